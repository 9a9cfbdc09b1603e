"""Paged attention, in plain torch and by every kernel, against naive dense attention in float64, head by head."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tern import ops
from tern.ops import cpu, reference, reference_attention
from tern.ops.reference_attention import MAX_GROUP_ROWS, MAX_GROUPED_QUERY, TILE
from tests.compare import assert_close, rounds_rows_alike

AVAILABLE = [found.name for found in cpu.instruction_sets() if found.available]
DTYPES = (torch.float32, torch.bfloat16, torch.int8)
TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.int8: 2e-4}
"""bf16 results are rounded once; beside int8 keys a query is rounded to 15 bits."""
SPLIT = 4 * TILE  # positions that the kernels join before they join others


@pytest.fixture(params=["reference", *AVAILABLE])
def by(request: pytest.FixtureRequest) -> Iterator[str]:
    """Who attends: plain torch, or the kernels of an instruction set with three threads."""
    if request.param == "reference":
        yield request.param
        return
    with cpu.use_machine(request.param, 3):
        yield request.param


@dataclass
class Case:
    """A step over a cache whose unused slots are NaN; `sequences` are (query length, context length)."""

    sequences: list[tuple[int, int]]
    block_size: int = 4
    kv_heads: int = 2
    group: int = 2
    head_dim: int = 16
    dtype: torch.dtype = torch.float32
    seed: int = 0

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        counts = [-(-context // self.block_size) for _, context in self.sequences]
        blocks = torch.randperm(sum(counts) + 3, generator=generator)
        sizes = (len(blocks), self.block_size, self.kv_heads, self.head_dim)
        self.keys, self.values = (
            # All bits set: a scale of -NaN beside int8 values.
            torch.full(shape, -1 if self.dtype == torch.int8 else math.nan, dtype=self.dtype)
            for shape in ops.kv_cache_shapes(*sizes, self.dtype)
        )
        self.tables = torch.zeros(len(counts), max(counts, default=0) + 1, dtype=torch.int64)
        self.contexts: list[tuple[Tensor, Tensor]] = []
        for row, ((_, context), count) in enumerate(zip(self.sequences, counts, strict=True)):
            mine, blocks = blocks[:count], blocks[count:]
            self.tables[row, :count] = mine
            key, value = (torch.randn(context, *sizes[2:], generator=generator) for _ in range(2))
            positions = torch.arange(context)
            slots = mine[positions // self.block_size] * self.block_size + positions % self.block_size
            reference.write_kv(self.keys, self.values, key, value, slots)
            cached = reference.read_kv(self.keys, self.values, slots)
            self.contexts.append((cached[0].double(), cached[1].double()))
        total = sum(query for query, _ in self.sequences)
        self.queries = torch.randn(total, self.kv_heads * self.group, self.head_dim, generator=generator)
        if self.dtype == torch.bfloat16:
            self.queries = self.queries.to(self.dtype)

    def actual(self, by: str) -> Tensor:
        lengths = torch.tensor([query for query, _ in self.sequences], dtype=torch.int64)
        starts = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        contexts = torch.tensor([context for _, context in self.sequences], dtype=torch.int64)
        if by == "reference":
            plan = reference_attention.plan_attention(starts, contexts, self.tables, self.block_size)
            return reference_attention.paged_attention(self.queries, self.keys, self.values, plan)
        most = {
            "max_query_len": max((query for query, _ in self.sequences), default=0),
            "max_context_len": max((context for _, context in self.sequences), default=0),
        }
        chosen = ops.plan_attention(starts, contexts, self.tables, self.values, **most)
        assert isinstance(chosen, cpu.SequencesPlan)
        return ops.paged_attention(self.queries, self.keys, self.values, chosen)

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
        [(1, SPLIT), (1, SPLIT + 1), (2, 2 * SPLIT + 1), (30, SPLIT + 14), (4, 3 * SPLIT - 1)],
    ],
    ids=str,
)
def test_mixes_of_chunks_and_decodes(by: str, sequences: list[tuple[int, int]]) -> None:
    case = Case(sequences)
    assert_close(case.actual(by), case.expected(), tolerance=2e-6)


@pytest.mark.parametrize("group", [1, 2, 4, 8])
@pytest.mark.parametrize("kv_heads", [1, 3])
@pytest.mark.parametrize("block_size", [1, 16, 24, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_head_groups_and_block_sizes(by: str, group: int, kv_heads: int, block_size: int, dtype: torch.dtype) -> None:
    sizes = {"block_size": block_size, "kv_heads": kv_heads, "group": group, "head_dim": 48}
    if dtype == torch.int8 and block_size % 4:
        with pytest.raises(ValueError, match="multiples of 4"):
            ops.kv_cache_shapes(1, block_size, kv_heads, 48, dtype)
        return
    case = Case([(1, 270), (20, 31), (3, 3)], dtype=dtype, **sizes)
    assert_close(case.actual(by), case.expected(), tolerance=TOLERANCES[dtype])


@settings(deadline=None, derandomize=True, max_examples=30)
@given(data=st.data(), block_size=st.integers(1, 9), seed=st.integers(0, 99))
def test_any_step_in_plain_torch(data: st.DataObject, block_size: int, seed: int) -> None:
    contexts = data.draw(st.lists(st.integers(1, 40), max_size=6))
    case = Case([(data.draw(st.integers(0, context)), context) for context in contexts], block_size, seed=seed)
    assert_close(case.actual("reference"), case.expected(), tolerance=2e-6)


@settings(deadline=None, derandomize=True, max_examples=30)
@given(data=st.data(), block_size=st.integers(1, 40), seed=st.integers(0, 99), dtype=st.sampled_from(DTYPES))
def test_any_step_by_kernels(data: st.DataObject, block_size: int, seed: int, dtype: torch.dtype) -> None:
    contexts = data.draw(st.lists(st.integers(1, 90), max_size=6))
    sequences = [(data.draw(st.integers(0, context)), context) for context in contexts]
    case = Case(sequences, block_size * (4 if dtype == torch.int8 else 1), seed=seed, dtype=dtype)
    for name in AVAILABLE:
        with cpu.use_machine(name, 1):
            assert_close(case.actual(name).float(), case.expected(), tolerance=TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_context_of_full_length(by: str, dtype: torch.dtype) -> None:
    case = Case([(1, 131_072), (3, 131_071)], block_size=16, kv_heads=1, group=2, dtype=dtype)
    assert_close(case.actual(by).float(), case.expected(), tolerance=TOLERANCES[dtype])


def test_more_decodes_than_one_group_holds(by: str) -> None:
    case = Case([(1, 1 + (7 * index) % 20) for index in range(150)])
    assert_close(case.actual(by), case.expected(), tolerance=2e-6)


def test_large_scores_do_not_overflow(by: str) -> None:
    case = Case([(1, 300), (20, 290)])
    case.queries *= 1e4
    assert_close(case.actual(by), case.expected(), tolerance=1e-4)


def test_int8_keys_and_values_cost_a_small_error() -> None:
    """Against the numbers before they were rounded: half a step of 1/127 of a head's largest is the most."""
    exact, rounded = (Case([(1, 3000)], head_dim=128, dtype=dtype) for dtype in (torch.float32, torch.int8))
    error = (rounded.actual("reference") - exact.expected()).norm() / exact.expected().norm()
    assert 1e-4 < error < 0.02


