"""Paged attention by the GPU's kernels beside the reference, and beside itself: a row alone, in a chunk, in a batch."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from tern.ops import reference, reference_attention
from tern.ops.cuda import GpuPlan, attention_few, attention_parts, paged_attention
from tests.compare import assert_close

FP8 = torch.float8_e4m3fn
TOLERANCES = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}
"""By the type of the queries: weights and results are rounded to it."""
SMALL_PIECE = 64
"""Of two tiles, so that short contexts have many pieces, and stretches of two: what the tests here cut them into."""


@dataclass
class Case:
    """A step over a cache whose unused slots are NaN; `sequences` are (query length, context length)."""

    device: torch.device
    sequences: list[tuple[int, int]]
    block_size: int = 16
    kv_heads: int = 1
    group: int = 5
    head_dim: int = 16
    dtype: torch.dtype = torch.float32
    cache: torch.dtype | None = None

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        counts = [-(-context // self.block_size) for _, context in self.sequences]
        blocks = torch.randperm(sum(counts) + 2, generator=generator)
        sizes = (len(blocks), self.block_size, self.kv_heads, self.head_dim)
        dtype = self.cache or self.dtype
        shapes = reference.kv_cache_shapes(*sizes, dtype, gpu=True)
        self.keys, self.values = (torch.full(shape, math.nan).to(dtype) for shape in shapes)
        self.tables = torch.full((len(counts), max(counts, default=0) + 1), int(blocks[-1]))
        for row, ((_, context), count) in enumerate(zip(self.sequences, counts, strict=True)):
            mine, blocks = blocks[:count], blocks[count:]
            self.tables[row, :count] = mine
            positions = torch.arange(context)
            slots = mine[positions // self.block_size] * self.block_size + positions % self.block_size
            key, value = (torch.randn(context, *sizes[2:], generator=generator) for _ in range(2))
            reference.write_kv(self.keys, self.values, key, value, slots)
        total = sum(query for query, _ in self.sequences)
        heads = self.kv_heads * self.group
        self.queries = torch.randn(total, heads, self.head_dim, generator=generator).to(self.dtype)

    def plan(self, **changes: int) -> GpuPlan:
        """What the step is; lengths that are not the step's own by name."""
        lengths, contexts = zip(*self.sequences, strict=True)
        starts = torch.tensor([0, *lengths]).cumsum(0)
        most = {"max_query_len": max(lengths), "max_context_len": max(contexts)} | changes
        tensors = (starts, torch.tensor(contexts), self.tables)
        return GpuPlan(*(tensor.to(self.device) for tensor in tensors), **most)

    def actual(self, plan: GpuPlan | None = None) -> Tensor:
        """By the kernels."""
        tensors = (tensor.to(self.device) for tensor in (self.queries, self.keys, self.values))
        return paged_attention(*tensors, plan or self.plan()).cpu()

    def expected(self) -> Tensor:
        """By the reference in float32, from the same rounded numbers."""
        plan = self.plan()
        tensors = (tensor.cpu() for tensor in (plan.query_starts, plan.context_lens, self.tables))
        wide = (tensor.float() for tensor in (self.queries, self.keys, self.values))
        return reference_attention.paged_attention(*wide, reference_attention.plan_attention(*tensors, self.block_size))

    def check(self) -> None:
        """Fail unless the kernels compute what the reference does."""
        found = self.actual()
        assert found.dtype == self.dtype
        assert_close(found.float(), self.expected(), tolerance=TOLERANCES[self.dtype])

    def only(self, sequences: list[tuple[int, int]], rows: slice) -> Tensor:
        """By the kernels, for some of the rows, which are now those of `sequences`."""
        kept = self.sequences, self.queries
        self.sequences, self.queries = sequences, self.queries[rows]
        found = self.actual()
        self.sequences, self.queries = kept
        return found


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_parts, "PIECE", SMALL_PIECE)
    monkeypatch.setattr(attention_parts, "STRETCH", 2)


@pytest.mark.parametrize(
    "sequences",
    [
        [(1, 1)],
        [(1, length) for length in (15, 16, 17, 33, 63, 64, 65, 128, 129)],
        [(2, 2), (3, 65), (2, 64), (1, 130)],
        [(5, 5)],
        [(19, 129)],
        [(64, 64), (1, 1)],
        [(1, 70), (30, 40), (0, 9), (1, 129), (13, 13), (2, 64)],
    ],
    ids=str,
)
def test_lengths(sequences: list[tuple[int, int]], device: torch.device) -> None:
    Case(device, sequences, dtype=torch.bfloat16).check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("sequences", [[(1, 63), (1, 65)], [(7, 40), (1, 70)]], ids=str)
def test_types(sequences: list[tuple[int, int]], dtype: torch.dtype, device: torch.device) -> None:
    Case(device, sequences, dtype=dtype).check()


