"""Mixtures of experts: pairs of tokens and experts sorted on the device, two products over them, one weighted sum.

Knows routing; the arithmetic of a weight is `products.multiply`. Nothing waits for the device, and every size follows
from the tensors' shapes, so that a CUDA graph can hold it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tern.ops.cuda.fp8 import round_rows_to_fp8
from tern.ops.cuda.launch import INTERPRETED, narrow, tl, triton
from tern.ops.cuda.matmul import swiglu
from tern.ops.cuda.products import Beside, Routing, kind_of, multiply
from tern.ops.cuda.router import choose
from tern.ops.gpu_weights import Fp8Weight, GpuWeight
from tern.ops.router import Router
from tern.ops.swiglu import SwiGLUWeights

_SORT_BLOCK = 2048
_MIX_COLUMNS = 512


def mixture(
    x: Tensor, router: Router, gate_up: GpuWeight, down: GpuWeight, shared: SwiGLUWeights | None = None
) -> Tensor:
    """`mix_experts` [T, H] of the experts that the router chooses for `x` [T, H]."""
    weights, experts, routing = choose(
        x, router.weight, router.correction_bias, router.experts_per_token, router.norm_min
    )
    return mix_experts(x, weights, experts, gate_up, down, shared, routing)


def mix_experts(
    x: Tensor,
    weights: Tensor,
    experts: Tensor,
    gate_up: GpuWeight,
    down: GpuWeight,
    shared: SwiGLUWeights | None = None,
    routing: Routing | None = None,
) -> Tensor:
    """As `tern.ops.reference_gpu.mix_experts`: `x` [T, H], `weights`, `experts` [T, K] -> [T, H].

    `routing` is `sort_by_expert(experts, E)` where it is known.
    """
    x = x.contiguous()
    rounds = isinstance(gate_up, Fp8Weight) or (shared is not None and isinstance(shared.gate_up, Fp8Weight))
    rounded = round_rows_to_fp8(x) if rounds else None
    routing = routing or sort_by_expert(experts, gate_up.shape[0])
    added: Tensor | None = None
    if shared is not None and _is_alike(shared, gate_up, down):
        outputs, added = _multiply_together(x, rounded, routing, gate_up, down, shared)
    else:
        gated = multiply(x, gate_up, gated=True, routing=routing, rounded=rounded)
        outputs = multiply(gated, down, routing=routing)
        if shared is not None:
            added = swiglu(x, shared, rounded)
    return _mix(outputs, weights, experts, added)


def _is_alike(shared: SwiGLUWeights, gate_up: GpuWeight, down: GpuWeight) -> bool:
    """Whether the shared expert's products can be computed in the launches of the experts'."""
    unbiased = shared.gate_up_bias is None and shared.down_bias is None
    pairs = ((shared.gate_up, gate_up), (shared.down, down))
    return unbiased and all(isinstance(own, GpuWeight) and kind_of(own) == kind_of(other) for own, other in pairs)


def _multiply_together(
    x: Tensor,
    rounded: tuple[Tensor, Tensor] | None,
    routing: Routing,
    gate_up: GpuWeight,
    down: GpuWeight,
    shared: SwiGLUWeights,
) -> tuple[Tensor, Tensor]:
    """What the experts give for the pairs [T * K, H], in their order, and the shared one for tokens [T, H]."""
    assert isinstance(shared.gate_up, GpuWeight)
    assert isinstance(shared.down, GpuWeight)
    beside = Beside(x, shared.gate_up, x.new_empty(x.shape[0], shared.down.shape[1]), rounded)
    gated = multiply(x, gate_up, gated=True, routing=routing, rounded=rounded, beside=beside)
    added = Beside(beside.out, shared.down, torch.empty_like(x))
    return multiply(gated, down, routing=routing, beside=added), added.out


def sort_by_expert(experts: Tensor, num_experts: int) -> Routing:
    """Sort the pairs of tokens and experts `experts` [T, K] by expert, those of one expert by token."""
    experts = experts.contiguous()
    order = torch.empty(experts.numel(), dtype=torch.int32, device=experts.device)
    starts = torch.empty(num_experts + 1, dtype=torch.int32, device=experts.device)
    block = min(_SORT_BLOCK, max(16, triton.next_power_of_2(experts.numel())))
    _sort[(num_experts,)](experts, order, starts, experts.numel(), num_experts, BLOCK=block)
    return Routing(order, starts, experts.shape[1])


def _mix(outputs: Tensor, weights: Tensor, experts: Tensor, shared: Tensor | None) -> Tensor:
    """The weighted sums [T, H] of the pairs' `outputs` [T * K, H], plus `shared` [T, H]."""
    tokens, experts_per_token = experts.shape
    width = outputs.shape[1]
    out = torch.empty(tokens, width, dtype=outputs.dtype, device=outputs.device)
    if out.numel():
        tensors = (out, outputs, weights.contiguous(), experts.contiguous(), out if shared is None else shared)
        _weighted_sums[(tokens, -(-width // _MIX_COLUMNS))](
            *tensors,
            width,
            PAIRS=experts_per_token,
            PAIRS_PADDED=max(2, triton.next_power_of_2(experts_per_token)),
            HAS_SHARED=shared is not None,
            BLOCK=_MIX_COLUMNS,
            INTERPRETED=INTERPRETED,
        )
    return out


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


# Bound by memory: all rows of a token are on their way at once.
@triton.jit
def _weighted_sums(
    out,
    outputs,
    weights,
    experts,
    shared,
    width,
    PAIRS: tl.constexpr,
    PAIRS_PADDED: tl.constexpr,
    HAS_SHARED: tl.constexpr,
    BLOCK: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Columns of one token's row of `out`: its `PAIRS` rows of `outputs` times their weights, by expert's number."""
    token = tl.program_id(0).to(tl.int64)
    pair = tl.arange(0, PAIRS_PADDED)
    known = pair < PAIRS
    expert = tl.load(experts + token * PAIRS + pair, mask=known, other=2147483647).to(tl.int32)
    weight = tl.load(weights + token * PAIRS + pair, mask=known, other=0.0)
    lower, equal = expert[None, :] < expert[:, None], expert[None, :] == expert[:, None]
    sooner = lower | (equal & (pair[None, :] < pair[:, None]))
    rank = tl.sum(sooner.to(tl.int32), axis=1)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    total = tl.zeros((BLOCK,), tl.float32)
    for place in tl.static_range(PAIRS):
        own = tl.sum(tl.where(rank == place, pair, 0), axis=0)
        factor = tl.sum(tl.where(rank == place, weight, 0.0), axis=0)
        row = tl.load(outputs + (token * PAIRS + own) * width + column, mask=inside, other=0.0)
        total += row.to(tl.float32) * factor
    dtype: tl.constexpr = out.dtype.element_ty
    result = narrow(total, dtype, INTERPRETED)
    if HAS_SHARED:
        added = tl.load(shared + token * width + column, mask=inside, other=0.0).to(tl.float32)
        result = narrow(result.to(tl.float32) + added, dtype, INTERPRETED)
    tl.store(out + token * width + column, result, mask=inside)
