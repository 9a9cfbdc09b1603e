"""Who may join the queue, and what those are told who may not."""

from __future__ import annotations

import pytest
from engine_fakes import add, make_engine

from tern.engine import EngineOptions
from tern.engine.admission import MOST_SECONDS, UNKNOWN_SECONDS, Admission
from tern.errors import QueueFullError


def refusal(admission: Admission, *state: int) -> QueueFullError:
    with pytest.raises(QueueFullError) as error:
        admission.check(*state)
    return error.value


def test_requests_and_tokens_have_limits_of_their_own() -> None:
    admission = Admission(EngineOptions(max_num_seqs=4, max_queue=2, max_queue_tokens=100))
    admission.check(5, 60, 40)
    assert "2 requests are waiting and max_queue is 2" in str(refusal(admission, 6, 0, 1))
    said = str(refusal(admission, 5, 61, 40))
    assert all(part in said for part in ("61 prompt tokens", "has 40", "max_queue_tokens is 100", "try again later"))


def test_a_prompt_of_any_length_may_wait_alone_and_choices_share_theirs() -> None:
    admission = Admission(EngineOptions(max_queue_tokens=100))
    admission.check(0, 0, 5000)
    admission.check(1, 5000, 0)
    refusal(admission, 1, 5000, 1)


def test_without_limits_nobody_is_refused() -> None:
    Admission(EngineOptions(max_queue=None, max_queue_tokens=None)).check(10**6, 10**9, 10**6)


def test_who_is_refused_is_told_when_to_come_back() -> None:
    admission = Admission(EngineOptions(max_num_seqs=4, max_queue=2, max_queue_tokens=100))
    assert refusal(admission, 6, 0, 1).retry_after == UNKNOWN_SECONDS
    assert refusal(admission, 1, 90, 20).retry_after == UNKNOWN_SECONDS
    for _ in range(5):
        admission.learn(10, 2.0)
    admission.learn(0, 0.5)
    assert refusal(admission, 1, 90, 20).retry_after == pytest.approx(10 * 0.2), "until 10 tokens have been read"
    assert refusal(admission, 1, 50, 1000).retry_after == pytest.approx(50 * 0.2), "until none waits"
    admission.ended()
    assert refusal(admission, 6, 0, 1).retry_after == pytest.approx(10.5, rel=0.05), "one has ended in 10.5 seconds"
    assert refusal(admission, 8, 0, 1).retry_after == pytest.approx(31.5, rel=0.05)
    for _ in range(5):
        admission.learn(1, 100.0)
    assert refusal(admission, 1, 100, 10**6).retry_after == MOST_SECONDS


def test_late_steps_count_more_than_early_ones() -> None:
    admission = Admission(EngineOptions(max_queue_tokens=10))
    for seconds in (1.0, 9.0):
        for _ in range(200):
            admission.learn(10, seconds)
    assert refusal(admission, 1, 10, 10).retry_after == pytest.approx(9.0, rel=0.05)


def test_the_engine_refuses_by_what_waits_and_not_by_what_runs() -> None:
    engine = make_engine(max_num_seqs=1, max_queue_tokens=20)
    add(engine, "running", [5] * 30, max_tokens=20, ignore_eos=True)
    with pytest.raises(QueueFullError, match="30 prompt tokens are waiting"):
        add(engine, "too early", [5])
    engine.step()
    assert engine.stats().waiting_tokens == 0
    add(engine, "waits", [6] * 12)
    add(engine, "its other choice", [6] * 12, choice_index=1)
    with pytest.raises(QueueFullError, match="12 prompt tokens are waiting, this request has 9"):
        add(engine, "too long", [7] * 9)
    add(engine, "fits", [7] * 8)
    assert engine.stats().waiting_tokens == 20
    assert engine.cancel("fits")
    assert engine.stats().waiting_tokens == 12
    while engine.step():
        engine.check_integrity()
    assert engine.stats().waiting_tokens == 0
