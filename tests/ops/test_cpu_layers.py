"""Norms, routing, rotary embedding and KV writes by every kernel, against the reference in plain torch."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from tern.ops import cpu, reference
from tests.compare import assert_close

AVAILABLE = [found.name for found in cpu.instruction_sets() if found.available]
DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture(params=AVAILABLE)
def kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    """Operations run on this instruction set, with three threads."""
    with cpu.use_machine(request.param, 3):
        yield request.param


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(0, 16), (1, 1), (3, 33), (20, 128), (9, 2560)])
def test_add_rms_norm(kernels: str, rows: int, width: int, dtype: torch.dtype) -> None:
    residual, delta = noise(rows, width).to(dtype), noise(rows, width, seed=1).to(dtype)
    weight = noise(width, seed=2).to(dtype)
    for added in (delta, None):
        normed, stream = cpu.add_rms_norm(added, residual, weight, 1e-5)
        expected, expected_stream = reference.add_rms_norm(added, residual, weight, 1e-5)
        assert torch.equal(stream, expected_stream), kernels
        # In bf16 a last bit of the float32 scale may tip one rounding.
        assert_close(normed.float(), expected.float(), tolerance=1e-6 if dtype == torch.float32 else 2**-7)
        assert (normed != expected).float().mean() < (1 if dtype == torch.float32 else 0.01) or rows == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(0, 8), (1, 1), (3, 33), (20, 96), (9, 1536)])
def test_silu_mul(kernels: str, rows: int, width: int, dtype: torch.dtype) -> None:
    gate_up = (noise(rows, 2 * width) * 4).to(dtype)
    found = cpu.silu_mul(gate_up)
    assert_close(
        found.float(), reference.silu_mul(gate_up).float(), tolerance=1e-6 if dtype == torch.float32 else 2**-8
    )
    assert all(torch.equal(cpu.silu_mul(gate_up[row:]), found[row:]) for row in range(rows)), kernels


def test_a_norm_of_rows_with_nan_stays_in_them(kernels: str) -> None:
    residual = noise(5, 40)
    residual[2, 7] = math.nan
    normed, _ = cpu.add_rms_norm(None, residual, torch.ones(40), 1e-5)
    assert normed.isnan().any(1).tolist() == [False, False, True, False, False], kernels


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "width", "experts", "top"), [(0, 8, 4, 2), (1, 40, 6, 6), (50, 2560, 64, 6), (9, 7, 1, 1)]
)
def test_route(kernels: str, rows: int, width: int, experts: int, top: int, dtype: torch.dtype) -> None:
    x, router = noise(rows, width).to(dtype), noise(experts, width, seed=1) / math.sqrt(width)
    bias = noise(experts, seed=2) * 0.01
    weights, chosen = cpu.route(x, router, bias, top, 1e-12)
    expected, expected_chosen = reference.route(x.double().float(), router, bias, top, 1e-12)
    probabilities = (x.double() @ router.double().t()).softmax(-1) + bias
    margins = probabilities.sort(-1, descending=True).values.diff(dim=-1).abs()[:, : top if top < experts else None]
    clear = (margins > 1e-6).all(-1)
    assert clear.float().mean() > 0.9 or rows == 0
    assert torch.equal(chosen[clear], expected_chosen[clear]), kernels
    assert_close(weights[clear], expected[clear], tolerance=1e-5)


def test_of_equal_experts_the_first_are_chosen(kernels: str) -> None:
    _, chosen = cpu.route(torch.zeros(2, 16), torch.zeros(5, 16), torch.zeros(5), 3, 1e-12)
    assert chosen.tolist() == [[0, 1, 2]] * 2, kernels


def test_a_row_of_nan_is_routed_somewhere_and_shows(kernels: str) -> None:
    x = noise(3, 16)
    x[1] = math.nan
    weights, chosen = cpu.route(x, noise(5, 16, seed=1), torch.zeros(5), 2, 1e-12)
    assert weights[1].isnan().all(), kernels
    assert sorted(set(chosen[1].tolist())) == sorted(chosen[1].tolist())
    assert weights[[0, 2]].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cache_dtype", [*DTYPES, torch.int8])
@pytest.mark.parametrize("block_size", [1, 5, 16])
def test_rotate_and_store(kernels: str, dtype: torch.dtype, cache_dtype: torch.dtype, block_size: int) -> None:
    if cache_dtype == torch.int8:
        block_size *= 4
    for rows in (11, 0):
        check_rotate_and_store(kernels, rows, dtype, cache_dtype, block_size)


def check_rotate_and_store(
    kernels: str, rows: int, dtype: torch.dtype, cache_dtype: torch.dtype, block_size: int
) -> None:
    heads, kv_heads, head_dim = 6, 2, 32
    qkv = noise(rows, (heads + 2 * kv_heads) * head_dim).to(dtype)
    positions = torch.arange(rows) * 12_973  # up to 129 730
    tables = reference.rotary_table(positions, reference.rotary_frequencies(head_dim, 5e5, torch.device("cpu")))
    slots = torch.randperm(40, generator=torch.Generator().manual_seed(1))[:rows]
    shapes = reference.kv_cache_shapes(-(-40 // block_size), block_size, kv_heads, head_dim, cache_dtype)
    mine, theirs = ([torch.full(shape, 7, dtype=cache_dtype) for shape in shapes] for _ in range(2))
    queries = cpu.rotate_and_store(qkv, *tables, slots, *mine)
    expected = reference.rotate_and_store(qkv, *tables, slots, *theirs)
    assert queries.shape == (rows, heads, head_dim)
    assert torch.equal(queries, expected), kernels
    assert torch.equal(mine[0], theirs[0]), kernels
    assert torch.equal(mine[1], theirs[1]), kernels


def test_keys_that_are_nothing_or_no_numbers_are_kept_as_such(kernels: str) -> None:
    qkv = noise(4, 3 * 16)
    qkv[1, 16:] = 0.0
    qkv[2, 20] = math.nan
    qkv[3, 40] = math.inf
    caches = [torch.zeros(shape, dtype=torch.int8) for shape in reference.kv_cache_shapes(1, 4, 1, 16, torch.int8)]
    cpu.rotate_and_store(qkv, torch.ones(4, 16), torch.zeros(4, 16), torch.arange(4), *caches)
    keys, values = reference.read_kv(*caches, torch.arange(4))
    assert torch.cat([keys[1], values[1]]).count_nonzero() == 0, kernels
    assert keys.isnan().all(2).squeeze(1).tolist() == [False, False, True, False]
    assert values.isnan().all(2).squeeze(1).tolist() == [False, False, False, True]


@pytest.mark.usefixtures("kernels")
def test_a_slot_outside_the_cache_is_refused() -> None:
    shapes = reference.kv_cache_shapes(2, 4, 1, 16, torch.float32)
    caches = [torch.zeros(shape) for shape in shapes]
    for slot in (-1, 8):
        with pytest.raises(ValueError, match="no such slot"):
            cpu.rotate_and_store(noise(1, 48), torch.ones(1, 16), torch.ones(1, 16), torch.tensor([slot]), *caches)
