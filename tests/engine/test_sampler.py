"""The vectorised sampler against a plain reference: thousands of settings, exact distributions, bad logits."""

from __future__ import annotations

import math
import random
from array import array
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from engine_fakes import Recorder

from tern.engine import GeneratedToken, Request, SamplingParams
from tern.engine.sampler import ALL_MASKED, NOT_FINITE, Sampler
from tern.engine.sampling_state import SamplingState, uniform


@dataclass
class Row:
    """What the sampler reads of a sequence."""

    sampling: SamplingState
    token_ids: array[int]
    num_generated_tokens: int


def make_row(
    prompt: tuple[int, ...] = (1,),
    generated: tuple[int, ...] = (),
    stop_ids: frozenset[int] = frozenset(),
    bad: tuple[tuple[int, ...], ...] = (),
    **fields: Any,
) -> Row:
    params = SamplingParams(**{"max_tokens": None, "seed": 0, **fields})
    request = Request("r", prompt, params, Recorder(), bad_token_sequences=bad)
    return Row(SamplingState(request, stop_ids), array("q", prompt + generated), len(generated))


def sample(logits: torch.Tensor, rows: list[Row]) -> list[Any]:
    return Sampler().sample(logits.clone(), rows)  # type: ignore[arg-type]


def reference_logits(raw: list[float], row: Row) -> list[float]:
    """The edited logits of one row, one token at a time, straight from the definitions."""
    state, params = row.sampling, row.sampling.params
    prompt, generated = list(row.token_ids)[: -row.num_generated_tokens or None], []
    if row.num_generated_tokens:
        generated = list(row.token_ids)[-row.num_generated_tokens :]
    logits = [value + params.logit_bias.get(token, 0.0) for token, value in enumerate(raw)]
    for token in range(len(logits)):
        if token in prompt or token in generated:
            value, repetition = logits[token], params.repetition_penalty
            logits[token] = value / repetition if value > 0 else value * repetition
        count = generated.count(token)
        if count:
            logits[token] -= params.presence_penalty + params.frequency_penalty * count
    if len(generated) < params.min_tokens:
        for token in state.stop_ids.tolist():
            logits[token] = -math.inf
    return logits


def mask_bad(logits: list[float], row: Row, bad: tuple[tuple[int, ...], ...]) -> None:
    generated = list(row.token_ids)[len(row.token_ids) - row.num_generated_tokens :]
    for words in bad:
        prefix = list(words[:-1])
        if len(prefix) <= len(generated) and generated[len(generated) - len(prefix) :] == prefix:
            logits[words[-1]] = -math.inf


def reference_distribution(logits: list[float], params: SamplingParams) -> list[tuple[int, float]]:
    """(token, probability) in the order in which the draw walks through them."""
    peak = max(logits)
    weights = [math.exp((value - peak) / params.temperature) for value in logits]
    order = [token for token, weight in enumerate(weights) if weight >= params.min_p and weight > 0]
    if 0 < params.top_k < len(logits) or params.top_p < 1:
        order.sort(key=lambda token: (-logits[token], token))
        if params.top_k > 0:
            order = order[: params.top_k]
        total, kept, reached = sum(weights[token] for token in order), [], 0.0
        for token in order:
            if reached >= params.top_p * total:
                break
            kept.append(token)
            reached += weights[token]
        order = kept
    total = sum(weights[token] for token in order)
    return [(token, weights[token] / total) for token in order]


def random_setting(rng: random.Random, vocab: int) -> tuple[Row, tuple[tuple[int, ...], ...]]:
    maybe = rng.random
    prompt = tuple(rng.randrange(vocab) for _ in range(rng.randint(1, 12)))
    generated = tuple(rng.randrange(min(vocab, 6)) for _ in range(rng.randint(0, 12)))
    bad: tuple[tuple[int, ...], ...] = ()
    if maybe() < 0.3:
        tail = generated[-rng.randint(1, 3) :]
        bad = ((rng.randrange(vocab),), (*tail, rng.randrange(vocab)), (3, 1, rng.randrange(vocab)))
    fields: dict[str, Any] = {
        "temperature": rng.choice([0.0, 0.2, 0.8, 1.0, 2.5]),
        "top_k": rng.choice([-1, -1, 0, 1, 2, 5, 40, vocab, 10 * vocab]),
        "top_p": rng.choice([1.0, 1.0, 0.95, 0.8, 0.5, 0.01]),
        "min_p": rng.choice([0.0, 0.0, 0.05, 0.3, 1.0]),
        "repetition_penalty": rng.choice([1.0, 1.0, 1.3, 0.7]),
        "presence_penalty": rng.choice([0.0, 0.0, 1.5, -1.0]),
        "frequency_penalty": rng.choice([0.0, 0.0, 0.4, -0.4]),
        "min_tokens": rng.choice([0, 0, 5]),
        "seed": rng.randrange(2**62),
        "logit_bias": {rng.randrange(vocab): rng.uniform(-9, 9) for _ in range(3)} if maybe() < 0.3 else {},
        "logprobs": rng.choice([None, None, 0, 3]),
    }
    row = make_row(prompt, generated, frozenset({1, 2}) if maybe() < 0.5 else frozenset(), bad, **fields)
    return row, bad


