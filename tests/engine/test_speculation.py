"""Speculation on models that are pure functions of their context: fewer steps, the same answers, the same books."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from engine_fakes import EOS, FixedTimes, HashModel, HashPredictor, Recorder, StandInGraphs, add, make_engine, run

from tern.engine import Engine, FinishReason, Steering
from tern.engine.sampler import NOT_FINITE
from tern.errors import OptionError
from tern.model.batch import Batch, KVCache

PROMPTS = [[5, 6, 7], [5, 6, 7, 8, 9, 10, 11, 12, 13], list(range(3, 40)), [9], [5, 6, 7, 8, 9, 10, 11, 12, 20, 21]]
ANSWER = 40
GREEDY: dict[str, Any] = {}
SAMPLED = {"temperature": 1.0, "seed": 3, "top_p": 0.9}


class Drafts:
    """A source of drafts: `of(sequence)` for each, as many as fit."""

    def __init__(self, of: Callable[[Any], Sequence[int]]) -> None:
        self.of = of

    def draft(self, sequences: Sequence[Any], room: int) -> list[tuple[int, ...]]:
        drafts = []
        for sequence in sequences:
            drafts.append(tuple(self.of(sequence))[: max(0, min(room, sequence.num_draftable_tokens))])
            room -= len(drafts[-1])
        return drafts


def answers(engine: Engine, names: str, **fields: Any) -> list[list[int]]:
    values = {"max_tokens": ANSWER, "ignore_eos": True, **fields}
    sinks = [add(engine, f"{names} {i}", prompt, **values) for i, prompt in enumerate(PROMPTS)]
    run(engine)
    return [sink.ids for sink in sinks]


def predicting(drafts: int = 3, **options: Any) -> Engine:
    """An engine whose model has a predictor that is always right, and to which rows cost nothing."""
    model = HashModel()
    model.mtp = HashPredictor(model)
    engine = make_engine(model, **{"speculation": "mtp", "num_speculative_tokens": drafts, **options})
    engine.drafter.times = FixedTimes()  # type: ignore[assignment]
    return engine


def truth(fields: dict[str, Any], *, wrong_every: int = 10**9) -> Callable[[Any], list[int]]:
    """Drafts from the known answers, of which some are wrong."""
    known = dict(enumerate(answers(make_engine(), "known", **fields)))

    def of(sequence: Any) -> list[int]:
        done = sequence.num_generated_tokens
        answer = known[int(sequence.request_id.split()[-1])][done : done + 5]
        return [
            token ^ 1 if (done + place) % wrong_every == wrong_every - 1 else token
            for place, token in enumerate(answer)
        ]

    return of


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_num_seqs": 1},
        {"max_num_batched_tokens": 8},
        {"max_num_seqs": 2, "max_num_batched_tokens": 3},
        {"block_size": 1},
        {"block_size": 64},
        {"enable_prefix_caching": False},
        {"num_kv_blocks": 24},
        {"num_kv_blocks": 26, "max_num_batched_tokens": 12},
    ],
    ids=str,
)
@pytest.mark.parametrize("fields", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("wrong_every", [1, 2, 7, 10**9])
def test_any_drafts_leave_the_answers_as_they_are(
    options: dict[str, Any], fields: dict[str, Any], wrong_every: int
) -> None:
    plain = answers(make_engine(), "plain", **fields)
    engine = make_engine(**options)
    engine.scheduler.drafter = Drafts(truth(fields, wrong_every=wrong_every))
    for state in ("cold", "warm"):
        assert answers(engine, state, **fields) == plain
    stats = engine.stats()
    assert stats.drafted_tokens > 0
    assert (stats.accepted_tokens == stats.drafted_tokens) == (wrong_every > ANSWER)
    assert (stats.accepted_tokens > 0) == (wrong_every > 1)
    assert stats.blocks_free == stats.blocks_total


@pytest.mark.parametrize(
    "fields",
    [
        {"logprobs": 3},
        {"min_tokens": 20, "ignore_eos": False, "stop_token_ids": list(range(3, 30))},
        {"logit_bias": {9: 3.0, 12: 3.0}},
        {"bad_token_sequences": ((9,), (12, 13), *((a, b) for a in range(20) for b in range(20)))},
        {"stop_token_ids": list(range(3, 12)), "ignore_eos": False},
        {"repetition_penalty": 1.3, "frequency_penalty": 0.4},
        {**SAMPLED, "min_p": 0.01, "top_k": 9, "logit_bias": {9: 3.0}, "min_tokens": 5},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_whatever_a_request_asks_it_gets_with_drafts_too(fields: dict[str, Any]) -> None:
    def tokens(engine: Engine) -> list[Any]:
        sinks = [
            add(engine, f"asked {i}", prompt, **{"max_tokens": ANSWER, "ignore_eos": True, **fields})
            for i, prompt in enumerate(PROMPTS)
        ]
        run(engine)
        return [(sink.tokens, sink.end.reason, sink.end.stop_token_id) for sink in sinks]

    engine = predicting()
    assert tokens(engine) == tokens(make_engine())
    assert (engine.stats().drafted_tokens == 0) == ("repetition_penalty" in fields)


@pytest.mark.parametrize("fields", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("drafts", [1, 3, 7])
def test_a_predictor_that_knows_saves_steps(fields: dict[str, Any], drafts: int) -> None:
    engine = predicting(drafts)
    sink = add(engine, "only", [5, 6, 7], max_tokens=ANSWER, ignore_eos=True, **fields)
    steps = run(engine)
    assert sink.ids == answers(make_engine(), "plain", **fields)[0]
    assert steps <= -(-ANSWER // (1 + drafts)) + 8  # the first ones, until its drafts are trusted
    assert engine.stats().accepted_tokens == engine.stats().drafted_tokens


@pytest.mark.parametrize(
    "options",
    [{}, {"block_size": 1}, {"block_size": 7}, {"num_kv_blocks": 24}, {"max_num_batched_tokens": 8}],
    ids=str,
)
@pytest.mark.parametrize("fields", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("drafts", [1, 6])
@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
def test_the_predictor_is_shown_every_position(
    options: dict[str, Any], fields: dict[str, Any], drafts: int, graphs: bool
) -> None:
    engine = predicting(
        drafts, graphs=StandInGraphs() if graphs else None, **options
    )  # its fake fails where it misses one
    plain = answers(make_engine(), "plain", **fields)
    assert answers(engine, "cold", **fields) == plain
    assert answers(engine, "warm", **fields) == plain
    assert engine.stats().accepted_tokens > ANSWER
    assert engine.stats().failed_steps == 0


def test_a_prompt_in_chunks_leaves_no_gap_behind_the_predictor() -> None:
    engine = predicting(3, max_num_batched_tokens=8)
    sink = add(engine, "long", list(range(3, 40)), max_tokens=ANSWER, ignore_eos=True)
    run(engine)
    assert sink.ids == answers(make_engine(), "plain")[2]
    assert engine.stats().accepted_tokens == engine.stats().drafted_tokens > 20


class ForgetfulPredictor(HashPredictor):
    """Wrong about every fifth position, right again behind it."""

    def hidden(self, batch: Batch, previous: torch.Tensor, kv: KVCache) -> torch.Tensor:
        right = super().hidden(batch, previous, kv)
        return torch.where(batch.positions[:, None] % 5 == 0, 8190 - right, right)


@pytest.mark.parametrize("drafts", [1, 3, 6])
def test_behind_a_wrong_draft_the_predictor_goes_on_from_what_stands(drafts: int) -> None:
    engine = predicting(drafts)
    engine.runner.predictor.mtp = ForgetfulPredictor(engine.runner.model)  # type: ignore
    prompt = list(range(3, 40))
    sink = add(engine, "r", prompt, max_tokens=ANSWER, ignore_eos=True)
    run(engine)
    assert sink.ids == answers(make_engine(), "plain")[2]
    lost = engine.stats().drafted_tokens - engine.stats().accepted_tokens
    assert 0 < lost <= (ANSWER // 5 + 1) * drafts  # each mistake costs the drafts behind it and no others
    assert engine.stats().accepted_tokens > 10


def test_the_text_so_far_drafts() -> None:
    engine = make_engine(speculation="ngram", prompt_lookup_min=2)
    engine.drafter.times = FixedTimes()  # type: ignore[assignment]
    bias = {token: -100.0 for token in range(61) if token not in (9, 10)}  # an answer that must repeat itself
    plain, sped = make_engine(), Recorder()
    sink = add(plain, "plain", [5], max_tokens=90, ignore_eos=True, logit_bias=bias)
    add(engine, "sped", [5], sink=sped, max_tokens=90, ignore_eos=True, logit_bias=bias)
    assert run(engine) < run(plain)
    assert sped.ids == sink.ids
    assert 0 < engine.stats().accepted_tokens < engine.stats().drafted_tokens
    assert engine.stats().generated_tokens == 90


def test_forced_tokens_cut_off_what_was_drafted_behind_them() -> None:
    plain, sped = (Recorder(script={k: Steering(force=(30, 31, 32)) for k in (2, 9, 15)}) for _ in "ab")
    add(make := make_engine(), "plain", [5, 6, 7], sink=plain, max_tokens=ANSWER, ignore_eos=True)
    run(make)
    engine = predicting(5)
    add(engine, "sped", [5, 6, 7], sink=sped, max_tokens=ANSWER, ignore_eos=True)
    run(engine)
    assert sped.tokens == plain.tokens
    assert engine.stats().accepted_tokens > 10


def test_an_end_among_the_drafts_ends_there() -> None:
    plain = add(make := make_engine(), "plain", [5, 6, 7], max_tokens=ANSWER, ignore_eos=True)
    run(make)
    for end in range(2, 12):
        stop = plain.ids[end]
        expected = plain.ids[: plain.ids.index(stop) + 1]
        engine = make_engine()
        engine.scheduler.drafter = Drafts(lambda s: plain.ids[s.num_generated_tokens :][:5])
        by_token = add(engine, "token", [5, 6, 7], stop_token_ids=[stop], ignore_eos=True, max_tokens=ANSWER)
        by_sink = add(
            engine,
            "sink",
            [5, 6, 7],
            sink=Recorder(script={len(expected): Steering(stop=True)}),
            ignore_eos=True,
            max_tokens=ANSWER,
        )
        by_length = add(engine, "length", [5, 6, 7], ignore_eos=True, max_tokens=len(expected))
        run(engine)
        assert by_token.ids == by_sink.ids == by_length.ids == expected
        assert by_token.end.stop_token_id == stop
        assert by_length.end.reason is FinishReason.LENGTH


@pytest.mark.parametrize("wrong_every", [2, 10**9])
def test_a_later_prompt_finds_what_it_would_have_found_without_drafts(wrong_every: int) -> None:
    of = truth(GREEDY, wrong_every=wrong_every)
    found = []
    for drafter in (None, Drafts(of)):
        engine = make_engine(max_num_seqs=1, num_kv_blocks=200)
        engine.scheduler.drafter = drafter
        texts = [[*prompt, *answer] for prompt, answer in zip(PROMPTS, answers(engine, "first"), strict=True)]
        sinks = [add(engine, f"next {number}", text, max_tokens=1) for number, text in enumerate(texts)]
        run(engine)
        found.append(([sink.end.num_cached_tokens for sink in sinks], engine.stats().blocks_cached))
    assert found[0] == found[1]
    assert sum(found[0][0]) > 100


def test_rejected_drafts_are_never_found_in_the_cache() -> None:
    engine = make_engine(block_size=2)
    engine.scheduler.drafter = Drafts(lambda _: (50, 51, 52, 53, 54))
    sink = add(engine, "first", [5, 6, 7], ignore_eos=True, max_tokens=9)
    run(engine)
    assert not {50, 51} <= set(sink.ids)
    for length in range(1, 9):
        text = [5, 6, 7, *sink.ids[:length], 50, 51, 52, 53, 54]
        later = add(engine, f"later {length}", text, max_tokens=1)
        run(engine)
        assert later.end.num_cached_tokens <= 3 + length


def test_drafts_take_no_blocks_that_others_grow_into() -> None:
    seen = []
    for blocks in range(24, 80, 5):
        preemptions = []
        for drafter in (None, Drafts(truth(GREEDY, wrong_every=1))):
            engine = make_engine(num_kv_blocks=blocks, block_size=2, max_model_len=48, max_num_seqs=4)
            engine.scheduler.drafter = drafter
            answers(engine, "tight", max_tokens=10)
            preemptions.append(engine.stats().preemptions)
        assert preemptions[0] == preemptions[1], f"{blocks} blocks"
        seen.append(preemptions[0])
    assert max(seen) > 0


def test_a_batch_with_a_prompt_carries_no_drafts_and_the_budget_bounds_them() -> None:
    engine = make_engine(max_num_batched_tokens=8)
    engine.scheduler.drafter = Drafts(lambda _: (50,) * 12)
    first = add(engine, "first", [5, 6], ignore_eos=True, max_tokens=20)
    engine.step()
    add(engine, "second", list(range(3, 30)), ignore_eos=True, max_tokens=20)
    model: Any = engine.runner.model
    while first.finishes == []:
        engine.step()
    sizes = [(len(batch.token_ids), len(batch.context_lens)) for batch in model.batches]
    assert sizes[:5] == [(2, 1), (8, 2), (8, 2), (8, 2), (1 + 6, 2)]
    assert sizes[5] == (8, 2)


@pytest.mark.parametrize("steps", range(2, 8))
def test_cancelling_between_steps_leaves_no_block_behind(steps: int) -> None:
    engine = predicting(5)
    sinks = [add(engine, name, [5, 6, name == "b"], ignore_eos=True, max_tokens=60) for name in "ab"]
    for _ in range(steps):
        engine.step()
    before = len(sinks[0].ids)
    assert engine.cancel("a")
    engine.check_integrity()
    run(engine)
    assert len(sinks[0].ids) == before
    assert len(sinks[1].ids) == 60
    assert engine.stats().blocks_free == engine.stats().blocks_total


def test_a_score_that_is_not_finite_behind_a_right_draft_ends_after_it() -> None:
    plain = add(make := make_engine(), "plain", [5, 6, 7], max_tokens=8, ignore_eos=True)
    run(make)
    model = HashModel()
    model.spoil_token = plain.ids[4]
    engine = make_engine(model)
    engine.scheduler.drafter = Drafts(lambda s: plain.ids[s.num_generated_tokens :][:1])
    sink = add(engine, "spoilt", [5, 6, 7], max_tokens=8, ignore_eos=True)
    run(engine)
    assert sink.ids == plain.ids[:5]
    assert (sink.end.reason, sink.end.message) == (FinishReason.ERROR, NOT_FINITE)


def test_a_draft_that_spoils_its_scores_harms_nobody() -> None:
    model = HashModel()
    plain = answers(make_engine(), "plain")[0]
    model.spoil_token = next(token for token in range(61) if token not in [*plain, *PROMPTS[0]])
    engine = make_engine(model)
    engine.scheduler.drafter = Drafts(lambda _: (model.spoil_token,))
    sink = add(engine, "sound", PROMPTS[0], max_tokens=ANSWER, ignore_eos=True)
    run(engine)
    assert sink.ids == plain


def test_a_predictor_is_asked_for_and_must_be_there() -> None:
    with pytest.raises(OptionError, match=r"speculation is 'mtp' but the model has no .* choose ngram, auto or off"):
        make_engine(speculation="mtp")
    assert make_engine(speculation="auto").drafter.predicted_drafts == 0
    assert predicting(speculation="auto").drafter.predicted_drafts == 1
    assert predicting(speculation="ngram").runner.predictor is None
    assert predicting(speculation="off", num_speculative_tokens=3).drafter.ngram_drafts == 0


def test_the_end_token_is_no_special_draft() -> None:
    engine = make_engine()
    engine.scheduler.drafter = Drafts(lambda _: (EOS, EOS))
    assert answers(engine, "ends") == answers(make_engine(), "plain")
