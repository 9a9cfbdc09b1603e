"""Cosines and signed sines of a step's positions, in one launch. Knows no heads."""

from __future__ import annotations

import torch
from torch import Tensor

from tern.ops.cuda.launch import EARLY, announce, tl, triton, wait


def rotary_table(positions: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """As `tern.ops.reference.rotary_table`, bit by bit as torch computes it on the same card."""
    rows, width = positions.shape[0], frequencies.shape[0]
    tables = torch.empty(2, rows, width, dtype=torch.float32, device=positions.device)
    cosines, signed_sines = tables
    if rows:
        sizes = {"COLUMNS": triton.next_power_of_2(width), "num_warps": 1, "enable_fp_fusion": False}
        _rotary_table[(rows,)](
            positions.contiguous(), frequencies.contiguous(), cosines, signed_sines, width, **sizes, **EARLY
        )
    return cosines, signed_sines


# Bound by its launch. Sines and cosines are those of whole turns taken away exactly, as torch's: at position 100 000 an
# approximation by the hardware would have no digit right.
@triton.jit
def _rotary_table(positions, frequencies, cosines, signed_sines, width, COLUMNS: tl.constexpr):
    """One position's rows [width] of both tables."""
    announce()
    wait()
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, COLUMNS)
    inside = columns < width
    angles = tl.load(positions + row).to(tl.float32) * tl.load(frequencies + columns, mask=inside, other=0.0)
    sines = tl.sin(angles)
    at = row * width + columns
    tl.store(cosines + at, tl.cos(angles), mask=inside)
    tl.store(signed_sines + at, tl.where(columns % 2 == 0, -sines, sines), mask=inside)
