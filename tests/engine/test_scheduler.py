"""The scheduler with no model at all: a step is what it says, a sampled token is any number."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from engine_fakes import MemoryStore, make_request
from hypothesis import given, settings
from hypothesis import strategies as st

from tern.engine.block_pool import BlockPool, IntegrityError
from tern.engine.sampling_state import SamplingState
from tern.engine.scheduler import Chunk, Scheduler
from tern.engine.sequence import Sequence, SequenceStatus


def make_scheduler(blocks: int = 32, *, block_size: int = 4, seqs: int = 4, tokens: int = 16) -> Scheduler:
    return Scheduler(BlockPool(blocks, block_size), max_num_seqs=seqs, max_num_batched_tokens=tokens)


def queue(scheduler: Scheduler, name: str, prompt: list[int], **fields: Any) -> Sequence:
    request = make_request(name, prompt, **fields)
    made = Sequence(request, max_length=99, stop_ids=frozenset(), sampling=SamplingState(request, frozenset()))
    scheduler.add(made)
    return made


def distinct(start: int, count: int) -> list[int]:
    return list(range(start * 1000, start * 1000 + count))


def step(scheduler: Scheduler, token: int = 7) -> list[Chunk]:
    """One step of a model that always answers `token`."""
    chunks = scheduler.schedule()
    assert sum(chunk.num_tokens for chunk in chunks) <= scheduler.max_num_batched_tokens
    assert len(scheduler.running) <= scheduler.max_num_seqs
    scheduler.commit(chunks)
    for chunk in chunks:
        assert chunk.samples == (chunk.sequence.num_uncomputed_tokens == 0)
        if chunk.samples:
            chunk.sequence.token_ids.append(token)
    scheduler.check_integrity()
    return chunks


def shape(chunks: list[Chunk]) -> list[tuple[str, int, bool]]:
    return [(chunk.sequence.request_id, chunk.num_tokens, chunk.samples) for chunk in chunks]


def test_the_scheduler_imports_no_torch() -> None:
    code = (
        "import sys, tern.engine.scheduler, tern.engine.block_pool, tern.engine.sequence, tern.engine.options\n"
        "from tern.engine import Request, SamplingParams, EngineOptions\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_long_prompt_is_read_in_chunks_beside_decodes() -> None:
    scheduler = make_scheduler()
    queue(scheduler, "short", distinct(1, 3))
    assert shape(step(scheduler)) == [("short", 3, True)]
    queue(scheduler, "long", distinct(2, 40))
    assert shape(step(scheduler)) == [("short", 1, True), ("long", 15, False)]
    assert shape(step(scheduler)) == [("short", 1, True), ("long", 15, False)]
    assert shape(step(scheduler)) == [("short", 1, True), ("long", 10, True)]
    assert shape(step(scheduler)) == [("short", 1, True), ("long", 1, True)]


def test_a_prefill_that_came_first_does_not_starve_decodes() -> None:
    scheduler = make_scheduler(tokens=4, seqs=4)
    queue(scheduler, "long", distinct(1, 3))
    queue(scheduler, "short", distinct(2, 1))
    step(scheduler)
    scheduler.running[0].token_ids.extend(distinct(3, 60))  # as long as a prompt, and first in order
    for left in (61, 58, 55):
        assert scheduler.running[0].num_uncomputed_tokens == left
        assert shape(step(scheduler)) == [("short", 1, True), ("long", 3, False)]


def test_forced_tokens_go_together_and_before_long_prompts() -> None:
    scheduler = make_scheduler()
    chat = queue(scheduler, "chat", distinct(1, 3))
    step(scheduler)
    queue(scheduler, "long", distinct(2, 60))
    step(scheduler)
    chat.token_ids.extend([1, 2, 3])
    assert shape(step(scheduler)) == [("chat", 4, True), ("long", 12, False)]


def test_waiting_goes_by_priority_then_arrival() -> None:
    scheduler = make_scheduler(seqs=1, tokens=8)
    for name, priority in [("a", 0), ("b", 1), ("c", -1), ("d", 0)]:
        queue(scheduler, name, distinct(ord(name), 2), priority=priority)
    order = []
    while scheduler.waiting or scheduler.running:
        chunks = step(scheduler)
        order.append(chunks[0].sequence.request_id)
        scheduler.remove(chunks[0].sequence)
    assert order == ["c", "a", "d", "b"]


def test_places_and_budget_bound_a_step() -> None:
    scheduler = make_scheduler(seqs=2, tokens=5)
    for name in "abc":
        queue(scheduler, name, distinct(ord(name), 3))
    assert shape(step(scheduler)) == [("a", 3, True), ("b", 2, False)]
    assert shape(step(scheduler)) == [("a", 1, True), ("b", 1, True)]
    assert [s.request_id for s in scheduler.waiting] == ["c"]


def test_when_blocks_run_out_the_last_in_order_is_preempted_and_comes_back_first() -> None:
    scheduler = make_scheduler(blocks=6, tokens=32)
    first = queue(scheduler, "first", distinct(1, 8))
    second = queue(scheduler, "second", distinct(2, 7))
    later = queue(scheduler, "later", distinct(3, 12))
    assert len(step(scheduler)) == 2  # `later` does not fit
    seen = set()
    for _ in range(30):
        for chunk in step(scheduler):
            seen.add(chunk.sequence.request_id)
        if second.status is SequenceStatus.WAITING:
            break
    assert scheduler.num_preemptions == 1
    assert scheduler.waiting == [second, later]
    assert seen == {"first", "second"}
    tokens = list(second.token_ids)
    scheduler.remove(first)
    chunks = step(scheduler)
    assert chunks[0].sequence is second
    assert list(second.token_ids)[: len(tokens)] == tokens
    assert second.num_cached_tokens == 0, "its own blocks are no hit of its prompt"


def test_the_last_in_order_holds_its_blocks_when_it_is_short_itself() -> None:
    scheduler = make_scheduler(blocks=4, tokens=32)
    first = queue(scheduler, "first", distinct(1, 5))
    second = queue(scheduler, "second", distinct(2, 4))
    step(scheduler)
    second.token_ids.extend(distinct(4, 4))  # forced: needs two blocks more, none but one is free
    assert [chunk.sequence for chunk in step(scheduler)] == [first]
    assert second.status is SequenceStatus.RUNNING
    assert scheduler.num_preemptions == 0


def test_a_worse_priority_is_preempted_before_a_later_arrival() -> None:
    scheduler = make_scheduler(blocks=4, tokens=32)
    background = queue(scheduler, "background", distinct(1, 4), priority=5)
    urgent = queue(scheduler, "urgent", distinct(2, 4), priority=0)
    for _ in range(12):
        step(scheduler)
    assert background.status is SequenceStatus.WAITING
    assert urgent.status is SequenceStatus.RUNNING


def test_siblings_wait_for_the_prompt_that_one_of_them_computes() -> None:
    scheduler = make_scheduler(tokens=16)
    prompt = distinct(1, 30)
    siblings = [queue(scheduler, f"choice {n}", prompt) for n in range(3)]
    other = queue(scheduler, "other", distinct(2, 3))
    assert shape(step(scheduler)) == [("choice 0", 13, False), ("other", 3, True)]
    assert other.status is SequenceStatus.RUNNING, "others go past the waiting siblings"
    assert shape(step(scheduler)) == [("other", 1, True), ("choice 0", 15, False)]
    assert shape(step(scheduler)) == [
        ("other", 1, True),
        ("choice 0", 2, True),
        ("choice 1", 2, True),
        ("choice 2", 2, True),
    ]
    assert [s.num_cached_tokens for s in siblings] == [0, 28, 28]
    assert scheduler.prefix_hit_tokens == 56
    assert scheduler.prompt_tokens == 93


def test_a_short_prompt_passes_a_long_one_which_keeps_half() -> None:
    scheduler = make_scheduler(tokens=16, blocks=64)
    queue(scheduler, "long", distinct(1, 60))
    assert shape(step(scheduler)) == [("long", 16, False)]
    for name, count in (("longer", 70), ("middle", 20), ("short", 6)):
        queue(scheduler, name, distinct(count, count))
    assert shape(step(scheduler)) == [("long", 8, False), ("short", 6, True), ("middle", 2, False)]
    assert shape(step(scheduler)) == [("short", 1, True), ("long", 8, False), ("middle", 7, False)]
    assert [s.request_id for s in scheduler.waiting] == ["longer"], "what is not shorter does not share"


def test_prompts_of_one_length_are_read_one_after_the_other() -> None:
    scheduler = make_scheduler(tokens=16)
    for name in "abc":
        queue(scheduler, name, distinct(ord(name), 24))
    assert shape(step(scheduler)) == [("a", 16, False)]
    assert shape(step(scheduler)) == [("a", 8, True), ("b", 8, False)]
    assert shape(step(scheduler)) == [("a", 1, True), ("b", 15, False)]


def test_a_better_priority_is_read_before_any_share_is_dealt() -> None:
    scheduler = make_scheduler(tokens=16, blocks=64)
    queue(scheduler, "background", distinct(1, 60), priority=5)
    queue(scheduler, "short", distinct(2, 3), priority=5)
    step(scheduler)
    urgent = queue(scheduler, "urgent", distinct(3, 40), priority=0)
    for _ in range(2):
        assert [chunk.sequence.request_id for chunk in step(scheduler)] == ["short", "urgent"]
    assert ("urgent", 10, True) in shape(step(scheduler))
    assert urgent.num_uncomputed_tokens == 1


def test_nobody_passes_the_first_when_blocks_or_places_are_short() -> None:
    for blocks, seqs in ((6, 4), (64, 2)):
        scheduler = make_scheduler(blocks=blocks, seqs=seqs, tokens=32)
        holders = [queue(scheduler, f"holder {number}", distinct(number, 4)) for number in (1, 2)]
        step(scheduler)
        long, short = queue(scheduler, "long", distinct(3, 16)), queue(scheduler, "short", distinct(4, 2))
        step(scheduler)
        assert scheduler.waiting == [long, short]
        scheduler.remove(holders[0])
        if seqs == 4:
            scheduler.remove(holders[1])
        assert long.request_id in [chunk.sequence.request_id for chunk in step(scheduler)]


class Bounds:
    """Allows so many prompt tokens beside decodes, and any number alone."""

    def __init__(self, beside: int) -> None:
        self.beside = beside

    def tokens(self, decodes: int) -> int:
        return self.beside if decodes else 1000


def test_a_step_with_decodes_reads_no_more_than_it_has_time_for() -> None:
    scheduler = make_scheduler(tokens=16)
    scheduler.prompt_bounds = Bounds(3)
    queue(scheduler, "long", distinct(1, 40))
    assert shape(step(scheduler)) == [("long", 16, False)], "nobody waits for this step"
    queue(scheduler, "short", distinct(2, 1))
    assert shape(step(scheduler)) == [("long", 15, False), ("short", 1, True)]
    assert shape(step(scheduler)) == [("short", 1, True), ("long", 3, False)]


def test_tokens_that_wait_are_counted_until_they_start() -> None:
    scheduler = make_scheduler(seqs=2, tokens=16, blocks=8)
    first, second, third = (queue(scheduler, name, distinct(ord(name), 9)) for name in "abc")
    queue(scheduler, "choice", distinct(9, 9), choice_index=1)
    assert scheduler.waiting_tokens == 27
    step(scheduler)
    assert scheduler.waiting_tokens == 9
    scheduler.remove(third)
    assert scheduler.waiting_tokens == 0
    while second.status is SequenceStatus.RUNNING:
        step(scheduler)
    assert scheduler.waiting_tokens == 0, "it had started"
    scheduler.remove(second)
    scheduler.remove(first)
    assert scheduler.waiting_tokens == 0


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    long=st.integers(20, 90),
    rivals=st.lists(st.lists(st.integers(1, 40), max_size=3), min_size=1, max_size=8),
    answers=st.integers(1, 4),
    seqs=st.integers(2, 4),
    room=st.integers(2, 16),
)
def test_nobody_starves_however_many_come_after(
    long: int, rivals: list[list[int]], answers: int, seqs: int, room: int
) -> None:
    """A prompt that arrived first is read at half of the speed or more while shorter ones never cease to come."""
    scheduler = make_scheduler(blocks=200, seqs=seqs, tokens=16 + seqs)
    scheduler.prompt_bounds = Bounds(room)
    last = queue(scheduler, "long", distinct(1, long))
    came = 0
    for steps in range(400):
        for length in rivals[steps % len(rivals)]:
            came += 1
            if len(scheduler.waiting) < 30:
                queue(scheduler, f"rival {came}", distinct(100 + came, length))
        for chunk in step(scheduler):
            if chunk.sequence.num_generated_tokens >= answers and chunk.sequence is not last:
                scheduler.remove(chunk.sequence)
        if last.num_generated_tokens:
            break
    assert steps <= long / (room - room // 2) + 1
    assert last.num_generated_tokens == 1


@settings(max_examples=100, deadline=None, derandomize=True)
@given(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=30), answers=st.integers(1, 6), seqs=st.integers(1, 4))
def test_whoever_waits_is_served_in_the_end(lengths: list[int], answers: int, seqs: int) -> None:
    """Shorter ones come in for ever; the first queue is done by the time that it could take alone, and a little."""
    scheduler = make_scheduler(blocks=100, seqs=seqs, tokens=16)
    queued = [queue(scheduler, f"{at}", distinct(at + 1, length)) for at, length in enumerate(lengths)]
    work = sum(-(-length // 8) + answers for length in lengths)
    for came in range(2 * work + 4 * answers * seqs):
        if len(scheduler.waiting) < 60:
            queue(scheduler, f"short {came}", distinct(100 + came, 1 + came % 3))
        for chunk in step(scheduler):
            if chunk.sequence.num_generated_tokens >= answers:
                scheduler.remove(chunk.sequence)
    assert [sequence.status for sequence in queued] == [SequenceStatus.FINISHED] * len(queued)


def test_a_sibling_goes_on_alone_when_its_runner_is_gone() -> None:
    scheduler = make_scheduler(tokens=16)
    first, second = (queue(scheduler, name, distinct(1, 40)) for name in ("first", "second"))
    step(scheduler)
    scheduler.remove(first)
    assert shape(step(scheduler)) == [("second", 16, False)]
    assert second.num_cached_tokens == 16


@pytest.mark.parametrize("status", ["waiting", "running", "part read", "preempted"])
def test_a_sequence_can_be_removed_wherever_it_stands(status: str) -> None:
    scheduler = make_scheduler(blocks=8, tokens=8)
    keeper = queue(scheduler, "keeper", distinct(1, 4), priority=-1)
    if status != "waiting":
        step(scheduler)
    target = queue(scheduler, "target", distinct(2, 12))
    for _ in range({"waiting": 0, "running": 4, "part read": 1, "preempted": 22}[status]):
        step(scheduler)
    expected = {"running": SequenceStatus.RUNNING, "part read": SequenceStatus.RUNNING}
    assert target.status is expected.get(status, SequenceStatus.WAITING)
    assert (scheduler.num_preemptions > 0) == (status == "preempted")
    scheduler.remove(target)
    scheduler.check_integrity()
    scheduler.remove(keeper)
    scheduler.check_integrity()
    assert scheduler.pool.num_free_blocks == 8
    assert scheduler.schedule() == []


def test_the_integrity_check_sees_a_misplaced_sequence() -> None:
    scheduler = make_scheduler()
    moved = queue(scheduler, "moved", distinct(1, 4))
    scheduler.running.append(scheduler.waiting.pop())
    with pytest.raises(IntegrityError, match="RUNNING"):
        scheduler.check_integrity()
    moved.status = SequenceStatus.RUNNING
    moved.num_computed_tokens = 3
    with pytest.raises(IntegrityError):
        scheduler.check_integrity()


def test_a_sequence_starts_behind_what_the_store_has() -> None:
    store = MemoryStore()
    for name in ("before", "after"):
        scheduler = make_scheduler(tokens=64)
        scheduler.pool.store = store
        doc = queue(scheduler, name, distinct(1, 41))
        chunks = step(scheduler)
        if name == "before":
            assert shape(chunks) == [(name, 41, True)]
            assert (doc.num_cached_tokens, scheduler.restored_hit_tokens) == (0, 0)
        else:
            assert shape(chunks) == [(name, 1, True)]
            assert (doc.num_cached_tokens, scheduler.prefix_hit_tokens, scheduler.restored_hit_tokens) == (40, 40, 40)
    twin = queue(scheduler, "twin", distinct(1, 41))
    assert shape(step(scheduler)) == [("after", 1, True), ("twin", 1, True)]
    assert twin.num_cached_tokens == 40
    assert scheduler.restored_hit_tokens == 40, "memory has them now"


def test_blocks_of_a_preempted_sequence_that_come_back_from_the_store_are_no_hit() -> None:
    scheduler = make_scheduler(blocks=6, tokens=32)
    scheduler.pool.store = MemoryStore()
    first, second = queue(scheduler, "first", distinct(1, 8)), queue(scheduler, "second", distinct(2, 9))
    step(scheduler)
    while second.status is SequenceStatus.RUNNING:
        step(scheduler)
    scheduler.remove(first)
    for number in (3, 4):  # take what it left in memory
        scheduler.remove(queue_and_run(scheduler, distinct(number, 20), before=second))
    assert scheduler.pool.find_prefix(second) == []
    [chunk] = step(scheduler)
    assert chunk.sequence is second
    assert chunk.num_tokens < 9, "the store had its blocks"
    assert (second.num_cached_tokens, scheduler.restored_hit_tokens) == (0, 0)


def queue_and_run(scheduler: Scheduler, prompt: list[int], *, before: Sequence) -> Sequence:
    """Compute a prompt that goes before a waiting sequence and leaves no room for it."""
    urgent = queue(scheduler, f"before {before.request_id}", prompt, priority=-1)
    [chunk] = step(scheduler)
    assert chunk.sequence is urgent
    return urgent


class Fixed:
    """A source that drafts the same for everyone."""

    def __init__(self, *drafts: int) -> None:
        self.drafts = drafts

    def draft(self, sequences: list[Sequence], room: int) -> list[tuple[int, ...]]:
        return [self.drafts[: room // len(sequences)] for _ in sequences]


def test_blocks_of_drafts_are_given_back_before_the_next_step() -> None:
    scheduler = make_scheduler(8)
    scheduler.drafter = Fixed(*range(9))
    sequence = queue(scheduler, "only", distinct(1, 3))
    step(scheduler)
    chunks = step(scheduler)
    assert chunks[0].drafts == tuple(range(9))
    assert len(sequence.block_table) == 4  # 4 tokens and 9 drafts
    scheduler.drafter = None
    step(scheduler)
    assert len(sequence.block_table) == 2
    assert scheduler.pool.num_free_blocks == 6


def test_drafts_leave_every_running_sequence_a_block() -> None:
    for blocks, fit in ((4, (3, 0)), (5, (3, 0)), (6, (7, 0)), (7, (9, 0)), (8, (9, 4))):
        scheduler = make_scheduler(blocks, tokens=32)
        for name in "ab":
            queue(scheduler, name, distinct(ord(name), 3))
        scheduler.schedule()
        for sequence in scheduler.running:
            sequence.num_computed_tokens = 3
            sequence.token_ids.append(7)
        scheduler.running[0].token_ids.append(7)
        scheduler.running[0].num_computed_tokens = 4
        scheduler.drafter = Fixed(*range(9))
        assert [len(chunk.drafts) for chunk in scheduler.schedule()] == list(fit), blocks
        assert scheduler.pool.num_free_blocks >= min(2, blocks - 3)
        scheduler.check_integrity()
