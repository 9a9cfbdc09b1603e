"""Mixtures of experts: pairs of tokens and experts sorted on the device, and two products over them.

Knows routing; the arithmetic of a weight is `products.multiply`, and the next norm makes the weighted sum. Nothing
waits for the device, and every size follows from the tensors' shapes, so that a CUDA graph can hold it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tern.ops.cuda.fp8 import round_together
from tern.ops.cuda.launch import tl, triton
from tern.ops.cuda.matmul import swiglu
from tern.ops.cuda.products import Beside, Routing, kind_of, multiply
from tern.ops.cuda.router import choose
from tern.ops.delta import ExpertOutputs
from tern.ops.gpu_weights import Fp8Weight, GpuWeight, Rows, plain_rows
from tern.ops.router import Router
from tern.ops.swiglu import SwiGLUWeights

_SORT_BLOCK = 2048


def mixture(
    x: Rows, router: Router, gate_up: GpuWeight, down: GpuWeight, shared: SwiGLUWeights | None = None
) -> ExpertOutputs:
    """`mix_experts` of the experts that the router chooses for `x` [T, H]."""
    weights, experts, routing = choose(
        plain_rows(x), router.weight, router.correction_bias, router.experts_per_token, router.norm_min
    )
    return mix_experts(x, weights, experts, gate_up, down, shared, routing)


def mix_experts(
    x: Rows,
    weights: Tensor,
    experts: Tensor,
    gate_up: GpuWeight,
    down: GpuWeight,
    shared: SwiGLUWeights | None = None,
    routing: Routing | None = None,
) -> ExpertOutputs:
    """As `tern.ops.reference_gpu.mix_experts` before its sum: `x` [T, H], `weights`, `experts` [T, K].

    `routing` is `sort_by_expert(experts, E)` where it is known.
    """
    routing = routing or sort_by_expert(experts, gate_up.shape[0])
    if shared is not None and _is_alike(shared, gate_up, down):
        outputs, added = _multiply_together(x, routing, gate_up, down, shared)
        return ExpertOutputs(outputs, weights, experts, added)
    gated = multiply(x, gate_up, gated=True, routing=routing)
    outputs = multiply(gated, down, routing=routing)
    return ExpertOutputs(outputs, weights, experts, None if shared is None else swiglu(x, shared))


def _is_alike(shared: SwiGLUWeights, gate_up: GpuWeight, down: GpuWeight) -> bool:
    """Whether the shared expert's products can be computed in the launches of the experts'."""
    unbiased = shared.gate_up_bias is None and shared.down_bias is None
    pairs = ((shared.gate_up, gate_up), (shared.down, down))
    return unbiased and all(isinstance(own, GpuWeight) and kind_of(own) == kind_of(other) for own, other in pairs)


def _multiply_together(
    x: Rows, routing: Routing, gate_up: GpuWeight, down: GpuWeight, shared: SwiGLUWeights
) -> tuple[Tensor, Tensor]:
    """What the experts give for the pairs [T * K, H], in their order, and the shared one for tokens [T, H]."""
    assert isinstance(shared.gate_up, GpuWeight)
    assert isinstance(shared.down, GpuWeight)
    rows, dtype, device = x.shape[0], x.dtype, x.device
    beside = Beside(x, shared.gate_up, torch.empty(rows, shared.down.shape[1], dtype=dtype, device=device))
    gated = multiply(x, gate_up, gated=True, routing=routing, beside=beside)
    is_fp8 = isinstance(down, Fp8Weight)
    entering, of_shared = round_together(gated, beside.out) if is_fp8 else (gated, beside.out)
    added = Beside(of_shared, shared.down, torch.empty(rows, shared.down.shape[0], dtype=dtype, device=device))
    return multiply(entering, down, routing=routing, beside=added), added.out


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
@triton.jit(do_not_specialize=["pairs"])
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
