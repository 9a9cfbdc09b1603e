"""Where a request's time went, by a clock that the test turns, and how large the steps were."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from engine_fakes import HashModel, add, make_engine, run

from tern.engine import EngineService, FinishReason, Milestones
from tern.engine.stats import STEP_TOKENS


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A clock that stands still: one second more for each step that an engine of `ticking` computes."""
    now = SimpleNamespace(seconds=100.0)
    fake = SimpleNamespace(monotonic=lambda: now.seconds, perf_counter=lambda: now.seconds)
    for module in ("delivery", "engine", "scheduler", "sequence"):
        monkeypatch.setattr(f"tern.engine.{module}.time", fake)
    return now


def ticking(clock: SimpleNamespace, **options: Any) -> Any:
    engine = make_engine(**options)
    compute = engine.runner.run

    def tick(*step: Any) -> Any:
        clock.seconds += 1
        return compute(*step)

    engine.runner.run = tick  # type: ignore[method-assign]
    return engine


def test_milestones_split_a_request_s_time(clock: SimpleNamespace) -> None:
    engine = ticking(clock, max_num_seqs=1, max_num_batched_tokens=4)
    first = add(engine, "first", [3, 4, 5, 6, 7, 8], max_tokens=3, ignore_eos=True)
    second = add(engine, "second", [9], max_tokens=2, ignore_eos=True)
    run(engine)
    assert first.end.milestones == Milestones(queued=100, started=100, first_token=102, ended=104)
    assert second.end.milestones == Milestones(queued=100, started=104, first_token=105, ended=106)
    assert second.end.milestones.queue_seconds == 4
    assert (second.end.milestones.prefill_seconds, second.end.milestones.decode_seconds) == (1, 1)


def test_a_preempted_sequence_started_when_it_first_did(clock: SimpleNamespace) -> None:
    engine = ticking(clock, num_kv_blocks=24)
    sinks = [add(engine, str(i), list(range(3, 30)), max_tokens=40, ignore_eos=True) for i in range(4)]
    run(engine)
    assert engine.stats().preemptions > 0
    assert all(sink.end.milestones.started < 105 for sink in sinks if sink.end.milestones)


def test_what_was_never_reached_is_none(clock: SimpleNamespace) -> None:
    engine = ticking(clock)
    sink = add(engine, "a", [3])
    clock.seconds += 7
    engine.cancel("a")
    assert sink.end.reason is FinishReason.CANCELLED
    assert sink.end.milestones == Milestones(100, None, None, 107)
    assert sink.end.milestones.queue_seconds == 7
    assert sink.end.milestones.prefill_seconds is sink.end.milestones.decode_seconds is None


def test_steps_are_counted_by_their_tokens() -> None:
    engine = make_engine(max_num_batched_tokens=20, enable_prefix_caching=False)
    add(engine, "a", list(range(3, 43)), max_tokens=3, ignore_eos=True)  # steps of 20, 20, 1 and 1 tokens
    run(engine)
    stats = engine.stats()
    counts = dict(zip(STEP_TOKENS, stats.steps_by_tokens, strict=False))
    assert (counts[1], counts[32]) == (2, 2)
    assert sum(stats.steps_by_tokens) == stats.steps == 4


def test_facts_are_those_of_engine_and_weights() -> None:
    model = HashModel()
    model.quantization = "wint4"
    facts = EngineService(make_engine(model, max_num_seqs=3)).facts()
    assert (facts.dtype, facts.quantization, facts.kv_cache_dtype) == ("float32", "wint4", "float32")
    assert (facts.device, facts.max_num_seqs, facts.block_size, facts.num_blocks) == ("cpu", 3, 4, 96)
