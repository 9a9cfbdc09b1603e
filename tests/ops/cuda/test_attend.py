"""Turning, storing and attending at once beside one after the other: the same bits, in the result and in the cache."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tern import ops
from tern.ops import Fp8Rows, reference
from tern.ops.cuda import GpuPlan, attend, attention_few, attention_parts, paged_attention, rotate_and_store
from tern.ops.cuda.arrival import MOST, counters
from tern.ops.gpu_weights import round_rows_to_fp8
from tern.ops.placement import interpreted
from tests.compare import assert_close

FP8 = torch.float8_e4m3fn
PIECE = 64
BLOCK_SIZE = 16
DECODES = [(1, 1), (1, 64), (1, 65), (1, 200), (1, 333)]
DRAFTS = [(3, 66), (0, 9), (2, 2), (5, 130), (1, 257)]


class Case:
    """A step whose own keys and values are not in the cache yet, and NaN where nothing is."""

    def __init__(
        self,
        device: torch.device,
        sequences: list[tuple[int, int]],
        *,
        heads: tuple[int, int] = (10, 2),
        head_dim: int = 16,
        dtype: torch.dtype = torch.bfloat16,
        cache: torch.dtype | None = None,
    ) -> None:
        generator = torch.Generator().manual_seed(3)
        lengths, contexts = zip(*sequences, strict=True)
        width = -(-max(contexts) // BLOCK_SIZE)
        tables = torch.randperm(len(sequences) * width, generator=generator).view(len(sequences), width)
        self.sizes = (len(sequences) * width, BLOCK_SIZE, heads[1], head_dim)
        shapes = reference.kv_cache_shapes(*self.sizes, cache or dtype, gpu=True)
        caches = [torch.full(shape, math.nan).to(cache or dtype) for shape in shapes]
        slots, positions = [], []
        for row, (length, context) in enumerate(sequences):
            at = torch.arange(context)
            places = tables[row, at // BLOCK_SIZE] * BLOCK_SIZE + at % BLOCK_SIZE
            old = torch.randn(2, context - length, heads[1], head_dim, generator=generator)
            reference.write_kv(*caches, *old, places[: context - length])
            slots.append(places[context - length :])
            positions.append(at[context - length :])
        qkv = torch.randn(sum(lengths), (heads[0] + 2 * heads[1]) * head_dim, generator=generator).to(dtype)
        frequencies = reference.rotary_frequencies(head_dim, 5e5, torch.device("cpu"))
        made = (qkv, *reference.rotary_table(torch.cat(positions), frequencies), torch.cat(slots), *caches)
        self.qkv, *self.tables, self.slots, self.keys, self.values = (tensor.to(device) for tensor in made)
        starts = torch.tensor([0, *lengths]).cumsum(0)
        tensors = (tensor.to(device) for tensor in (starts, torch.tensor(contexts), tables))
        self.plan = GpuPlan(*tensors, max(lengths), max(contexts))

    def rows(self) -> tuple[Tensor, ...]:
        """What a step passes, with caches of its own."""
        return self.qkv, *self.tables, self.slots, self.keys.clone(), self.values.clone()

    def expected(self) -> tuple[Tensor, Tensor, Tensor]:
        """By three launches -> result and caches."""
        rows = self.rows()
        return paged_attention(rotate_and_store(*rows), *rows[4:], self.plan), *rows[4:]

    def check(self) -> None:
        """Fail unless one launch leaves the same bits."""
        expected, *caches = self.expected()
        rows = self.rows()
        assert torch.equal(attend(*rows, self.plan), expected.flatten(1))
        assert all(same(mine, theirs) for mine, theirs in zip(rows[4:], caches, strict=True))
        assert not counters(self.qkv.device).any()


def same(left: Tensor, right: Tensor) -> bool:
    """Bit by bit, NaN or not."""
    return torch.equal(left.view(torch.uint8), right.view(torch.uint8))


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_parts, "PIECE", PIECE)
    monkeypatch.setattr(attention_parts, "STRETCH", 2)


@pytest.mark.parametrize("cache", [None, FP8], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("sequences", [DECODES, DRAFTS], ids=["decodes", "drafts"])
def test_types(
    sequences: list[tuple[int, int]], dtype: torch.dtype, cache: torch.dtype | None, device: torch.device
) -> None:
    Case(device, [(min(length, 3), context) for length, context in sequences], dtype=dtype, cache=cache).check()


@pytest.mark.parametrize("head_dim", [8, 64, 80, 128, 256])
def test_head_dims(head_dim: int, device: torch.device) -> None:
    Case(device, [(2, 130), (1, 40)], head_dim=head_dim).check()


@pytest.mark.parametrize("heads", [(3, 3), (8, 1), (20, 1), (20, 4)])
def test_head_groups(heads: tuple[int, int], device: torch.device) -> None:
    Case(device, [(1, 65), (2, 129)], heads=heads).check()


@pytest.mark.parametrize("programs", [1, 3, 16])
@pytest.mark.parametrize("stretch", [1, 2, 8])
def test_new_tokens_in_any_program_and_pieces_in_any_stretch(
    programs: int, stretch: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Drafts cross from one program's piece to another's, and from one stretch to the next."""
    monkeypatch.setattr(attention_few, "PROGRAMS", programs)
    monkeypatch.setattr(attention_parts, "STRETCH", stretch)
    Case(device, [(12, 6 * PIECE + 5)]).check()
    Case(device, [(3, 4 * PIECE + 1), (1, 7)]).check()