@pytest.mark.parametrize("vocab", [16, 61, 300, 1000])
def test_thousands_of_random_settings_agree_with_the_plain_reference(vocab: int) -> None:
    rng = random.Random(vocab)
    generator = torch.Generator().manual_seed(vocab)
    for _ in range(max(6, 6000 // vocab // 5)):
        settings = [random_setting(rng, vocab) for _ in range(40)]
        logits = torch.randn(40, vocab, generator=generator) * rng.choice([0.1, 2.0, 8.0])
        answers = sample(logits, [row for row, _ in settings])
        for (row, bad), raw, answer in zip(settings, logits.tolist(), answers, strict=True):
            assert isinstance(answer, GeneratedToken)
            expected = reference_logits(raw, row)
            mask_bad(expected, row, bad)
            if row.sampling.params.greedy:
                assert expected[answer.token_id] >= max(expected) - 1e-5
                continue
            number, reached = uniform(row.sampling.stream, row.num_generated_tokens), 0.0
            for token, probability in reference_distribution(expected, row.sampling.params):
                if token == answer.token_id:
                    assert reached - 1e-4 <= number <= reached + probability + 1e-4, row.sampling.params
                    break
                reached += probability
            else:
                pytest.fail(f"token {answer.token_id} should have been filtered out by {row.sampling.params}")


FILTERS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.5},
    {"temperature": 1.7},
    {"top_k": 5},
    {"top_p": 0.7},
    {"min_p": 0.2},
    {"temperature": 0.8, "top_k": 8, "top_p": 0.9},
    {"temperature": 1.4, "top_p": 0.9, "min_p": 0.1},
    {"repetition_penalty": 1.5, "top_p": 0.95},
    {"presence_penalty": 1.0, "frequency_penalty": 0.5, "logit_bias": {4: 1.5, 5: -100.0}},
]
DRAWS = 4000


def chi_square(counts: dict[int, int], distribution: list[tuple[int, float]]) -> tuple[float, float]:
    """The statistic over the tokens expected at least five times, and a bound that chance passes once in 10 000."""
    common = [(token, share * DRAWS) for token, share in distribution if share * DRAWS >= 5]
    statistic = sum((counts.get(token, 0) - expected) ** 2 / expected for token, expected in common)
    freedom = max(len(common) - 1, 1)
    return statistic, freedom * (1 - 2 / (9 * freedom) + 3.72 * math.sqrt(2 / (9 * freedom))) ** 3  # Wilson-Hilferty


def drawn_counts(logits: torch.Tensor, fields: dict[str, Any], *, one_stream: bool) -> tuple[dict[int, int], Row]:
    """Count DRAWS draws: of one seed over many positions, or of many seeds at one position."""
    counts: dict[int, int] = {}
    row = make_row((3, 7), (4, 4, 9), **fields)
    rows = []
    for number in range(DRAWS):
        other = make_row((3, 7), (4, 4, 9), **{**fields, "seed": 11 if one_stream else number})
        other.num_generated_tokens = 3 + number if one_stream else 3
        rows.append(other)
    for first in range(0, DRAWS, 2000):
        for answer in sample(logits.expand(2000, -1), rows[first : first + 2000]):
            counts[answer.token_id] = counts.get(answer.token_id, 0) + 1
    return counts, row


@pytest.mark.parametrize("one_stream", [True, False], ids=["positions", "seeds"])
@pytest.mark.parametrize("fields", FILTERS, ids=str)
def test_draws_follow_the_exact_distribution(fields: dict[str, Any], one_stream: bool) -> None:
    logits = torch.randn(1, 40, generator=torch.Generator().manual_seed(1)) * 1.5
    counts, row = drawn_counts(logits, fields, one_stream=one_stream)
    distribution = reference_distribution(reference_logits(logits[0].tolist(), row), row.sampling.params)
    assert set(counts) <= {token for token, _ in distribution}, "a token was drawn that the filters exclude"
    statistic, bound = chi_square(counts, distribution)
    assert statistic < bound


