"""Mixtures of experts: pairs of tokens and experts sorted on the device, and two products over them.

Knows routing; the arithmetic of a weight is `products.multiply`, and the next norm makes the weighted sum. Nothing
waits for the device, and every size follows from the tensors' shapes, so that a CUDA graph can hold it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tern.ops.cuda.launch import tl, triton
from tern.ops.cuda.matmul import swiglu
from tern.ops.cuda.products import Routing, multiply
from tern.ops.delta import ExpertOutputs
from tern.ops.gpu_weights import GpuWeight, Rows
from tern.ops.swiglu import SwiGLUWeights

_SORT_BLOCK = 2048


def mix_experts(
    x: Rows,
    weights: Tensor,
    experts: Tensor,
    gate_up: GpuWeight,
    down: GpuWeight,
    shared: SwiGLUWeights | None = None,
) -> ExpertOutputs:
    """As `tern.ops.reference_gpu.mix_experts` before its sum: `x` [T, H], `weights`, `experts` [T, K]."""
    routing = sort_by_expert(experts, gate_up.shape[0])
    gated = multiply(x, gate_up, gated=True, routing=routing)
    outputs = multiply(gated, down, routing=routing)
    return ExpertOutputs(outputs, weights, experts, None if shared is None else swiglu(x, shared))


def sort_by_expert(experts: Tensor, num_experts: int) -> Routing:
    """Sort the pairs of tokens and experts `experts` [T, K] by expert, those of one expert by token."""
    experts = experts.contiguous()
    order = torch.empty(experts.numel(), dtype=torch.int32, device=experts.device)
    starts = torch.empty(num_experts + 1, dtype=torch.int32, device=experts.device)
    block = min(_SORT_BLOCK, max(16, triton.next_power_of_2(experts.numel())))
    _sort[(num_experts,)](experts, order, starts, experts.numel(), num_experts, BLOCK=block)
    return Routing(order, starts, experts.shape[1])


# Bound by its launch for decodes, whose pairs are one block. Each expert's program reads all pairs twice, from the
# cache: with 8192 tokens 25 blocks, a hundredth of what the products take.
@triton.jit
def _sort(experts, order, starts, pairs, num_experts, BLOCK: tl.constexpr):
    """Where the pairs of expert `program_id(0)` begin -> `starts`, and which they are -> `order` from there on."""
    expert = tl.program_id(0)
    before = 0
    for begin in range(0, pairs, BLOCK):
        pair = begin + tl.arange(0, BLOCK)
        chosen = tl.load(experts + pair, mask=pair < pairs, other=num_experts).to(tl.int32)
        before += tl.sum((chosen < expert).to(tl.int32), axis=0)
    place = before
    for begin in range(0, pairs, BLOCK):
        pair = begin + tl.arange(0, BLOCK)
        chosen = tl.load(experts + pair, mask=pair < pairs, other=num_experts).to(tl.int32)
        own = (chosen == expert).to(tl.int32)
        tl.store(order + place + tl.cumsum(own, axis=0) - 1, pair, mask=own == 1)
        place += tl.sum(own, axis=0)
    tl.store(starts + expert, before)
    if expert == num_experts - 1:
        tl.store(starts + num_experts, place)
