"""Rows rounded to fp8 by groups, for kernels that make such rows. As `tern.ops.gpu_weights.round_rows_to_fp8`."""

from __future__ import annotations

import torch
from torch import Tensor

from tern.ops.cuda.launch import INTERPRETED, narrow, tl, triton
from tern.ops.cuda.tiles import BLOCKS_T
from tern.ops.gpu_weights import BLOCK, FP8, Fp8Rows
from tern.ops.packed import round_up


def empty_fp8_rows(rows: int, width: int, dtype: torch.dtype, device: torch.device, plain: Tensor | None) -> Fp8Rows:
    """Room for rows [rows, width] of `dtype` in fp8, beside those that are `plain`.

    The scales of a group of 128 columns lie side by side, and behind them is room for a tile's: a product loads several
    at once, those past the last row as well.
    """
    values = torch.empty(rows, width, dtype=FP8, device=device)
    scales = torch.empty(-(-width // BLOCK), round_up(rows, 16) + BLOCKS_T[-1], dtype=torch.float32, device=device)
    if INTERPRETED:
        scales.zero_()  # NumPy warns of what comes of numbers that nobody wrote
    return Fp8Rows(values, scales.t()[:rows], dtype, plain)


@triton.jit
def round_groups(x, dtype: tl.constexpr, INTERPRETED: tl.constexpr):
    """float32 `x` [groups, width] -> the groups in `dtype`, fp8, and the scale of each.

    The divisions round as IEEE says, since the largest of a group must become 448.
    """
    peaks = tl.max(tl.abs(x), axis=1)
    scales = tl.where(peaks > 0, tl.div_rn(peaks, 448.0), 1.0)
    return narrow(tl.div_rn(x, tl.broadcast_to(scales[:, None], x.shape)), dtype, INTERPRETED), scales


@triton.jit
def store_as_fp8(
    x,
    values,
    scales,
    pitch,
    first,
    width,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """A row's columns from `first` on, float32 `x` [BLOCK] with zeros beyond `width`, to where the row's values begin.

    `scales` is where the row's first scale is; its others are `pitch` apart. GROUP divides `first` and BLOCK.
    """
    GROUPS: tl.constexpr = BLOCK // GROUP
    codes, steps = round_groups(tl.reshape(x, (GROUPS, GROUP)), values.dtype.element_ty, INTERPRETED)
    groups = first // GROUP + tl.arange(0, GROUPS)
    columns = groups[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    tl.store(values + columns, codes, mask=columns < width)
    tl.store(scales + groups * pitch, steps, mask=groups * GROUP < width)
