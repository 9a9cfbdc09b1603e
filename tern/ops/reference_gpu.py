"""Layers over the weights that a GPU takes, in plain torch: the truth for its kernels with packed and fp8 weights.

Knows layers; what a product with such a weight is, `tern.ops.gpu_weights.product` says. With plain weights a layer is
that of `tern.ops.reference`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tern.ops import reference
from tern.ops.gpu_weights import GpuWeight, product
from tern.ops.swiglu import SwiGLUWeights


def linear(x: Tensor, weight: GpuWeight, bias: Tensor | None = None) -> Tensor:
    """`x` [T, in], `weight` [out, in], `bias` [out] -> [T, out] in the type of `x`, rounded once."""
    if isinstance(weight, Tensor):
        return reference.linear(x, weight, bias)
    return _sums(x, weight, bias).to(x.dtype)


def swiglu(x: Tensor, layer: SwiGLUWeights) -> Tensor:
    """down(silu(gate(x)) * up(x)): `x` [T, in] -> [T, out]. What enters `down` is rounded to the type of `x` first."""
    gate_up, down = layer.gate_up, layer.down
    assert isinstance(gate_up, GpuWeight)
    assert isinstance(down, GpuWeight)
    return linear(_gated(x, gate_up, layer.gate_up_bias), down, layer.down_bias)


def mix_experts(
    x: Tensor,
    weights: Tensor,
    experts: Tensor,
    gate_up: GpuWeight,
    down: GpuWeight,
    shared: SwiGLUWeights | None = None,
) -> Tensor:
    """The weighted sum of each token's experts, plus the shared one -> [T, H] like `x`.

    `x` [T, H], `weights` [T, K] float32, `experts` [T, K], stacks `gate_up` [E, 2I, H], `down` [E, H, I]. Rounded to
    the type of `x` are: what enters `down`, what leaves it, the routed sum, and the sum with the shared expert's. A
    token's terms are added in float32, in the order of the experts' numbers.
    """
    mixed = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for expert in range(gate_up.shape[0]):
        tokens, places = (experts == expert).nonzero(as_tuple=True)
        outputs = linear(_gated(x[tokens], gate_up[expert], None), down[expert])
        mixed.index_add_(0, tokens, outputs.float() * weights[tokens, places, None])
    routed = mixed.to(x.dtype)
    return routed if shared is None else routed + swiglu(x, shared)


def _sums(x: Tensor, weight: GpuWeight, bias: Tensor | None) -> Tensor:
    """The product and the bias in float32."""
    sums = product(x, weight)
    return sums if bias is None else sums + bias.float()


def _gated(x: Tensor, gate_up: GpuWeight, bias: Tensor | None) -> Tensor:
    """silu(gate) * up in the type of `x`."""
    if isinstance(gate_up, Tensor):
        return reference.silu_mul(reference.linear(x, gate_up, bias))
    return reference.silu_mul(_sums(x, gate_up, bias)).to(x.dtype)
