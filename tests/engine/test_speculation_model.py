"""Speculation on the real network: the same answers in every precision, from good drafts and from bad ones."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from engine_fakes import FixedTimes, StandInGraphs, add, make_engine, run
from test_engine_model import ANSWER, EXPERTS, LENGTH, PROMPTS, SMALL, VOCAB, build, network

from tern.engine import Engine, drafts
from tern.engine import engine as engine_module
from tern.errors import OptionError
from tern.model import ErnieConfig, ErnieModel, parameter_shapes

PRECISIONS = ["moe mtp", "moe mtp bf16", "moe mtp wint4", "moe mtp wint4 bf16"]
SCHEDULES: dict[str, dict[str, Any]] = {
    "plenty": {},
    "one by one": {"max_num_seqs": 1},
    "small chunks": {"max_num_batched_tokens": 9},
    "odd blocks": {"max_num_batched_tokens": 2048, "block_size": 5},
    "no prefix cache": {"enable_prefix_caching": False},
    "preempted": {"num_kv_blocks": 33, "max_model_len": 130, "block_size": 4, "max_num_batched_tokens": 17},
}
SAMPLED: dict[str, Any] = {"temperature": 0.9, "top_p": 0.9, "seed": 5}


class HalfKnown:
    """Drafts that are right but for every fourth token of an answer."""

    def __init__(self, architecture: str) -> None:
        self.architecture = architecture

    def draft(self, sequences: Sequence[Any], room: int) -> list[tuple[int, ...]]:
        drafted = []
        for sequence in sequences:
            done = sequence.num_generated_tokens
            number = int(sequence.request_id.split()[-1])
            answer = plain_answers(self.architecture)[number][done:][: 6 - number % 2]
            told = [token if (done + place) % 4 else (token + 1) % VOCAB for place, token in enumerate(answer)]
            drafted.append(tuple(told[: max(0, min(room, sequence.num_draftable_tokens))]))
            room -= len(drafted[-1])
        return drafted


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drafts are carried however unlikely they are."""
    monkeypatch.setattr(drafts, "LEAST_CHANCE", 0.0)
    monkeypatch.setattr(drafts, "StepTimes", FixedTimes)


def build_with_graphs(architecture: str, **options: Any) -> tuple[Engine, StandInGraphs]:
    graphs = StandInGraphs()
    with patch.object(engine_module, "capture_for", lambda *_, **__: graphs):
        return build(architecture, **options), graphs


def answers(engine: Engine, name: str, **fields: Any) -> list[list[int]]:
    values = {"max_tokens": ANSWER, "ignore_eos": True, **fields}
    sinks = [add(engine, f"{name} {number}", prompt, **values) for number, prompt in enumerate(PROMPTS)]
    run(engine)
    assert engine.stats().failed_steps == 0
    assert engine.stats().blocks_free == engine.stats().blocks_total
    return [sink.ids for sink in sinks]


@lru_cache
def plain_answers(architecture: str) -> list[list[int]]:
    """Without drafts, one request at a time."""
    return answers(build(architecture, max_num_seqs=1), "plain")


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("schedule", ["plenty", "no prefix cache", "preempted"])
@pytest.mark.parametrize("architecture", PRECISIONS)
def test_bad_drafts_of_a_random_predictor_change_nothing(architecture: str, schedule: str) -> None:
    engine = build(architecture, speculation="mtp", num_speculative_tokens=3, **SCHEDULES[schedule])
    for state in ("cold", "warm"):
        assert answers(engine, state) == plain_answers(architecture)
    assert engine.stats().drafted_tokens > ANSWER
    assert engine.stats().accepted_tokens < 0.5 * engine.stats().drafted_tokens


@pytest.mark.parametrize("schedule", ["one by one", "small chunks", "odd blocks", "preempted"])
@pytest.mark.parametrize("architecture", PRECISIONS)
def test_good_drafts_change_nothing_but_the_number_of_steps(architecture: str, schedule: str) -> None:
    engine, plain = build(architecture, **SCHEDULES[schedule]), build(architecture, **SCHEDULES[schedule])
    engine.scheduler.drafter = HalfKnown(architecture)
    assert answers(engine, "drafted") == plain_answers(architecture) == answers(plain, "plain")
    assert engine.stats().accepted_tokens > ANSWER // 2  # steps that read a prompt beside carry none
    assert engine.stats().steps < 0.8 * plain.stats().steps


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("architecture", ["moe mtp", "moe mtp wint4 bf16"])
def test_drafts_are_verified_by_graphs_alike(architecture: str, schedule: str) -> None:
    engine, graphs = build_with_graphs(architecture, speculation="ngram", **SCHEDULES[schedule])
    engine.scheduler.drafter = HalfKnown(architecture)
    verified = []
    take = engine.runner.graphs.run  # type: ignore[union-attr]
    engine.runner.graphs.run = lambda step, tokens=None: verified.append(step) or take(step, tokens)  # type: ignore
    assert answers(engine, "drafted") == plain_answers(architecture)
    assert engine.stats().accepted_tokens > ANSWER // 2
    assert graphs.replays == len(verified)
    assert any(step.max_query_len > 1 for step in verified)
    if schedule != "one by one":
        assert any(len(set(np.diff(step.query_starts))) > 1 for step in verified), "drafts of different lengths"


