"""Norms: one program a row, which stays in registers from the sum with the residual stream to the normed result.

What the layer before left to add may be experts' outputs, which are summed here, and the result may be rounded to fp8
for the product behind it: either would otherwise be a launch of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tern.ops.cuda.launch import EARLY, INTERPRETED, announce, narrow, tl, triton, wait
from tern.ops.cuda.rounding import empty_fp8_rows, store_as_fp8
from tern.ops.delta import Delta, ExpertOutputs
from tern.ops.gpu_weights import BLOCK as GROUP
from tern.ops.gpu_weights import RowForm, Rows


def add_rms_norm(
    delta: Delta | None, residual: Tensor, weight: Tensor, eps: float, form: RowForm = "plain"
) -> tuple[Rows, Tensor]:
    """As `tern.ops.reference.add_rms_norm` after `delta.sum()`, the normed rows in the form that is asked for.

    In fp8 they are what `tern.ops.gpu_weights.round_rows_to_fp8` makes of the plain ones.
    """
    residual = residual.contiguous()
    rows, width = residual.shape
    plain = None if form == "fp8" else torch.empty_like(residual)
    summed = residual if delta is None else torch.empty_like(residual)
    to_fp8 = form != "plain"
    rounded = empty_fp8_rows(rows, width, residual.dtype, residual.device, plain) if to_fp8 else None
    if rows:
        results = (plain, *((None, None) if rounded is None else (rounded.values, rounded.scales)), summed)
        pitch = 0 if rounded is None else rounded.scales.stride(1)
        addends, kinds = _addends(delta)
        block = max(triton.next_power_of_2(width), GROUP if to_fp8 else 1)
        _add_rms_norm[(rows,)](
            *(residual, weight, *results, *addends, width, pitch, eps),
            **kinds,
            PLAIN=plain is not None,
            TO_FP8=to_fp8,
            INTERPRETED=INTERPRETED,
            BLOCK=block,
            GROUP=GROUP,
            num_warps=min(16, max(1, block // 256)),
            **EARLY,
        )
    normed = plain if rounded is None else rounded
    assert normed is not None
    return normed, summed


def _addends(delta: Delta | None) -> tuple[tuple[Tensor | None, ...], dict[str, object]]:
    """What the kernel reads of `delta`: rows, weights, experts and shared rows; and what it is compiled for."""
    pairs = 0
    tensors: tuple[Tensor | None, ...] = (None, None, None, None)
    if isinstance(delta, ExpertOutputs):
        pairs, tensors = delta.experts.shape[1], (delta.outputs, delta.weights, delta.experts, delta.shared)
    elif delta is not None:
        tensors = (delta, None, None, None)
    kinds: dict[str, object] = {"HAS_DELTA": delta is not None, "HAS_SHARED": tensors[3] is not None}
    addends = tuple(None if tensor is None else tensor.contiguous() for tensor in tensors)
    return addends, kinds | {"PAIRS": pairs, "PAIRS_PADDED": max(2, triton.next_power_of_2(pairs))}


# Bound by memory, and with few rows by its latency: a row is read and written once. All of it lies in one program's
# registers: 8 numbers a thread, which is one load of 16 bytes. With 16 the compiler loads half of a token's experts
# when it has added the others. It also puts off loads that are needed late, until others have arrived: what is needed
# first is therefore loaded last, behind a barrier that no load passes.
@triton.jit
def _add_rms_norm(
    residual,
    weight,
    normed,
    values,
    scales,
    summed,
    delta,
    pair_weights,
    pair_experts,
    shared,
    width,
    pitch,
    eps,
    HAS_DELTA: tl.constexpr,
    HAS_SHARED: tl.constexpr,
    PAIRS: tl.constexpr,
    PAIRS_PADDED: tl.constexpr,
    PLAIN: tl.constexpr,
    TO_FP8: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Rows [width] of `residual` (+ `delta`) -> `summed`; normed and scaled -> `normed`, or `values` and `scales`.

    If `PAIRS`, `delta` has so many rows a token, to be summed by their weights and with the `shared` row.
    """
    announce()
    row = tl.program_id(0).to(tl.int64)
    start = row * width
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    dtype: tl.constexpr = residual.dtype.element_ty
    scaling = tl.load(weight + columns, mask=inside, other=0.0)
    wait()
    if HAS_SHARED:
        beside = tl.load(shared + start + columns, mask=inside, other=0.0)
    if not HAS_DELTA:
        tl.debug_barrier()
    x = tl.load(residual + start + columns, mask=inside, other=0.0).to(tl.float32)
    if HAS_DELTA:
        if PAIRS:
            total = _weighted_sum(delta, pair_weights, pair_experts, row, width, columns, PAIRS, PAIRS_PADDED)
            added = narrow(total, dtype, INTERPRETED).to(tl.float32)
            if HAS_SHARED:
                added = narrow(added + beside.to(tl.float32), dtype, INTERPRETED).to(tl.float32)
        else:
            tl.debug_barrier()
            added = tl.load(delta + start + columns, mask=inside, other=0.0).to(tl.float32)
        stream = narrow(x + added, dtype, INTERPRETED)
        tl.store(summed + start + columns, stream, mask=inside)
        x = stream.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, axis=0) / width + eps)
    unscaled = narrow(x * scale, dtype, INTERPRETED).to(tl.float32)
    result = narrow(unscaled * scaling.to(tl.float32), dtype, INTERPRETED)
    if PLAIN:
        tl.store(normed + start + columns, result, mask=inside)
    if TO_FP8:
        at = values + start, scales + row, pitch
        store_as_fp8(result.to(tl.float32), *at, 0, width, BLOCK, GROUP, INTERPRETED)


@triton.jit
def _weighted_sum(outputs, weights, experts, token, width, columns, PAIRS: tl.constexpr, PAIRS_PADDED: tl.constexpr):
    """The `columns` of one token's `PAIRS` rows of `outputs` [tokens * PAIRS, width] times their weights, in float32.

    They are added in the order of the experts' numbers, and of one expert's in that of the pairs.
    """
    pair = tl.arange(0, PAIRS_PADDED)
    known = pair < PAIRS
    expert = tl.load(experts + token * PAIRS + pair, mask=known, other=2147483647).to(tl.int32)
    weight = tl.load(weights + token * PAIRS + pair, mask=known, other=0.0)
    lower, equal = expert[None, :] < expert[:, None], expert[None, :] == expert[:, None]
    sooner = lower | (equal & (pair[None, :] < pair[:, None]))
    rank = tl.sum(sooner.to(tl.int32), axis=1)
    rows = ()
    for place in tl.static_range(PAIRS - 1, -1, -1):
        if place == 0:
            tl.debug_barrier()
        own = tl.sum(tl.where(rank == place, pair, 0), axis=0)
        row = tl.load(outputs + (token * PAIRS + own) * width + columns, mask=columns < width, other=0.0)
        rows = rows + (row,)  # type: ignore[assignment]  # noqa: RUF005
    total = tl.zeros(columns.shape, tl.float32)
    for place in tl.static_range(PAIRS):
        total += rows[PAIRS - 1 - place].to(tl.float32) * tl.sum(tl.where(rank == place, weight, 0.0), axis=0)
    return total
