"""The choice of tokens by the GPU's kernels beside the reference: few rows under the interpreter, many on a GPU."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from tern.ops import reference_sampling
from tern.ops.cuda import draw, drawing, keep_allowed, largest, sampling
from tern.ops.cuda.arrival import counters
from tern.ops.reference_sampling import Draws
from tests.ops.test_sampling import some_draws

ON_GPU = torch.cuda.is_available()
MANY = 100 if ON_GPU else 1  # times as many rows on a GPU


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def padded(rows: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The same rows with NaN behind each of them."""
    wide = torch.full((rows.shape[0], rows.shape[1] + 13), math.nan, device=device)
    wide[:, : rows.shape[1]] = rows
    return wide[:, : rows.shape[1]]


def draws_of(
    uniforms: list[float],
    vocab: int,
    *,
    temperature: float = 1.0,
    min_p: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> Draws:
    rows = len(uniforms)
    return Draws(
        uniforms=torch.tensor(uniforms, dtype=torch.float64),
        temperatures=torch.full((rows,), temperature),
        min_p=torch.full((rows,), min_p, dtype=torch.float64),
        top_k=torch.full((rows,), top_k or vocab),
        top_p=torch.full((rows,), top_p, dtype=torch.float64),
    )


def agreeing(tokens: torch.Tensor, logits: torch.Tensor, draws: Draws) -> torch.Tensor:
    """Which `tokens` [rows] the reference draws too, by the same number or one next to it: sums differ in last bits."""
    peaks, _ = reference_sampling.largest(logits)
    agree = torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
    for slack in (-1e-6, 0.0, 1e-6):
        moved = replace(draws, uniforms=(draws.uniforms + slack).clamp(0, 1 - 2**-53))
        agree |= tokens == reference_sampling.draw(logits.clone(), peaks, moved)
    return agree


def both(logits: torch.Tensor, draws: Draws, device: torch.device) -> tuple[list[int], list[int]]:
    """The tokens of the kernels and of the reference, which computes on the CPU."""
    peaks, _ = reference_sampling.largest(logits)
    found = draw(padded(logits, device), peaks.to(device), draws)
    return found.tolist(), reference_sampling.draw(logits.clone(), peaks, draws).tolist()


@pytest.mark.parametrize("width", [1, 2, 1000, 2048, 5003])
def test_the_largest_and_its_first_place(width: int, device: torch.device) -> None:
    logits = noise(7, width, seed=width).bfloat16().float()  # many ties
    logits[1] = -math.inf
    logits[2, width // 2 :] = math.nan
    logits[3] = 0.0
    logits[3, : width // 2] = -0.0
    logits[4, -1] = math.inf
    expected, expected_ids = reference_sampling.largest(logits)
    peaks, ids = largest(padded(logits, device))
    assert torch.equal(peaks.cpu().nan_to_num(nan=7e7), expected.nan_to_num(nan=7e7))
    assert torch.equal(ids.cpu(), expected_ids)


@pytest.mark.parametrize("width", [1, 33, 1000, 5003])
@pytest.mark.parametrize("rows", [[], [2], [3, 0]])
def test_what_a_mask_forbids_is_minus_infinity(width: int, rows: list[int], device: torch.device) -> None:
    logits = noise(4, width, seed=width)
    masks = np.random.default_rng(width).integers(0, 2**32, (len(rows), -(-width // 32)), np.uint32)
    found = padded(logits, device)
    keep_allowed(found, rows, masks)
    if rows:
        reference_sampling.keep_allowed(logits, rows, masks)
    assert torch.equal(found.cpu(), logits)
    assert found._base is not None
    assert found._base[:, width:].isnan().all()


@pytest.mark.parametrize("rounded", [True, False], ids=["ties", "no ties"])
@pytest.mark.parametrize(("width", "rows"), [(1, 4), (2, 8), (40, 16), (1000, 16), (5003, 8)])
def test_draws_are_those_of_the_reference(width: int, rows: int, rounded: bool, device: torch.device) -> None:
    rng = random.Random(width)
    logits = noise(rows * MANY, width, seed=width) * 2
    logits = logits.bfloat16().float() if rounded else logits
    logits[rng.randrange(rows), 1:] = -math.inf
    draws = some_draws(rng, len(logits), width)
    found, expected = both(logits, draws, device)
    assert agreeing(torch.tensor(found), logits, draws).all()
    assert sum(a != b for a, b in zip(found, expected, strict=True)) <= len(found) // 100


def test_evenly_spread_uniforms_give_the_tokens_of_the_reference(device: torch.device) -> None:
    """Evenly spread numbers, none of them at a border between two tokens."""
    number = 20 * MANY
    logits = noise(1, 12, seed=5).expand(number, -1).clone()
    logits[:, 7] = logits[:, 3]
    for fields in ({}, {"top_p": 0.8}, {"top_k": 5, "temperature": 0.7, "top_p": 0.9}):
        draws = draws_of([(place + 0.5) / number for place in range(number)], 12, **fields)
        found, expected = both(logits, draws, device)
        assert found == expected
        assert len(set(found)) > 2


@pytest.mark.parametrize("fields", [{}, {"top_p": 0.7}, {"top_k": 4, "temperature": 1.5}, {"min_p": 0.2}], ids=str)
def test_draws_follow_the_exact_distribution(fields: dict[str, float], device: torch.device) -> None:
    number = 50 * MANY
    logits = noise(1, 9, seed=3)
    rng = random.Random(9)
    draws = draws_of([rng.random() for _ in range(number)], 9, **fields)
    peaks = logits.amax(1).expand(number).to(device)
    found = draw(logits.expand(number, -1).to(device), peaks, draws).cpu()

    shares = ((logits[0].double() - logits.max()) / fields.get("temperature", 1.0)).exp()
    shares[shares < fields.get("min_p", 0.0)] = 0.0
    order = shares.argsort(descending=True)
    kept = order[: int(fields.get("top_k", 9))]
    before = shares[kept].cumsum(0) - shares[kept]
    kept = kept[before < fields.get("top_p", 1.0) * shares[kept].sum()]
    expected = torch.zeros(9, dtype=torch.float64)
    expected[kept] = shares[kept] / shares[kept].sum() * number
    counts = found.bincount(minlength=9).double()
    assert (counts[expected == 0] == 0).all(), "a token was drawn that the filters exclude"
    common = expected >= 5
    statistic = float(((counts - expected)[common] ** 2 / expected[common]).sum())
    freedom = max(int(common.sum()) - 1, 1)
    bound = freedom * (1 - 2 / (9 * freedom) + 3.72 * math.sqrt(2 / (9 * freedom))) ** 3  # Wilson-Hilferty, p = 1e-4
    assert statistic < bound


def test_a_flat_row_and_uniforms_at_the_ends(device: torch.device) -> None:
    for top_k in (600, 599, 3):
        draws = draws_of([0.0, 0.5, 1.0 - 2**-53], 600, top_k=top_k)
        ids = draw(torch.zeros(3, 600, device=device), torch.zeros(3, device=device), draws)
        assert ids.tolist() == [0, top_k // 2, top_k - 1]


@pytest.mark.parametrize(
    ("top_p", "vocab", "kept"), [(0.1, 10, 1), (0.4, 10, 4), (0.6, 10, 6), (0.05, 20, 1), (0.3, 20, 6), (5e-324, 10, 1)]
)
def test_a_nucleus_that_is_reached_exactly_takes_no_token_more(
    top_p: float, vocab: int, kept: int, device: torch.device
) -> None:
    draws = draws_of([0.0, 1.0 - 2**-53], vocab, top_p=top_p)
    ids = draw(torch.zeros(2, vocab, device=device), torch.zeros(2, device=device), draws)
    assert ids.tolist() == [0, kept - 1]


@pytest.mark.parametrize(
    "fields", [{}, {"top_k": 1}, {"top_k": 3}, {"top_p": 1e-9}, {"top_p": 0.9}, {"min_p": 1.0}, {"temperature": 1e-5}]
)
def test_a_row_that_leaves_one_token_gives_it(fields: dict[str, float], device: torch.device) -> None:
    logits = torch.full((2, 5003), -math.inf)
    logits[0, 4321] = -7.0
    logits[1] = noise(5003, seed=1)
    logits[1, 2047] = 60.0
    found, expected = both(logits, draws_of([0.0, 1.0 - 2**-53], 5003, **fields), device)
    assert found == expected == [4321, 2047]


def test_a_row_with_more_candidates_than_are_gathered(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawing, "_CANDIDATES", 4)
    rng = random.Random(2)
    logits = noise(8, 3000, seed=2) * 0.3
    logits[0] = 0.0
    logits[1:3] = logits[1:3].bfloat16().float()
    draws = draws_of([rng.random() for _ in range(8)], 3000, top_k=1500, top_p=0.9)
    found, expected = both(logits, draws, device)
    assert found == expected


@pytest.mark.parametrize("top_k", [0, 5])
def test_a_row_without_a_peak_gets_a_token_and_disturbs_no_other(top_k: int, device: torch.device) -> None:
    logits = noise(5, 3000, seed=4)
    logits[1] = -math.inf
    logits[2, 5] = math.nan
    logits[3, 5] = math.inf
    draws = draws_of([0.3, 0.3, 0.3, 0.3, 0.6], 3000, top_k=top_k)
    peaks, _ = reference_sampling.largest(logits)
    ids = draw(logits.to(device), peaks.to(device), draws).tolist()
    assert all(0 <= token < 3000 for token in ids)
    sound = torch.tensor([0, 4])
    expected = reference_sampling.draw(logits[sound], peaks[sound], draws.rows(sound)).tolist()
    assert [ids[0], ids[4]] == expected


def test_a_row_draws_the_same_alone_and_among_others(device: torch.device) -> None:
    logits = (noise(8, 3000, seed=3) * 3).bfloat16().float().to(device)
    draws = some_draws(random.Random(8), 8, 3000)
    peaks, _ = largest(logits)
    together = draw(logits, peaks, draws).tolist()
    for row in range(8):
        alone = draw(logits[row : row + 1], peaks[row : row + 1], draws.rows(torch.tensor([row])))
        assert alone.tolist() == [together[row]]


def test_more_rows_than_there_are_counters(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    logits = (noise(7, 2500, seed=6) * 3).to(device)
    draws = some_draws(random.Random(6), 7, 2500)
    peaks, ids = largest(logits)
    together = draw(logits, peaks, draws)
    monkeypatch.setattr(sampling, "MOST", 3)
    assert torch.equal(torch.stack(largest(logits)), torch.stack((peaks, ids)))
    assert torch.equal(draw(logits, peaks, draws), together)
    assert not counters(logits.device).any(), "the next launch finds zeros"


def test_no_rows_and_bad_draws(device: torch.device) -> None:
    none = draws_of([], 5)
    assert draw(torch.zeros(0, 5, device=device), torch.zeros(0, device=device), none).shape == (0,)
    assert largest(torch.zeros(0, 5, device=device))[1].shape == (0,)
    with pytest.raises(ValueError, match="0 draws for 2 rows"):
        draw(torch.zeros(2, 5, device=device), torch.zeros(2, device=device), none)
    wide = torch.zeros(1, 1, device=device).expand(1, 2**18)
    with pytest.raises(ValueError, match="262144 tokens cannot be drawn from on a GPU: at most 262143"):
        draw(wide, torch.zeros(1, device=device), draws_of([0.5], 2**18))


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("scale", [0.1, 1.0, 4.0])
def test_a_whole_vocabulary_in_a_graph(scale: float, device: torch.device) -> None:
    """Captured without a word to the host, and replayed: every token stands where its number falls."""
    rows, vocab = 256, 103424
    logits = (noise(rows, vocab, seed=1) * scale).bfloat16().float().to(device)
    draws = some_draws(random.Random(1), rows, vocab).to(device)
    draw(logits, largest(logits)[0], draws)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tokens = draw(logits, largest(logits)[0], draws)
    for seed in (1, 2):
        logits.copy_((noise(rows, vocab, seed=seed) * scale).bfloat16())
        graph.replay()
        assert agreeing(tokens, logits, draws).all()
