"""Products with packed weights through the kernels. Checks tensors, and passes their addresses.

A weight's kernel object is made when it is first used and kept as long as the weight.
"""

from __future__ import annotations

from typing import TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn import functional

from tern.ops.cpu import _kernels
from tern.ops.cpu.machine import machine
from tern.ops.cpu.rows import ROW_TYPES, as_rows
from tern.ops.packed import PANEL, PackedWeight, empty
from tern.ops.swiglu import SwiGLUWeights

_Layer = TypeVar("_Layer")


class _Kept(WeakKeyDictionary[object, tuple[_Layer, tuple[Tensor, ...]]]):
    """Kernel objects by what they were made of, each with the tensors that it points to."""


_weights: _Kept[_kernels.PackedWeight] = _Kept()
_layers: _Kept[_kernels.SwiGLU] = _Kept()


def linear_packed(x: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """As `tern.ops.reference_packed.linear_packed`."""
    if weight.parts != 1:
        raise ValueError("gate and up are multiplied by swiglu_packed")
    floats = None if bias is None else bias.float().contiguous()
    layer = _kernels.linear_layer(_weight(weight), 0 if floats is None else floats.data_ptr(), weight.out_features)
    x, output = _operands(x, weight)
    machine().linear(as_rows(x), layer, as_rows(output))
    return output


def swiglu_packed(x: Tensor, layer: SwiGLUWeights) -> Tensor:
    """As `tern.ops.reference_packed.swiglu_packed`."""
    assert isinstance(layer.gate_up, PackedWeight)
    assert isinstance(layer.down, PackedWeight)
    x, output = _operands(x, layer.gate_up, layer.down)
    machine().swiglu(as_rows(x), _swiglu(layer), as_rows(output))
    return output


def mix_experts_packed(
    x: Tensor,
    weights: Tensor,
    experts: Tensor,
    gate_up: PackedWeight,
    down: PackedWeight,
    shared: SwiGLUWeights | None = None,
) -> Tensor:
    """As `tern.ops.reference_packed.mix_experts_packed`."""
    x, output = _operands(x, gate_up, down)
    weights, experts = weights.float().contiguous(), experts.contiguous()
    if weights.shape != experts.shape or experts.shape[:1] != x.shape[:1] or experts.dtype != torch.int64:
        raise ValueError("every row of x needs as many weights as int64 numbers of experts")
    routed = _kernels.swiglu_layer(_linear(gate_up), _linear(down))
    layer = _kernels.experts(routed, gate_up.shape[0], None if shared is None else _swiglu(shared))
    chosen = (weights.data_ptr(), experts.data_ptr(), experts.shape[1])
    machine().mix_experts(as_rows(x), *chosen, layer, as_rows(output))
    return output


def pack(weight: Tensor, bits: int, parts: int = 1) -> PackedWeight:
    """As `tern.ops.reference_packed.pack`, but for what rounds to either side in the last bit."""
    if weight.device.type != "cpu" or weight.dtype not in ROW_TYPES:
        raise ValueError(f"a weight of {weight.dtype} on {weight.device} cannot be packed here")
    if weight.numel() == 0 or weight.shape[-2] % parts != 0:
        raise ValueError(f"a weight {list(weight.shape)} cannot be packed in {parts} parts")
    packed = empty(tuple(weight.shape), bits, parts)
    for index in range(packed.experts or 1):
        one = packed if packed.experts is None else packed[index]
        rows = as_rows((weight if packed.experts is None else weight[index]).contiguous())
        factors = 0 if one.factors is None else one.factors.data_ptr()
        machine().pack(rows, bits, parts, one.values.data_ptr(), factors, one.scales.data_ptr())
    return packed


def _operands(x: Tensor, first: PackedWeight, last: PackedWeight | None = None) -> tuple[Tensor, Tensor]:
    """`x` [T, in] as kernels read it, and an empty [T, out] of the same type."""
    last = last or first
    if x.dim() != 2 or x.shape[1] != first.in_features:
        raise ValueError(f"x is {list(x.shape)} but the weight takes {first.in_features} inputs")
    if x.device.type != "cpu":
        raise ValueError(f"x is on {x.device}: packed weights are multiplied on the CPU")
    if x.dtype not in ROW_TYPES:
        raise ValueError(f"x is {x.dtype}: packed weights multiply float32 and bfloat16")
    return x.contiguous(), x.new_empty(x.shape[0], last.out_features)


def _weight(weight: PackedWeight) -> _kernels.PackedWeight:
    """The kernel's view of a weight, or of the first one of a stack."""
    kept = _weights.get(weight)
    if kept is None:
        tensors = [weight.values, weight.scales, *([] if weight.factors is None else [weight.factors])]
        _check_sizes(weight)
        held = tuple(tensor.contiguous() for tensor in tensors)
        factors = 0 if weight.factors is None else held[2].data_ptr()
        kernel = _kernels.packed_weight(
            weight.bits, held[0].data_ptr(), factors, held[1].data_ptr(), weight.columns, weight.depth
        )
        kept = _weights[weight] = (kernel, held)
    return kept[0]


def _check_sizes(weight: PackedWeight) -> None:
    """Kernels read as many bytes as the sizes say, so the tensors must have them."""
    places = weight.columns * weight.depth * (weight.experts or 1)
    sizes = {"values": (weight.values, places * weight.bits // 8, torch.uint8)}
    if weight.factors is not None:
        sizes["factors"] = (weight.factors, places // 64, torch.uint8)
    sizes["scales"] = (weight.scales, weight.columns * (weight.experts or 1), torch.float32)
    for name, (tensor, count, dtype) in sizes.items():
        if tensor.numel() != count or tensor.dtype != dtype or tensor.device.type != "cpu":
            raise ValueError(f"{name} of a packed weight {list(weight.shape)} must be {count} of {dtype} on the CPU")
    half = -(-weight.out_features // weight.parts // PANEL) * PANEL
    if weight.columns != half * weight.parts:
        raise ValueError(f"a packed weight {list(weight.shape)} cannot have {weight.columns} columns")


def _linear(weight: PackedWeight, bias: Tensor | None = None) -> _kernels.Linear:
    out = weight.out_features if weight.parts == 1 else weight.columns
    return _kernels.linear_layer(_weight(weight), 0 if bias is None else bias.data_ptr(), out)


def _swiglu(layer: SwiGLUWeights) -> _kernels.SwiGLU:
    kept = _layers.get(layer)
    if kept is None:
        assert isinstance(layer.gate_up, PackedWeight)
        assert isinstance(layer.down, PackedWeight)
        first = last = None
        if layer.gate_up_bias is not None:
            halves = layer.gate_up_bias.float().view(2, -1)
            first = functional.pad(halves, (0, layer.gate_up.columns // 2 - halves.shape[1])).flatten().contiguous()
        if layer.down_bias is not None:
            last = layer.down_bias.float().contiguous()
        kernel = _kernels.swiglu_layer(_linear(layer.gate_up, first), _linear(layer.down, last))
        kept = _layers[layer] = (kernel, tuple(bias for bias in (first, last) if bias is not None))
    return kept[0]
