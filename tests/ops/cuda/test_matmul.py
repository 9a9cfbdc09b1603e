"""Products of the GPU's kernels with weights of every kind beside the reference."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from tern.ops import SwiGLUWeights, reference_gpu, reference_packed
from tern.ops.cuda import linear, logits, swiglu
from tern.ops.cuda.arrival import counters
from tern.ops.cuda.fp8 import round_rows_to_fp8, round_together
from tern.ops.cuda.product_kernel import product_tile
from tern.ops.gpu_weights import Fp8Weight, GpuWeight, RowPackedWeight, round_to_fp8
from tern.ops.gpu_weights import round_rows_to_fp8 as reference_rounding
from tests.compare import assert_close

KINDS = ["int8", "int4", "fp8-blocks", "fp8-whole"]
ALL_KINDS = ["plain", *KINDS]
SHAPES = [(64, 128), (70, 260), (130, 33), (5, 1100), (1, 32)]
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def weight_of(kind: str, *shape: int, seed: int = 1, parts: int = 1) -> GpuWeight:
    """A weight, or a stack, of random numbers whose rows differ in size."""
    floats = noise(*shape, seed=seed) * torch.linspace(0.5, 2, shape[-2])[:, None] / math.sqrt(shape[-1])
    if kind in ("int8", "int4"):
        return RowPackedWeight.of(reference_packed.pack(floats, int(kind[3:]), parts))
    if kind.startswith("fp8"):
        return round_to_fp8(floats, block_wise=kind == "fp8-blocks")
    return floats


def of_type(weight: GpuWeight, dtype: torch.dtype) -> GpuWeight:
    """A plain weight in the type of the rows that it meets; others meet rows of any."""
    return weight.to(dtype) if isinstance(weight, torch.Tensor) else weight


def tolerance(kind: str, dtype: torch.dtype, device: torch.device) -> float:
    """fp8 products of a GPU are added up with fewer bits within 128 depths."""
    return 3e-3 if dtype == torch.float32 and kind.startswith("fp8") and device.type == "cuda" else TOLERANCES[dtype]


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ALL_KINDS)
def test_linear(kind: str, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
    weight = of_type(weight_of(kind, *shape), dtype)
    bias = noise(shape[0], seed=2).to(dtype) if shape[0] != 64 else None
    for rows in (0, 1, 3, 17):
        x = noise(rows, shape[1]).to(dtype)
        expected = reference_gpu.linear(x, weight, bias)
        found = linear(x.to(device), weight.to(device), None if bias is None else bias.to(device))
        assert found.dtype == dtype
        assert_close(found.cpu(), expected, tolerance=tolerance(kind, dtype, device))


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_swiglu(kind: str, device: torch.device) -> None:
    gate_up, down = weight_of(kind, 2 * 70, 1100, parts=2), weight_of(kind, 34, 70, seed=2)
    biases = noise(140, seed=3), noise(34, seed=4)
    for rows in (0, 1, 17):
        x = noise(rows, 1100)
        layer = SwiGLUWeights(gate_up, down, *biases)
        expected = reference_gpu.swiglu(x, layer)
        there = SwiGLUWeights(gate_up.to(device), down.to(device), *(bias.to(device) for bias in biases))
        # What enters `down` may round to the neighbour in fp8.
        wide = 2e-2 if kind.startswith("fp8") else 1e-5
        assert_close(swiglu(x.to(device), there).cpu(), expected, tolerance=wide)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("kind", ALL_KINDS)
def test_a_row_is_the_same_in_any_batch(kind: str, gated: bool, device: torch.device) -> None:
    floats = weight_of(kind, 66, 1100, parts=2), weight_of(kind, 40, 33, seed=2)
    weight, down = (of_type(weight, torch.bfloat16).to(device) for weight in floats)
    layer = SwiGLUWeights(weight, down)

    def compute(x: torch.Tensor) -> torch.Tensor:
        return swiglu(x, layer) if gated else linear(x, weight)

    x = noise(70, 1100).to(device, torch.bfloat16)
    whole = compute(x)
    for rows in (slice(0, 1), slice(5, 6), slice(3, 20)):
        assert torch.equal(compute(x[rows]), whole[rows])


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_chunks_apart_add_up_like_chunks_in_one_program(
    kind: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    floats = weight_of(kind, 66, 2100, parts=2), weight_of(kind, 40, 33, seed=3)
    weight, down = (of_type(weight, torch.bfloat16).to(device) for weight in floats)
    bias = noise(66, seed=2).to(device)
    layer = SwiGLUWeights(weight, down, bias)
    rows = noise(17, 2100).to(device, torch.bfloat16)
    apart = [(linear(x, weight, bias), swiglu(x, layer)) for x in (rows[:1], rows)]
    assert not counters(rows.device).any(), "the next launch finds zeros"
    monkeypatch.setattr("tern.ops.cuda.products.PROCESSORS", 0)
    together = linear(rows, weight, bias), swiglu(rows, layer)
    for products in apart:
        for found, expected in zip(products, together, strict=True):
            assert torch.equal(found, expected[: len(found)])


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_what_lies_around_is_not_read(kind: str, device: torch.device) -> None:
    depth = 100
    padded = torch.full((6, depth + 28), math.nan)
    padded[1:4, :depth] = noise(3, depth)
    x = padded[1:4, :depth]
    weight = weight_of(kind, 20, depth)
    if isinstance(weight, RowPackedWeight):
        scales = torch.full((40,), math.nan)
        scales[:20] = weight.scales
        there: GpuWeight = RowPackedWeight(weight.values, weight.factors, scales.to(device)[:20], depth).to(device)
    else:
        stored = weight.values if isinstance(weight, Fp8Weight) else weight
        values = torch.full((20 * depth + 5000,), math.nan).to(stored.dtype)
        values[: 20 * depth] = stored.flatten()
        there = values.to(device)[: 20 * depth].view(20, depth)
        if isinstance(weight, Fp8Weight):
            there = Fp8Weight(there, weight.scales.to(device))
    assert_close(linear(x.to(device), there).cpu(), reference_gpu.linear(x, weight), tolerance=3e-3)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("shape", [(0, 128), (1, 128), (3, 100), (2, 1300)])
def test_rounding_of_rows_to_fp8(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
    x = (noise(*shape) * torch.exp(3 * noise(*shape, seed=1))).to(dtype)
    x[:1, :100] = 0
    found, expected = round_rows_to_fp8(x.to(device)), reference_rounding(x)
    assert torch.equal(found.values.cpu().float(), expected.values.float())
    assert torch.equal(found.scales.cpu(), expected.scales)
    assert found.dtype == dtype


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(
    "shapes",
    [[(0, 128), (0, 256)], [(6, 1536), (1, 3072)], [(3, 100), (2, 1300)], [(0, 40), (2, 1025)], [(5, 9), (0, 7)]],
)
def test_two_are_rounded_to_fp8_as_each_alone(
    shapes: list[tuple[int, int]], dtype: torch.dtype, device: torch.device
) -> None:
    given = [(noise(*shape) * torch.exp(2 * noise(*shape, seed=1))).to(dtype) for shape in shapes]
    for part, found in zip(given, round_together(*(part.to(device) for part in given)), strict=True):
        expected = reference_rounding(part)
        assert torch.equal(found.values.cpu().float(), expected.values.float())
        assert torch.equal(found.scales.cpu(), expected.scales)
        assert found.plain is not None
        assert torch.equal(found.plain.cpu(), part)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("kind", ALL_KINDS)
@pytest.mark.parametrize("rows", [0, 1, 17])
def test_logits_are_a_product_stored_as_float32(rows: int, kind: str, dtype: torch.dtype, device: torch.device) -> None:
    weight, x = weight_of(kind, 66, 300).to(device), noise(rows, 300).to(device, dtype)
    if isinstance(weight, torch.Tensor):
        weight = weight.to(dtype)
    found = logits(x, weight, noise(66, seed=3).to(device, dtype))
    assert found.dtype == torch.float32
    assert torch.equal(found, linear(x, weight, noise(66, seed=3).to(device, dtype)).float())


@pytest.mark.parametrize("rows", [0, 1, 17])
@pytest.mark.parametrize("kind", [*KINDS, "plain"])
def test_rows_that_come_in_fp8_are_those_that_are_rounded_here(kind: str, rows: int, device: torch.device) -> None:
    """And whose weight is not in fp8 takes them as they were."""
    weight, down = weight_of(kind, 66, 300, parts=2).to(device), weight_of(kind, 40, 33, seed=2).to(device)
    layer = SwiGLUWeights(weight, down)
    x = noise(rows, 300).to(device)
    given = round_rows_to_fp8(x)
    if kind.startswith("fp8"):
        given = replace(given, plain=None)
    assert torch.equal(linear(given, weight), linear(x, weight))
    assert torch.equal(swiglu(given, layer), swiglu(x, layer))


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_rows_of_another_length_are_refused(kind: str, device: torch.device) -> None:
    with pytest.raises(ValueError, match="rows of 40 numbers cannot meet a weight of 48"):
        linear(noise(2, 40).to(device), weight_of(kind, 16, 48).to(device))


def test_a_plain_weight_of_another_type_is_refused(device: torch.device) -> None:
    with pytest.raises(ValueError, match=r"rows of torch.bfloat16 cannot meet a weight of torch.float32"):
        linear(noise(2, 48).to(device, torch.bfloat16), noise(16, 48).to(device))


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(("rows", "shape"), [(1, (2000, 80)), (130, (300, 48)), (1, (16, 2561)), (2, (1, 17))])
def test_plain_products_of_odd_shapes(
    rows: int, shape: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> None:
    """Many columns as a head has them, more rows than a tile, depths that no group of 16 divides, one column."""
    weight = of_type(weight_of("plain", *shape), dtype)
    x = noise(rows, shape[1]).to(dtype)
    found = linear(x.to(device), weight.to(device))
    assert_close(found.cpu(), reference_gpu.linear(x, weight), tolerance=TOLERANCES[dtype])
    assert torch.equal(linear(x[-1:].to(device), weight.to(device)), found[-1:])


def test_a_product_of_plain_weights_is_one_launch(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    launched = []

    def noted(kernel: Any, grid: tuple[int, ...]) -> Callable[..., Any]:
        launched.append(grid)
        return run(kernel, grid)

    run = type(product_tile).__getitem__
    monkeypatch.setattr(type(product_tile), "__getitem__", noted)
    weight = noise(66, 2100).to(device)
    for rows, programs in ((1, [(2, 4)]), (20, [(2, 4)])):
        linear(noise(rows, 2100).to(device), weight)
        assert launched == programs
        launched.clear()