def test_bf16_is_rounded_once_at_the_end(by: str) -> None:
    case = Case([(1, 300), (20, 30)], dtype=torch.bfloat16)
    output = case.actual(by)
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
    case.actual("reference")
    assert 0 < largest <= MAX_GROUP_ROWS * TILE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
def test_a_row_does_not_depend_on_the_chunk_it_comes_in(by: str, dtype: torch.dtype) -> None:
    """Prefilled in one piece, token by token, or in pieces: bit for bit the same."""
    if by == "reference" and not rounds_rows_alike():
        pytest.skip("this machine's float32 products round rows differently")
    length = 2 * SPLIT + 40
    whole = Case([(200, length)], group=5, dtype=dtype, block_size=16)
    expected = whole.actual(by)
    queries = whole.queries
    for count, start in ((1, 0), (1, 77), (1, 199), (3, 100), (4, 196), (90, 5)):
        end = start + count
        whole.sequences, whole.queries = [(count, length - 200 + end)], queries[start:end]
        assert torch.equal(whole.actual(by), expected[start:end]), (count, start)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_a_number_that_is_none_shows_in_its_rows_alone(by: str, dtype: torch.dtype) -> None:
    case = Case([(1, 30), (20, 40), (1, 50)], dtype=dtype)
    case.queries[3] = math.nan
    found = case.actual(by).isfinite().flatten(1).all(1)
    assert found.tolist() == [row != 3 for row in range(22)]
    case.keys[:, case.tables[2, 0]] = -1 if dtype == torch.int8 else math.nan  # of the last sequence
    assert case.actual(by)[-1].isnan().all()
    assert case.actual(by)[:3].isfinite().all()


def test_kernels_refuse_what_would_lead_out_of_the_cache() -> None:
    def refused(complaint: str, **changes: object) -> None:
        case = Case([(2, 9)])
        for name, value in changes.items():
            setattr(case, name, value)
        with pytest.raises(ValueError, match=complaint):
            case.actual("kernels")

    tables = Case([(2, 9)]).tables
    refused("no such block", tables=torch.full_like(tables, 99))
    refused("no such block", tables=torch.full_like(tables, -1))
    refused("too short", tables=tables[:, :1].clone())
    refused("not among the rows", sequences=[(3, 9)])
    refused("more queries than positions", sequences=[(2, 1)])


def test_heads_and_types_that_kernels_do_not_know_go_to_plain_torch() -> None:
    for head_dim, dtype in ((8, torch.float32), (16, torch.float16), (8, torch.int8)):
        assert not cpu.can_attend(torch.empty(reference.kv_cache_shapes(1, 4, 1, head_dim, dtype)[1], dtype=dtype))
    case = Case([(5, 50), (1, 9)], head_dim=8)
    starts, contexts = torch.tensor([0, 5, 6]), torch.tensor([50, 9])
    most = {"max_query_len": 5, "max_context_len": 50}
    plan = ops.plan_attention(starts, contexts, case.tables, case.values, **most)
    assert_close(ops.paged_attention(case.queries, case.keys, case.values, plan), case.expected(), tolerance=2e-6)
