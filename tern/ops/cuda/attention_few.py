"""Attention of sequences with few queries each: their contexts' pieces are shared out among programs, in one launch.

Knows who stores which token, who computes which piece and who joins them; the arithmetic is that of `attention_parts`.

    program p        stores the new tokens that stand in its pieces, if any do,
                     piece p, p + programs, ...: its sums go to memory
    the last in a    stretch of pieces joins them,
    and the last     of those joins the stretches and writes the rows
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tern.ops.cuda import attention_parts as parts
from tern.ops.cuda.arrival import MOST, counters, is_last
from tern.ops.cuda.attention_parts import as_query, piece_sums, score_factor, shares, side_by_side
from tern.ops.cuda.launch import EARLY, announce, narrow, tl, triton, wait
from tern.ops.cuda.rotary import turn
from tern.ops.cuda.rounding import round_groups

if TYPE_CHECKING:
    from tern.ops.cuda.attention import GpuPlan

PROGRAMS = 132 * 9
"""Programs of one warp that a Hopper card holds at a time, among which the pieces of a step are spread.

More would be on their way no sooner, and in a graph made for 131 072 positions nearly all of them would find nothing to
do. Deep in a context each takes several pieces.
"""
FEWEST = 4
"""Programs that share a context, if any do. Fewer would add little to what is on its way, and programs that share keep
the sums of all pieces: at 131 072 positions 11 MB a sequence, of which there are up to 74 then.
"""
_JOINED = 1024
"""Numbers that a warp joins at a time: eight rows of 128."""
_AT_ONCE = 4
"""Sums that are fetched together when they are joined: one after the other they would cost the memory's latency each,
and more would take more registers than the pieces themselves."""


@dataclass(frozen=True)
class NewTokens:
    """What turns a step's rows of all heads and stores them: tables [T, D] float32 and `slots` [T]."""

    cosines: Tensor
    signed_sines: Tensor
    slots: Tensor


