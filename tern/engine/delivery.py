"""What a step gave, to the sinks; and the end of every request. Knows sequences and sinks; knows no tensors.

A sink may do anything when it hears of a token: force others, end its request or another's, or fail. What that means
for the rest of what the step gave is decided here.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Sequence as Ordered
from contextlib import suppress

from tern.engine.admission import Admission
from tern.engine.request import Finish, FinishReason, GeneratedToken, Steering
from tern.engine.request_checks import check_ids
from tern.engine.runner import StepResult
from tern.engine.sampler import GRAMMAR_FAILED
from tern.engine.scheduler import Chunk, Scheduler
from tern.engine.sequence import Sequence, SequenceStatus

logger = logging.getLogger(__name__)

SINK_FAILED = "The request ended because its tokens could not be delivered."


class Delivery:
    """Hands tokens and scores on and ends requests, which it takes out of `sequences` and of the scheduler's queues.

    `generated_tokens`, `finished` and `grammar_seconds`, which the grammars took to hear of tokens, are sums so far.
    """

    def __init__(
        self, sequences: dict[str, Sequence], scheduler: Scheduler, admission: Admission, vocab_size: int
    ) -> None:
        self.generated_tokens = 0
        self.grammar_seconds = 0.0
        self.finished = dict.fromkeys(FinishReason, 0)
        self._sequences = sequences
        self._scheduler = scheduler
        self._admission = admission
        self._vocab_size = vocab_size

    def deliver(self, chunks: Ordered[Chunk], result: StepResult) -> None:
        """Hand on what computed chunks gave, which the scheduler has noted as computed."""
        self._deliver_scores(chunks, result)
        self._deliver_tokens(chunks, result)

    def finish(
        self,
        sequence: Sequence,
        reason: FinishReason,
        *,
        stop_token_id: int | None = None,
        message: str | None = None,
    ) -> None:
        """End a request wherever it stands, unless it has ended."""
        if sequence.status is SequenceStatus.FINISHED:  # its sink cancelled it just now
            return
        self._scheduler.remove(sequence)
        self._end(sequence, reason, stop_token_id=stop_token_id, message=message)

    def end_all(self, reason: FinishReason, message: str | None = None) -> None:
        """Finish every request, because the engine stops: even if its books are wrong, each gets its ending."""
        while self._sequences:
            sequence = next(iter(self._sequences.values()))
            try:
                self._scheduler.remove(sequence)
            except Exception:
                logger.exception("Request %r could not be taken from the queues", sequence.request_id)
                sequence.status = SequenceStatus.FINISHED
                with suppress(Exception):  # the pool may be what is broken
                    self._scheduler.pool.release(sequence)
            self._end(sequence, reason, message=message)

    def _deliver_scores(self, chunks: Ordered[Chunk], result: StepResult) -> None:
        """Hand the scores of prompt tokens on, and end the sequences that wanted nothing else."""
        for place, scores in result.scores.items():
            sequence = chunks[place].sequence
            if sequence.status is SequenceStatus.FINISHED:  # another's sink cancelled it just now
                continue
            if isinstance(scores, str):
                self._scheduler.pool.forget(sequence)  # what could not be read from must not be found again
                self.finish(sequence, FinishReason.ERROR, message=scores)
                continue
            sequence.num_scored_tokens += len(scores)
            try:
                if sequence.request.prompt_sink is not None:
                    sequence.request.prompt_sink(scores)
            except Exception:
                logger.exception("The prompt sink of request %r failed", sequence.request_id)
                self.finish(sequence, FinishReason.ERROR, message=SINK_FAILED)
        for chunk in chunks:
            if not chunk.samples and chunk.sequence.num_uncomputed_tokens == 0:
                self.finish(chunk.sequence, FinishReason.LENGTH)

    def _deliver_tokens(self, chunks: Ordered[Chunk], result: StepResult) -> None:
        sampling = (chunk.sequence for chunk in chunks if chunk.samples)
        for sequence, sampled in zip(sampling, result.sampled, strict=True):
            for place, token in enumerate(sampled.tokens):
                if sequence.status is SequenceStatus.FINISHED or sequence.num_uncomputed_tokens > min(place, 1):
                    break  # its sink ended it or forced other tokens: what was computed beyond does not follow
                if place > 0:
                    self._scheduler.accept(sequence)
                if isinstance(token, str):
                    self._scheduler.pool.forget(sequence)  # what could not be read from must not be found again
                    self.finish(sequence, FinishReason.ERROR, message=token)
                else:
                    self._append(sequence, token)

    def _append(self, sequence: Sequence, token: GeneratedToken) -> None:
        """Append a sampled token, and what its sink forces after it, until one of them ends the sequence."""
        pending = deque([token])
        while pending and sequence.status is not SequenceStatus.FINISHED:  # a sink may cancel any request
            token = pending.popleft()
            sequence.token_ids.append(token.token_id)
            self.generated_tokens += 1
            if not self._obeys_grammar(sequence, token.token_id):
                return
            if sequence.first_token_at is None:
                sequence.first_token_at = time.monotonic()
            try:
                steering = sequence.request.sink.push(token)
                check_ids("Steering.force", steering.force, self._vocab_size)
            except Exception:
                logger.exception("The sink of request %r failed", sequence.request_id)
                self.finish(sequence, FinishReason.ERROR, message=SINK_FAILED)
                return
            self._end_if_due(sequence, token, steering)
            pending.extend(GeneratedToken(forced, forced=True) for forced in steering.force)

    def _obeys_grammar(self, sequence: Sequence, token_id: int) -> bool:
        """Tell the sequence's grammar of a token; False if that failed, and then the sequence has been ended."""
        if sequence.request.grammar is None:
            return True
        started = time.perf_counter()
        try:
            sequence.request.grammar.accept(token_id)
        except Exception:
            logger.exception("The grammar of request %r failed", sequence.request_id)
            self.finish(sequence, FinishReason.ERROR, message=GRAMMAR_FAILED)
            return False
        finally:
            self.grammar_seconds += time.perf_counter() - started
        return True

    def _end_if_due(self, sequence: Sequence, token: GeneratedToken, steering: Steering) -> None:
        if token.token_id in sequence.stop_ids and not token.forced:
            self.finish(sequence, FinishReason.STOP, stop_token_id=token.token_id)
        elif steering.stop or (sequence.request.grammar is not None and sequence.request.grammar.ended):
            self.finish(sequence, FinishReason.STOP)
        elif len(sequence.token_ids) >= sequence.max_length:
            self.finish(sequence, FinishReason.LENGTH)

    def _end(
        self,
        sequence: Sequence,
        reason: FinishReason,
        *,
        stop_token_id: int | None = None,
        message: str | None = None,
    ) -> None:
        """Tell the sink of a sequence that stands in no queue any more."""
        del self._sequences[sequence.request_id]
        self.finished[reason] += 1
        self._admission.ended()
        finish = Finish(
            reason=reason,
            num_prompt_tokens=sequence.num_prompt_tokens,
            num_generated_tokens=sequence.num_generated_tokens,
            num_cached_tokens=sequence.num_cached_tokens or 0,
            stop_token_id=stop_token_id,
            message=message,
            milestones=sequence.milestones(),
        )
        try:
            sequence.request.sink.finish(finish)
        except Exception:
            logger.exception("The sink of request %r failed at its end", sequence.request_id)
