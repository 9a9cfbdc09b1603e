"""What attention is made of, whichever program does it: tiles, pieces and stretches of a context, and how they join.

Knows positions and a program's rows; knows neither launches nor which programs share a sequence.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tern.ops.cuda.launch import INTERPRETED, dot, narrow, tl, triton

PIECE = 128
"""Positions of a context whose sum is one program's. A warp goes through a piece by tiles of 32 keys, each waited for
and then multiplied, some 1.5 us by an estimate; so a sequence that is alone waits for one piece and for the joins:

    sequences x positions     pieces of 4 KV heads      at once, of 1 188 programs
            1 x   1 024            32                   32: 4 tiles one after the other, 6 us; 12 us with 256 positions
            1 x   8 192           256                   256: as long
            1 x 131 072         4 096                   1 188, four pieces each: as long as memory takes, 56 us in bf16
           32 x   1 024         1 024                   1 024, memory's limit; with 256 positions half as many
          256 x   1 024         8 192                   1 024, eight pieces each

A piece's sums are 4 % of the bytes of bf16 keys and values that it reads, written and read again; half as many
positions would make it 8 %. Chunks join once a piece, which takes a warp 1 200 instructions beside the 3 100 of its
tiles, and a third level once a stretch, 1 000 beside 69 000.
"""
STRETCH = 16
"""Pieces that are joined among themselves first: one program alone would be long at the 1 024 pieces of 131 072
positions. A context of n pieces takes 16 + n / 16 joins one after the other, instead of n, and up to 2 048 positions
need no second round."""
TILE = 32
"""Keys visited at once: with 64 the registers of neither kernel hold the scores, and every tile spills."""
MAX_ROWS = 64
"""Query rows of a program, a row for each head: 32 a warp, so that a warp uses what it fetches of a tile twice."""
LEAST_ROWS = 16
"""Rows of a tensor core's smallest product, and all that a program has in float32, which goes without tensor cores."""


def multiplied(queries: torch.dtype, cache: torch.dtype) -> torch.dtype:
    """The type in which queries meet keys, and weights values.

    float8_e4m3fn becomes float16 in one instruction for two numbers, and bfloat16 only by way of that.
    """
    if cache.itemsize == 1:
        return torch.float32 if queries == torch.float32 else torch.float16
    return torch.promote_types(queries, cache)


def constants(queries: torch.dtype, heads: int, key_cache: Tensor, rows: int) -> dict[str, Any]:
    """Those of both kernels, for programs of `rows` rows."""
    head_dim = key_cache.shape[4]
    width = max(16, triton.next_power_of_2(head_dim))
    slab = width if width <= MAX_ROWS else width // 2
    return {
        "HEADS": heads,
        "GROUP": heads // key_cache.shape[0],
        "DIM": head_dim,
        "WIDTH": width,
        "SLAB": slab,
        "BLOCK_SIZE": key_cache.shape[3],
        "ROWS": rows,
        "TILE": TILE,
        "PIECE": PIECE,
        "STRETCH": STRETCH,
        "MULTIPLIED": _TRITON_TYPES[multiplied(queries, key_cache.dtype)],
        "INTERPRETED": INTERPRETED,
        # 32 rows a warp, and never four warps: see docs/decisions/0019-attention-by-one-instruction.md.
        "num_warps": 1 if rows <= 32 or slab > rows else 2,
        "num_stages": 3,
        "enable_fp_fusion": False,
    }


_TRITON_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def score_factor(head_dim: int) -> float:
    """That of the scores, which are powers of two: log2(e) / sqrt(D)."""
    return math.log2(math.e) / math.sqrt(head_dim)


@triton.jit
def shares(highest, next_highest):
    """Two parts of a context with these highest scores -> the higher, and what each part's sums are multiplied by.

    A part that holds nothing for a row (-inf, and sums of 0) changes nothing in it.
    """
    joined = tl.maximum(highest, next_highest)
    base = tl.where(joined == float("-inf"), 0.0, joined)
    return joined, tl.exp2(highest - base), tl.exp2(next_highest - base)


@triton.jit
def nothing(ROWS: tl.constexpr, SLAB: tl.constexpr):
    """The sums of no key: highest score, total weight, and the mixed values in two slabs of columns."""
    highest = tl.full([ROWS], float("-inf"), tl.float32)
    return highest, tl.zeros([ROWS], tl.float32), tl.zeros([ROWS, SLAB], tl.float32), tl.zeros([ROWS, SLAB], tl.float32)


