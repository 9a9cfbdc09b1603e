"""The parameters of a router, which operations take together. Knows no arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Router:
    """What chooses `experts_per_token` of E experts for a token; see `tern.ops.reference.route`.

    `weight` [E, H] and `correction_bias` [E] float32.
    """

    weight: Tensor
    correction_bias: Tensor
    experts_per_token: int
    norm_min: float
