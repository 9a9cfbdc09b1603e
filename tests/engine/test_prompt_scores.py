"""Log-probabilities of prompts: those of one pass over the whole prompt, however the engine came by them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from engine_fakes import LENGTH, VOCAB, HashModel, Recorder, hash_context, make_engine, make_request, run
from test_engine_model import PROMPTS, build, network, plain_answer

from tern.engine import Engine, FinishReason, ScoredToken
from tern.engine import runner as runner_module
from tern.engine.sampler import NOT_FINITE, score
from tern.errors import ContextLengthError, InvalidRequestError
from tern.model import Batch, KVCache


@dataclass
class PromptRecorder(Recorder):
    """A recorder of the prompt's scores too; `runs` counts how many pieces they came in."""

    scores: list[ScoredToken] = field(default_factory=list)
    runs: int = 0
    raise_on_prompt: bool = False

    def prompt(self, tokens: Sequence[ScoredToken]) -> None:
        assert not self.tokens, "the prompt comes before what follows it"
        assert not self.finishes
        if self.raise_on_prompt:
            raise ValueError("the prompt sink fails as asked")
        self.scores += tokens
        self.runs += 1


def add(
    engine: Engine,
    name: str,
    prompt: Sequence[int],
    top: int | None = 0,
    sink: PromptRecorder | None = None,
    **fields: Any,
) -> PromptRecorder:
    sink = sink or PromptRecorder()
    request = make_request(name, list(prompt), sink=sink, prompt_logprobs=top, **fields)
    engine.add(replace(request, prompt_sink=sink.prompt))
    return sink


def expected(logits: torch.Tensor, prompt: Sequence[int], top: int) -> list[tuple[int, float, int, list[int]]]:
    """Token, score, rank and likeliest tokens of every prompt token but the first, from all logits [tokens, vocab]."""
    answer = []
    for row, token in zip(logits.double().log_softmax(-1)[:-1], prompt[1:], strict=True):
        order = sorted(range(len(row)), key=lambda each: (-float(row[each]), each))
        answer.append((token, float(row[token]), order.index(token) + 1, order[:top]))
    return answer


def check(scores: Sequence[ScoredToken], wanted: Sequence[tuple[int, float, int, list[int]]]) -> None:
    assert len(scores) == len(wanted)
    for found, (token, value, rank, likeliest) in zip(scores, wanted, strict=True):
        assert found.logprob is not None
        assert math.isfinite(found.logprob.logprob)
        assert (found.token_id, found.logprob.token_id, found.logprob.rank) == (token, token, rank)
        assert abs(found.logprob.logprob - value) < 1e-5
        assert [top.token_id for top in found.top_logprobs] == likeliest
        assert [top.rank for top in found.top_logprobs] == list(range(1, len(likeliest) + 1))


def one_pass(architecture: str, prompt: Sequence[int]) -> torch.Tensor:
    """The logits of all rows of one forward pass with no engine, [tokens, vocab]."""
    model, count = network(architecture), len(prompt)
    kv = KVCache.allocate(model.config, num_blocks=1, block_size=count, dtype=model.dtype, device=model.device)
    everything = torch.arange(count)
    batch = Batch(
        token_ids=torch.tensor(prompt),
        positions=everything,
        slots=everything,
        query_starts=torch.tensor([0, count]),
        context_lens=torch.tensor([count]),
        block_tables=torch.zeros(1, 1, dtype=torch.int64),
        logit_rows=torch.tensor([count - 1]),
        max_query_len=count,
        max_context_len=count,
    )
    return model.logits(model.hidden(batch, kv))


@pytest.mark.parametrize("architecture", ["dense", "moe", "moe wint4"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_num_seqs": 1},
        {"max_num_seqs": 8, "max_num_batched_tokens": 9},
        {"max_num_batched_tokens": 2048, "block_size": 5},
        {"enable_prefix_caching": False},
        {"num_kv_blocks": 33, "max_model_len": 130, "block_size": 4, "max_num_batched_tokens": 17},
        {"speculation": "ngram"},
    ],
    ids=["plenty", "one by one", "small chunks", "odd blocks", "no prefix cache", "preempted", "drafts"],
)
def test_scores_are_those_of_one_pass_over_the_prompt(
    architecture: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner_module, "SCORED_ROWS", 7)
    engine = build(architecture, **options)
    wanted = [expected(one_pass(architecture, prompt), prompt, 3) for prompt in PROMPTS]
    for state in ("cold", "warm"):
        sinks = [
            add(engine, f"{state} {number}", prompt, 3, max_tokens=24, ignore_eos=True)
            for number, prompt in enumerate(PROMPTS)
        ]
        run(engine)
        for number, sink in enumerate(sinks):
            check(sink.scores, wanted[number])
            assert sink.ids == plain_answer(architecture, number)
            assert sink.end.num_cached_tokens == 0
    assert engine.stats().preemptions > 0 or "num_kv_blocks" not in options


def hash_logits(model: HashModel, prompt: Sequence[int]) -> torch.Tensor:
    return torch.stack([model.table[hash_context(list(prompt[:end]))] for end in range(1, len(prompt) + 1)])


@pytest.mark.parametrize("length", [1, 2, 4, 5, 31, 32, 33, 64, LENGTH])
@pytest.mark.parametrize("budget", [1, 5, 32])
def test_nothing_is_generated_where_only_scores_are_wanted(length: int, budget: int) -> None:
    model = HashModel()
    engine = make_engine(model, max_num_batched_tokens=budget, max_num_seqs=1)
    prompt = [(number * 7) % VOCAB for number in range(length)]
    sink = add(engine, "scored", prompt, 2, max_tokens=0)
    run(engine)
    check(sink.scores, expected(hash_logits(model, prompt), prompt, 2))
    assert sink.ids == []
    assert (sink.end.reason, sink.end.num_generated_tokens) == (FinishReason.LENGTH, 0)


