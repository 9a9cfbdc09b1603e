"""Grammars in the engine: what they forbid never comes, whatever else goes on, and their faults end one request."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from engine_fakes import EOS, VOCAB, FixedTimes, HashModel, HashPredictor, Recorder, add, hash_context, make_engine, run
from test_speculation import PROMPTS, Drafts

from tern import ops
from tern.engine import Engine, FinishReason, Steering
from tern.engine.sampler import ALL_MASKED, GRAMMAR_FAILED
from tern.errors import InvalidRequestError
from tern.ops import reference_sampling

LENGTH = 24


class Alternating:
    """Even tokens after odd ones and the other way round, `length` of them; then only the end.

    Before token `free` nothing binds. It fails where `fail_at` says.
    """

    def __init__(self, length: int = LENGTH, *, free: int = 0, fail_at: int = -1, only: set[int] | None = None) -> None:
        self.length, self.free, self.fail_at, self.only = length, free, fail_at, only
        self.tokens: list[int] = []
        self.asked = 0

    @property
    def ended(self) -> bool:
        return self.tokens[-1:] == [EOS] or len(self.tokens) >= self.length

    def allowed(self, tokens: Sequence[int]) -> set[int]:
        if len(tokens) >= self.length or (len(tokens) > self.free and tokens[-1] == EOS):
            return {EOS}
        if len(tokens) < self.free:
            return set(range(VOCAB))
        odd = not tokens[-1] % 2 if len(tokens) else True
        return {t for t in range(3, VOCAB) if t % 2 == odd and (self.only is None or t in self.only)}

    def fill(self, mask: np.ndarray, ahead: Sequence[int]) -> bool:
        self.asked += 1
        tokens = list(self.tokens)
        if len(tokens) == self.fail_at:
            raise ValueError("the grammar fails as asked")
        assert mask.shape == (-(-VOCAB // 32),)
        assert not mask.any()
        for token in ahead:
            if token not in self.allowed(tokens):
                return False
            tokens.append(token)
        if len(tokens) < self.free:
            return False
        for token in self.allowed(tokens):
            mask[token // 32] |= np.uint32(1 << token % 32)
        return True

    def accept(self, token_id: int) -> None:
        assert token_id in self.allowed(self.tokens), "a token that the grammar forbids"
        self.tokens.append(token_id)


def expected(prompt: list[int], length: int = LENGTH, free: int = 0) -> list[int]:
    """Greedy tokens with no engine."""
    model, grammar = HashModel(), Alternating(length, free=free)
    while len(grammar.tokens) < length:
        logits = model.table[hash_context(prompt + grammar.tokens)]
        grammar.tokens.append(max(grammar.allowed(grammar.tokens), key=lambda token: float(logits[token])))
    return grammar.tokens


def answers(engine: Engine, name: str, **fields: Any) -> list[list[int]]:
    values = {"max_tokens": LENGTH + 8, **fields}
    sinks = [add(engine, f"{name} {i}", prompt, grammar=Alternating(), **values) for i, prompt in enumerate(PROMPTS)]
    others = [add(engine, f"{name} free {i}", prompt, max_tokens=9) for i, prompt in enumerate(PROMPTS[:2])]
    run(engine)
    assert all(sink.end.reason is FinishReason.STOP for sink in sinks)
    assert all(sink.finishes for sink in others)
    return [sink.ids for sink in sinks]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_num_seqs": 1},
        {"max_num_batched_tokens": 8},
        {"max_num_seqs": 2, "max_num_batched_tokens": 3},
        {"block_size": 1},
        {"enable_prefix_caching": False},
        {"num_kv_blocks": 26, "max_num_batched_tokens": 12},
    ],
    ids=str,
)
def test_greedy_answers_are_those_without_an_engine(options: dict[str, Any]) -> None:
    engine = make_engine(**options)
    wanted = [expected(prompt) for prompt in PROMPTS]
    for state in ("cold", "warm"):
        assert answers(engine, state) == wanted
    assert engine.stats().grammar_seconds > 0
    assert engine.stats().blocks_free == engine.stats().blocks_total


@pytest.mark.parametrize("wrong_every", [1, 2, 7, 10**9])
@pytest.mark.parametrize("fields", [{}, {"temperature": 1.0, "seed": 3, "top_p": 0.9}], ids=["greedy", "sampled"])
def test_drafts_change_nothing(fields: dict[str, Any], wrong_every: int) -> None:
    wanted = answers(make_engine(), "known", **fields)

    def of(sequence: Any) -> list[int]:
        done = sequence.num_generated_tokens
        if "free" in sequence.request_id:
            return []
        told = wanted[int(sequence.request_id.split()[-1])][done : done + 5]
        return [t ^ 1 if (done + k) % wrong_every == wrong_every - 1 else t for k, t in enumerate(told)]

    engine = make_engine()
    engine.scheduler.drafter = Drafts(of)
    assert answers(engine, "drafted", **fields) == wanted
    assert engine.stats().drafted_tokens > 0
    assert (engine.stats().accepted_tokens > 0) == (wrong_every > 1)


def test_the_predictor_drafts_what_the_grammar_allows() -> None:
    model = HashModel()
    model.mtp = HashPredictor(model)
    engine = make_engine(model, speculation="mtp", num_speculative_tokens=3)
    engine.drafter.times = FixedTimes()  # type: ignore[assignment]
    assert answers(engine, "predicted") == [expected(prompt) for prompt in PROMPTS]
    assert engine.stats().accepted_tokens > LENGTH


def test_nothing_binds_before_the_grammar_begins() -> None:
    engine = make_engine()
    sink = add(engine, "r", [5, 6], grammar=Alternating(free=5), max_tokens=40)
    plain = add(make := make_engine(), "plain", [5, 6], max_tokens=5)
    run(engine)
    run(make)
    assert sink.ids[:5] == plain.ids
    assert sink.ids == expected([5, 6], free=5)


@pytest.mark.parametrize(
    "fields",
    [
        {"min_tokens": 30},
        {"ignore_eos": True},
        {"bad_token_sequences": ((EOS,), *((t,) for t in range(3, VOCAB)))},
        {"ignore_eos": True, "min_tokens": 30, "bad_token_sequences": ((EOS,),)},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_the_grammar_wins_where_others_leave_nothing(fields: dict[str, Any]) -> None:
    engine = make_engine()
    sink = add(engine, "r", [5, 6], grammar=Alternating(), max_tokens=40, **fields)
    run(engine)
    assert sink.ids == expected([5, 6])
    assert sink.end.reason is FinishReason.STOP


def test_bad_words_and_biases_count_within_the_grammar() -> None:
    engine = make_engine()
    plain = expected([5, 6])
    sink = add(engine, "r", [5, 6], grammar=Alternating(), max_tokens=40, bad_token_sequences=((plain[0],),))
    biased = add(engine, "b", [5, 6], grammar=Alternating(), max_tokens=40, logit_bias={40: 100.0, 41: 100.0})
    run(engine)
    assert plain[0] not in sink.ids
    assert biased.ids == [41, 40] * (LENGTH // 2)


def test_logprobs_are_those_of_the_unmodified_model() -> None:
    engine = make_engine()
    sink = add(engine, "r", [5, 6], grammar=Alternating(), max_tokens=40, logprobs=2)
    run(engine)
    for place, token in enumerate(sink.tokens):
        scores = HashModel().table[hash_context([5, 6, *sink.ids[:place]])].log_softmax(-1)
        assert token.logprob is not None
        assert token.logprob.logprob == pytest.approx(float(scores[token.token_id]), abs=1e-5)
        assert token.top_logprobs[0].token_id == int(scores.argmax())


def test_forced_tokens_are_told_to_the_grammar() -> None:
    engine = make_engine()
    grammar = Alternating()
    sink = Recorder(script={1: Steering(force=(4, 7, 10))})
    add(engine, "r", [5, 6], sink=sink, grammar=grammar, max_tokens=40)
    run(engine)
    assert grammar.tokens == sink.ids
    assert sink.ids[1:4] == [4, 7, 10]


def test_a_grammar_that_refuses_a_forced_token_ends_its_request() -> None:
    engine = make_engine()
    sink = Recorder(script={1: Steering(force=(5,))})
    add(engine, "r", [5, 6], sink=sink, grammar=Alternating(), max_tokens=40)
    run(engine)
    assert sink.end.reason is FinishReason.ERROR
    assert sink.end.message == GRAMMAR_FAILED


@pytest.mark.parametrize("fail_at", [0, 7])
def test_a_grammar_that_fails_ends_its_request_alone(fail_at: int) -> None:
    engine = make_engine()
    broken = add(engine, "broken", [5, 6], grammar=Alternating(fail_at=fail_at), max_tokens=40)
    good = add(engine, "good", [5, 6], grammar=Alternating(), max_tokens=40)
    run(engine)
    assert broken.end.reason is FinishReason.ERROR
    assert broken.end.message == GRAMMAR_FAILED
    assert len(broken.ids) == fail_at
    assert good.ids == expected([5, 6])
    assert engine.stats().failed_steps == 0
    assert add(engine, "again", [5, 6], grammar=Alternating(), max_tokens=40).finishes == []
    run(engine)


def test_a_grammar_that_allows_nothing_says_so() -> None:
    engine = make_engine()
    sink = add(engine, "r", [5, 6], grammar=Alternating(only=set()), max_tokens=40)
    run(engine)
    assert sink.end.reason is FinishReason.ERROR
    assert sink.end.message == ALL_MASKED


def test_too_few_tokens_are_a_length() -> None:
    engine = make_engine()
    sink = add(engine, "r", [5, 6], grammar=Alternating(), max_tokens=7)
    run(engine)
    assert sink.ids == expected([5, 6])[:7]
    assert sink.end.reason is FinishReason.LENGTH


def test_a_form_without_its_grammar_is_refused() -> None:
    from tern import StructuredOutputsParams

    with pytest.raises(InvalidRequestError, match="make a grammar of it"):
        add(make_engine(), "r", [5], structured_outputs=StructuredOutputsParams(json_object=True))


@pytest.mark.parametrize("vocab", [1, 31, 32, 33, 61, 1000, 3072])
def test_keep_allowed_against_the_definition(vocab: int) -> None:
    generator = torch.Generator().manual_seed(vocab)
    logits = torch.randn(5, vocab, generator=generator)
    rng = np.random.default_rng(vocab)
    masks = rng.integers(0, 2**32, (3, -(-vocab // 32)), dtype=np.uint32)
    masks[2] = 0
    rows = [4, 0, 2]
    wanted = logits.clone()
    for row, mask in zip(rows, masks, strict=True):
        for token in range(vocab):
            if not int(mask[token // 32]) >> token % 32 & 1:
                wanted[row, token] = -torch.inf
    for keep in (ops.keep_allowed, reference_sampling.keep_allowed):
        found = logits.clone()
        keep(found, rows, masks)
        assert torch.equal(found, wanted)
    strided = torch.stack([logits, logits], -1)[..., 0]
    ops.keep_allowed(strided, rows, masks)
    assert torch.equal(strided, wanted)
