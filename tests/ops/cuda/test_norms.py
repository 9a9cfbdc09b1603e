"""Norms of the GPU's kernels beside the reference."""

from __future__ import annotations

import math

import pytest
import torch

from tern.ops import reference
from tern.ops.cuda import add_rms_norm, add_rms_norm_to_fp8
from tern.ops.gpu_weights import round_rows_to_fp8
from tests.compare import assert_close

SHAPES = [(1, 8), (3, 100), (2, 2560), (17, 33), (0, 16)]
TOLERANCES = {torch.float32: 1e-6, torch.bfloat16: 1e-2}


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("with_delta", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_add_rms_norm(shape: tuple[int, int], with_delta: bool, dtype: torch.dtype, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    noise = [torch.randn(shape, generator=generator).to(device, dtype) for _ in range(2)]
    weight = torch.randn(shape[1], generator=generator).to(device, dtype)
    delta = noise[0] if with_delta else None
    expected = reference.add_rms_norm(delta, noise[1], weight, 1e-5)
    found = add_rms_norm(delta, noise[1], weight, 1e-5)
    assert torch.equal(found[1], expected[1])
    assert_close(found[0], expected[0], tolerance=TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("with_delta", [True, False])
@pytest.mark.parametrize("shape", [*SHAPES, (2, 128), (1, 257)])
def test_its_rows_in_fp8(shape: tuple[int, int], with_delta: bool, dtype: torch.dtype, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    noise = [torch.randn(shape, generator=generator).to(device, dtype) for _ in range(2)]
    weight = torch.randn(shape[1], generator=generator).to(device, dtype)
    delta = noise[0] if with_delta else None
    values, scales, summed = add_rms_norm_to_fp8(delta, noise[1], weight, 1e-5)
    normed, expected_sum = add_rms_norm(delta, noise[1], weight, 1e-5)
    assert torch.equal(summed, expected_sum)
    expected, expected_scales = round_rows_to_fp8(normed.cpu())
    # On a GPU the sum of squares may be added in another order, whose last bit seldom tips one rounding.
    assert_close(scales.cpu(), expected_scales, tolerance=TOLERANCES[dtype])
    assert_close(values.cpu().float(), expected.float(), tolerance=2**-3)
    assert shape[0] == 0 or (values.cpu().float() != expected.float()).float().mean() < 0.01


def test_what_lies_behind_a_row_is_not_read(device: torch.device) -> None:
    padded = torch.full((4, 48), math.nan, device=device)
    padded[:, :33] = 1.0
    normed, _ = add_rms_norm(None, padded[:, :33], torch.ones(33, device=device), 0.0)
    assert torch.equal(normed, torch.ones(4, 33, device=device))
