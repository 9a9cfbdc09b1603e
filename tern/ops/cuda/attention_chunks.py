"""Attention of chunks of many queries: a program goes through the context of its rows alone.

Knows which rows are a program's; the arithmetic is that of `attention_parts`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from tern.ops.cuda.attention_parts import as_query, constants, join, nothing, piece_sums, score_factor
from tern.ops.cuda.launch import narrow, tl, triton

if TYPE_CHECKING:
    from tern.ops.cuda.attention import GpuPlan


def attend_chunks(
    queries: Tensor, caches: tuple[Tensor, Tensor], plan: GpuPlan, few: int, rows: int, output: Tensor
) -> None:
    """The sequences with more than `few` queries -> their rows of `output`, by programs of `rows` rows."""
    sequences, kv_heads, heads = plan.context_lens.shape[0], caches[0].shape[0], queries.shape[1]
    tokens = rows // (heads // kv_heads)
    # Sequence s has its tiles from number query_starts[s] // tokens + s on: always room enough, and known without sums.
    _attend_chunks[(queries.shape[0] // tokens + sequences, kv_heads)](
        queries,
        *caches,
        plan.query_starts,
        plan.context_lens,
        plan.block_tables,
        output,
        caches[0].stride(0),
        caches[1].stride(0),
        sequences,
        plan.block_tables.stride(0),
        score_factor(queries.shape[2]),
        FEW=few,
        TOKENS=tokens,
        **constants(queries.dtype, heads, caches[0], rows),
    )


@triton.jit
def _sequence_of(tile, query_starts, sequences, TOKENS: tl.constexpr):
    """The last sequence whose tiles begin at number `tile` or before it, by halves."""
    sequence = 0
    beyond = sequences
    while beyond - sequence > 1:
        middle = (sequence + beyond) // 2
        begins = tl.load(query_starts + middle).to(tl.int32) // TOKENS + middle <= tile
        sequence = tl.where(begins, middle, sequence)
        beyond = tl.where(begins, beyond, middle)
    return sequence


@triton.jit(do_not_specialize=["sequences", "table_stride"])
def _attend_chunks(
    queries,
    key_cache,
    value_cache,
    query_starts,
    context_lens,
    block_tables,
    output,
    key_head_stride,
    value_head_stride,
    sequences,
    table_stride,
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
    FEW: tl.constexpr,
    TOKENS: tl.constexpr,
    MULTIPLIED: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Program (tile, g): `TOKENS` queries of a sequence in all heads of KV head g, over all of their context.

    It should meet the limit of the tensor cores: 32 rows a warp use each fragment of keys twice, and what the registers
    cannot hold is the pieces before, which wait in local memory and are read once a piece.
    """
    kv_head = tl.program_id(1).to(tl.int64)
    # The last tiles of a sequence take longest, so they go first.
    number = tl.num_programs(0) - 1 - tl.program_id(0)
    sequence = _sequence_of(number, query_starts, sequences, TOKENS)
    tile = number - (tl.load(query_starts + sequence).to(tl.int32) // TOKENS + sequence)
    start = tl.load(query_starts + sequence)
    length = (tl.load(query_starts + sequence + 1) - start).to(tl.int32)
    context = tl.load(context_lens + sequence).to(tl.int32)
    if (length <= FEW) | (tile * TOKENS >= length):
        return

    rows = tl.arange(0, ROWS)
    tokens = tile * TOKENS + rows // GROUP
    live = (rows < TOKENS * GROUP) & (tokens < length)
    positions = context - length + tokens
    limit = context - length + tl.minimum((tile + 1) * TOKENS, length)  # of keys, for the last row
    columns = tl.arange(0, WIDTH)
    places = ((start + tokens) * HEADS + kv_head * GROUP + rows % GROUP) * DIM
    inside = live[:, None] & (columns < DIM)[None, :]
    query = tl.load(queries + places[:, None] + columns[None, :], mask=inside, other=0.0)
    query = as_query(query, MULTIPLIED, INTERPRETED)
    keys = key_cache + kv_head * key_head_stride + columns[:, None]
    slab = tl.arange(0, SLAB)[None, :]
    values = value_cache + kv_head * value_head_stride + slab
    table = block_tables + sequence.to(tl.int64) * table_stride

    highest, total, left, right = nothing(ROWS, SLAB)
    pieces = tl.cdiv(limit, PIECE)
    for stretch in range(0, pieces, STRETCH):
        its_highest, its_total, its_left, its_right = nothing(ROWS, SLAB)
        for piece in range(stretch, tl.minimum(stretch + STRETCH, pieces)):
            next_highest, next_total, next_left, next_right = piece_sums(
                query, keys, values, table, piece, limit, positions, factor,
                DIM, WIDTH, SLAB, BLOCK_SIZE, ROWS, TILE, PIECE, MULTIPLIED, INTERPRETED,
            )  # fmt: skip
            its_highest, its_total, its_left, its_right = join(
                its_highest, its_total, its_left, its_right, next_highest, next_total, next_left, next_right
            )
        highest, total, left, right = join(highest, total, left, right, its_highest, its_total, its_left, its_right)
    dtype: tl.constexpr = output.dtype.element_ty
    place = output + places[:, None] + slab
    tl.store(place, narrow(left / total[:, None], dtype, INTERPRETED), mask=live[:, None] & (slab < DIM))
    if SLAB < WIDTH:
        result = narrow(right / total[:, None], dtype, INTERPRETED)
        tl.store(place + SLAB, result, mask=live[:, None] & (SLAB + slab < DIM))
