"""Which tokens the next step computes. Knows sequences, blocks and the token budget; knows no tensors and no sampling.

Two lists in order of service (priority, then arrival): `running` sequences own blocks for all their tokens, `waiting`
ones own nothing. A step is composed in three moves:

    1. every running sequence gets the blocks for its new tokens; when none is free, the last in order is preempted
    2. every decode gets its token, so that no prompt stalls them
    3. what is left of the budget, and not more than `PromptBounds` allows beside the decodes, is dealt to prompts,
       priority by priority, those that run and those that wait alike: half to the first in order, half to those that
       are shorter, the shortest first; what these leave, to the rest in order. A waiting sequence that gets some starts
       from the cached blocks its prompt begins with, found in memory and behind them in the pool's store

So a short prompt passes a long one, which still is read at half the speed at least, and whoever waits comes to be the
first in order one day (`docs/decisions/0017`). Where places or blocks are short, the first in order gets them: nobody
passes it then.

A step of decodes alone may carry drafts (`tern.engine.drafts`) in a fourth move, within the budget and in blocks that
nobody else is about to need. Where nothing else can come next, a step of decodes may be composed before the one before
it has given its tokens (`follow`). A preempted sequence keeps its tokens, loses its blocks and is computed again later;
its output does not change.
The first in order can take the blocks of all others and a full-length sequence fits the pool, so work always goes on.
"""

from __future__ import annotations

import time
from bisect import insort
from collections.abc import Sequence as Ordered
from dataclasses import dataclass, replace
from itertools import groupby
from operator import attrgetter
from typing import Protocol

from tern.engine.block_pool import BlockPool, IntegrityError
from tern.engine.sequence import Sequence, SequenceStatus

_ORDER = attrgetter("order")
_PRIORITY = attrgetter("request.priority")


@dataclass(frozen=True)
class Chunk:
    """`num_tokens` uncomputed tokens of a sequence, to be computed in one step.

    `samples`: they are the last uncomputed ones, so the step gives the sequence its next token, if it is to have one.
    `drafts` may follow them; they are computed too, and those that turn out right are tokens that the same step gives.
    """

    sequence: Sequence
    num_tokens: int
    samples: bool
    drafts: tuple[int, ...] = ()

    @property
    def is_decode(self) -> bool:
        """Whether the only token is the sequence's newest."""
        return self.samples and self.num_tokens == 1

    @property
    def scoring_positions(self) -> range:
        """Positions of the chunk whose logits score the prompt token behind them, mostly none."""
        sequence = self.sequence
        end = min(sequence.num_computed_tokens + self.num_tokens, sequence.num_prompt_tokens - 1)
        return range(sequence.num_scored_tokens - 1, end)


class DraftSource(Protocol):
    """Who knows tokens that may come next."""

    def draft(self, sequences: Ordered[Sequence], room: int) -> list[tuple[int, ...]]:
        """Drafts for each of the decoding `sequences`, at most `room` in all and `num_draftable_tokens` each."""
        ...


class PromptBounds(Protocol):
    """Who knows how many tokens of prompts a step has time for."""

    def tokens(self, decodes: int) -> int:
        """Prompt tokens that the next step may compute beside so many decodes, at least one."""
        ...


