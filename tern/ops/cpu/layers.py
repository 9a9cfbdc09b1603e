"""What stands between the products of a layer, and attention, through the kernels. Checks tensors, passes addresses."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tern.ops.cpu import _kernels
from tern.ops.cpu.machine import machine
from tern.ops.cpu.rows import ROW_TYPES, as_rows
from tern.ops.reference import cached_head_dim

LANES = 16
"""A head's width must be a multiple of this."""


@dataclass(frozen=True)
class SequencesPlan:
    """A step's sequences, as kernels read them; see `tern.ops.reference_attention.plan_attention`. All int64."""

    query_starts: Tensor
    context_lens: Tensor
    block_tables: Tensor


def can_attend(values: Tensor) -> bool:
    """Whether the kernels attend over caches whose values are like `values` [..., W, r]."""
    head_dim = cached_head_dim(values)
    return values.device.type == "cpu" and values.dtype in (*ROW_TYPES, torch.int8) and head_dim % LANES == 0


def can_norm(x: Tensor) -> bool:
    """Whether the kernels norm and route rows like `x`."""
    return x.device.type == "cpu" and x.dtype in ROW_TYPES and x.dim() == 2


def add_rms_norm(delta: Tensor | None, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """As `tern.ops.reference.add_rms_norm`."""
    residual = residual.contiguous()
    normed = torch.empty_like(residual)
    new_residual = residual if delta is None else torch.empty_like(residual)
    added = None if delta is None else as_rows(delta.contiguous())
    scales = as_rows(weight.contiguous().view(1, -1))
    machine().add_rms_norm(added, as_rows(residual), scales, eps, as_rows(normed), as_rows(new_residual))
    return normed, new_residual


def silu_mul(gate_up: Tensor) -> Tensor:
    """As `tern.ops.reference.silu_mul`; how a row is rounded does not depend on where threads share the rows out."""
    gate_up = gate_up.contiguous()
    output = gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)
    machine().silu_mul(as_rows(gate_up), as_rows(output))
    return output


def route(
    x: Tensor, router: Tensor, correction_bias: Tensor, experts_per_token: int, norm_min: float
) -> tuple[Tensor, Tensor]:
    """As `tern.ops.reference.route`; of experts that are equal the first is chosen."""
    x, router, bias = x.contiguous(), router.contiguous(), correction_bias.contiguous()
    if router.dtype != torch.float32 or bias.dtype != torch.float32 or router.shape != (len(bias), x.shape[1]):
        raise ValueError(f"x {list(x.shape)} cannot be routed by {router.dtype} {list(router.shape)}")
    weights = torch.empty(x.shape[0], experts_per_token)
    experts = torch.empty(x.shape[0], experts_per_token, dtype=torch.int64)
    sizes = (len(bias), experts_per_token, norm_min)
    machine().route(as_rows(x), router.data_ptr(), bias.data_ptr(), *sizes, weights.data_ptr(), experts.data_ptr())
    return weights, experts


def rotate_and_store(
    qkv: Tensor, cosines: Tensor, signed_sines: Tensor, slots: Tensor, key_cache: Tensor, value_cache: Tensor
) -> Tensor:
    """As `tern.ops.reference.rotate_and_store`."""
    qkv, slots = qkv.contiguous(), slots.contiguous()
    tables = (cosines.contiguous(), signed_sines.contiguous())
    kv_heads, head_dim = value_cache.shape[0], cached_head_dim(value_cache)
    if any(table.shape != (qkv.shape[0], head_dim) or table.dtype != torch.float32 for table in tables):
        raise ValueError(f"rotary tables must be float32 [{qkv.shape[0]}, {head_dim}]")
    if slots.shape != qkv.shape[:1] or slots.dtype != torch.int64:
        raise ValueError(f"slots must be int64 [{qkv.shape[0]}]")
    queries = qkv.new_empty(qkv.shape[0], qkv.shape[1] - 2 * kv_heads * head_dim)
    places = (tables[0].data_ptr(), tables[1].data_ptr(), slots.data_ptr())
    machine().rotate_and_store(as_rows(qkv), *places, _cache(key_cache, value_cache), as_rows(queries))
    return queries.view(qkv.shape[0], queries.shape[1] // head_dim, head_dim)


def paged_attention(queries: Tensor, key_cache: Tensor, value_cache: Tensor, plan: SequencesPlan) -> Tensor:
    """As `tern.ops.reference_attention.paged_attention`."""
    rows = queries.contiguous().flatten(1)
    output = torch.zeros_like(rows)
    starts, lengths, tables = (t.contiguous() for t in (plan.query_starts, plan.context_lens, plan.block_tables))
    if {t.dtype for t in (starts, lengths, tables)} != {torch.int64} or len(starts) != len(lengths) + 1:
        raise ValueError("a plan holds int64 tensors [S + 1], [S] and [S, blocks]")
    if len(tables) != len(lengths):
        raise ValueError(f"a plan of {len(lengths)} sequences needs as many block tables, not {len(tables)}")
    step = (starts.data_ptr(), lengths.data_ptr(), tables.data_ptr(), len(lengths), tables.shape[1])
    machine().attend(as_rows(rows), _cache(key_cache, value_cache), *step, as_rows(output))
    return output.view(queries.shape)


def _cache(key_cache: Tensor, value_cache: Tensor) -> _kernels.Cache:
    """One layer's cache, whose memory must lie in one piece."""
    kv_heads, blocks, _, block_size, _ = key_cache.shape
    if not (key_cache.is_contiguous() and value_cache.is_contiguous()) or key_cache.numel() != value_cache.numel():
        raise ValueError("a layer's keys and values must be contiguous and of one size")
    if key_cache.dtype != value_cache.dtype or not can_attend(value_cache):
        raise ValueError(f"a cache of {value_cache.dtype} cannot be attended to")
    sizes = (blocks, block_size, kv_heads, cached_head_dim(value_cache), value_cache.dtype.itemsize)
    return _kernels.cache(key_cache.data_ptr(), value_cache.data_ptr(), *sizes)
