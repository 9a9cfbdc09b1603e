"""What is drafted and how much of it, from times and acceptances that the test dictates."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from engine_fakes import FixedTimes, make_request

from tern.engine import EngineOptions
from tern.engine.drafts import NGRAM_DRAFTS, PAUSE_STEPS, Acceptance, Drafter, Method
from tern.engine.sampling_state import SamplingState
from tern.engine.scheduler import Chunk
from tern.engine.sequence import Sequence
from tern.engine.step_times import FEWEST_SAMPLES, StepTimes


def make_sequence(prompt: list[int], **fields: Any) -> Sequence:
    request = make_request("r", prompt, **{"max_tokens": None, **fields})
    return Sequence(request, max_length=500, stop_ids=frozenset(), sampling=SamplingState(request, frozenset()))


def make_drafter(seconds: Callable[[int], float] = lambda _: 1.0, **options: Any) -> Drafter:
    """A drafter for a machine on which a step of one sequence takes `seconds(rows)`."""
    drafter = Drafter(EngineOptions(**options), predicts=options.get("speculation") in ("mtp", "auto"))
    drafter.times = FixedTimes(seconds)  # type: ignore[assignment]
    return drafter


@dataclass
class Given:
    """A step's outcome for one sequence."""

    tokens: list[int]
    predicted: tuple[int, ...] = ()
    accepted: int = field(default=0)


def decode(drafter: Drafter, sequence: Sequence, token: int, predicted: tuple[int, ...] = (), cost: float = 0.0) -> int:
    """A step of one sequence that gives it `token`; returns how many drafts it carried."""
    (drafts,) = drafter.draft([sequence], 30)
    drafter.learn([Chunk(sequence, 1, True, drafts)], [Given([token], predicted)], 1.0, cost)
    sequence.token_ids.append(token)
    return len(drafts)


def test_acceptance_follows_what_was_seen_lately() -> None:
    acceptance, chances = Acceptance(), []
    for right in [True] * 20 + [False] * 20 + [True] * 20:
        acceptance.add(right)
        chances.append(acceptance.chance)
    assert Acceptance().chance == 0.5
    assert chances[19] > 0.9
    assert chances[39] < 0.2
    assert chances[59] > 0.85
    assert all(0 < chance < 1 for chance in chances)


def test_step_times_are_the_shortest_of_late_ones_and_a_line_between() -> None:
    times = StepTimes()
    assert not times.known(1)
    for seconds in (5.0, 1.0, 3.0):
        times.add(1, 1, seconds)
    times.add(2, 2, 9.0)
    assert times.known(1)
    assert not times.known(2)
    assert [times.curve(1)(rows) for rows in (1, 2, 9)] == [1.0, 1.0, 1.0]  # others are free until tried
    times.add(1, 5, 3.0)
    assert [times.curve(1)(rows) for rows in (1, 2, 3, 5, 9)] == [1.0, 1.5, 2.0, 3.0, 5.0]
    times.add(1, 3, 2.5)
    assert [times.curve(1)(rows) for rows in (2, 3, 4, 5, 9)] == [1.75, 2.5, 2.75, 3.0, 5.0]
    times.add(1, 7, 0.5)  # faster with more rows: a glitch, and no reason for negative times
    assert times.curve(1)(100) == 1.0


def test_step_times_grow_stale() -> None:
    times = StepTimes()
    for _ in range(2):
        times.add(1, 1, 1.0)
    for _ in range(256):
        assert times.known(1)
        times.add(2, 2, 1.0)
    times.add(2, 2, 1.0)
    assert not times.known(1)


def test_nothing_is_drafted_before_plain_steps_were_timed() -> None:
    drafter = Drafter(EngineOptions(), predicts=False)
    sequence = make_sequence([1, 2, 3, 4, 5] * 4)
    carried = [decode(drafter, sequence, 1 + step % 5) for step in range(FEWEST_SAMPLES + 1)]
    assert carried[:-1] == [0] * FEWEST_SAMPLES
    assert carried[-1] > 0


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (lambda _: 1.0, NGRAM_DRAFTS),
        (lambda rows: 1.0 + 0.5 * (rows - 1), NGRAM_DRAFTS),
        (lambda rows: 1.0 if rows <= 3 else 5.0, 2),
        (lambda rows: float(rows), 0),
        (lambda rows: 1.0 + 1.2 * (rows - 1), 0),
    ],
    ids=["free", "half price", "two are free", "full price", "more"],
)
def test_as_many_drafts_as_pay(seconds: Callable[[int], float], expected: int) -> None:
    drafter = make_drafter(seconds, speculation="ngram")
    sequence = make_sequence([1, 2, 3, 4, 5] * 4)
    for step in range(60):
        carried = decode(drafter, sequence, 1 + step % 5)  # always as foretold
    assert carried == expected


