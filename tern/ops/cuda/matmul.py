"""Linear layers and SwiGLUs. Knows layers; the arithmetic is `products.multiply`, of plain weights too."""

from __future__ import annotations

from torch import Tensor

from tern.ops.cuda.products import multiply
from tern.ops.gpu_weights import GpuWeight
from tern.ops.swiglu import SwiGLUWeights


def linear(x: Tensor, weight: GpuWeight, bias: Tensor | None = None) -> Tensor:
    """As `tern.ops.reference_gpu.linear`: `x` [T, in], `weight` [out, in], `bias` [out] -> [T, out]."""
    return multiply(x, weight, bias)


def swiglu(x: Tensor, layer: SwiGLUWeights, rounded: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """As `tern.ops.reference_gpu.swiglu`: `x` [T, in] -> [T, out]. `rounded` is `x` in fp8 where that is known."""
    gate_up, down = layer.gate_up, layer.down
    assert isinstance(gate_up, GpuWeight)
    assert isinstance(down, GpuWeight)
    return linear(multiply(x, gate_up, layer.gate_up_bias, gated=True, rounded=rounded), down, layer.down_bias)
