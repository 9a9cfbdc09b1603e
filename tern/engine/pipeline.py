"""Steps one after the other or, on a GPU, each begun before the one before it is read. Knows chunks; knows no sinks.

    one by one      host   |schedule|pack| . . . . . |sample|deliver|schedule|pack| . . . .
                    GPU                  |  step n   |                            | step n+1
    a step ahead    host   |pack n+1|  read n, deliver n  |pack n+2|  read n+1, deliver n+1
                    GPU    |  step n     |  step n+1              |  step n+2

Step n+1 takes its tokens from step n where they lie, on the device. Penalties and whatever else hangs on a sequence's
tokens are known then up to step n-1, which is all that choosing those of step n takes. It is composed while nothing
else could come next (`Scheduler.follow`), no drafts pay, and nobody must read a token first (`_is_read_late`). What
step n then turns out to mean is obeyed when step n+1 is read: of a sequence that ended, nothing of it counts; where a
sink forced other tokens, what was sampled after the one before them is dropped, and what was computed is right.

A step that carries drafts is read first: where the next one's rows stand and what they carry follows from which drafts
were right, and new drafts from the text behind those.

A block of a sequence that has ended may be given away while step n+1 writes into it. That is sound: whoever gets it
writes in a later step, and the device runs steps in order; and no cached block is written, since only computed
positions are ever found again.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from collections.abc import Sequence as Ordered
from dataclasses import replace

from tern.engine.runner import BegunStep, Runner, StepResult
from tern.engine.scheduler import Chunk, Scheduler
from tern.engine.sequence import Sequence, SequenceStatus

logger = logging.getLogger(__name__)


class Pipeline:
    """Composes and computes steps; with `ahead`, begins the next one before it waits for a step where that is sound.

    `follows`: whether the predictor reads a sequence's steps, which then cannot be begun ahead.
    """

    def __init__(
        self, scheduler: Scheduler, runner: Runner, follows: Callable[[Sequence], bool], *, ahead: bool
    ) -> None:
        self.scheduler = scheduler
        self.runner = runner
        self.steps_ahead = 0  # how many steps were begun before the one before them was read
        self._follows = follows
        self._ahead = ahead
        self._composed: Ordered[Chunk] = ()
        self._begun: BegunStep | None = None  # the composed chunks, if the step is in flight
        self._read_at = 0.0

    def compose(self) -> Ordered[Chunk]:
        """The chunks of the next step: those in flight that still count, or what the scheduler says."""
        if self._begun is not None and not any(map(_counts, self._begun.chunks)):
            self._begun = None
        self._composed = self._begun.chunks if self._begun is not None else self.scheduler.schedule()
        return self._composed

    def run(self, chunks: Ordered[Chunk]) -> StepResult:
        """Compute chunks and wait for what they give. Raises what that raises; nothing is in flight then."""
        if chunks is not self._composed or not self._ahead:  # some of a step that failed, each alone
            return self.runner.run(chunks, self._follows)
        begun, was_ahead = self._begun, self._begun is not None
        self._begun = None
        begun = begun or self.runner.begin(chunks)
        following = self._begin_next(begun, fresh=not was_ahead)
        result = self.runner.finish(begun, self._follows)
        self._begun = following
        now = time.perf_counter()
        if was_ahead:  # until the step before was read, the device had that to do
            result = replace(result, seconds=now - max(begun.started, self._read_at))
        self._read_at = now
        return result

    def _begin_next(self, begun: BegunStep, *, fresh: bool) -> BegunStep | None:
        """Begin the step after `begun`, or None. `fresh`: the scheduler asked for drafts when it composed `begun`."""
        live = [chunk.sequence for chunk in begun.chunks if _counts(chunk)]
        if not all(_is_read_late(sequence) and not self._follows(sequence) for sequence in live):
            return None
        if not fresh and self._drafts_pay(live):
            return None
        chunks = self.scheduler.follow(begun.chunks)
        if not chunks:
            return None
        try:
            following = self.runner.begin(chunks, after=begun)
        except Exception:  # it is composed anew, and fails there if it must
            logger.exception("A step of %d sequences could not be begun ahead", len(chunks))
            return None
        self.steps_ahead += 1
        return following

    def _drafts_pay(self, sequences: list[Sequence]) -> bool:
        """Whether what is known of the sequences promises drafts that a step should wait for."""
        drafter = self.scheduler.drafter
        room = self.scheduler.max_num_batched_tokens - len(sequences)
        return drafter is not None and bool(sequences) and any(drafter.draft(sequences, room))


def _is_read_late(sequence: Sequence) -> bool:
    """Whether the host needs nothing of the sequence's next token before the step that follows is begun.

    A grammar has to hear of a token before it says what may follow, and log-probabilities are computed when a choice is
    read, behind whatever was enqueued before.
    """
    return sequence.sampling.grammar is None and sequence.sampling.params.logprobs is None


def _counts(chunk: Chunk) -> bool:
    return chunk.sequence.status is not SequenceStatus.FINISHED
