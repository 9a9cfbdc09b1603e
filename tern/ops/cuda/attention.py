"""Attention over a paged KV cache on a GPU. Knows block tables and positions; knows no layers and no requests.

A row's context is cut at multiples of `PIECE` positions. Within a piece keys are visited in tiles of `TILE` with the
running softmax of flash attention (arXiv 2205.14135); what the pieces came to is joined from the first to the last.
Both cuts depend on positions alone, so there are two ways to the same sums:

    few queries a sequence (decodes, drafts)          a chunk of many
    program     piece 0   1   2   3   4               program            piece 0   1   2   3   4
    p                 #           #                   rows  0..11              #   #   #
    p + 1                 #           #               rows 12..23              #   #   #   #
    p + 2                     #                       rows 24..35              #   #   #   #   #
    each writes its pieces' sums, then one            each joins a piece when it has it,
    program a row joins them, 0 to 4                  0 to 4

A row comes out bit by bit alike on both, whatever stands beside it. What lies beyond a row's own position changes
nothing in it: a weight of zero, a factor of one.
docs/decisions/0019-attention-by-one-instruction.md says what this asks of the hardware.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tern.ops.attention_libraries import Chunks
from tern.ops.cuda.launch import INTERPRETED, dot, narrow, tl, triton

PIECE = 256
"""Positions of a context whose sum is one program's, and whose partial result is 2 % of the bytes that it read.

At 4 096 positions a single sequence of four KV heads then has 64 programs. Twice as many positions would halve them,
half as many would double what is written and read again.
"""
TILE = 32
"""Keys visited at once: with 64 the registers of neither kernel hold the scores, and every tile spills."""
MAX_ROWS = 64
"""Query rows of a program, a row for each head: 32 a warp, so that a warp uses what it fetches of a tile twice."""
LEAST_ROWS = 16
"""Rows of a tensor core's smallest product, and all that a program has in float32, which goes without tensor cores."""
PROGRAMS = 4096
"""Programs among which the pieces of a step are spread: enough for every multiprocessor to hold some, few enough that
those which find nothing to do cost little."""
JOINED = 16
"""Pieces' sums that are fetched together when they are joined: they come from memory, one after the other they would
cost its latency each."""


@dataclass(frozen=True)
class GpuPlan:
    """One step's queries: tensors on the device as they came, whose numbers the host never reads.

    The launches depend on the shapes and the two lengths alone. A CUDA graph that was captured with them is right for
    any numbers in the tensors, as long as no chunk and no context is longer than the plan says.
    """

    query_starts: Tensor
    context_lens: Tensor
    block_tables: Tensor
    max_query_len: int
    max_context_len: int
    chunks: Chunks | None = None
    """Of prompts, where a library attends them; None where the kernels here do."""


