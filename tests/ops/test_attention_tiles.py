"""Attention over bf16 caches in tile registers: near the float32 kernels, and a row's own whatever stands beside it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tern.ops import cpu
from tern.ops.cpu import _kernels
from tests.compare import assert_close
from tests.ops.test_paged_attention import TILE, Case
from tests.ops.test_tiles import EMULATED, TILED, config

ERROR = 2**-14
"""Queries and weights are cut to 16 bits; one bf16 number each would err 30 times as much."""


def case_of(sequences: list[tuple[int, int]], **shape: int) -> Case:
    """A bf16 cache with float32 queries, whose output is not rounded."""
    case = Case(sequences, dtype=torch.bfloat16, **shape)
    case.queries = torch.randn(case.queries.shape, generator=torch.Generator().manual_seed(5))
    return case


def by(name: str, case: Case) -> Tensor:
    with cpu.use_machine(name, 1):
        return case.actual(name)


@pytest.mark.parametrize("name", TILED)
@pytest.mark.parametrize("head_dim", [32, 64, 96, 128])
@pytest.mark.parametrize(("group", "block_size"), [(1, 16), (5, 16), (5, 7), (3, 300), (16, 1)])
def test_attention_in_tiles_is_near_exact(name: str, head_dim: int, group: int, block_size: int) -> None:
    case = case_of([(1, TILE + 30), (21, 47), (7, TILE + 16)], head_dim=head_dim, group=group, block_size=block_size)
    assert_close(by(name, case), case.expected(), tolerance=ERROR)


@pytest.mark.parametrize("name", TILED)
@pytest.mark.parametrize("context", [1, 2, 15, 16, 17, 31, 32, 33, TILE - 1, TILE, TILE + 1])
def test_every_end_of_a_context(name: str, context: int) -> None:
    case = case_of([(min(context, 20), context), (1, context)], head_dim=32, block_size=16)
    assert_close(by(name, case), case.expected(), tolerance=ERROR)


@pytest.mark.parametrize("name", TILED)
def test_a_row_in_tiles_does_not_depend_on_the_chunk_it_comes_in(name: str) -> None:
    length = 4 * TILE + 40
    whole = case_of([(60, length)], group=5, head_dim=64, block_size=16)
    expected, queries = by(name, whole), whole.queries
    for count, start in ((1, 0), (1, 37), (1, 59), (3, 20), (4, 56), (17, 5)):
        end = start + count
        whole.sequences, whole.queries = [(count, length - 60 + end)], queries[start:end]
        assert torch.equal(by(name, whole), expected[start:end]), (count, start)


@pytest.mark.parametrize("name", TILED)
def test_what_is_not_finite_shows_in_its_rows_alone(name: str) -> None:
    case = case_of([(1, 30), (20, 40)], head_dim=32)
    case.queries[3], case.queries[5] = math.nan, math.inf
    found = by(name, case).isfinite().flatten(1).all(1)
    assert found.tolist() == [row not in (3, 5) for row in range(21)]


@pytest.mark.parametrize("name", EMULATED)
def test_only_bf16_caches_with_whole_pairs_of_panels_go_through_tiles(name: str) -> None:
    for head_dim, dtype, tiles in ((32, torch.bfloat16, True), (48, torch.bfloat16, False), (32, torch.float32, False)):
        before = _kernels.emulated_tiles().products
        by(name, Case([(2, 9)], head_dim=head_dim, dtype=dtype))
        assert (_kernels.emulated_tiles().products > before) == tiles, (head_dim, dtype)


def test_pairs_of_bf16_are_added_up_in_float32() -> None:
    rows, pairs, columns = 5, 7, 3
    tiles = _kernels.EmulatedTiles()
    tiles.configure(config((rows, 4 * columns), (rows, 4 * pairs), (pairs, 4 * columns)))
    generator = torch.Generator().manual_seed(1)
    a = torch.randn(rows, 2 * pairs, generator=generator).bfloat16()
    b = torch.randn(pairs, columns, 2, generator=generator).bfloat16()
    a[0, 1], b[0, 0, 1] = 1e-39, 1e38  # a subnormal number counts as 0
    start = torch.randn(rows, columns, generator=generator)
    sums = torch.empty(rows, columns)
    tiles.load(0, start.data_ptr(), 4 * columns)
    tiles.load(1, a.data_ptr(), 4 * pairs)
    tiles.load(2, b.data_ptr(), 4 * columns)
    tiles.add_pairs(0, 1, 2)
    tiles.store(0, sums.data_ptr(), 4 * columns)
    parts = torch.zeros(2, rows, columns)
    a[0, 1] = 0
    for pair in range(pairs):
        for i in (0, 1):
            parts[i] += a[:, 2 * pair + i, None].float() * b[pair, :, i].float()
    assert torch.equal(sums, start + (parts[0] + parts[1]))
    with pytest.raises(RuntimeError, match="#UD"):
        tiles.add_pairs(0, 2, 1)
