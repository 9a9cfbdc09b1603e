"""The layouts of a GPU's weights hold the numbers that processors' do, and round as they say."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tern.ops import gpu_weights, reference_packed
from tern.ops.gpu_weights import (
    BLOCK,
    FP8_MAX,
    RowPackedWeight,
    plain_rows,
    product,
    round_rows_to_fp8,
    round_to_fp8,
    row_form,
)
from tern.ops.packed import unpack
from tests.memory_peak import MemoryPeak

SHAPES = [(16, 32), (40, 96), (5, 33), (6, 100), (34, 64), (3, 128), (4, 130), (2, 300)]


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_hold_the_numbers_of_panels(shape: tuple[int, int], parts: int, bits: int) -> None:
    if shape[0] % parts:
        pytest.skip("a weight of two parts has halves")
    packed = reference_packed.pack(noise(*shape), bits, parts)
    rows = RowPackedWeight.of(packed)
    assert rows.bits == bits
    assert rows.shape == shape
    assert rows.integers().shape == (shape[0], -(-shape[1] // BLOCK) * BLOCK)
    assert not rows.integers()[:, shape[1] :].any()
    assert torch.equal(rows.floats(), unpack(packed))
    assert rows.integers().to(torch.bfloat16).float().equal(rows.integers().float())


@pytest.mark.parametrize("bits", [4, 8])
def test_a_stack_is_its_weights(bits: int) -> None:
    packed = reference_packed.pack(noise(3, 20, 70), bits, 2)
    stack = RowPackedWeight.of(packed)
    assert stack.experts == 3
    assert stack.shape == (3, 20, 70)
    assert torch.equal(stack.floats(), unpack(packed))
    assert torch.equal(stack[1].floats(), unpack(packed[1]))


def test_a_group_of_zeros_stays_one() -> None:
    weight = noise(16, 64)
    weight[:, :32] = 0
    assert not RowPackedWeight.of(reference_packed.pack(weight, 4)).floats()[:, :32].any()


@pytest.mark.parametrize("shape", [(128, 128), (130, 257), (3, 5), (2, 140, 300)])
@pytest.mark.parametrize("block_wise", [True, False])
def test_fp8_errs_by_half_a_step_of_its_scale(shape: tuple[int, ...], block_wise: bool) -> None:
    weight = noise(*shape) * 10
    rounded = round_to_fp8(weight, block_wise=block_wise)
    assert rounded.shape == shape
    assert rounded.block_wise == (block_wise or max(shape[-2:]) <= BLOCK)
    assert rounded.values.float().abs().max() == FP8_MAX
    # e4m3 has three bits of mantissa: an error of at most a sixteenth, and 2^-10 of the scale near zero
    errors = (rounded.floats() - weight).abs()
    assert (errors <= weight.abs() / 16 + rounded.scales.max() * 2**-10).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(128, 128), (1000, 257), (129, 640), (2, 300, 140)])
@pytest.mark.parametrize("block_wise", [True, False])
def test_fp8_is_the_same_in_runs_of_any_length(
    shape: tuple[int, ...], block_wise: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = (noise(*shape) * torch.linspace(0.1, 9, shape[-2])[:, None]).to(dtype)
    whole = round_to_fp8(weight, block_wise=block_wise)
    for numbers in (1, 3 * BLOCK * shape[-1]):
        monkeypatch.setattr(gpu_weights, "ROUNDED_NUMBERS", numbers)
        in_runs = round_to_fp8(weight, block_wise=block_wise)
        assert torch.equal(in_runs.values.view(torch.uint8), whole.values.view(torch.uint8))
        assert torch.equal(in_runs.scales, whole.scales)


@pytest.mark.parametrize("block_wise", [True, False])
def test_rounding_to_fp8_takes_the_memory_of_a_run(block_wise: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_weights, "ROUNDED_NUMBERS", run := 2 * BLOCK * 256)
    weight = noise(40 * BLOCK + 3, 256).bfloat16()
    with MemoryPeak() as peak:
        rounded = round_to_fp8(weight, block_wise=block_wise)
    assert rounded.nbytes < peak.most < rounded.nbytes + 5 * run * 4


def test_fp8_of_zeros() -> None:
    assert not round_to_fp8(torch.zeros(8, 8), block_wise=True).floats().any()
    rows = round_rows_to_fp8(torch.zeros(2, 200))
    assert not rows.values.float().any()
    assert rows.scales.shape == (2, 2)
    assert rows.shape == (2, 200)


def test_the_form_of_rows_follows_from_who_reads_them() -> None:
    plain, packed = noise(4, 32), reference_packed.pack(noise(16, 32), 4)
    fp8 = round_to_fp8(plain, block_wise=True)
    assert row_form(plain, RowPackedWeight.of(packed), packed) == "plain"
    assert row_form(fp8, fp8) == "fp8"
    assert row_form(plain, fp8) == row_form(fp8, packed) == "both"


def test_rows_in_fp8_alone_are_not_plain() -> None:
    x = noise(2, 8)
    rows = round_rows_to_fp8(x)
    assert plain_rows(x) is plain_rows(rows) is x
    with pytest.raises(ValueError, match="ask for both forms"):
        plain_rows(replace(rows, plain=None))


@pytest.mark.parametrize("rows", [1, 7])
def test_products_are_near_those_of_floats(rows: int) -> None:
    x, weight = noise(rows, 300, seed=1), noise(50, 300, seed=2)
    exact = x @ weight.t()
    packed = RowPackedWeight.of(reference_packed.pack(weight, 8))
    for rounded, tolerance in ((packed, 0.02), (round_to_fp8(weight, block_wise=True), 0.06), (weight, 1e-6)):
        error = (product(x, rounded) - exact).norm() / exact.norm()
        assert torch.isfinite(error)
        assert error <= tolerance
