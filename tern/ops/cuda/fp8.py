"""Activations rounded to fp8, a group of 128 depths of a token by its own scale. Knows no weights."""

from __future__ import annotations

from torch import Tensor

from tern.ops.cuda.launch import EARLY, INTERPRETED, announce, tl, triton, wait
from tern.ops.cuda.rounding import empty_fp8_rows, store_as_fp8
from tern.ops.gpu_weights import BLOCK, Fp8Rows


def round_rows_to_fp8(x: Tensor) -> Fp8Rows:
    """As `tern.ops.gpu_weights.round_rows_to_fp8`, bit by bit."""
    x = x.contiguous()
    rows, depth = x.shape
    rounded = empty_fp8_rows(rows, depth, x.dtype, x.device, x)
    groups = rounded.scales.shape[1]
    if rows and depth:
        tensors = (x, rounded.values, rounded.scales)
        grid = (rows, -(-groups // _GROUPS))
        sizes = {"GROUPS": _GROUPS, "WIDTH": BLOCK, "INTERPRETED": INTERPRETED}
        _round_rows[grid](*tensors, depth, rounded.scales.stride(1), **sizes, **EARLY)
    return rounded


_GROUPS = 8


# Reads once, writes half of it: bound by memory with many rows, by its launch with few. 8 groups a program: 16 bytes a
# thread in bfloat16.
#
# What enters `down` is rounded here and not at the end of the gated product, which would have to own a group, 128
# columns. Six experts of 1536 columns are then 72 programs for the 132 processors that read their 47 MB at one token,
# where 64 columns make 144: that loses more than a launch. With 8192 tokens there would be some 4 % to win, by count
# of bytes (0.3 GB a layer beside 1.5e12 operations).
@triton.jit
def _round_rows(
    x,
    values,
    scales,
    depth,
    pitch,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """`GROUPS` groups of one row [depth] of `x` -> `values`, and their `scales`, `pitch` apart."""
    announce()
    wait()
    row, first = tl.program_id(0).to(tl.int64), tl.program_id(1) * GROUPS * WIDTH
    columns = first + tl.arange(0, GROUPS * WIDTH)
    wide = tl.load(x + row * depth + columns, mask=columns < depth, other=0.0).to(tl.float32)
    at = values + row * depth, scales + row, pitch
    store_as_fp8(wide, *at, first, depth, GROUPS * WIDTH, WIDTH, INTERPRETED)
