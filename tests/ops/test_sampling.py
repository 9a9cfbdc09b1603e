"""The choice of tokens by every kernel against plain torch."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator

import pytest
import torch

from tern.ops import cpu, reference_sampling
from tern.ops.reference_sampling import Draws

AVAILABLE = [found.name for found in cpu.instruction_sets() if found.available]


@pytest.fixture(params=AVAILABLE)
def kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    """Operations run on this instruction set, with three threads."""
    with cpu.use_machine(request.param, 3):
        yield request.param


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def some_draws(rng: random.Random, rows: int, vocab: int) -> Draws:
    def column(values: tuple[float, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor([rng.choice(values) for _ in range(rows)], dtype=dtype)

    return Draws(
        uniforms=torch.tensor([rng.random() for _ in range(rows)], dtype=torch.float64),
        temperatures=column((0.3, 0.8, 1.0, 3.0), torch.float32),
        min_p=column((0.0, 0.0, 0.05), torch.float64),
        top_k=column((vocab, vocab, 1, min(7, vocab), max(vocab // 2, 1)), torch.int64),
        top_p=column((1.0, 0.8, 0.95, 1e-9), torch.float64),
    )


@pytest.mark.parametrize("width", [1, 2, 15, 16, 17, 255, 256, 257, 5000])
def test_the_largest_and_its_first_place(kernels: str, width: int) -> None:
    logits = noise(9, width, seed=width).bfloat16().float()  # many ties
    logits[1] = -math.inf
    logits[2, width // 2 :] = math.nan
    logits[3] = 0.0
    logits[4, -1] = math.inf
    peaks, ids, told = cpu.largest(logits)
    expected, expected_ids, expected_told = reference_sampling.largest(logits)
    assert torch.equal(peaks.nan_to_num(nan=7e7), expected.nan_to_num(nan=7e7)), kernels
    assert torch.equal(ids, expected_ids), kernels
    assert torch.equal(told, expected_told), kernels
    finite = expected.isfinite()
    assert torch.equal(expected_told[finite], expected_ids[finite])
    assert expected_told[~finite].tolist() == [reference_sampling.NO_TOKEN] * 3


@pytest.mark.parametrize("width", [1, 2, 40, 256, 300, 9000])
def test_draws_are_those_of_plain_torch(kernels: str, width: int) -> None:
    rng = random.Random(width)
    rows = 200 if width < 9000 else 60
    logits = (noise(rows, width, seed=width) * 2).bfloat16().float()
    logits[rng.randrange(rows), 1:] = -math.inf
    peaks, _, _ = reference_sampling.largest(logits)
    draws = some_draws(rng, rows, width)
    expected = reference_sampling.draw(logits.clone(), peaks, draws)
    assert torch.equal(cpu.draw(logits.clone(), peaks, draws), expected), kernels


def test_a_flat_row_and_uniforms_at_the_ends(kernels: str) -> None:
    for top_k in (600, 599):
        draws = Draws(
            uniforms=torch.tensor([0.0, 0.5, 1.0 - 2**-53], dtype=torch.float64),
            temperatures=torch.ones(3),
            min_p=torch.zeros(3, dtype=torch.float64),
            top_k=torch.full((3,), top_k),
            top_p=torch.ones(3, dtype=torch.float64),
        )
        ids = cpu.draw(torch.zeros(3, 600), torch.zeros(3), draws)
        assert ids.tolist() == [0, top_k // 2, top_k - 1], kernels


def test_a_nucleus_of_more_than_the_first_candidates_is_a_share_of_top_k(kernels: str) -> None:
    """top_k ends beyond the candidates that the reference sorts first, and the nucleus before."""
    logits = torch.zeros(1, 5000)
    logits[0, :4] = torch.tensor(
        [0.32, 0.24, 0.24, 0.1]
    ).log()  # the rest weigh 2e-5 each, 0.01 within top_k and 0.1 in all
    logits[0, 4:] = math.log(2e-5)
    draws = Draws(
        uniforms=torch.tensor([1.0 - 2**-53], dtype=torch.float64),
        temperatures=torch.ones(1),
        min_p=torch.zeros(1, dtype=torch.float64),
        top_k=torch.tensor([504]),
        top_p=torch.tensor([0.87], dtype=torch.float64),
    )
    assert reference_sampling.draw(logits.clone(), logits.amax(1), draws).tolist() == [
        2
    ]  # 0.87 of 0.91 is less than 0.8, 0.87 of all is more
    assert cpu.draw(logits.clone(), logits.amax(1), draws).tolist() == [2], kernels


def test_no_rows_and_bad_draws(kernels: str) -> None:
    empty = some_draws(random.Random(0), 0, 5)
    assert cpu.draw(torch.zeros(0, 5), torch.zeros(0), empty).shape == (0,), kernels
    assert cpu.largest(torch.zeros(0, 5))[1].shape == (0,)
    one = some_draws(random.Random(0), 1, 5)
    with pytest.raises(ValueError, match="a draw for each row"):
        cpu.draw(torch.zeros(2, 5), torch.zeros(2), one)


def test_logits_that_are_none_are_never_drawn(kernels: str) -> None:
    """The engine ends such rows before; the kernels must not be led astray by one all the same."""
    logits = noise(40, 700)
    logits[:, ::3] = math.nan
    peaks = logits.nan_to_num(nan=-math.inf).amax(1)
    for draws in (some_draws(random.Random(1), 40, 700), some_draws(random.Random(2), 40, 700)):
        ids = cpu.draw(logits.clone(), peaks, draws)
        assert (ids % 3 != 0).all(), kernels
        assert ((ids >= 0) & (ids < 700)).all()


def test_a_row_without_a_peak_gets_a_token_and_disturbs_no_other(kernels: str) -> None:
    logits = noise(30, 700)
    logits[0] = -math.inf
    logits[10, 5] = math.nan
    logits[20, 5] = math.inf
    peaks, _, _ = reference_sampling.largest(logits)
    draws = some_draws(random.Random(3), 30, 700)
    sound = torch.tensor([row % 10 > 0 for row in range(30)])
    expected = reference_sampling.draw(logits[sound], peaks[sound], draws.rows(sound))
    for draw in (cpu.draw, reference_sampling.draw):
        ids = draw(logits.clone(), peaks, draws)
        assert ((ids >= 0) & (ids < 700)).all(), kernels
        assert torch.equal(ids[sound], expected), kernels