def test_a_prompt_that_is_preempted_while_it_is_scored_is_scored_once() -> None:
    model = HashModel()
    engine = make_engine(model, num_kv_blocks=24, max_num_seqs=3, max_num_batched_tokens=3)
    writer = add(engine, "first", [3, 4], None, max_tokens=90, ignore_eos=True)
    engine.step()
    prompt = [(number * 5) % VOCAB for number in range(70)]
    sink = add(engine, "second", prompt, max_tokens=3)
    late = add(engine, "third", prompt, None, max_tokens=3)
    while not engine.stats().preemptions:
        engine.step()
    assert 1 < len(sink.scores) < 60
    run(engine)
    check(sink.scores, expected(hash_logits(model, prompt), prompt, 0))
    assert sink.runs > 1
    assert late.scores == []
    assert len(writer.ids) == 90


def test_scoring_computes_what_others_left_and_leaves_what_others_find() -> None:
    engine = make_engine()
    prompt = list(range(3, 40))
    for name, top, cached in (("left", None, 0), ("scored", 0, 0), ("found", None, 36)):
        sink = add(engine, name, prompt, top, max_tokens=1)
        run(engine)
        assert sink.end.num_cached_tokens == cached
        assert len(sink.scores) == (0 if top is None else 36)


def test_a_sequence_that_is_scored_does_not_wait_for_one_that_computes_the_same() -> None:
    engine = make_engine(max_num_batched_tokens=64)
    sinks = [add(engine, str(number), range(3, 30), max_tokens=0) for number in range(2)]
    engine.step()
    assert [len(sink.finishes) for sink in sinks] == [1, 1]
    assert sinks[0].scores == sinks[1].scores


def test_a_prompt_sink_that_fails_ends_its_request_alone() -> None:
    engine = make_engine()
    failing = add(engine, "failing", range(3, 60), sink=PromptRecorder(raise_on_prompt=True))
    sound = add(engine, "sound", range(3, 60))
    run(engine)
    assert failing.end.reason is FinishReason.ERROR
    assert failing.ids == []
    assert (len(sound.scores), len(sound.ids)) == (56, 8)


def test_a_prompt_sink_may_cancel_another_request() -> None:
    engine = make_engine(max_num_batched_tokens=64)
    other = add(engine, "other", range(3, 20), max_tokens=0)
    sink = PromptRecorder()
    request = make_request("cancels", [5, 6, 7], sink=sink, prompt_logprobs=0, priority=-1)
    engine.add(replace(request, prompt_sink=lambda _: engine.cancel("other") and None))
    run(engine)
    assert (other.end.reason, other.scores) == (FinishReason.CANCELLED, [])
    assert sink.end.num_generated_tokens > 0


@pytest.mark.parametrize("max_tokens", [0, 3])
def test_scores_that_are_no_numbers_end_the_request(max_tokens: int) -> None:
    model = HashModel()
    model.spoil_token = 9
    engine = make_engine(model)
    spoiled = add(engine, "spoiled", [5, 9, 6, 7, 8, 3], max_tokens=max_tokens)
    sound = add(engine, "sound", [5, 6, 7])
    run(engine)
    assert (spoiled.end.reason, spoiled.end.message, spoiled.scores) == (FinishReason.ERROR, NOT_FINITE, [])
    assert len(sound.scores) == 2


def test_a_row_without_a_finite_score_is_refused() -> None:
    logits = torch.zeros(2, 5)
    assert isinstance(score(logits, [1, 2], [0, 0]), list)
    logits[1] = float("nan")
    assert score(logits, [1, 2], [0, 0]) == NOT_FINITE


def test_what_cannot_be_scored_is_refused() -> None:
    engine = make_engine()
    with pytest.raises(InvalidRequestError, match="max_tokens is 0"):
        make_request("nothing", [5], max_tokens=0)
    with pytest.raises(InvalidRequestError, match="prompt_logprobs is 21"):
        make_request("much", [5], prompt_logprobs=21)
    for length, tokens in ((LENGTH + 1, 0), (LENGTH, 1), (LENGTH, None)):
        with pytest.raises(ContextLengthError):
            add(engine, "long", [5] * length, max_tokens=tokens)


def test_only_allowed_tokens_are_chosen() -> None:
    model = HashModel()
    engine = make_engine(model)
    free = add(engine, "free", [5, 6], None, max_tokens=30, ignore_eos=True)
    held = add(engine, "held", [5, 6], None, max_tokens=30, allowed_token_ids=[7, 7, 11], logprobs=1)
    run(engine)
    text = [5, 6]
    for token in held.ids:
        row = model.table[hash_context(text)]
        assert token == (7 if row[7] >= row[11] else 11)
        text.append(token)
    assert set(held.ids) == {7, 11} != set(free.ids)
    assert any(token.top_logprobs[0].token_id not in (7, 11) for token in held.tokens), "scores are the model's own"


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"allowed_token_ids": [VOCAB]}, f"token id {VOCAB}"),
        ({"allowed_token_ids": [7], "bad_token_sequences": ((7,),)}, "forbidden by bad_words"),
        ({"allowed_token_ids": [2], "min_tokens": 1}, "held back by min_tokens"),
        ({"allowed_token_ids": "7"}, "must be a list"),
        ({"allowed_token_ids": [True]}, "whole number"),
    ],
)
def test_tokens_that_cannot_be_allowed(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidRequestError, match=said):
        add(make_engine(), "wrong", [5], None, **fields)