@triton.jit
def join(highest, total, left, right, next_highest, next_total, next_left, next_right):
    """The sums of a part of a context and of the next -> those of both."""
    highest, keep, add = shares(highest, next_highest)
    total = total * keep + next_total * add
    left = left * keep[:, None] + next_left * add[:, None]
    right = right * keep[:, None] + next_right * add[:, None]
    return highest, total, left, right


@triton.jit
def side_by_side(left, right, SLAB: tl.constexpr, WIDTH: tl.constexpr):
    """Two slabs of columns [ROWS, SLAB], or one that has them all -> [ROWS, WIDTH]."""
    whole = left
    if SLAB < WIDTH:
        whole = tl.reshape(tl.permute(tl.join(left, right), (0, 2, 1)), (left.shape[0], WIDTH))
    return whole


@triton.jit
def as_query(query, MULTIPLIED: tl.constexpr, INTERPRETED: tl.constexpr):
    """A query in the type of the product, as far as that reaches."""
    if query.dtype == tl.bfloat16 and tl.float16 == MULTIPLIED:
        query = tl.clamp(query.to(tl.float32), -65504.0, 65504.0, propagate_nan=tl.PropagateNan.ALL)
    return _as_multiplied(query, MULTIPLIED, INTERPRETED)


@triton.jit
def _as_multiplied(x, MULTIPLIED: tl.constexpr, INTERPRETED: tl.constexpr):
    """Numbers in the type of the product; the interpreter's is float32."""
    if INTERPRETED:
        return x.to(tl.float32)
    return x.to(MULTIPLIED)


@triton.jit
def piece_sums(
    query,
    keys,
    values,
    table,
    piece,
    limit,
    positions,
    factor,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    SLAB: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    PIECE: tl.constexpr,
    MULTIPLIED: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """The sums of `piece` for rows [ROWS] that stand at `positions`; no key from `limit` on is read: in a tile that
    reaches beyond, the last before it stands for them, with no weight.

    `keys` are the places of slot 0 by columns [WIDTH, 1], `values` those of the first slab [1, SLAB]. The values are
    taken in two slabs of 64 columns where D is 128: with more columns than rows the compiler would share out a row's
    keys among warps.
    """
    highest, total, left, right = nothing(ROWS, SLAB)
    columns, slab = tl.arange(0, WIDTH), tl.arange(0, SLAB)[None, :]
    for begin in range(piece * PIECE, tl.minimum((piece + 1) * PIECE, limit), TILE):
        at = begin + tl.arange(0, TILE)
        near = tl.minimum(at, limit - 1)
        slots = tl.load(table + near // BLOCK_SIZE).to(tl.int32) * BLOCK_SIZE + near % BLOCK_SIZE
        key = tl.load(keys + slots[None, :].to(tl.int64) * DIM, mask=(columns < DIM)[:, None], other=0.0)
        key = _as_multiplied(key, MULTIPLIED, INTERPRETED)
        scores = dot(query, key, tl.zeros([ROWS, TILE], tl.float32), INTERPRETED)
        scores = tl.where(at[None, :] <= positions[:, None], scores, float("-inf"))
        highest_now = tl.maximum(highest, tl.max(scores, axis=1) * factor)
        base = tl.where(highest_now == float("-inf"), 0.0, highest_now)
        shrink = tl.exp2(highest - base)
        weights = tl.exp2(tl.fma(scores, factor, -base[:, None]))
        highest = highest_now
        total = total * shrink + tl.sum(weights, axis=1)
        weights = narrow(weights, MULTIPLIED, INTERPRETED)
        value = tl.load(values + slots[:, None].to(tl.int64) * DIM, mask=slab < DIM, other=0.0)
        value = _as_multiplied(value, MULTIPLIED, INTERPRETED)
        left = dot(weights, value, left * shrink[:, None], INTERPRETED)
        if SLAB < WIDTH:
            place = values + SLAB + slots[:, None].to(tl.int64) * DIM
            value = tl.load(place, mask=SLAB + slab < DIM, other=0.0)
            value = _as_multiplied(value, MULTIPLIED, INTERPRETED)
            right = dot(weights, value, right * shrink[:, None], INTERPRETED)
    return highest, total, left, right
