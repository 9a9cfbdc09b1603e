"""Norms of the GPU's kernels beside the reference, and beside the launches that they stand for."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tern.ops import reference
from tern.ops.cuda import add_rms_norm
from tern.ops.delta import Delta, ExpertOutputs
from tern.ops.gpu_weights import Fp8Rows, RowForm, round_rows_to_fp8
from tests.compare import assert_close

SHAPES = [(1, 8), (3, 100), (2, 2560), (17, 33), (0, 16)]
TOLERANCES = {torch.float32: 1e-6, torch.bfloat16: 1e-2}
EXPERTS = 11


def noise(*shape: int, seed: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def outputs_of(tokens: int, width: int, pairs: int, *, shared: bool, dtype: torch.dtype, device: torch.device):
    """What `pairs` experts a token, out of order, came to."""
    made = [noise(tokens * pairs, width, seed=3, dtype=dtype, device=device)]
    made.append(noise(tokens, pairs, seed=4, dtype=torch.float32, device=device).softmax(dim=-1))
    scores = noise(tokens, EXPERTS, seed=5, dtype=torch.float32, device=device)
    beside = noise(tokens, width, seed=6, dtype=dtype, device=device) if shared else None
    return ExpertOutputs(*made, scores.topk(pairs, dim=-1).indices, beside)


def assert_same(found: Tensor, expected: Tensor, dtype: torch.dtype, device: torch.device) -> None:
    """Bit by bit where kernels are interpreted; compiled, a product and a sum may be rounded together."""
    if device.type == "cpu":
        assert torch.equal(found, expected)
    else:
        assert_close(found, expected, tolerance=TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("with_delta", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_add_rms_norm(shape: tuple[int, int], with_delta: bool, dtype: torch.dtype, device: torch.device) -> None:
    residual = noise(*shape, seed=0, dtype=dtype, device=device)
    weight = noise(shape[1], seed=1, dtype=dtype, device=device)
    delta = noise(*shape, seed=2, dtype=dtype, device=device) if with_delta else None
    expected = reference.add_rms_norm(delta, residual, weight, 1e-5)
    found = add_rms_norm(delta, residual, weight, 1e-5)
    assert torch.equal(found[1], expected[1])
    assert_close(found[0], expected[0], tolerance=TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", [*TOLERANCES, torch.float16])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("pairs", [1, 2, 3, 6, 8])
@pytest.mark.parametrize("shape", [(1, 2560), (5, 100), (17, 33), (0, 16), (2, 8)])
def test_experts_are_summed_as_if_apart(
    shape: tuple[int, int], pairs: int, shared: bool, dtype: torch.dtype, device: torch.device
) -> None:
    delta = outputs_of(*shape, pairs, shared=shared, dtype=dtype, device=device)
    residual = noise(*shape, seed=0, dtype=dtype, device=device)
    weight = noise(shape[1], seed=1, dtype=dtype, device=device)
    found = add_rms_norm(delta, residual, weight, 1e-5)
    expected = add_rms_norm(delta.sum(), residual, weight, 1e-5)
    for mine, theirs in zip(found, expected, strict=True):
        assert_same(mine, theirs, dtype, device)


def test_experts_are_added_in_the_order_of_their_numbers(device: torch.device) -> None:
    """Large numbers that cancel tell orders apart; an expert chosen twice comes in the order of the pairs."""
    values = torch.tensor([3e8, 1.0, -3e8, 0.25], device=device)
    outputs = values.repeat(3, 1).flatten()[:, None].expand(12, 4).contiguous()
    experts = torch.tensor([[0, 1, 2, 3], [0, 2, 1, 3], [5, 1, 5, 1]], device=device)
    delta = ExpertOutputs(outputs, torch.ones(3, 4, device=device), experts, None)
    _, summed = add_rms_norm(delta, torch.zeros(3, 4, device=device), torch.ones(4, device=device), 1e-5)
    assert summed[:, 0].tolist() == [0.25, 1.25, 0.0]
    assert torch.equal(delta.sum(), summed)


@pytest.mark.parametrize("form", ["fp8", "both"])
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("kind", ["none", "rows", "experts"])
@pytest.mark.parametrize("shape", [*SHAPES, (2, 128), (1, 257)])
def test_rows_in_fp8_are_the_plain_ones_rounded(
    shape: tuple[int, int], kind: str, dtype: torch.dtype, form: RowForm, device: torch.device
) -> None:
    residual = noise(*shape, seed=0, dtype=dtype, device=device)
    weight = noise(shape[1], seed=1, dtype=dtype, device=device)
    delta: Delta | None = None
    if kind != "none":
        delta = outputs_of(*shape, 6, shared=True, dtype=dtype, device=device)
        delta = delta if kind == "experts" else delta.sum()
    rows, summed = add_rms_norm(delta, residual, weight, 1e-5, form)
    normed, expected_sum = add_rms_norm(delta, residual, weight, 1e-5)
    assert isinstance(rows, Fp8Rows)
    assert rows.dtype == dtype
    assert torch.equal(summed, expected_sum)
    assert (rows.plain is None) == (form == "fp8")
    assert rows.plain is None or torch.equal(rows.plain, normed)
    expected = round_rows_to_fp8(normed.cpu())
    assert torch.equal(rows.scales.cpu(), expected.scales)
    assert torch.equal(rows.values.cpu().float(), expected.values.float())


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter's arithmetic
@pytest.mark.parametrize("form", ["plain", "both"])
def test_what_is_not_a_number_stays_in_its_row(form: RowForm, device: torch.device) -> None:
    delta = outputs_of(7, 300, 3, shared=True, dtype=torch.bfloat16, device=device)
    assert delta.shared is not None
    delta.outputs[4, 17] = math.nan  # a pair of token 1
    delta.shared[3, 299] = math.inf
    residual = noise(7, 300, seed=0, dtype=torch.bfloat16, device=device)
    residual[5, 0] = -math.inf
    weight = torch.ones(300, dtype=torch.bfloat16, device=device)
    rows, summed = add_rms_norm(delta, residual, weight, 1e-5, form)
    expected, expected_sum = reference.add_rms_norm(delta.sum(), residual, weight, 1e-5)
    damaged = [1, 3, 5]
    normed = rows.plain if isinstance(rows, Fp8Rows) else rows
    assert normed is not None
    assert torch.equal(normed.isnan(), expected.isnan())
    assert not summed.isfinite().all(dim=1)[damaged].any()
    sound = [0, 2, 4, 6]
    assert_same(summed[sound], expected_sum[sound], torch.bfloat16, device)
    if isinstance(rows, Fp8Rows):
        assert rows.values.float().isfinite().all(dim=1).tolist() == [row in sound for row in range(7)]
        assert rows.scales.isfinite().all(dim=1)[sound].all()


def test_a_row_alone_is_as_in_a_batch(device: torch.device) -> None:
    delta = outputs_of(9, 260, 4, shared=True, dtype=torch.bfloat16, device=device)
    assert delta.shared is not None
    residual = noise(9, 260, seed=0, dtype=torch.bfloat16, device=device)
    weight = noise(260, seed=1, dtype=torch.bfloat16, device=device)
    rows, summed = add_rms_norm(delta, residual, weight, 1e-5, "fp8")
    for row in range(9):
        own = slice(row, row + 1)
        one = ExpertOutputs(
            delta.outputs[row * 4 : row * 4 + 4], delta.weights[own], delta.experts[own], delta.shared[own]
        )
        alone, alone_sum = add_rms_norm(one, residual[own], weight, 1e-5, "fp8")
        assert torch.equal(alone_sum, summed[own])
        assert torch.equal(alone.values.float(), rows.values[own].float())
        assert torch.equal(alone.scales, rows.scales[own])


def test_what_lies_behind_a_row_is_not_read(device: torch.device) -> None:
    padded = torch.full((4, 48), math.nan, device=device)
    padded[:, :33] = 1.0
    normed, _ = add_rms_norm(None, padded[:, :33], torch.ones(33, device=device), 0.0)
    assert torch.equal(normed, torch.ones(4, 33, device=device))
