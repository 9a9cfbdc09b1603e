"""Activations rounded to fp8, a group of 128 depths of a token by its own scale. Knows no weights."""

from __future__ import annotations

from torch import Tensor

from tern.ops.cuda.launch import EARLY, INTERPRETED, announce, tl, triton, wait
from tern.ops.cuda.rounding import empty_fp8_rows, store_as_fp8
from tern.ops.gpu_weights import BLOCK, Fp8Rows

_GROUPS = 8


def round_rows_to_fp8(x: Tensor) -> Fp8Rows:
    """As `tern.ops.gpu_weights.round_rows_to_fp8`, bit by bit."""
    return round_together(x)[0]


def round_together(*parts: Tensor) -> list[Fp8Rows]:
    """`round_rows_to_fp8` of each of one or two `parts` [T, in], by one launch."""
    plain = [part.contiguous() for part in parts]
    rounded = [empty_fp8_rows(x.shape[0], x.shape[1], x.dtype, x.device, x) for x in plain]
    programs = [x.shape[0] * -(-x.shape[1] // (_GROUPS * BLOCK)) for x in plain]
    if sum(programs):
        each = [(x, y.values, y.scales, x.shape[1], y.scales.stride(1)) for x, y in zip(plain, rounded, strict=True)]
        sizes = {"TWO": len(parts) > 1, "GROUPS": _GROUPS, "WIDTH": BLOCK, "INTERPRETED": INTERPRETED}
        _round_rows[(sum(programs),)](*each[0], *each[-1], programs[0], **sizes, **EARLY)
    return rounded


# Reads once, writes half of it: bound by memory with many rows, by its launch with few. 8 groups a program: 16 bytes a
# thread in bfloat16.
#
# What enters `down` is rounded here and not at the end of the gated product, which would have to own a group, 128
# columns. Six experts of 1536 columns are then 72 programs for the 132 processors that read their 47 MB at one token,
# where 64 columns make 144: that loses more than a launch. With 8192 tokens there would be some 4 % to win, by count
# of bytes (0.3 GB a layer beside 1.5e12 operations).
@triton.jit(do_not_specialize=["programs"])
def _round_rows(
    x,
    values,
    scales,
    depth,
    pitch,
    other_x,
    other_values,
    other_scales,
    other_depth,
    other_pitch,
    programs,
    TWO: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """`GROUPS` groups of one row [depth] of `x` -> `values`, and their `scales`, `pitch` apart.

    With `TWO`, those of the other rows behind the first `programs`.
    """
    announce()
    wait()
    SIZE: tl.constexpr = GROUPS * WIDTH
    program = tl.program_id(0)
    if TWO:
        mine = program < programs
        if not mine:
            x, values, scales = other_x, other_values, other_scales
        depth, pitch = tl.where(mine, depth, other_depth), tl.where(mine, pitch, other_pitch)
        program = tl.where(mine, program, program - programs)
    across = tl.cdiv(depth, SIZE)
    row, first = (program // across).to(tl.int64), program % across * SIZE
    columns = first + tl.arange(0, SIZE)
    wide = tl.load(x + row * depth + columns, mask=columns < depth, other=0.0).to(tl.float32)
    at = values + row * depth, scales + row, pitch
    store_as_fp8(wide, *at, first, depth, SIZE, WIDTH, INTERPRETED)