def test_the_distribution_test_would_notice_a_wrong_temperature() -> None:
    logits = torch.randn(1, 40, generator=torch.Generator().manual_seed(1)) * 1.5
    counts, _ = drawn_counts(logits, {"temperature": 1.1}, one_stream=False)
    wrong = reference_distribution(logits[0].tolist(), SamplingParams(temperature=1.0))
    statistic, bound = chi_square(counts, wrong)
    assert statistic > bound


def test_neighbouring_positions_and_seeds_are_independent() -> None:
    pairs = [(uniform(seed, position), uniform(seed, position + 1)) for seed in range(80) for position in range(100)]
    pairs += [(uniform(seed, 0), uniform(seed + 1, 0)) for seed in range(8000)]
    cells = [0] * 64
    for first, second in pairs:
        assert 0.0 <= first < 1.0
        cells[int(first * 8) * 8 + int(second * 8)] += 1
    expected = len(pairs) / 64
    assert sum((count - expected) ** 2 / expected for count in cells) < 112  # 63 degrees of freedom, p = 1e-4


def test_a_row_draws_the_same_alone_and_among_others() -> None:
    rng = random.Random(8)
    logits = (torch.randn(48, 3000, generator=torch.Generator().manual_seed(3)) * 3).bfloat16().float()  # many ties
    rows = [random_setting(rng, 3000)[0] for _ in range(48)]
    together = sample(logits, rows)
    for index, row in enumerate(rows):
        (alone,) = sample(logits[index : index + 1], [row])
        assert alone.token_id == together[index].token_id


@pytest.mark.parametrize("top_k", [-1, 100, 255, 256, 257, 9000])
def test_a_nucleus_larger_than_the_candidates_is_drawn_from_exactly(top_k: int) -> None:
    vocab = 20000
    logits = torch.randn(1, vocab, generator=torch.Generator().manual_seed(4)) * 0.3
    rows = [make_row(top_p=0.9, top_k=top_k, seed=seed) for seed in range(64)]
    distribution = reference_distribution(logits[0].tolist(), rows[0].sampling.params)
    reached, ends = 0.0, []
    for _, probability in distribution:
        reached += probability
        ends.append(reached)
    for row, answer in zip(rows, sample(logits.expand(64, -1), rows), strict=True):
        number = uniform(row.sampling.stream, 0)
        place = [token for token, _ in distribution].index(answer.token_id)
        assert (ends[place - 1] if place else 0.0) - 1e-5 <= number <= ends[place] + 1e-5


@pytest.mark.parametrize("top_p", [1e-30, 1e-46, 1e-300, 5e-324])
def test_the_smallest_nucleus_is_the_likeliest_token(top_p: float) -> None:
    logits = torch.randn(3, 500, generator=torch.Generator().manual_seed(1))
    rows = [make_row(temperature=1.0, top_p=top_p, seed=seed) for seed in range(3)]
    assert [token.token_id for token in sample(logits, rows)] == logits.argmax(dim=1).tolist()


@pytest.mark.parametrize(
    ("top_p", "vocab", "kept"),
    [(0.1, 10, 1), (0.2, 10, 2), (0.4, 10, 4), (0.6, 10, 6), (0.8, 10, 8), (0.05, 20, 1), (0.3, 20, 6)],
)
def test_a_nucleus_that_is_reached_exactly_takes_no_token_more(top_p: float, vocab: int, kept: int) -> None:
    rows = [make_row(temperature=1.0, top_p=top_p, seed=seed) for seed in range(300)]
    drawn = {token.token_id for token in sample(torch.zeros(300, vocab), rows)}
    assert drawn == set(range(kept))