def test_a_step_with_a_chunk(device: torch.device) -> None:
    Case(device, [(1, 70), (40, 100), (2, 129)]).check()


def test_sequences_beyond_the_counters_have_a_launch_of_their_own(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(device, DRAFTS)
    monkeypatch.setattr(attention_few, "MOST", 2 * 2 * (1 + 3))  # two sequences of two KV heads and three stretches
    assert MOST > attention_few.MOST
    case.check()


def test_a_plan_for_longer_ones_gives_the_same(device: torch.device) -> None:
    """As a captured graph is replayed, padded by rows that all write the first slot of a spare block."""
    case = Case(device, [(1, 70), (1, 3), (1, 1), (1, 1)])
    spare = int(case.plan.block_tables[2, 0])
    case.plan.block_tables[2:] = spare
    case.slots[2:] = spare * BLOCK_SIZE
    case.qkv[3] = case.qkv[2]
    expected, *_ = case.expected()
    rows = case.rows()
    plan = GpuPlan(case.plan.query_starts, case.plan.context_lens, case.plan.block_tables, 2, 20 * PIECE)
    assert torch.equal(attend(*rows, plan), expected.flatten(1))


@pytest.mark.parametrize("form", ["plain", "fp8"])
def test_padding_of_a_step_with_drafts_changes_nothing_that_is_somebodys(
    form: ops.RowForm, device: torch.device
) -> None:
    """As `tern.engine.graphs` pads five rows to eight: a row of the shortest context again, which writes into a spare
    block, and as many empty sequences as there are rows too many.
    """
    case = Case(device, [(3, 66), (1, 9), (1, 130), (0, 16)], head_dim=128)
    expected, *caches = case.expected()
    spare = int(case.plan.block_tables[3, 0])
    rows = torch.tensor([0, 1, 2, 3, 4, 3, 3, 3], device=device)
    slots = case.slots[rows]
    slots[5:] = spare * BLOCK_SIZE
    starts, contexts = (
        torch.tensor(numbers, device=device) for numbers in ([0, 3, 4, 5, 6, 7, 8, 8, 8], [66, 9, 130, 9, 9, 9, 0, 0])
    )
    owners = torch.tensor([0, 1, 2, 1, 1, 1, 3, 3], device=device)
    plan = GpuPlan(starts, contexts, case.plan.block_tables[owners], 6, 20 * PIECE)
    mine = [case.keys.clone(), case.values.clone()]
    found = attend(case.qkv[rows], *(table[rows] for table in case.tables), slots, *mine, plan, form)
    if isinstance(found, Fp8Rows):
        wanted = round_rows_to_fp8(expected.flatten(1).cpu())
        assert same(found.values[:5].cpu(), wanted.values)
        assert torch.equal(found.scales[:5].cpu(), wanted.scales)
    else:
        assert torch.equal(found[:5], expected.flatten(1))
    for cache, theirs in zip(mine, caches, strict=True):
        padded, plain = (one.view(2, -1, 128)[:, spare * BLOCK_SIZE] for one in (cache, theirs))
        assert not same(padded, plain)
        padded.copy_(plain)
        assert same(cache, theirs)
    assert not counters(device).any()


@pytest.mark.parametrize("programs", [1, 3, 64])
def test_sequences_without_rows_stand_anywhere(
    programs: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some have contexts, others none, and those with rows give what they give alone."""
    monkeypatch.setattr(attention_few, "PROGRAMS", programs)
    case = Case(device, [(0, 70), (2, 5 * PIECE + 1), (0, 1), (0, 64), (1, 3), (3, 3 * PIECE), (0, 9)])
    case.plan.context_lens[2] = 0
    case.check()
    together, *_ = case.expected()
    alone = Case(device, [(2, 5 * PIECE + 1), (1, 3), (3, 3 * PIECE)])
    alone.keys, alone.values = case.keys, case.values
    alone.qkv, alone.tables, alone.slots = case.qkv, case.tables, case.slots
    alone.plan.block_tables.copy_(case.plan.block_tables[[1, 4, 5]])
    assert torch.equal(alone.expected()[0], together)


def test_an_empty_step_is_empty(device: torch.device) -> None:
    case = Case(device, [(0, 5), (0, 9)])
    assert attend(*case.rows(), case.plan).shape == (0, 160)
    assert attend(*case.rows(), case.plan, "fp8").values.shape == (0, 160)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("sequences", [[(1, 1), (1, 64), (1, 257)], [(3, 66), (0, 9)], [(40, 100), (1, 5)]], ids=str)
def test_rows_for_a_product_in_fp8(sequences: list[tuple[int, int]], head_dim: int, device: torch.device) -> None:
    case = Case(device, sequences, head_dim=head_dim, cache=FP8)
    expected = round_rows_to_fp8(case.expected()[0].flatten(1).cpu())
    found = attend(*case.rows(), case.plan, "fp8")
    assert isinstance(found, Fp8Rows)
    assert same(found.values.cpu(), expected.values)
    assert torch.equal(found.scales.cpu(), expected.scales)


@pytest.mark.parametrize("form", ["plain", "fp8"])
def test_the_door_leads_to_it(form: ops.RowForm, device: torch.device) -> None:
    """`tern.ops` on what belongs to a GPU; and the reference in the same caches."""
    case = Case(device, DRAFTS, head_dim=128, dtype=torch.float32)
    with interpreted():
        found = ops.attend(*case.rows(), case.plan, form)
    rows = [tensor.cpu() for tensor in case.rows()]
    *parts, plan = rows[:4], case.plan
    numbers = (tensor.cpu() for tensor in (plan.query_starts, plan.context_lens, plan.block_tables))
    lengths = {"max_query_len": plan.max_query_len, "max_context_len": plan.max_context_len}
    theirs = [torch.zeros(shape) for shape in reference.kv_cache_shapes(*case.sizes, torch.float32)]
    slots = torch.arange(case.sizes[0] * BLOCK_SIZE)
    reference.write_kv(*theirs, *(part.nan_to_num() for part in reference.read_kv(*rows[4:], slots)), slots)
    expected = ops.attend(*parts[0], *theirs, ops.plan_attention(*numbers, theirs[1], **lengths), form)
    if isinstance(found, Fp8Rows):
        found = found.values.float() * found.scales.repeat_interleave(128, 1)
    assert_close(found.cpu(), expected, tolerance=2e-6 if form == "plain" else 0.1)


def test_what_does_not_fit_is_refused(device: torch.device) -> None:
    case = Case(device, DECODES)
    qkv, cosines, sines, slots, keys, values = case.rows()
    with pytest.raises(ValueError, match=r"shape \[5\], not \[2\]"):
        attend(qkv, cosines, sines, slots[:2], keys, values, case.plan)
    with pytest.raises(ValueError, match="contiguous and of one type"):
        attend(qkv, cosines, sines, slots, keys.float(), values, case.plan)
