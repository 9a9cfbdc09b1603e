"""Norms: one program a row, which stays in registers from the sum with the residual stream to the normed result."""

from __future__ import annotations

import torch
from torch import Tensor

from tern.ops.cuda.launch import INTERPRETED, narrow, tl, triton
from tern.ops.cuda.rounding import empty_fp8_rows, store_as_fp8
from tern.ops.gpu_weights import BLOCK as GROUP


def add_rms_norm(delta: Tensor | None, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """As `tern.ops.reference.add_rms_norm`."""
    residual = residual.contiguous()
    normed = torch.empty_like(residual)
    return normed, _norm(delta, residual, weight, eps, normed)


def add_rms_norm_to_fp8(
    delta: Tensor | None, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`add_rms_norm` whose normed rows `tern.ops.gpu_weights.round_rows_to_fp8` rounds, in one launch.

    Returns float8_e4m3fn [T, H], float32 [T, ceil(H / 128)] and the new residual stream.
    """
    residual = residual.contiguous()
    values, scales = empty_fp8_rows(residual.shape[0], residual.shape[1], residual.device)
    return values, scales, _norm(delta, residual, weight, eps, values, scales)


def _norm(
    delta: Tensor | None, residual: Tensor, weight: Tensor, eps: float, normed: Tensor, scales: Tensor | None = None
) -> Tensor:
    """Fill `normed`, and `scales` where its numbers have some -> the new residual stream."""
    rows, width = residual.shape
    summed = residual if delta is None else torch.empty_like(residual)
    if rows:
        added = residual if delta is None else delta.contiguous()
        block = max(triton.next_power_of_2(width), 1 if scales is None else GROUP)
        tensors = (added, residual, weight, normed, normed if scales is None else scales, summed)
        sizes = {"BLOCK": block, "GROUP": GROUP, "num_warps": min(16, max(1, block // 512))}
        kinds = {"HAS_DELTA": delta is not None, "TO_FP8": scales is not None, "INTERPRETED": INTERPRETED}
        _add_rms_norm[(rows,)](*tensors, width, eps, **kinds, **sizes)
    return summed


# Bound by memory: a row is read and written once. All of it lies in one program's registers, 16 numbers a thread, so
# that they are loaded by 16 bytes and many loads are on their way at once.
@triton.jit
def _add_rms_norm(
    delta,
    residual,
    weight,
    normed,
    scales,
    summed,
    width,
    eps,
    HAS_DELTA: tl.constexpr,
    TO_FP8: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Rows [width] of `residual` (+ `delta`) -> `summed`; normed and scaled -> `normed`, with `scales` if TO_FP8."""
    row = tl.program_id(0).to(tl.int64)
    start = row * width
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    x = tl.load(residual + start + columns, mask=inside, other=0.0).to(tl.float32)
    dtype: tl.constexpr = residual.dtype.element_ty
    if HAS_DELTA:
        x += tl.load(delta + start + columns, mask=inside, other=0.0).to(tl.float32)
        rounded = narrow(x, dtype, INTERPRETED)
        tl.store(summed + start + columns, rounded, mask=inside)
        x = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, axis=0) / width + eps)
    unscaled = narrow(x * scale, dtype, INTERPRETED).to(tl.float32)
    weights = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    result = narrow(unscaled * weights, dtype, INTERPRETED)
    if TO_FP8:
        of_row = scales + row * tl.cdiv(width, GROUP)
        store_as_fp8(result.to(tl.float32), normed + start, of_row, 0, width, BLOCK, GROUP, INTERPRETED)
    else:
        tl.store(normed + start + columns, result, mask=inside)