def attend_few(
    rows: Tensor,
    heads: int,
    tokens: NewTokens | None,
    caches: tuple[Tensor, Tensor],
    plan: GpuPlan,
    few: int,
    output: Tensor,
    scales: Tensor | None = None,
) -> None:
    """The sequences with at most `few` queries -> their rows of `output` [T, heads * D].

    `rows` [T, all heads * D] are to be turned and stored as `tokens` says; without, they are queries alone, and the
    caches hold their keys. With `scales` [T, heads] the output is fp8, rounded by heads of 128.
    """
    if rows.numel() == 0:
        return
    kv_heads, head_dim = caches[0].shape[0], caches[0].shape[4]
    pieces = -(-plan.max_context_len // parts.PIECE)
    stretches = -(-pieces // parts.STRETCH)
    room = MOST // (kv_heads * (1 + stretches))
    total = plan.context_lens.shape[0]
    most = min(room, total)
    sizes = _constants(rows, heads, caches[0], few)
    programs = min(pieces, PROGRAMS // (most * kv_heads * sizes["num_warps"]))
    if programs < FEWEST:
        programs = 1
    # A program that is alone has joined a stretch before it begins the next, whose sums take the same places.
    held = pieces if programs > 1 else min(pieces, parts.STRETCH)
    sums = rows.new_empty((min(rows.shape[0], most * few), heads, held + stretches, head_dim), dtype=torch.float32)
    highest, weights = rows.new_empty((2, *sums.shape[:3]), dtype=torch.float32)
    for first in range(0, total, room):
        _attend_few[(programs, kv_heads, min(room, total - first))](
            rows,
            (tokens.cosines, tokens.signed_sines, tokens.slots) if tokens else (rows, rows, rows),
            caches,
            (plan.query_starts[first:], plan.context_lens[first:], plan.block_tables[first:]),
            (output, output if scales is None else scales),
            (sums, highest, weights),
            counters(rows.device),
            caches[0].stride(0),
            caches[1].stride(0),
            plan.block_tables.stride(0),
            held,
            stretches,
            few,
            0 if scales is None else scales.stride(1),
            score_factor(head_dim),
            TURN=tokens is not None,
            TO_FP8=scales is not None,
            **sizes,
            **EARLY,
        )


def _constants(rows: Tensor, heads: int, key_cache: Tensor, few: int) -> dict[str, Any]:
    """The kernel's, for sequences of at most `few` queries."""
    group = heads // key_cache.shape[0]
    sizes = parts.constants(rows.dtype, heads, key_cache, max(parts.LEAST_ROWS, triton.next_power_of_2(few * group)))
    joined = max(1, _JOINED * sizes["num_warps"] // sizes["WIDTH"])
    return sizes | {
        # As many as the rows hold: a kernel for each number of queries would be compiled while somebody waits.
        "TOKENS": 1 if few == 1 else triton.next_power_of_2(sizes["ROWS"] // group),
        "JOINED": min(sizes["ROWS"], joined),
        "AT_ONCE": _AT_ONCE,
        # Those of nine programs fit into a multiprocessor then; what is spilled for it is not in the loop over tiles.
        "maxnreg": 224 if sizes["ROWS"] == parts.LEAST_ROWS else None,
    }


@triton.jit
def _store_new(
    rows,
    tables,
    keys,
    values,
    tokens,
    mine,
    kv_head,
    ROW_HEADS: tl.constexpr,
    FIRST_KEY: tl.constexpr,
    FIRST_VALUE: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Turn the keys of those `tokens` that are `mine`, and store them and their values in a KV head.

    Its slot 0 is at `keys` and `values`. What is stored is what `tern.ops.cuda.rotary` stores.
    """
    cosines, signed_sines, slots = tables
    columns = tl.arange(0, WIDTH)[None, :]
    there = mine[:, None] & (columns < DIM)
    row = rows + (tokens * ROW_HEADS + kv_head)[:, None] * DIM + columns
    key = tl.load(row + FIRST_KEY * DIM, mask=there, other=0.0).to(tl.float32)
    value = tl.load(row + FIRST_VALUE * DIM, mask=there, other=0.0).to(tl.float32)
    cosine = tl.load(cosines + tokens[:, None] * DIM + columns, mask=there, other=0.0)
    sine = tl.load(signed_sines + tokens[:, None] * DIM + columns, mask=there, other=0.0)
    slot = tl.load(slots + tokens, mask=mine, other=0).to(tl.int64)[:, None] * DIM + columns
    dtype: tl.constexpr = keys.dtype.element_ty
    key = turn(key, cosine, sine, rows.dtype.element_ty, INTERPRETED).to(tl.float32)
    tl.store(keys + slot, narrow(key, dtype, INTERPRETED), mask=there)
    tl.store(values + slot, narrow(value, dtype, INTERPRETED), mask=there)


@triton.jit
def _queries(
    rows,
    tables,
    tokens,
    heads,
    live,
    ROW_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    TURN: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """A query for each of `tokens` and `heads` [ROWS], turned if need be; zeros where none is `live`."""
    cosines, signed_sines, _ = tables
    columns = tl.arange(0, WIDTH)[None, :]
    inside = live[:, None] & (columns < DIM)
    query = tl.load(rows + (tokens * ROW_HEADS + heads)[:, None] * DIM + columns, mask=inside, other=0.0)
    if TURN:
        cosine = tl.load(cosines + tokens[:, None] * DIM + columns, mask=inside, other=0.0)
        sine = tl.load(signed_sines + tokens[:, None] * DIM + columns, mask=inside, other=0.0)
        query = turn(query.to(tl.float32), cosine, sine, rows.dtype.element_ty, INTERPRETED)
    return query


@triton.jit
def _store_sums(
    memory, number, live, highest, total, left, right, DIM: tl.constexpr, WIDTH: tl.constexpr, SLAB: tl.constexpr
):
    """A piece's sums for rows that are `live` -> sums number `number` [ROWS] of `memory`."""
    sums, highest_sums, total_sums = memory
    tl.store(highest_sums + number, highest, mask=live)
    tl.store(total_sums + number, total, mask=live)
    slab = tl.arange(0, SLAB)[None, :]
    place = sums + number[:, None].to(tl.int64) * DIM + slab
    tl.store(place, left, mask=live[:, None] & (slab < DIM))
    if SLAB < WIDTH:
        tl.store(place + SLAB, right, mask=live[:, None] & (SLAB + slab < DIM))


@triton.jit
def _write(
    into, row, live, total, mixed, dtype: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, TO_FP8: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """All sums of rows that are `live`, mixed values [R, columns] -> rows number `row` [R] of the result, which is the
    output, and with `TO_FP8` scales [T, HEADS] whose columns lie `pitch` apart.
    """
    output, scales, pitch = into
    columns = tl.arange(0, mixed.shape[1])[None, :]
    inside = live[:, None] & (columns < DIM)
    result = narrow(mixed / tl.where(live, total, 1.0)[:, None], dtype, INTERPRETED)
    place = tl.max_contiguous(row[:, None] * DIM + columns, (1, 4))
    if TO_FP8:
        codes, steps = round_groups(result.to(tl.float32), output.dtype.element_ty, INTERPRETED)
        tl.store(output + place, codes, mask=inside)
        tl.store(scales + row // HEADS + row % HEADS * pitch, steps, mask=live)
    else:
        tl.store(output + place, result, mask=inside)


@triton.jit
def _join(
    memory,
    first,
    count,
    target,
    rows,
    kv_head,
    entries,
    into,
    dtype: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    JOINED: tl.constexpr,
    AT_ONCE: tl.constexpr,
    TO_FP8: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """The sums number `first` and the next of `memory`, `count` together, joined in this order -> the sums number
    `target`, or where that is negative, since these are all: rows of the result.

    A sequence has `rows` rows in all heads of `kv_head`, and a row has `entries` sums. What is alone need not be joined
    to nothing, as chunks do: that changes no number.
    """
    sums, highest_sums, total_sums = memory
    columns = tl.arange(0, WIDTH)[None, :]
    zeros = tl.zeros([JOINED], tl.int32)
    for begin in range(0, rows, JOINED):
        row = begin + tl.arange(0, JOINED)
        live = row < rows
        row = row // GROUP * HEADS + kv_head * GROUP + row % GROUP
        mine = row.to(tl.int64) * entries
        highest = tl.full([JOINED], float("-inf"), tl.float32)
        total = tl.zeros([JOINED], tl.float32)
        mixed = tl.zeros([JOINED, WIDTH], tl.float32)
        for number in range(first, first + count, AT_ONCE):
            fetched = ()
            for ahead in tl.static_range(AT_ONCE):
                place = mine + number + ahead
                there = live & (number + ahead + zeros < first + count)
                fetched += (  # type: ignore[assignment]
                    (
                        tl.load(highest_sums + place, mask=there, other=float("-inf"), cache_modifier=".cg"),
                        tl.load(total_sums + place, mask=there, other=0.0, cache_modifier=".cg"),
                        tl.load(
                            sums + place[:, None] * DIM + columns,
                            mask=there[:, None] & (columns < DIM),
                            other=0.0,
                            cache_modifier=".cg",
                        ),
                    ),
                )
            for ahead in tl.static_range(AT_ONCE):
                next_highest, next_total, next_mixed = fetched[ahead]  # type: ignore[var-annotated]
                highest, keep, add = shares(highest, next_highest)
                total = total * keep + next_total * add
                mixed = mixed * keep[:, None] + next_mixed * add[:, None]
        if target < 0:
            _write(into, row, live, total, mixed, dtype, HEADS, DIM, TO_FP8, INTERPRETED)
        else:
            tl.store(highest_sums + mine + target, highest, mask=live)
            tl.store(total_sums + mine + target, total, mask=live)
            place = sums + (mine + target)[:, None] * DIM + columns
            tl.store(place, mixed, mask=live[:, None] & (columns < DIM))


@triton.jit(do_not_specialize=["table_stride", "held", "max_stretches", "few", "scales_pitch"])
def _attend_few(
    rows,
    tables,
    caches,
    plan,
    into,
    memory,
    counter,
    key_head_stride,
    value_head_stride,
    table_stride,
    held,
    max_stretches,
    few,
    scales_pitch,
    factor,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    SLAB: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    PIECE: tl.constexpr,
    STRETCH: tl.constexpr,
    JOINED: tl.constexpr,
    AT_ONCE: tl.constexpr,
    TOKENS: tl.constexpr,
    TURN: tl.constexpr,
    TO_FP8: tl.constexpr,
    MULTIPLIED: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Program (p, g, s): a sequence's queries in all heads of KV head g, over every piece whose number is p modulo the
    programs.

    It should meet the limit of memory: one warp for the 16 rows of a product, 21 KB of tiles on their way, so that nine
    such programs share a multiprocessor. `memory` is for what the programs tell each other: sums of as many rows as
    there may be, [rows, HEADS, `held` pieces and behind them stretches, D], and [the same without D] twice.
    """
    announce()
    wait()
    first, kv_head, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    query_starts, context_lens, block_tables = plan
    # Together, though those without a piece need one of them: all others would wait twice.
    start = tl.load(query_starts + sequence)
    length = (tl.load(query_starts + sequence + 1) - start).to(tl.int32)
    context = tl.load(context_lens + sequence).to(tl.int32)
    earlier = start - tl.load(query_starts)
    pieces = tl.cdiv(context, PIECE)
    if (length > few) | (length <= 0) | (first >= pieces):
        return
    KV_HEADS: tl.constexpr = HEADS // GROUP
    ROW_HEADS: tl.constexpr = HEADS + 2 * KV_HEADS if TURN else HEADS
    keys = caches[0] + kv_head.to(tl.int64) * key_head_stride
    values = caches[1] + kv_head.to(tl.int64) * value_head_stride
    row = tl.arange(0, ROWS)
    token, head = row // GROUP, kv_head * GROUP + row % GROUP
    live = token < length
    query = _queries(rows, tables, start + token, head, live, ROW_HEADS, DIM, WIDTH, TURN, INTERPRETED)
    if TURN:
        new = tl.arange(0, TOKENS)
        mine = (new < length) & ((context - length + new) // PIECE % tl.num_programs(0) == first)
        _store_new(
            rows, tables, keys, values, start + new, mine, kv_head,
            ROW_HEADS, HEADS, HEADS + KV_HEADS, DIM, WIDTH, INTERPRETED,
        )  # fmt: skip
        tl.debug_barrier()  # before any thread of this program reads what another stored
    query = as_query(query, MULTIPLIED, INTERPRETED)
    table = block_tables + sequence.to(tl.int64) * table_stride
    entries = held + max_stretches
    # The rows before in this launch, or as many as sequences before may have: what is less, and no two share any.
    before = tl.minimum(earlier.to(tl.int64), sequence.to(tl.int64) * few) * HEADS * entries
    memory = (memory[0] + before * DIM, memory[1] + before, memory[2] + before)
    into = (into[0] + start * HEADS * DIM, into[1] + start, scales_pitch)
    row = token * HEADS + head
    counter += (sequence * KV_HEADS + kv_head) * (1 + max_stretches)
    stretches = tl.cdiv(pieces, STRETCH)
    dtype: tl.constexpr = rows.dtype.element_ty
    # What only the joins need is computed when they do: kept over the tiles, it would push theirs out of the registers.
    for piece in tl.range(first, pieces, tl.num_programs(0), disable_licm=True):
        highest, total, left, right = piece_sums(
            query, keys + tl.arange(0, WIDTH)[:, None], values + tl.arange(0, SLAB)[None, :], table, piece, context,
            context - length + token, factor,
            DIM, WIDTH, SLAB, BLOCK_SIZE, ROWS, TILE, PIECE, MULTIPLIED, INTERPRETED,
        )  # fmt: skip
        if pieces == 1:
            mixed = side_by_side(left, right, SLAB, WIDTH)
            _write(into, row, live, total, mixed, dtype, HEADS, DIM, TO_FP8, INTERPRETED)
        else:
            _store_sums(memory, row * entries + piece % held, live, highest, total, left, right, DIM, WIDTH, SLAB)
            stretch = piece // STRETCH
            its_pieces = tl.minimum(pieces - stretch * STRETCH, STRETCH)
            if is_last(counter + 1 + stretch, its_pieces):
                target = tl.where(stretches == 1, -1, held + stretch)
                _join(
                    memory, stretch * STRETCH % held, its_pieces, target, length * GROUP, kv_head, entries, into,
                    dtype, HEADS, GROUP, DIM, WIDTH, JOINED, AT_ONCE, TO_FP8, INTERPRETED,
                )  # fmt: skip
                if stretches > 1:  # noqa: SIM102 - a kernel's `and` would count both
                    if is_last(counter, stretches):
                        _join(
                            memory, held, stretches, -1, length * GROUP, kv_head, entries, into,
                            dtype, HEADS, GROUP, DIM, WIDTH, JOINED, AT_ONCE, TO_FP8, INTERPRETED,
                        )  # fmt: skip