@pytest.mark.parametrize("ahead", [False, True], ids=["one by one", "ahead"])
def test_sequences_join_and_leave_steps_that_graphs_verify(ahead: bool) -> None:
    wanted = plain_answers("moe mtp")
    engine, graphs = build_with_graphs("moe mtp", speculation="ngram", max_num_seqs=3, async_scheduling=ahead)
    engine.scheduler.drafter = HalfKnown("moe mtp")
    sinks = []
    for number, prompt in enumerate(PROMPTS):
        sinks.append(add(engine, str(number), prompt, max_tokens=ANSWER - number, ignore_eos=True))
        gone = add(engine, f"gone {number}", prompt, max_tokens=ANSWER, ignore_eos=True)
        for _ in range(3):
            engine.step()
        engine.cancel(f"gone {number}")
        assert len(gone.finishes) == 1
    run(engine)
    assert [sink.ids for sink in sinks] == [answer[: ANSWER - number] for number, answer in enumerate(wanted)]
    assert graphs.replays > 0


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("schedule", ["plenty", "odd blocks", "preempted"])
@pytest.mark.parametrize("architecture", ["moe mtp", "moe mtp wint4 bf16"])
def test_the_predictor_drafts_the_same_by_graphs(
    architecture: str, schedule: str, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drafts, "_START_GAIN", 1e9)  # it would be paused when a clock says so
    options = {"speculation": "mtp", "num_speculative_tokens": count, **SCHEDULES[schedule]}
    options |= {"target_step_seconds": None}
    plain = build(architecture, **options)
    engine, graphs = build_with_graphs(architecture, **options)
    for state in ("cold", "warm"):
        assert answers(engine, state) == answers(plain, state) == plain_answers(architecture)
    found, wanted = engine.stats(), plain.stats()
    assert (found.drafted_tokens, found.accepted_tokens) == (wanted.drafted_tokens, wanted.accepted_tokens)
    predictor, other = engine.runner.predictor, plain.runner.predictor
    assert predictor is not None
    assert predictor.graphs is not None
    assert other is not None
    assert graphs.replays > found.steps, "its own passes are replayed too"
    owned = slice(0, engine.pool.num_blocks)
    assert torch.equal(predictor.kv.keys[:, :, owned], other.kv.keys[:, :, owned])


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("architecture", ["dense", "moe mtp", "moe mtp wint4 bf16"])
@pytest.mark.parametrize("speculation", ["ngram", "auto"])
def test_seeded_draws_are_the_same_tokens_with_drafts(architecture: str, speculation: str) -> None:
    fields = {**SAMPLED, "logit_bias": dict.fromkeys((30, 31, 32), 12.0)}  # texts that repeat themselves
    plain = answers(build(architecture), "plain", **fields)
    engine = build(architecture, speculation=speculation, prompt_lookup_min=2)
    assert answers(engine, "drafted", **fields) == plain
    assert engine.stats().accepted_tokens > 10


def successor(token: int) -> int:
    return (token * 7 + 3) % VOCAB


def counting_network(predictor: bool = True) -> ErnieModel:
    """A network that follows every token by its `successor` and a predictor that knows it does.

    Embeddings are random directions, the head holds at the successor of a token that token's direction, and all layers
    add nothing. The predictor passes on the half of its input that comes from the token.
    """
    raw = {**SMALL, "model_type": "ernie4_5_moe", **EXPERTS, "num_nextn_predict_layers": 1, "hidden_size": 128}
    config = ErnieConfig.from_dict({**raw, "tie_word_embeddings": False})
    generator = torch.Generator().manual_seed(2)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in parameter_shapes(config).items()}
    for name, tensor in tensors.items():
        if name.endswith("norm"):
            tensor.fill_(1.0)
        elif name.endswith(("attn.o.weight", "down.weight", "down")):
            tensor.zero_()
    for token in range(VOCAB):
        tensors["head"][successor(token)] = tensors["embed"][token]
    tensors["mtp.proj.weight"] = torch.cat([torch.eye(128), torch.zeros(128, 128)], dim=1)
    if not predictor:
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("mtp.")}
    return ErnieModel(config, tensors)


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("fields", [{}, {**SAMPLED, "temperature": 3.0, "top_p": 1.0}], ids=["greedy", "sampled"])
def test_right_drafts_of_the_predictor_are_taken(count: int, fields: dict[str, Any]) -> None:
    options = {"num_kv_blocks": 60, "max_model_len": LENGTH}
    plain = make_engine(counting_network(), **options)
    engine = make_engine(counting_network(), speculation="mtp", num_speculative_tokens=count, **options)
    sink, expected = (add(e, "r", [8, 9], max_tokens=60, ignore_eos=True, **fields) for e in (engine, plain))
    steps, plain_steps = run(engine), run(plain)
    assert sink.ids == expected.ids
    assert (sink.ids[:2] == [successor(9), successor(successor(9))]) or fields
    assert plain_steps == 60
    assert steps <= 60 / (1 + 0.9 * count) + 2
    assert engine.stats().accepted_tokens == engine.stats().drafted_tokens


@pytest.mark.usefixtures("eager")
def test_a_damaged_predictor_costs_only_its_drafts() -> None:
    sound = network("moe mtp")
    tensors = {name: torch.full(shape, float("nan")) for name, shape in parameter_shapes(sound.config).items()}
    broken = network.__wrapped__("moe mtp")
    broken.mtp.proj.weight = tensors["mtp.proj.weight"]
    engine = make_engine(broken, speculation="mtp", num_kv_blocks=200, max_num_batched_tokens=64)
    assert answers(engine, "broken") == plain_answers("moe mtp")


def test_without_weights_for_it_there_is_no_predictor() -> None:
    model = counting_network(predictor=False)
    with pytest.raises(OptionError, match="no multi-token predictor"):
        make_engine(model, speculation="mtp", num_kv_blocks=60)
    assert make_engine(model, speculation="auto", num_kv_blocks=60).runner.predictor is None