def test_rows_near_full_price_are_not_bought_for_coin_tosses() -> None:
    drafter = make_drafter(lambda rows: 1.0 + 0.8 * (rows - 1), speculation="ngram")
    sequence, toss = make_sequence([1, 2, 3, 1, 2, 3]), random.Random(1)
    carried = [decode(drafter, sequence, toss.choice([1, 2])) for _ in range(300)]
    assert sum(carried[100:]) < 20


def test_acceptance_is_learned_from_drafts_that_were_not_carried() -> None:
    drafter = make_drafter(lambda rows: float(rows), speculation="ngram")
    sequence = make_sequence([1, 2, 3, 4, 5] * 4)
    assert sum(decode(drafter, sequence, 1 + step % 5) for step in range(30)) == 0
    assert sequence.drafting is not None
    assert sequence.drafting.acceptance[Method.NGRAM].chance > 0.9
    later = make_sequence([7, 8, 9] * 3)  # begins with what the engine knows
    decode(drafter, later, 7)
    assert later.drafting is not None
    assert later.drafting.proposals[0].chance > 0.9


def test_the_likeliest_drafts_go_first() -> None:
    drafter = make_drafter(lambda rows: 1.0 if rows <= 6 else 9.0, speculation="ngram", num_speculative_tokens=4)
    sure, unsure = make_sequence([1, 2, 3, 4] * 4), make_sequence([1, 2, 3, 4] * 4)
    for sequence, right in ((sure, True), (unsure, False)):
        for step in range(12):
            decode(drafter, sequence, 1 + step % 4 if right or step > 5 else 9)
    assert [len(drafts) for drafts in drafter.draft([unsure, sure], 30)] == [1, 4]


def test_room_and_length_bound_drafts() -> None:
    drafter = make_drafter(speculation="ngram")
    sequence = make_sequence([1, 2, 3, 4, 5] * 4)
    for step in range(60):
        decode(drafter, sequence, 1 + step % 5)
    assert [len(drafter.draft([sequence], room)[0]) for room in (0, 1, 3, 30)] == [0, 1, 3, 8]
    for left, expected in ((0, 0), (1, 0), (2, 1), (5, 4), (30, 8)):
        sequence.max_length = len(sequence.token_ids) + left
        assert len(drafter.draft([sequence], 30)[0]) == expected


def test_requests_with_penalties_carry_no_drafts() -> None:
    drafter = make_drafter(speculation="auto")
    for fields in ({"repetition_penalty": 1.1}, {"presence_penalty": 0.1}, {"frequency_penalty": 0.1}):
        sequence = make_sequence([1, 2, 3] * 9, **fields)
        assert drafter.draft([sequence], 30) == [()]
        assert not drafter.follows(sequence)


def test_what_the_predictor_said_is_used_where_it_was_said_for() -> None:
    drafter = make_drafter(speculation="mtp", num_speculative_tokens=2)
    sequence = make_sequence([1, 2, 3])
    assert drafter.follows(sequence)
    assert decode(drafter, sequence, 4, predicted=(5, 6)) == 0
    assert drafter.draft([sequence], 30) == [(5, 6)]
    sequence.token_ids.append(9)  # forced
    assert drafter.draft([sequence], 30) == [()]
    drafter.learn([Chunk(sequence, 1, True)], [Given([5, 6, 7], predicted=(8, 9))], 1.0, 0.0)
    sequence.token_ids.append(5)  # and then the sink forced another
    sequence.token_ids.append(40)
    assert drafter.draft([sequence], 30) == [()]


@pytest.mark.parametrize("right", [True, False])
def test_a_predictor_that_loses_is_paused_and_tried_again_on_later_sequences(right: bool) -> None:
    drafter = make_drafter(lambda rows: 1.0 + 0.1 * (rows - 1), speculation="mtp")
    sequence = make_sequence([1])
    sequence.max_length = 10**6
    for step in range(200):
        decode(drafter, sequence, step, predicted=(step + 1 if right else step,), cost=0.2)
    assert drafter.follows(sequence) == right
    if right:
        return
    during = make_sequence([2])
    assert not drafter.follows(during)
    for _ in range(PAUSE_STEPS):
        drafter.learn([Chunk(sequence, 1, True)], [Given([1])], 1.0, 0.0)
    assert drafter.follows(make_sequence([3]))
    assert not drafter.follows(during)  # it has not been seen from its beginning
    assert not drafter.follows(sequence)


def test_switched_off_nothing_is_kept() -> None:
    drafter = make_drafter(speculation="off")
    sequence = make_sequence([1, 2, 3] * 9)
    assert drafter.draft([sequence], 30) == [()]
    assert sequence.drafting is None
