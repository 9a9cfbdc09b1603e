"""Numbers to bytes with one scale a row, in plain torch: the rounding of activations and of int8 KV caches."""

from __future__ import annotations

import torch
from torch import Tensor

SMALLEST = 1e-30
"""Magnitudes up to here count as zero: their inverse would overflow."""
LEVELS = 127.0


def round_to_bytes(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round `x` [..., n] -> int8 [..., n] and scales [...] float32, whose product is about `x`.

    The largest magnitude of a row becomes 127, halves are rounded to even. A row of nothing above `SMALLEST` becomes
    zeros; one that holds NaN or an infinity becomes zeros with scale NaN.
    """
    x = x.float()
    largest = x.abs().amax(dim=-1)
    finite = torch.isfinite(x).all(dim=-1)
    usable = finite & (largest > SMALLEST)
    # Not LEVELS / largest, which torch computes as a product with the reciprocal.
    inverse = torch.where(usable, torch.full_like(largest, LEVELS) / torch.where(usable, largest, 1.0), 0.0)
    scaled = (x * inverse[..., None]).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    scales = torch.where(finite, torch.where(usable, largest / LEVELS, 0.0), torch.nan)
    return scaled.round().to(torch.int8), scales
