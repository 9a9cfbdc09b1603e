"""Activations rounded to fp8, a group of 128 depths of a token by its own scale. Knows no weights."""

from __future__ import annotations

import torch
from torch import Tensor

from tern.ops.cuda.launch import INTERPRETED, narrow, tl, triton
from tern.ops.gpu_weights import BLOCK, FP8, FP8_MAX


def round_rows_to_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """As `tern.ops.gpu_weights.round_rows_to_fp8`, bit by bit."""
    x = x.contiguous()
    rows, depth = x.shape
    groups = -(-depth // BLOCK)
    values = torch.empty(rows, depth, dtype=FP8, device=x.device)
    scales = torch.empty(rows, groups, dtype=torch.float32, device=x.device)
    if rows and depth:
        tensors = (x, values, scales)
        grid = (rows, -(-groups // _GROUPS))
        _round_rows[grid](*tensors, depth, groups, FP8_MAX, GROUPS=_GROUPS, WIDTH=BLOCK, INTERPRETED=INTERPRETED)
    return values, scales


_GROUPS = 8


# Reads once, writes half of it: bound by memory with many rows, by its launch with few. 8 groups a program: 16 bytes a
# thread in bfloat16.
@triton.jit
def _round_rows(
    x,
    values,
    scales,
    depth,
    groups,
    limit,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """`GROUPS` groups of one row [depth] of `x` -> `values`, and their `scales` [groups]."""
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    depths = group[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    inside = depths < depth
    wide = tl.load(x + row * depth + depths, mask=inside, other=0.0).to(tl.float32)
    peaks = tl.max(tl.abs(wide), axis=1)
    limits = tl.full([GROUPS], 1.0, tl.float32) * limit
    scale = tl.where(peaks > 0, tl.div_rn(peaks, limits), 1.0)
    spread = tl.broadcast_to(scale[:, None], (GROUPS, WIDTH))
    quotients = tl.div_rn(wide, spread)
    quotients = tl.minimum(tl.maximum(quotients, -limit), limit)
    tl.store(values + row * depth + depths, narrow(quotients, values.dtype.element_ty, INTERPRETED), mask=inside)
    tl.store(scales + row * groups + group, scale, mask=group < groups)
