"""The choice of experts: float32 products of a token with the router, then softmax and the largest, in two launches.

A token's logits are sums over spans of `SPAN` depths, each added depth by depth and the spans in their order, whatever
else stands in the batch: only tiles of tokens and experts depend on the number of rows, and no sum runs along those.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tern.ops.cuda.launch import tl, triton

SPAN = 256
"""Depths that one program multiplies."""

# Tokens, experts and depths of a tile. Of few rows each program reads 16 KB of the router: 40 programs for one token of
# 2560 depths and 64 experts. Many rows reuse what they read of it.
_FEW_ROWS = 256
_FEW = {"TOKENS": 16, "EXPERTS": 16, "DEPTHS": 32, "num_warps": 4, "num_stages": 3}
_MANY = {"TOKENS": 32, "EXPERTS": 64, "DEPTHS": 16, "num_warps": 4, "num_stages": 3}


_CHOOSERS = 4
"""Tokens for which a program chooses, a warp each."""


def route(
    x: Tensor, router: Tensor, correction_bias: Tensor, experts_per_token: int, norm_min: float
) -> tuple[Tensor, Tensor]:
    """As `tern.ops.reference.route`; of experts that are equal the first is chosen.

    Raises `ValueError` for a router or bias that is not float32 or does not fit, and for more experts than there are.
    """
    rows, depth = x.shape
    experts = router.shape[0]
    if {router.dtype, correction_bias.dtype} != {torch.float32} or router.shape[1] != depth:
        raise ValueError(f"x {list(x.shape)} cannot be routed by {router.dtype} {list(router.shape)}")
    if correction_bias.shape != (experts,) or not 1 <= experts_per_token <= experts:
        raise ValueError(f"{experts} experts cannot give {experts_per_token} with a bias {list(correction_bias.shape)}")
    weights = torch.empty(rows, experts_per_token, dtype=torch.float32, device=x.device)
    chosen = torch.empty(rows, experts_per_token, dtype=torch.int64, device=x.device)
    if rows:
        spans = triton.cdiv(depth, SPAN)
        sums = torch.empty(spans, rows, experts, dtype=torch.float32, device=x.device)
        tile = _FEW if rows <= _FEW_ROWS else _MANY
        grid = (triton.cdiv(rows, tile["TOKENS"]), triton.cdiv(experts, tile["EXPERTS"]), spans)
        _multiply[grid](x.contiguous(), router.contiguous(), sums, rows, experts, depth, SPAN=SPAN, **tile)
        sizes = {"SPANS": spans, "K": experts_per_token, "LANES": triton.next_power_of_2(experts)}
        sizes["PLACES"] = triton.next_power_of_2(experts_per_token)
        tensors = (sums, correction_bias.contiguous(), weights, chosen)
        programs = triton.cdiv(rows, _CHOOSERS)
        _choose[(programs,)](*tensors, rows, experts, norm_min, **sizes, TOKENS=_CHOOSERS, num_warps=_CHOOSERS)
    return weights, chosen


# For few rows bound by how soon the router has come from the L2 cache, for many by float32 multiplications, which
# have no tensor cores: the choice among near experts takes all of float32. `tl.dot` gives them to ordinary ones, each
# sum by one thread in the order of the depths.
@triton.jit
def _multiply(
    x,
    router,
    sums,
    rows,
    experts,
    depth,
    SPAN: tl.constexpr,
    TOKENS: tl.constexpr,
    EXPERTS: tl.constexpr,
    DEPTHS: tl.constexpr,
):
    """Rows [depth] of `x` by rows [depth] of `router`, over one span of depths -> `sums` [spans, rows, experts]."""
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    expert = tl.program_id(1) * EXPERTS + tl.arange(0, EXPERTS)
    span = tl.program_id(2)
    total = tl.zeros((TOKENS, EXPERTS), dtype=tl.float32)
    for start in range(0, tl.minimum(SPAN, depth - span * SPAN), DEPTHS):
        at = span * SPAN + start + tl.arange(0, DEPTHS)
        left = (token[:, None] < rows) & (at[None, :] < depth)
        inputs = tl.load(x + token[:, None] * depth + at[None, :], mask=left, other=0.0).to(tl.float32)
        right = (expert[None, :] < experts) & (at[:, None] < depth)
        columns = tl.load(router + expert[None, :] * depth + at[:, None], mask=right, other=0.0)
        total = tl.dot(inputs, columns, total, input_precision="ieee")
    places = (span * rows + token[:, None]) * experts + expert[None, :]
    tl.store(sums + places, total, mask=(token[:, None] < rows) & (expert[None, :] < experts))


# Bound by latency: one warp a token, two of 64 experts a thread, so that no sum or maximum waits for another warp.
@triton.jit
def _choose(
    sums,
    bias,
    weights,
    chosen,
    rows,
    experts,
    norm_min,
    SPANS: tl.constexpr,
    K: tl.constexpr,
    LANES: tl.constexpr,
    PLACES: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Tokens' `sums` [SPANS, rows, experts] -> their rows [K] of `weights` and of `chosen`."""
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)[:, None]
    lane = tl.arange(0, LANES)[None, :]
    inside = (token < rows) & (lane < experts)
    logits = tl.zeros((TOKENS, LANES), dtype=tl.float32)
    for span in tl.static_range(SPANS):
        logits += tl.load(sums + (span * rows + token) * experts + lane, mask=inside, other=0.0)
    logits = tl.where(lane < experts, logits, -float("inf"))
    powers = tl.exp(logits - tl.max(logits, axis=1, keep_dims=True))
    probabilities = powers / tl.sum(powers, axis=1, keep_dims=True)
    scores = probabilities + tl.load(bias + lane, mask=lane < experts, other=0.0)

    # A score and its expert as one whole number: the order of floats, and of equals the first expert is the largest.
    bits = scores.to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    lowest = tl.full((TOKENS, LANES), -(2**63), dtype=tl.int64)
    keys = tl.where(lane < experts, ordered.to(tl.int64) * LANES + (LANES - 1 - lane), lowest)
    place = tl.arange(0, PLACES)[None, :]
    row_weights = tl.zeros((TOKENS, PLACES), dtype=tl.float32)
    row_experts = tl.zeros((TOKENS, PLACES), dtype=tl.int64)
    for k in range(K):
        expert = LANES - 1 - (tl.max(keys, axis=1, keep_dims=True) & (LANES - 1))
        weight = tl.sum(tl.where(lane == expert, probabilities, 0.0), axis=1, keep_dims=True)
        row_weights = tl.where(place == k, weight, row_weights)
        row_experts = tl.where(place == k, expert, row_experts)
        keys = tl.where(lane == expert, lowest, keys)
    divisors = tl.maximum(tl.sum(row_weights, axis=1, keep_dims=True), norm_min)
    kept = (token < rows) & (place < K)
    tl.store(weights + token * K + place, row_weights / divisors, mask=kept)
    tl.store(chosen + token * K + place, row_experts, mask=kept)
