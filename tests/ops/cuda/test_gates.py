"""The gate of SwiGLU by a GPU's kernels, beside the reference."""

from __future__ import annotations

import math

import pytest
import torch

from tern.ops import reference
from tern.ops.cuda import silu_mul, silu_mul_to_fp8
from tern.ops.gpu_weights import round_rows_to_fp8
from tests.compare import assert_close

TOLERANCES = {torch.float32: 1e-6, torch.float16: 2**-9, torch.bfloat16: 2**-7}
SHAPES = [(0, 8), (1, 1), (3, 33), (2, 128), (5, 1536), (17, 130)]


def noise(rows: int, width: int) -> torch.Tensor:
    return torch.randn(rows, 2 * width, generator=torch.Generator().manual_seed(0)) * 4


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("shape", SHAPES)
def test_silu_mul(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
    gate_up = noise(*shape).to(device, dtype)
    assert_close(silu_mul(gate_up).float(), reference.silu_mul(gate_up).float(), tolerance=TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("shape", SHAPES)
def test_its_rows_in_fp8(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
    gate_up = noise(*shape).to(device, dtype)
    values, scales = silu_mul_to_fp8(gate_up)
    expected, expected_scales = round_rows_to_fp8(silu_mul(gate_up).cpu())
    assert torch.equal(values.cpu().view(torch.uint8), expected.view(torch.uint8))
    assert torch.equal(scales.cpu(), expected_scales)


def test_a_group_of_zeros_stays_one(device: torch.device) -> None:
    gate_up = noise(2, 300).to(device)
    gate_up[1, :128] = 0.0
    values, scales = silu_mul_to_fp8(gate_up)
    assert not values[1, :128].float().any()
    assert scales[1, 0] == 1.0
    assert values[1, 128:256].float().abs().max() == values[1, 256:].float().abs().max() == 448.0


def test_what_lies_beside_and_behind_is_not_read(device: torch.device) -> None:
    padded = torch.full((4, 80), math.nan, device=device)
    padded[:, :66] = 1.0
    assert_close(silu_mul(padded[:, :66]).cpu(), reference.silu_mul(torch.ones(4, 66)), tolerance=1e-6)


def test_an_odd_row_has_no_halves(device: torch.device) -> None:
    with pytest.raises(ValueError, match="7 columns are not"):
        silu_mul(torch.zeros(2, 7, device=device))
