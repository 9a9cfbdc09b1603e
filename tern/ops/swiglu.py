"""The parameters of a SwiGLU, which several operations take together. Knows no arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tern.ops.gpu_weights import Weight


@dataclass(frozen=True, eq=False)
class SwiGLUWeights:
    """down(silu(gate(x)) * up(x)): `gate_up` [2F, in], gate first, and `down` [out, F], biases or none."""

    gate_up: Weight
    down: Weight
    gate_up_bias: Tensor | None = None
    down_bias: Tensor | None = None