@pytest.mark.parametrize("sequences", [[(1, 63), (1, 65)], [(17, 40), (1, 70)]], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_float8_cache(sequences: list[tuple[int, int]], dtype: torch.dtype, device: torch.device) -> None:
    Case(device, sequences, dtype=dtype, cache=FP8).check()


def test_queries_wider_than_the_cache(device: torch.device) -> None:
    Case(device, [(1, 20), (2, 40)], dtype=torch.float32, cache=torch.bfloat16).check()


@pytest.mark.parametrize("head_dim", [8, 16, 64, 80, 128, 256])
def test_head_dims(head_dim: int, device: torch.device) -> None:
    Case(device, [(1, 70), (14, 40)], head_dim=head_dim, dtype=torch.bfloat16).check()


@pytest.mark.parametrize(("group", "kv_heads"), [(1, 3), (5, 2), (8, 1), (20, 1)])
def test_head_groups(group: int, kv_heads: int, device: torch.device) -> None:
    Case(device, [(1, 66), (70 // group, 71)], group=group, kv_heads=kv_heads, dtype=torch.bfloat16).check()


@pytest.mark.parametrize("block_size", [1, 4, 24, 300])
def test_block_sizes(block_size: int, device: torch.device) -> None:
    Case(device, [(1, 66), (15, 40)], block_size=block_size, dtype=torch.bfloat16).check()


def test_pieces_of_full_size(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    piece = attention_parts.PIECE
    assert piece > SMALL_PIECE
    Case(device, [(1, piece), (1, piece + 1), (13, 300)], head_dim=128, dtype=torch.bfloat16).check()


@pytest.mark.parametrize("programs", [1, 3])
def test_programs_that_take_several_pieces(
    programs: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(device, [(1, 7 * SMALL_PIECE + 3)])
    spread = case.actual()
    monkeypatch.setattr(attention_few, "PROGRAMS", programs)
    assert torch.equal(case.actual(), spread)
    case.check()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_row_does_not_depend_on_the_chunk_it_comes_in(dtype: torch.dtype, device: torch.device) -> None:
    """In one chunk, alone, or with a few others: bit by bit the same, though not by the same kernels."""
    whole = Case(device, [(28, 150)], dtype=dtype, head_dim=128 if dtype == torch.bfloat16 else 16)
    expected = whole.actual()
    for count, start in ((1, 0), (1, 27), (3, 11), (6, 22), (12, 5), (14, 9)):
        end = start + count
        found = whole.only([(count, 122 + end)], slice(start, end))
        assert torch.equal(found, expected[start:end]), (count, start)


def test_a_row_does_not_depend_on_its_batch(device: torch.device) -> None:
    together = Case(device, [(1, 70), (30, 40), (2, 129)], dtype=torch.bfloat16, head_dim=128)
    expected = together.actual()
    tables = together.tables
    for row, rows in enumerate((slice(0, 1), slice(1, 31), slice(31, 33))):
        together.tables = tables[row : row + 1]
        assert torch.equal(together.only([together.sequences[row]], rows), expected[rows])


def test_a_plan_for_longer_ones_gives_the_same(device: torch.device) -> None:
    """As a captured graph is replayed: the tensors' numbers change, the launches do not."""
    case = Case(device, [(1, 70), (1, 3)], dtype=torch.bfloat16)
    assert torch.equal(case.actual(case.plan(max_context_len=300)), case.actual())
    case = Case(device, [(2, 70), (0, 3), (1, 64)], dtype=torch.bfloat16)
    assert torch.equal(case.actual(case.plan(max_context_len=300, max_query_len=3)), case.actual())


def test_a_number_that_is_none_shows_in_its_rows_alone(device: torch.device) -> None:
    case = Case(device, [(1, 30), (20, 40), (1, 70)], dtype=torch.bfloat16)
    case.queries[3] = math.nan
    found = case.actual().isfinite().flatten(1).all(1)
    assert found.tolist() == [row != 3 for row in range(22)]
    case.keys[:, case.tables[2, 0]] = math.nan  # of the last sequence
    assert case.actual()[-1].isnan().all()
    assert case.actual()[:3].isfinite().all()


def test_large_scores_do_not_overflow(device: torch.device) -> None:
    case = Case(device, [(1, 130), (20, 90)])
    case.queries *= 1e4
    assert_close(case.actual(), case.expected(), tolerance=1e-4)


def test_queries_need_not_lie_together(device: torch.device) -> None:
    case = Case(device, [(3, 20)])
    expected = case.actual()
    case.queries = torch.cat([case.queries, torch.full_like(case.queries, math.nan)], dim=1)[:, :5]
    assert torch.equal(case.actual(), expected)


def test_an_empty_step_is_empty(device: torch.device) -> None:
    case = Case(device, [(0, 0), (0, 9)])
    assert case.actual().shape == (0, 5, 16)


def test_caches_that_are_not_laid_out_for_a_gpu_are_refused(device: torch.device) -> None:
    case = Case(device, [(2, 9)], kv_heads=2)
    with pytest.raises(ValueError, match="do not fit a cache of 2 heads of 16"):
        paged_attention(case.queries[:, :5], case.keys, case.values, case.plan())
    with pytest.raises(ValueError, match="gpu=True"):
        paged_attention(case.queries, case.keys.transpose(2, 4), case.values, case.plan())
    with pytest.raises(ValueError, match="one behind the other"):
        paged_attention(case.queries, case.keys[:, ::2], case.values[:, ::2], case.plan())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="captures a CUDA graph")
def test_a_captured_step_is_right_for_other_contexts(device: torch.device) -> None:
    contexts = [(1, 5000), (1, 256), (1, 77)]
    case = Case(device, contexts, kv_heads=4, head_dim=128, dtype=torch.bfloat16)
    queries, keys, values = (tensor.to(device) for tensor in (case.queries, case.keys, case.values))
    plan = case.plan(max_context_len=8192)
    paged_attention(queries, keys, values, plan)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = paged_attention(queries, keys, values, plan)
    for lengths in ([5000, 256, 77], [1, 255, 20], [4096, 1, 77]):
        case.sequences = [(1, length) for length in lengths]
        plan.context_lens.copy_(torch.tensor(lengths))
        graph.replay()
        assert torch.equal(output.cpu(), case.actual())
        assert_close(output.cpu().float(), case.expected(), tolerance=TOLERANCES[torch.bfloat16])
