"""Steps begun before the one before them is read: when that happens, what is dropped, and that no answer changes."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from engine_fakes import EOS, FixedTimes, HashModel, HashPredictor, Recorder, StandInGraphs, add, make_engine, run

from tern.engine import Engine, FinishReason, GeneratedToken, Steering
from tern.engine.sampler import NOT_FINITE
from tern.engine.step_failures import STEP_FAILED

PROMPTS = [[5, 6, 7], list(range(3, 20)), [9], [5, 6, 7, 8, 9, 10, 11, 12, 20, 21]]


@pytest.fixture(autouse=True)
def nothing_fails_unseen(request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """A step that cannot be begun ahead costs no answer, so it would not be noticed."""
    yield
    said = " ".join(record.getMessage() for record in caplog.get_records("call"))
    assert ("could not be begun ahead" in said) == ("cannot_be_begun" in request.node.name)


def serve(engine: Engine, **fields: Any) -> list[Recorder]:
    values = {"max_tokens": 20, "ignore_eos": True, **fields}
    sinks = [add(engine, f"{len(engine.sequences)}", prompt, **values) for prompt in PROMPTS]
    run(engine)
    return sinks


def ids(sinks: list[Recorder]) -> list[list[int]]:
    return [sink.ids for sink in sinks]


PLAIN = ids(serve(make_engine()))


@pytest.mark.parametrize("graphs", [None, StandInGraphs()], ids=["eager", "graphs"])
@pytest.mark.parametrize("fields", [{}, {"ignore_eos": False}, {"max_tokens": 3}], ids=str)
def test_answers_are_those_of_steps_one_by_one(fields: dict[str, Any], graphs: StandInGraphs | None) -> None:
    engine = make_engine(async_scheduling=True, graphs=graphs)
    found, wanted = serve(engine, **fields), serve(make_engine(), **fields)
    assert ids(found) == ids(wanted)
    assert [sink.end.reason for sink in found] == [sink.end.reason for sink in wanted]
    assert engine.pipeline.steps_ahead > 0
    assert engine.stats().blocks_free == engine.stats().blocks_total


def test_a_step_is_begun_before_the_one_before_it_is_delivered() -> None:
    model = HashModel()
    engine = make_engine(model, async_scheduling=True)
    begun: list[int] = []

    class Noting(Recorder):
        def push(self, token: GeneratedToken) -> Steering:
            begun.append(len(model.batches))
            return super().push(token)

    add(engine, "a", [5, 6, 7], sink=Noting(), max_tokens=6, ignore_eos=True)
    run(engine)
    # The prompt's step is no decode; then each token is delivered when the step after its own has begun.
    assert begun == [1, 3, 4, 5, 6, 6]
    assert engine.pipeline.steps_ahead == 4


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 1.0, "seed": 1},
        {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "seed": 5},
        {"repetition_penalty": 1.2},
        {"frequency_penalty": 1.0, "temperature": 0.5, "seed": 3},
        {"logit_bias": {5: 1.0}},
        {"min_tokens": 20},
        {"allowed_token_ids": list(range(3, 40))},
    ],
    ids=str,
)
def test_whatever_is_asked_of_the_sampler_is_chosen_ahead_alike(fields: dict[str, Any]) -> None:
    engine = make_engine(async_scheduling=True)
    assert ids(serve(engine, **fields)) == ids(serve(make_engine(), **fields))
    assert engine.pipeline.steps_ahead > 8


def test_log_probabilities_are_waited_for() -> None:
    engine = make_engine(async_scheduling=True)
    assert ids(serve(engine, logprobs=2)) == ids(serve(make_engine(), logprobs=2))
    assert engine.pipeline.steps_ahead == 0


def test_one_that_must_be_waited_for_makes_all_wait() -> None:
    engine = make_engine(async_scheduling=True)
    add(engine, "scored", [4, 4], logprobs=1, max_tokens=30, ignore_eos=True)
    assert ids(serve(engine)) == PLAIN
    assert engine.pipeline.steps_ahead < 12, "only after the scored one was done"


def test_without_the_wish_no_step_is_begun_ahead_on_the_processor() -> None:
    engine = make_engine()
    serve(engine)
    assert engine.pipeline.steps_ahead == 0


def test_what_follows_an_end_is_dropped() -> None:
    """Whatever ends a sequence is known a step late: nothing of that step reaches its sink."""
    first = PLAIN[0]
    for sink, fields, reason, count in [
        (Recorder(script={5: Steering(stop=True)}), {}, FinishReason.STOP, 5),
        (Recorder(raise_at=7), {}, FinishReason.ERROR, 7),
        (Recorder(), {"stop_token_ids": [first[9]]}, FinishReason.STOP, first.index(first[9]) + 1),
    ]:
        model = HashModel()
        engine = make_engine(model, async_scheduling=True)
        values: dict[str, Any] = {"max_tokens": 20, "ignore_eos": True, **fields}
        add(engine, "a", PROMPTS[0], sink=sink, **values)
        other = add(engine, "b", PROMPTS[1], max_tokens=20, ignore_eos=True)
        run(engine)
        assert (sink.ids, sink.end.reason) == (first[:count], reason)
        assert other.ids == PLAIN[1]
        assert len(model.batches) == 1 + 19, "no step was repeated"


def test_forced_tokens_take_the_place_of_what_was_sampled_behind_them() -> None:
    found = []
    for ahead in (True, False):
        sink = Recorder(script={4: Steering(force=(7, 8)), 9: Steering(force=(3,))})
        engine = make_engine(async_scheduling=ahead)
        other = add(engine, "other", PROMPTS[1], max_tokens=20, ignore_eos=True)
        found.append(add_and_run(engine, PROMPTS[0], sink=sink).ids)
        assert other.ids == PLAIN[1]
        assert (engine.pipeline.steps_ahead > 8) == ahead
    assert found[0] == found[1]
    assert found[0][:4] == PLAIN[0][:4]
    assert found[0][4:6] == [7, 8]


def test_cancelled_in_flight_and_its_blocks_given_away_at_once() -> None:
    engine = make_engine(async_scheduling=True, num_kv_blocks=24, max_num_seqs=2, enable_prefix_caching=False)
    gone = add(engine, "gone", [5] * 40, max_tokens=50, ignore_eos=True)
    stays = add(engine, "stays", PROMPTS[0], max_tokens=20, ignore_eos=True)
    while len(stays.ids) < 6:
        engine.step()
    assert engine.pipeline.steps_ahead > 0
    assert engine.cancel("gone")
    late = add(engine, "late", PROMPTS[1], max_tokens=20, ignore_eos=True)
    run(engine)
    assert gone.end.reason is FinishReason.CANCELLED
    assert (stays.ids, late.ids) == (PLAIN[0], PLAIN[1])


def test_all_cancelled_in_flight_leaves_nothing_behind() -> None:
    engine = make_engine(async_scheduling=True)
    sink = add(engine, "a", PROMPTS[0], max_tokens=20, ignore_eos=True)
    for _ in range(4):
        engine.step()
    engine.cancel("a")
    assert not engine.step()
    assert add_and_run(engine, PROMPTS[1]).ids == PLAIN[1]
    assert len(sink.finishes) == 1


def add_and_run(engine: Engine, prompt: list[int], **fields: Any) -> Recorder:
    sink = add(engine, "again", prompt, **{"max_tokens": 20, "ignore_eos": True, **fields})
    run(engine)
    return sink


def test_steps_run_ahead_while_the_house_is_full_and_stop_for_whom_there_is_room() -> None:
    engine = make_engine(async_scheduling=True, max_num_seqs=2)
    for name in ("a", "b"):
        add(engine, name, PROMPTS[0], max_tokens=20, ignore_eos=True)
    waiting = add(engine, "waits", PROMPTS[1], max_tokens=20, ignore_eos=True)
    while engine.stats().running < 2 or engine.pipeline.steps_ahead < 3:
        engine.step()
    assert not waiting.ids
    run(engine)
    assert waiting.ids == PLAIN[1]
    engine = make_engine(async_scheduling=True)
    add(engine, "a", PROMPTS[0], max_tokens=40, ignore_eos=True)
    while not engine.pipeline.steps_ahead:
        engine.step()
    late = add(engine, "late", PROMPTS[1], max_tokens=20, ignore_eos=True)
    for _ in range(3):  # the one in flight, and then its prompt
        engine.step()
    assert late.ids, "a newcomer waits for one step at most"


def test_a_full_pool_is_left_to_the_scheduler() -> None:
    wanted = ids(serve(make_engine(num_kv_blocks=25)))
    engine = make_engine(async_scheduling=True, num_kv_blocks=25)
    assert ids(serve(engine)) == wanted == PLAIN


def test_damaged_numbers_end_the_sequence_and_no_other() -> None:
    model = HashModel()
    model.spoil_token = PLAIN[0][6]
    engine = make_engine(model, async_scheduling=True)
    sinks = serve(engine)
    wanted = serve(make_engine(model))
    assert NOT_FINITE in {sink.end.message for sink in sinks}
    assert [(sink.ids, sink.end.message) for sink in sinks] == [(sink.ids, sink.end.message) for sink in wanted]


def test_a_step_that_cannot_be_begun_ahead_is_computed_in_its_turn(caplog: pytest.LogCaptureFixture) -> None:
    model = HashModel()
    engine = make_engine(model, async_scheduling=True)
    compute, calls = model.hidden, []

    def sometimes(*args: Any) -> torch.Tensor:
        calls.append(args)
        if len(calls) in (3, 6):  # begun ahead both times
            raise RuntimeError("not now")
        return compute(*args)

    model.hidden = sometimes  # type: ignore[method-assign]
    with caplog.at_level(logging.ERROR):
        assert ids(serve(engine)) == PLAIN
    assert "could not be begun ahead" in caplog.text
    assert engine.stats().failed_steps == 0


def test_a_step_in_flight_that_fails_is_computed_again_without_those_who_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(async_scheduling=True)
    finish, count = engine.runner.finish, 0

    def failing(begun: Any, *args: Any) -> Any:
        nonlocal count
        if len(begun.chunks) > 1:
            count += 1
            if count == 8:
                engine.cancel("0")
                raise RuntimeError("lost on the way")
        return finish(begun, *args)

    monkeypatch.setattr(engine.runner, "finish", failing)
    sinks = serve(engine)
    assert sinks[0].end.reason is FinishReason.CANCELLED
    assert ids(sinks[1:]) == PLAIN[1:]
    assert STEP_FAILED not in {sink.end.message for sink in sinks}


def test_drafts_that_pay_are_worth_waiting_for() -> None:
    class Always:
        def __init__(self) -> None:
            self.pays = False

        def draft(self, sequences: Any, room: int) -> list[tuple[int, ...]]:
            return [(5,) if self.pays and room else () for _ in sequences]

    engine = make_engine(async_scheduling=True)
    engine.scheduler.drafter = drafter = Always()
    sink = add(engine, "a", PROMPTS[0], max_tokens=20, ignore_eos=True)
    while len(sink.ids) < 5:
        engine.step()
    ahead = engine.pipeline.steps_ahead
    assert ahead > 0
    drafter.pays = True
    run(engine)
    assert engine.pipeline.steps_ahead <= ahead + 1
    assert sink.ids == PLAIN[0]


def test_a_sequence_that_the_predictor_follows_is_not_begun_ahead() -> None:
    model = HashModel()
    model.mtp = HashPredictor(model)
    engine = make_engine(model, async_scheduling=True, speculation="mtp")
    engine.drafter.times = FixedTimes()  # type: ignore[assignment]
    assert ids(serve(engine)) == PLAIN
    assert engine.pipeline.steps_ahead == 0


def test_the_end_token_is_obeyed_although_the_next_step_has_begun() -> None:
    model = HashModel()
    model.table[:, EOS] += 1.5  # it comes now and then
    found, wanted = (
        serve(make_engine(model, async_scheduling=ahead), ignore_eos=False, max_tokens=40) for ahead in (True, False)
    )
    assert ids(found) == ids(wanted)
    assert FinishReason.STOP in {sink.end.reason for sink in found}