def test_greedy_takes_the_lowest_id_of_equals() -> None:
    for vocab in (7, 256, 700):
        logits = torch.zeros(2, vocab)
        logits[1, [vocab - 1, vocab // 2]] = 3.0
        ids = [answer.token_id for answer in sample(logits, [make_row(temperature=0.0)] * 2)]
        assert ids == [0, vocab // 2]


def test_top_k_of_equals_keeps_the_lowest_ids() -> None:
    rows = [make_row(top_k=3, seed=seed) for seed in range(60)]
    assert {answer.token_id for answer in sample(torch.zeros(60, 500), rows)} == {0, 1, 2}


@pytest.mark.parametrize("temperature", [0.0, 1e-300, 1e-6, 1e-4])
def test_a_temperature_near_zero_is_greedy(temperature: float) -> None:
    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(9)) * 100
    for seed in range(20):
        (answer,) = sample(logits, [make_row(temperature=temperature, seed=seed)])
        assert answer.token_id == int(logits.argmax())


@pytest.mark.parametrize(
    "fields", [{"temperature": 0.0}, {}, {"top_p": 0.5}, {"logprobs": 2}, {"min_tokens": 1}], ids=str
)
@pytest.mark.parametrize("bad", [math.nan, math.inf, "all -inf"])
def test_logits_that_are_not_finite_end_their_row_only(fields: dict[str, Any], bad: float | str) -> None:
    logits = torch.randn(3, 40, generator=torch.Generator().manual_seed(2))
    logits[1, 7 if isinstance(bad, float) else slice(None)] = bad if isinstance(bad, float) else -math.inf
    good, broken, also_good = sample(logits, [make_row(stop_ids=frozenset({2}), **fields)] * 3)
    assert broken == NOT_FINITE
    assert isinstance(good, GeneratedToken)
    assert isinstance(also_good, GeneratedToken)


def test_a_vocabulary_that_is_masked_whole_is_said() -> None:
    bad = tuple((token,) for token in range(6))
    answers = sample(torch.zeros(2, 6), [make_row(bad=bad), make_row()])
    assert answers[0] == ALL_MASKED
    assert isinstance(answers[1], GeneratedToken)


def test_logprobs_are_those_of_the_raw_logits() -> None:
    logits = torch.randn(3, 80, generator=torch.Generator().manual_seed(6))
    rows = [
        make_row(temperature=0.0, logprobs=3, logit_bias={5: 50.0}),
        make_row(logprobs=0, seed=3, temperature=3.0),
        make_row(temperature=0.0),
    ]
    biased, drawn, silent = sample(logits, rows)
    scores = logits.double().log_softmax(-1)
    assert biased.token_id == 5
    assert biased.logprob.logprob == pytest.approx(float(scores[0, 5]), abs=1e-5)
    assert biased.logprob.rank == 1 + int((scores[0] > scores[0, 5]).sum())
    assert [top.token_id for top in biased.top_logprobs] == scores[0].topk(3).indices.tolist()
    assert [top.rank for top in biased.top_logprobs] == [1, 2, 3]
    assert [top.logprob for top in biased.top_logprobs] == pytest.approx(scores[0].topk(3).values.tolist(), abs=1e-5)
    assert drawn.top_logprobs == ()
    assert drawn.logprob.logprob == pytest.approx(float(scores[1, drawn.token_id]), abs=1e-5)
    assert silent.logprob is None


@pytest.mark.parametrize("wanted", [0, 1, 3, 5, 20])
def test_logprobs_of_equals_are_in_the_order_of_ids(wanted: int) -> None:
    logits = torch.zeros(2, 30)
    logits[0, [4, 7, 9]] = 1.0
    first, second = sample(logits, [make_row(temperature=0.0, logprobs=wanted) for _ in range(2)])
    order = [4, 7, 9, *(token for token in range(30) if token not in (4, 7, 9))]
    assert [(top.token_id, top.rank) for top in first.top_logprobs] == [(order[i], i + 1) for i in range(wanted)]
    assert (first.logprob.token_id, first.logprob.rank) == (4, 1)
    assert [top.token_id for top in second.top_logprobs] == list(range(wanted))
    forced = sample(logits, [make_row(temperature=0.0, logprobs=wanted, logit_bias={9: 50.0}), make_row()])[0]
    assert (forced.logprob.token_id, forced.logprob.rank) == (9, 3)


def test_choices_of_one_seed_differ_and_repeat() -> None:
    def stream(choice: int, seed: int | None = 5) -> int:
        request = Request("r", (1,), SamplingParams(seed=seed), Recorder(), choice_index=choice)
        return SamplingState(request, frozenset()).stream

    assert stream(0) == stream(0)
    assert len({stream(choice) for choice in range(100)}) == 100
    assert stream(1, seed=5) != stream(0, seed=6)
    assert stream(0, seed=None) != stream(0, seed=None)
    assert stream(0, seed=-(2**63)) != stream(0, seed=2**63 - 1)


def test_history_counts_tokens_generated_since_the_last_step() -> None:
    row = make_row((9, 9, 8), (), repetition_penalty=2.0, frequency_penalty=1.0, temperature=0.0)
    for count, token in enumerate([8, 4, 4, *range(10, 60)], start=1):
        row.token_ids.append(token)
        row.num_generated_tokens = count
        logits = torch.full((1, 64), 1.0)
        expected = reference_logits(logits[0].tolist(), row)
        sampler_view = logits.clone()
        Sampler().sample(sampler_view, [row])  # type: ignore[list-item]
        assert sampler_view[0].tolist() == pytest.approx(expected)
