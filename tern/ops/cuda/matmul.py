"""Linear layers and SwiGLUs. Knows layers; the arithmetic is `products.multiply`, of plain weights too."""

from __future__ import annotations

from torch import Tensor

from tern.ops.cuda.products import multiply
from tern.ops.gpu_weights import GpuWeight, Rows
from tern.ops.swiglu import SwiGLUWeights


def linear(x: Rows, weight: GpuWeight, bias: Tensor | None = None) -> Tensor:
    """As `tern.ops.reference_gpu.linear`: `x` [T, in], `weight` [out, in], `bias` [out] -> [T, out]."""
    return multiply(x, weight, bias)


def swiglu(x: Rows, layer: SwiGLUWeights) -> Tensor:
    """As `tern.ops.reference_gpu.swiglu`: `x` [T, in] -> [T, out]."""
    gate_up, down = layer.gate_up, layer.down
    assert isinstance(gate_up, GpuWeight)
    assert isinstance(down, GpuWeight)
    return linear(multiply(x, gate_up, layer.gate_up_bias, gated=True), down, layer.down_bias)
