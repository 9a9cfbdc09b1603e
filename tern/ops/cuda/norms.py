"""Norms: one program a row, which stays in registers from the sum with the residual stream to the normed result."""

from __future__ import annotations

import torch
from torch import Tensor

from tern.ops.cuda.launch import INTERPRETED, narrow, tl, triton


def add_rms_norm(delta: Tensor | None, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """As `tern.ops.reference.add_rms_norm`."""
    residual = residual.contiguous()
    rows, width = residual.shape
    normed = torch.empty_like(residual)
    summed = residual if delta is None else torch.empty_like(residual)
    if rows:
        added = residual if delta is None else delta.contiguous()
        block = triton.next_power_of_2(width)
        warps = min(16, max(1, block // 512))
        tensors = (added, residual, weight, normed, summed)
        sizes = {"BLOCK": block, "INTERPRETED": INTERPRETED, "num_warps": warps}
        _add_rms_norm[(rows,)](*tensors, width, eps, HAS_DELTA=delta is not None, **sizes)
    return normed, summed


@triton.jit
def _add_rms_norm(
    delta,
    residual,
    weight,
    normed,
    summed,
    width,
    eps,
    HAS_DELTA: tl.constexpr,
    BLOCK: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Rows [width] of `residual` (+ `delta`) -> `summed`, and normed and scaled -> `normed`."""
    start = tl.program_id(0).to(tl.int64) * width
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    x = tl.load(residual + start + columns, mask=inside, other=0.0).to(tl.float32)
    dtype: tl.constexpr = normed.dtype.element_ty
    if HAS_DELTA:
        x += tl.load(delta + start + columns, mask=inside, other=0.0).to(tl.float32)
        rounded = narrow(x, dtype, INTERPRETED)
        tl.store(summed + start + columns, rounded, mask=inside)
        x = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, axis=0) / width + eps)
    unscaled = narrow(x * scale, dtype, INTERPRETED).to(tl.float32)
    scales = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(normed + start + columns, narrow(unscaled * scales, dtype, INTERPRETED), mask=inside)