class Scheduler:
    """Composes steps of at most `max_num_seqs` sequences and `max_num_batched_tokens` tokens.

    `waiting_tokens` are those of the prompts in the queue that were never started.
    """

    def __init__(
        self,
        pool: BlockPool,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        drafter: DraftSource | None = None,
        prompt_bounds: PromptBounds | None = None,
    ) -> None:
        self.pool = pool
        self.drafter = drafter
        self.prompt_bounds = prompt_bounds
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.waiting_tokens = 0
        self.num_preemptions = 0
        self.prompt_tokens = 0
        self.prefix_hit_tokens = 0
        self.restored_hit_tokens = 0
        self._arrivals = 0
        self._admits = True  # whether the step that is being composed may still start sequences

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence behind those of its priority."""
        self._arrivals += 1
        sequence.arrival = self._arrivals
        self.waiting_tokens += sequence.num_queue_tokens
        self._wait(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence, wherever it stands, and free its blocks."""
        queue = self.running if sequence.status is SequenceStatus.RUNNING else self.waiting
        queue.remove(sequence)
        self._count_started(sequence)
        self.pool.release(sequence)
        sequence.status = SequenceStatus.FINISHED

    def schedule(self) -> list[Chunk]:
        """Compose the next step; an empty list means that there is nothing to do."""
        for sequence in self.running:
            self.pool.trim(sequence)
        ready, preempted = self._reserve_running()
        self._admits = not preempted  # blocks just taken from one sequence are for those that run
        chunks = [_chunk(sequence, 1) for sequence in ready if sequence.num_uncomputed_tokens == 1]
        chunks += self._read([sequence for sequence in ready if sequence.num_uncomputed_tokens > 1], len(chunks))
        return self._with_drafts(chunks) if all(chunk.is_decode for chunk in chunks) else chunks

    def follow(self, chunks: Ordered[Chunk]) -> list[Chunk]:
        """The step after `chunks`, composed before it is known what they give; empty if it has to wait for that.

        It can be if all that runs decodes in `chunks`, nobody could be started, and a block is free for each that needs
        one. Each sequence goes on by one token, those apart that are then at their end. `drafter` is not asked.
        """
        live = [chunk.sequence for chunk in chunks if chunk.sequence.status is SequenceStatus.RUNNING]
        decodes = all(chunk.is_decode and not chunk.drafts for chunk in chunks)
        if not decodes or len(live) != len(self.running) or any(s.num_uncomputed_tokens != 1 for s in live):
            return []
        lasting = [sequence for sequence in live if len(sequence.token_ids) + 1 < sequence.max_length]
        if self.waiting and len(lasting) < self.max_num_seqs:
            return []
        if sum(self.pool.blocks_missing(sequence, 1) for sequence in lasting) > self.pool.num_free_blocks:
            return []
        for sequence in lasting:
            self.pool.reserve(sequence, 1)
        return [Chunk(sequence, 1, samples=True) for sequence in lasting]

    def commit(self, chunks: Ordered[Chunk]) -> None:
        """Note that the step's tokens are computed, and make their full blocks findable.

        Sequences that ended while it was computed own no blocks any more.
        """
        for chunk in chunks:
            sequence = chunk.sequence
            if sequence.status is SequenceStatus.FINISHED:
                continue
            first = sequence.num_computed_tokens
            sequence.num_computed_tokens += chunk.num_tokens
            self.pool.remember(sequence, first)

    def accept(self, sequence: Sequence) -> None:
        """Note that the sequence's newest token, which was drafted, is computed."""
        sequence.num_computed_tokens += 1
        self.pool.remember(sequence, sequence.num_computed_tokens - 1)

    def check_integrity(self) -> None:
        """Raise `IntegrityError` if a sequence or a block is lost, misplaced or owned twice."""
        self.pool.check_integrity(self.running)
        for queue, status in ((self.waiting, SequenceStatus.WAITING), (self.running, SequenceStatus.RUNNING)):
            if any(sequence.status is not status for sequence in queue):
                raise IntegrityError(f"the {status.name} queue holds a sequence of another status: {queue}")
            if queue != sorted(queue, key=_ORDER):
                raise IntegrityError(f"the {status.name} queue is out of order: {queue}")
        unread = [s for s in [*self.waiting, *self.running] if s.num_cached_tokens is None]
        if self.waiting_tokens != sum(sequence.num_queue_tokens for sequence in unread):
            raise IntegrityError(f"{self.waiting_tokens} tokens are said to wait, but the queue is {self.waiting}")
        for sequence in self.waiting:
            if sequence.block_table or sequence.num_computed_tokens:
                raise IntegrityError(f"{sequence} waits, yet owns blocks or computed tokens")
        for sequence in self.running:
            owned = len(sequence.block_table) * self.pool.block_size
            if not 0 <= sequence.num_computed_tokens <= min(owned, len(sequence.token_ids)):
                raise IntegrityError(f"{sequence} has more computed tokens than tokens or blocks")

    def _wait(self, sequence: Sequence) -> None:
        sequence.status = SequenceStatus.WAITING
        insort(self.waiting, sequence, key=_ORDER)

    def _reserve_running(self) -> tuple[list[Sequence], bool]:
        """Give running sequences blocks for their new tokens; return those that have them, and if any was preempted.

        The last in order, when it is itself short, keeps what it has and sits this step out.
        """
        ready: list[Sequence] = []
        preempted = False
        position = 0
        while position < len(self.running):
            sequence = self.running[position]
            missing = self.pool.blocks_missing(sequence)
            while missing > self.pool.num_free_blocks and position < len(self.running) - 1:
                self._preempt(self.running[-1])
                preempted = True
            if missing <= self.pool.num_free_blocks:
                self.pool.reserve(sequence)
                ready.append(sequence)
            position += 1
        return ready, preempted

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.pool.release(sequence)
        sequence.num_computed_tokens = 0
        self.num_preemptions += 1
        self._wait(sequence)

    def _read(self, prompts: list[Sequence], decodes: int) -> list[Chunk]:
        """Chunks of running and waiting prompts beside so many decodes."""
        room = self.max_num_batched_tokens - decodes
        if self.prompt_bounds is not None:
            room = min(room, self.prompt_bounds.tokens(decodes))
        waiting = self.waiting if self._admits and len(self.running) < self.max_num_seqs else []
        chunks: list[Chunk] = []
        for _, peers in groupby(sorted([*prompts, *waiting], key=_ORDER), key=_PRIORITY):
            if room <= 0:
                break
            dealt = self._deal(list(peers), room)
            room -= sum(chunk.num_tokens for chunk in dealt)
            chunks += dealt
        return chunks

    def _deal(self, peers: list[Sequence], room: int) -> list[Chunk]:
        """Deal up to `room` tokens to sequences of one priority, given in order.

        first             the shorter ones, shortest first    the others, in order
        |-- half or all --|------ the other half at most ------|-- what is left ------|
        """
        first = next(filter(self._enters, peers), None)
        if first is None:
            return []
        spare = room // 2 if first.num_uncomputed_tokens > room // 2 else room - first.num_uncomputed_tokens
        others = [peer for peer in peers if peer is not first]
        shorter = [peer for peer in others if peer.num_uncomputed_tokens < first.num_uncomputed_tokens]
        chunks = self._serve(sorted(shorter, key=lambda peer: (peer.num_uncomputed_tokens, peer.order)), spare)
        left = room - sum(chunk.num_tokens for chunk in chunks)
        chunks.insert(0, _chunk(first, left))
        served = {chunk.sequence for chunk in chunks}
        return chunks + self._serve([peer for peer in others if peer not in served], left - chunks[0].num_tokens)

    def _serve(self, sequences: list[Sequence], room: int) -> list[Chunk]:
        """Chunks of `sequences`, those of them that run or can be started, one after the other while `room` lasts."""
        chunks: list[Chunk] = []
        for sequence in sequences:
            if room == 0:
                break
            if self._enters(sequence):
                chunks.append(_chunk(sequence, room))
                room -= chunks[-1].num_tokens
        return chunks

    def _enters(self, sequence: Sequence) -> bool:
        """Whether the sequence runs; it is started if it waits and there is a place, and blocks.

        It must leave the running ones a free block apiece, or it would be preempted at once. One whose next block a
        running sequence is computing right now waits for that instead of computing it too; others may go before it.
        """
        if sequence.status is SequenceStatus.RUNNING:
            return True
        if not self._admits or len(self.running) == self.max_num_seqs:
            return False
        self.pool.extend_digests(sequence)
        if any(_computes_prefix(runner, sequence, self.pool.block_size) for runner in self.running):
            return False
        found = self.pool.find_prefix(sequence)
        missing = self.pool.blocks_for(len(sequence.token_ids)) - len(found)
        if missing + len(self.running) > self.pool.num_free_without(found):
            self._admits = False
            return False
        self._start(sequence, found)
        return True

    def _with_drafts(self, chunks: list[Chunk]) -> list[Chunk]:
        """Let decodes carry drafts, in blocks beyond the free one apiece that the running sequences grow into."""
        if self.drafter is None or not chunks:
            return chunks
        drafts = self.drafter.draft([chunk.sequence for chunk in chunks], self.max_num_batched_tokens - len(chunks))
        return [
            replace(chunk, drafts=self._reserve_drafts(chunk.sequence, d))
            for chunk, d in zip(chunks, drafts, strict=True)
        ]

    def _reserve_drafts(self, sequence: Sequence, drafts: tuple[int, ...]) -> tuple[int, ...]:
        """Give the sequence blocks for `drafts`; return those that have one."""
        spare = max(0, self.pool.num_free_blocks - len(self.running))
        owned = len(sequence.block_table) * self.pool.block_size - len(sequence.token_ids)
        drafts = drafts[: owned + spare * self.pool.block_size]
        self.pool.reserve(sequence, len(drafts))
        return drafts

    def _start(self, sequence: Sequence, found: list[int]) -> None:
        if sequence.started_at is None:
            sequence.started_at = time.monotonic()
        self.waiting.remove(sequence)
        sequence.status = SequenceStatus.RUNNING
        insort(self.running, sequence, key=_ORDER)
        self.pool.share(sequence, found)
        self.pool.reserve(sequence)
        restored = self.pool.restore(sequence, len(found))
        sequence.num_computed_tokens = (len(found) + restored) * self.pool.block_size
        self._count_started(sequence)
        if sequence.num_cached_tokens is None:  # a preempted sequence finding its own blocks again is no hit
            sequence.num_cached_tokens = sequence.num_computed_tokens
            self.prompt_tokens += sequence.num_prompt_tokens
            self.prefix_hit_tokens += sequence.num_cached_tokens
            self.restored_hit_tokens += restored * self.pool.block_size

    def _count_started(self, sequence: Sequence) -> None:
        """Note that the sequence waits no more; one that comes back after a preemption did not wait again."""
        if sequence.num_cached_tokens is None:
            self.waiting_tokens -= sequence.num_queue_tokens


def _chunk(sequence: Sequence, budget: int) -> Chunk:
    left = sequence.num_uncomputed_tokens
    return Chunk(sequence, min(left, budget), samples=left <= budget and len(sequence.token_ids) < sequence.max_length)


def _computes_prefix(runner: Sequence, sequence: Sequence, block_size: int) -> bool:
    """Whether the full block that `runner` computes next is also the next one that `sequence` could reuse.

    Digests are chained: equal digests mean equal content up to and including that block.
    """
    index = runner.num_computed_tokens // block_size
    reusable = min(len(sequence.digests), sequence.num_reusable_tokens // block_size)
    return index < min(reusable, len(runner.digests)) and runner.digests[index] == sequence.digests[index]
