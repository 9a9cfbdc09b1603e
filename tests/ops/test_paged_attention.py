"""Paged attention against naive dense attention in float64, one token and one head at a time."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tern import ops
from tern.ops.reference_attention import MAX_GROUP_ROWS, MAX_GROUPED_QUERY, TILE
from tests.compare import assert_close


@dataclass
class Case:
    """A step over a cache whose unused slots are NaN; `sequences` are (query length, context length)."""

    sequences: list[tuple[int, int]]
    block_size: int = 4
    kv_heads: int = 2
    group: int = 2
    head_dim: int = 8
    dtype: torch.dtype = torch.float32
    seed: int = 0

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        counts = [-(-context // self.block_size) for _, context in self.sequences]
        blocks = torch.randperm(sum(counts) + 3, generator=generator)
        shape = (len(blocks), self.block_size, self.kv_heads, self.head_dim)
        self.keys = torch.full(shape, math.nan, dtype=self.dtype)
        self.values = torch.full(shape, math.nan, dtype=self.dtype)
        self.tables = torch.zeros(len(counts), max(counts, default=0) + 1, dtype=torch.int64)
        self.contexts: list[tuple[Tensor, Tensor]] = []
        for row, ((_, context), count) in enumerate(zip(self.sequences, counts, strict=True)):
            mine, blocks = blocks[:count], blocks[count:]
            self.tables[row, :count] = mine
            key, value = (torch.randn(context, *shape[2:], generator=generator).to(self.dtype) for _ in range(2))
            slots = torch.arange(context)
            self.keys[mine[slots // self.block_size], slots % self.block_size] = key
            self.values[mine[slots // self.block_size], slots % self.block_size] = value
            self.contexts.append((key.double(), value.double()))
        total = sum(query for query, _ in self.sequences)
        self.queries = torch.randn(total, self.kv_heads * self.group, self.head_dim, generator=generator).to(self.dtype)

    def actual(self) -> Tensor:
        lengths = torch.tensor([query for query, _ in self.sequences], dtype=torch.int64)
        starts = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        contexts = torch.tensor([context for _, context in self.sequences], dtype=torch.int64)
        plan = ops.plan_attention(starts, contexts, self.tables, self.block_size)
        return ops.paged_attention(self.queries, self.keys, self.values, plan)

    def expected(self) -> Tensor:
        rows, outputs = iter(self.queries.double()), []
        for (query_count, context), (keys, values) in zip(self.sequences, self.contexts, strict=True):
            for position in range(context - query_count, context):
                heads = []
                for number, head in enumerate(next(rows)):
                    seen_keys = keys[: position + 1, number // self.group]
                    weights = (seen_keys @ head / math.sqrt(self.head_dim)).softmax(dim=0)
                    heads.append(weights @ values[: position + 1, number // self.group])
                outputs.append(torch.stack(heads))
        return torch.stack(outputs) if outputs else self.queries.double()


@pytest.mark.parametrize(
    "sequences",
    [
        [],
        [(0, 5)],
        [(1, 1)],
        [(1, 7)],
        [(1, TILE), (1, TILE + 1), (1, TILE - 1), (1, 1)],
        [(1, 3), (1, 2 * TILE + 5), (1, 40)],
        [(6, 6)],
        [(5, 50), (5, 300), (5, 5), (2, 9), (2, TILE + 1)],
        [(MAX_GROUPED_QUERY, 20), (MAX_GROUPED_QUERY + 1, 20)],
        [(MAX_GROUP_ROWS + 9, MAX_GROUP_ROWS + 9)],
        [(40, TILE + 60), (1, 12), (0, 4), (1, 90), (33, 33), (3, 100)],
    ],
    ids=str,
)
def test_mixes_of_chunks_and_decodes(sequences: list[tuple[int, int]]) -> None:
    case = Case(sequences)
    assert_close(case.actual(), case.expected(), tolerance=2e-6)


@pytest.mark.parametrize("group", [1, 2, 4, 8])
@pytest.mark.parametrize("kv_heads", [1, 3])
@pytest.mark.parametrize("block_size", [1, 16, 300])
def test_head_groups_and_block_sizes(group: int, kv_heads: int, block_size: int) -> None:
    case = Case([(1, 270), (20, 31), (3, 3)], block_size=block_size, kv_heads=kv_heads, group=group, head_dim=6)
    assert_close(case.actual(), case.expected(), tolerance=2e-6)


@settings(deadline=None, derandomize=True, max_examples=30)
@given(data=st.data(), block_size=st.integers(1, 9), seed=st.integers(0, 99))
def test_any_step(data: st.DataObject, block_size: int, seed: int) -> None:
    contexts = data.draw(st.lists(st.integers(1, 40), max_size=6))
    case = Case([(data.draw(st.integers(0, context)), context) for context in contexts], block_size, seed=seed)
    assert_close(case.actual(), case.expected(), tolerance=2e-6)


def test_more_decodes_than_one_group_holds() -> None:
    case = Case([(1, 1 + (7 * index) % 20) for index in range(150)], head_dim=4)
    assert_close(case.actual(), case.expected(), tolerance=2e-6)


def test_large_scores_do_not_overflow() -> None:
    case = Case([(1, 300), (20, 290)])
    case.queries *= 1e4
    assert_close(case.actual(), case.expected(), tolerance=1e-4)


def test_bf16_is_rounded_once_at_the_end() -> None:
    case = Case([(1, 300), (20, 30)], dtype=torch.bfloat16)
    output = case.actual()
    assert output.dtype == torch.bfloat16
    assert_close(output.float(), case.expected(), tolerance=2**-8)


def test_a_long_chunk_never_materialises_its_score_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest product is rows x TILE, whatever the context."""
    largest = 0
    original = Tensor.__matmul__

    def watching(a: Tensor, b: Tensor) -> Tensor:
        nonlocal largest
        product = original(a, b)
        largest = max(largest, product.numel())
        return product

    monkeypatch.setattr(Tensor, "__matmul__", watching)
    case = Case([(600, 2000)], kv_heads=1, group=1, head_dim=4, block_size=16)
    case.actual()
    assert 0 < largest <= MAX_GROUP_ROWS * TILE
