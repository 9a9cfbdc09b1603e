"""Rotary embedding of queries and keys, and the way of keys and values into the cache, in one launch."""

from __future__ import annotations

import torch
from torch import Tensor

from tern.ops.cuda.launch import INTERPRETED, narrow, tl, triton

_HEADS = 8
"""That a program takes: with a head dim of 128 as many numbers as four warps load by 16 bytes."""


def rotate_and_store(
    qkv: Tensor, cosines: Tensor, signed_sines: Tensor, slots: Tensor, key_cache: Tensor, value_cache: Tensor
) -> Tensor:
    """As `tern.ops.reference.rotate_and_store`, into caches as a GPU has them (`kv_cache_shapes`).

    Raises `ValueError` if the cache has another layout or does not lie in one piece, or the tables do not fit the rows.
    """
    check_rows(qkv, cosines, signed_sines, slots, key_cache, value_cache)
    kv_heads, blocks, block_size, head_dim, _ = value_cache.shape
    rows, heads = qkv.shape[0], qkv.shape[1] // head_dim
    queries = qkv.new_empty(rows, heads - 2 * kv_heads, head_dim)
    if rows:
        tensors = (qkv.contiguous(), cosines.contiguous(), signed_sines.contiguous(), slots.contiguous())
        counts = (heads, kv_heads, blocks * block_size)
        sizes = {"D": head_dim, "COLUMNS": triton.next_power_of_2(head_dim), "HEADS": _HEADS, "num_warps": 4}
        options = {"INTERPRETED": INTERPRETED, "enable_fp_fusion": False}
        grid = (rows, triton.cdiv(heads, _HEADS))
        _rotate_and_store[grid](*tensors, queries, key_cache, value_cache, *counts, **sizes, **options)
    return queries


def check_rows(
    qkv: Tensor, cosines: Tensor, signed_sines: Tensor, slots: Tensor, key_cache: Tensor, value_cache: Tensor
) -> None:
    """Raise `ValueError` for rows that kernels would turn or store wrongly."""
    kv_heads, blocks, block_size, head_dim, _ = value_cache.shape
    rows = qkv.shape[0]
    if key_cache.shape != (kv_heads, blocks, 1, block_size, head_dim) or value_cache.shape[4] != 1:
        raise ValueError(f"a GPU's cache has no keys {list(key_cache.shape)} and values {list(value_cache.shape)}")
    if not (key_cache.is_contiguous() and value_cache.is_contiguous()) or key_cache.dtype != value_cache.dtype:
        raise ValueError("a layer's keys and values must be contiguous and of one type")
    if any(table.shape != (rows, head_dim) or table.dtype != torch.float32 for table in (cosines, signed_sines)):
        raise ValueError(f"rotary tables must be float32 [{rows}, {head_dim}]")
    if slots.shape != (rows,):
        raise ValueError(f"slots must be of shape [{rows}], not {list(slots.shape)}")


@triton.jit
def turn(x, cosines, signed_sines, dtype: tl.constexpr, INTERPRETED: tl.constexpr):
    """float32 rows `x` [R, C] by their tables, [R, C] or [1, C], and rounded to `dtype`.

    Product and sum must not be fused (`enable_fp_fusion=False`), so that every kernel turns alike. Pairs are swapped by
    sums of their bits, which wrap: behind a `tl.join` the compiler would cut the depths of a query's product otherwise.
    """
    pairs = tl.reshape(x.to(tl.int32, bitcast=True), (x.shape[0], x.shape[1] // 2, 2))
    swapped = tl.reshape(tl.sum(pairs, axis=2, keep_dims=True) - pairs, x.shape).to(tl.float32, bitcast=True)
    return narrow(x * cosines + swapped * signed_sines, dtype, INTERPRETED)


# Bound by memory: each number passes once. A token's heads are shared out among programs, so that a decode has more
# than one a token; what a head is, its number says.
@triton.jit
def _rotate_and_store(
    qkv,
    cosines,
    signed_sines,
    slots,
    queries,
    key_cache,
    value_cache,
    heads,
    kv_heads,
    num_slots,
    INTERPRETED: tl.constexpr,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
    HEADS: tl.constexpr,
):
    """Some heads of a token: queries, keys and values stand in a row [heads, D] of `qkv` in this order.

    In a cache [kv_heads, num_slots, D] a token has the row `slots[token]` of every head.
    """
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    columns = tl.arange(0, COLUMNS)
    inside = columns[None, :] < D
    present = (head[:, None] < heads) & inside
    loaded = tl.load(qkv + (token * heads + head[:, None]) * D + columns[None, :], mask=present, other=0.0)
    cosine = tl.load(cosines + token * D + columns, mask=columns < D, other=0.0)
    sine = tl.load(signed_sines + token * D + columns, mask=columns < D, other=0.0)
    x = loaded.to(tl.float32)
    rotated = turn(x, cosine[None, :], sine[None, :], qkv.dtype.element_ty, INTERPRETED)

    first_key, first_value = heads - 2 * kv_heads, heads - kv_heads
    is_query, is_value = head < first_key, head >= first_value
    query_rows = token * first_key + head
    tl.store(queries + query_rows[:, None] * D + columns[None, :], rotated, mask=is_query[:, None] & inside)
    dtype: tl.constexpr = key_cache.dtype.element_ty
    slot = tl.load(slots + token).to(tl.int64)
    key_rows = (head - first_key).to(tl.int64) * num_slots + slot
    keys = narrow(rotated.to(tl.float32), dtype, INTERPRETED)
    is_key = ~is_query & ~is_value
    tl.store(key_cache + key_rows[:, None] * D + columns[None, :], keys, mask=is_key[:, None] & inside)
    value_rows = (head - first_value).to(tl.int64) * num_slots + slot
    values = narrow(x, dtype, INTERPRETED)
    tl.store(value_cache + value_rows[:, None] * D + columns[None, :], values, mask=is_value[:, None] & present)