def paged_attention(queries: Tensor, key_cache: Tensor, value_cache: Tensor, plan: GpuPlan) -> Tensor:
    """As `tern.ops.reference_attention.paged_attention`; a row of no sequence stays unwritten.

    The caches are one layer's as a GPU keeps them (`tern.ops.kv_cache_shapes`), of any floating type. Queries and keys
    are multiplied in the wider of their types, beside float8 keys in float16 if the queries have 16 bits. While few
    queries meet a context their pieces' sums take 4 * (D + 2) bytes for each query head and piece of the plan's longest
    context: 0.33 MB a sequence of 20 heads of 128 at 8 192 positions.
    """
    queries = queries.contiguous()
    _check(queries, key_cache, value_cache)
    output = torch.empty_like(queries)
    group = queries.shape[1] // key_cache.shape[0]
    sequences = plan.context_lens.shape[0]
    if queries.numel() == 0 or sequences == 0:
        return output
    wide = _multiplied(queries.dtype, key_cache.dtype) == torch.float32
    rows = max(LEAST_ROWS if wide else MAX_ROWS, triton.next_power_of_2(group))
    few = plan.max_query_len if plan.max_query_len * group <= rows else 1
    caches = (key_cache, value_cache)
    if plan.max_query_len > few and plan.chunks is not None:
        plan.chunks.attend(queries, caches, plan.block_tables, output)
        few = plan.chunks.longest_within(rows // group)  # which are attended here, whatever the library made of them
    elif plan.max_query_len > few:
        _attend_chunks(queries, caches, plan, output, few, rows)
    if plan.max_query_len <= few or sequences > 1:
        _attend_pieces(queries, caches, plan, output, few)
    return output


def _check(queries: Tensor, key_cache: Tensor, value_cache: Tensor) -> None:
    """Raise `ValueError` for caches that the kernels would read wrongly."""
    kv_heads, num_blocks, _, block_size, head_dim = key_cache.shape
    if tuple(value_cache.shape) != (kv_heads, num_blocks, block_size, head_dim, 1) or key_cache.shape[2] != 1:
        raise ValueError(
            f"caches of shapes {list(key_cache.shape)} and {list(value_cache.shape)} are not laid out for a GPU: "
            "allocate them by kv_cache_shapes(..., gpu=True)"
        )
    if not (key_cache[0].is_contiguous() and value_cache[0].is_contiguous()):
        raise ValueError("the blocks of a KV head must lie one behind the other: pass a layer's cache as it was made")
    if queries.shape[2] != head_dim or queries.shape[1] % kv_heads:
        raise ValueError(
            f"{queries.shape[1]} query heads of {queries.shape[2]} do not fit a cache of {kv_heads} heads of {head_dim}"
        )


def _multiplied(queries: torch.dtype, cache: torch.dtype) -> torch.dtype:
    """The type in which queries meet keys, and weights values.

    float8_e4m3fn becomes float16 in one instruction for two numbers, and bfloat16 only by way of that.
    """
    if cache.itemsize == 1:
        return torch.float32 if queries == torch.float32 else torch.float16
    return torch.promote_types(queries, cache)


def _sizes(queries: Tensor, key_cache: Tensor, rows: int) -> dict[str, object]:
    """The constants of both kernels."""
    head_dim = queries.shape[2]
    width = max(16, triton.next_power_of_2(head_dim))
    slab = width if width <= MAX_ROWS else width // 2
    return {
        "HEADS": queries.shape[1],
        "GROUP": queries.shape[1] // key_cache.shape[0],
        "DIM": head_dim,
        "WIDTH": width,
        "SLAB": slab,
        "BLOCK_SIZE": key_cache.shape[3],
        "ROWS": rows,
        "TILE": TILE,
        "PIECE": PIECE,
        "MULTIPLIED": _TRITON_TYPES[_multiplied(queries.dtype, key_cache.dtype)],
        "INTERPRETED": INTERPRETED,
        # 32 rows a warp, and never four warps: see the decision named above.
        "num_warps": 1 if rows <= 32 or slab > rows else 2,
        "num_stages": 3,
        "enable_fp_fusion": False,
    }


_TRITON_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def _attend_chunks(
    queries: Tensor, caches: tuple[Tensor, Tensor], plan: GpuPlan, output: Tensor, few: int, rows: int
) -> None:
    """The sequences with more than `few` queries -> their rows of `output`."""
    sequences, kv_heads = plan.context_lens.shape[0], caches[0].shape[0]
    sizes = _sizes(queries, caches[0], rows)
    tokens = rows // (queries.shape[1] // kv_heads)
    # Sequence s has its tiles from number query_starts[s] // tokens + s on: always room enough, and known without sums.
    grid = (queries.shape[0] // tokens + sequences, kv_heads, 1)
    _attend[grid](
        queries,
        *caches,
        plan.query_starts,
        plan.context_lens,
        plan.block_tables,
        output,
        output,
        output,
        *_numbers(queries, caches, plan),
        FEW=few,
        TOKENS=tokens,
        SPLIT=False,
        **sizes,
    )


def _attend_pieces(queries: Tensor, caches: tuple[Tensor, Tensor], plan: GpuPlan, output: Tensor, few: int) -> None:
    """The sequences with at most `few` queries -> their rows of `output`, by way of their pieces' sums."""
    heads, head_dim, kv_heads = queries.shape[1], queries.shape[2], caches[0].shape[0]
    sequences, pieces = plan.context_lens.shape[0], -(-plan.max_context_len // PIECE)
    sizes = _sizes(queries, caches[0], max(LEAST_ROWS, triton.next_power_of_2(few * heads // kv_heads)))
    sums = queries.new_empty((sequences * few, heads, pieces, head_dim), dtype=torch.float32)
    highest, total = queries.new_empty((2, *sums.shape[:3]), dtype=torch.float32)
    programs = min(pieces, max(1, PROGRAMS // (sequences * kv_heads)))
    _attend[(programs, kv_heads, sequences)](
        queries,
        *caches,
        plan.query_starts,
        plan.context_lens,
        plan.block_tables,
        sums,
        highest,
        total,
        *_numbers(queries, caches, plan),
        FEW=few,
        TOKENS=few,
        SPLIT=True,
        **sizes,
    )
    _join[(sequences * few, heads)](
        sums,
        highest,
        total,
        plan.query_starts,
        plan.context_lens,
        output,
        pieces,
        FEW=few,
        **{name: sizes[name] for name in ("HEADS", "DIM", "WIDTH", "PIECE", "INTERPRETED", "enable_fp_fusion")},
        JOINED=min(JOINED, triton.next_power_of_2(pieces)),
        num_warps=1,
    )


def _numbers(queries: Tensor, caches: tuple[Tensor, Tensor], plan: GpuPlan) -> tuple[object, ...]:
    """Strides, counts and the factor of the scores, which are powers of two: log2(e) / sqrt(D)."""
    return (
        caches[0].stride(0),
        caches[1].stride(0),
        plan.context_lens.shape[0],
        plan.block_tables.stride(0),
        -(-plan.max_context_len // PIECE),
        math.log2(math.e) / math.sqrt(queries.shape[2]),
    )


@triton.jit
def _shares(highest, next_highest):
    """Two parts of a context with these highest scores -> the higher, and what each part's sums are multiplied by.

    A part that holds nothing for a row (-inf, and sums of 0) changes nothing in it.
    """
    joined = tl.maximum(highest, next_highest)
    base = tl.where(joined == float("-inf"), 0.0, joined)
    return joined, tl.exp2(highest - base), tl.exp2(next_highest - base)


@triton.jit
def _as_multiplied(x, MULTIPLIED: tl.constexpr, INTERPRETED: tl.constexpr):
    """Cached numbers in the type of the product; the interpreter's is float32."""
    if INTERPRETED:
        return x.to(tl.float32)
    return x.to(MULTIPLIED)


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


@triton.jit(do_not_specialize=["sequences", "table_stride", "max_pieces"])
def _attend(
    queries,
    key_cache,
    value_cache,
    query_starts,
    context_lens,
    block_tables,
    output,
    highest_output,
    total_output,
    key_head_stride,
    value_head_stride,
    sequences,
    table_stride,
    max_pieces,
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
    FEW: tl.constexpr,
    TOKENS: tl.constexpr,
    SPLIT: tl.constexpr,
    MULTIPLIED: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """`TOKENS` queries of a sequence, in all heads of a KV head, over pieces of their context.

    SPLIT: program (p, g, s) takes every piece whose number is p modulo the programs, and writes its sums: [tokens of
    all sequences, heads, pieces, D] and [tokens of all sequences, heads, pieces] twice. Else program (tile, g) takes
    all pieces and writes the result.

    Few rows should meet the limit of memory: one warp for the 16 rows of a product, 21 KB of tiles on their way, so
    that nine such programs share a multiprocessor. Many rows should meet the limit of the tensor cores: 32 rows a warp
    use each fragment of keys twice, and what the registers cannot hold is the pieces before, which wait in local
    memory and are read once a piece. The values are taken in two slabs of 64 columns where D is 128: with more columns
    than rows the compiler would share out a row's keys among warps.
    """
    kv_head = tl.program_id(1).to(tl.int64)
    if SPLIT:
        sequence = tl.program_id(2)
        tile = 0
    else:
        # The last tiles of a sequence take longest, so they go first.
        number = tl.num_programs(0) - 1 - tl.program_id(0)
        sequence = _sequence_of(number, query_starts, sequences, TOKENS)
        tile = number - (tl.load(query_starts + sequence).to(tl.int32) // TOKENS + sequence)
    start = tl.load(query_starts + sequence)
    length = (tl.load(query_starts + sequence + 1) - start).to(tl.int32)
    context = tl.load(context_lens + sequence).to(tl.int32)
    if (length <= FEW) != SPLIT:
        return
    if tile * TOKENS >= length:
        return

    rows = tl.arange(0, ROWS)
    tokens = tile * TOKENS + rows // GROUP
    live = (rows < TOKENS * GROUP) & (tokens < length)
    heads = kv_head * GROUP + rows % GROUP
    positions = context - length + tokens
    limit = context - length + tl.minimum((tile + 1) * TOKENS, length)  # of keys, for the last row
    columns = tl.arange(0, WIDTH)
    places = ((start + tokens) * HEADS + heads) * DIM
    query = tl.load(
        queries + places[:, None] + columns[None, :], mask=live[:, None] & (columns < DIM)[None, :], other=0.0
    )
    if query.dtype == tl.bfloat16 and tl.float16 == MULTIPLIED:
        query = tl.clamp(query.to(tl.float32), -65504.0, 65504.0, propagate_nan=tl.PropagateNan.ALL)
    query = _as_multiplied(query, MULTIPLIED, INTERPRETED)
    keys = key_cache + kv_head * key_head_stride + columns[:, None]
    slab = tl.arange(0, SLAB)[None, :]
    values = value_cache + kv_head * value_head_stride + slab
    table = block_tables + sequence.to(tl.int64) * table_stride

    highest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    left = tl.zeros([ROWS, SLAB], tl.float32)
    right = tl.zeros([ROWS, SLAB], tl.float32)
    first = tl.program_id(0) if SPLIT else 0
    step = tl.num_programs(0) if SPLIT else 1
    for piece in range(first, tl.cdiv(limit, PIECE), step):
        next_highest = tl.full([ROWS], float("-inf"), tl.float32)
        next_total = tl.zeros([ROWS], tl.float32)
        next_left = tl.zeros([ROWS, SLAB], tl.float32)
        next_right = tl.zeros([ROWS, SLAB], tl.float32)
        for begin in range(piece * PIECE, tl.minimum((piece + 1) * PIECE, limit), TILE):
            at = begin + tl.arange(0, TILE)
            inside = at < limit
            slots = tl.load(table + at // BLOCK_SIZE, mask=inside, other=0).to(tl.int64) * BLOCK_SIZE + at % BLOCK_SIZE
            key = tl.load(keys + slots[None, :] * DIM, mask=(columns < DIM)[:, None] & inside[None, :], other=0.0)
            key = _as_multiplied(key, MULTIPLIED, INTERPRETED)
            scores = dot(query, key, tl.zeros([ROWS, TILE], tl.float32), INTERPRETED)
            scores = tl.where(at[None, :] <= positions[:, None], scores, float("-inf"))
            highest_now = tl.maximum(next_highest, tl.max(scores, axis=1) * factor)
            base = tl.where(highest_now == float("-inf"), 0.0, highest_now)
            shrink = tl.exp2(next_highest - base)
            weights = tl.exp2(tl.fma(scores, factor, -base[:, None]))
            next_highest = highest_now
            next_total = next_total * shrink + tl.sum(weights, axis=1)
            weights = narrow(weights, MULTIPLIED, INTERPRETED)
            value = tl.load(values + slots[:, None] * DIM, mask=inside[:, None] & (slab < DIM), other=0.0)
            value = _as_multiplied(value, MULTIPLIED, INTERPRETED)
            next_left = dot(weights, value, next_left * shrink[:, None], INTERPRETED)
            if SLAB < WIDTH:
                there = inside[:, None] & (SLAB + slab < DIM)
                value = tl.load(values + slots[:, None] * DIM + SLAB, mask=there, other=0.0)
                value = _as_multiplied(value, MULTIPLIED, INTERPRETED)
                next_right = dot(weights, value, next_right * shrink[:, None], INTERPRETED)
        if SPLIT:
            sums = ((sequence.to(tl.int64) * FEW + tokens) * HEADS + heads) * max_pieces + piece
            tl.store(highest_output + sums, next_highest, mask=live)
            tl.store(total_output + sums, next_total, mask=live)
            place = output + sums[:, None] * DIM + slab
            tl.store(place, next_left, mask=live[:, None] & (slab < DIM))
            if SLAB < WIDTH:
                tl.store(place + SLAB, next_right, mask=live[:, None] & (SLAB + slab < DIM))
        else:
            highest, keep, add = _shares(highest, next_highest)
            total = total * keep + next_total * add
            left = left * keep[:, None] + next_left * add[:, None]
            right = right * keep[:, None] + next_right * add[:, None]
    if not SPLIT:
        dtype: tl.constexpr = output.dtype.element_ty
        place = output + places[:, None] + slab
        tl.store(place, narrow(left / total[:, None], dtype, INTERPRETED), mask=live[:, None] & (slab < DIM))
        if SLAB < WIDTH:
            result = narrow(right / total[:, None], dtype, INTERPRETED)
            tl.store(place + SLAB, result, mask=live[:, None] & (SLAB + slab < DIM))


@triton.jit(do_not_specialize=["max_pieces"])
def _join(
    sums,
    highest_sums,
    total_sums,
    query_starts,
    context_lens,
    output,
    max_pieces,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    PIECE: tl.constexpr,
    FEW: tl.constexpr,
    JOINED: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """A query in one head: its pieces' sums, joined from the first to the last -> its row of `output`.

    It waits for memory: its loads do not depend on each other, and `JOINED` of them are under way at a time.
    """
    sequence = tl.program_id(0) // FEW
    token = tl.program_id(0) % FEW
    head = tl.program_id(1)
    start = tl.load(query_starts + sequence)
    length = (tl.load(query_starts + sequence + 1) - start).to(tl.int32)
    if (length > FEW) | (token >= length):
        return
    count = tl.cdiv(tl.load(context_lens + sequence).to(tl.int32) - length + token + 1, PIECE)
    one = tl.arange(0, 1)
    columns = tl.arange(0, WIDTH)[None, :]
    mine = (tl.program_id(0).to(tl.int64) * HEADS + head) * max_pieces + one
    highest = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    mixed = tl.zeros([1, WIDTH], tl.float32)
    for begin in range(0, count, JOINED):
        for ahead in tl.static_range(JOINED):
            piece = mine + begin + ahead
            there = begin + ahead + one < count
            next_highest = tl.load(highest_sums + piece, mask=there, other=float("-inf"))
            next_total = tl.load(total_sums + piece, mask=there, other=0.0)
            whole = there[:, None] & (columns < DIM)
            next_mixed = tl.load(sums + piece[:, None] * DIM + columns, mask=whole, other=0.0)
            highest, keep, add = _shares(highest, next_highest)
            total = total * keep + next_total * add
            mixed = mixed * keep[:, None] + next_mixed * add[:, None]
    place = ((start + token) * HEADS + head) * DIM
    result = narrow(mixed / total[:, None], output.dtype.element_ty, INTERPRETED)
    tl.store(output + place + columns, result, mask=columns < DIM)
