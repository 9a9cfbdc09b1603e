"""The choice of experts: float32 products of a token with the router, softmax, the largest; of few tokens also sorted.

A token's logits are sums over spans of `SPAN` depths, each added depth by depth and the spans in their order, whatever
else stands in the batch: only tiles of tokens and experts depend on the number of rows, and no sum runs along those.
Whatever else is added up is in whole numbers or has its own order. So one launch, whose last program chooses and sorts
for few tokens, gives the bits of two.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tern.ops.cuda.arrival import counters, is_last
from tern.ops.cuda.launch import EARLY, announce, ask_for, tl, triton, wait
from tern.ops.cuda.products import Routing

SPAN = 256
"""Depths that one program multiplies."""

# Tokens, experts and depths of a tile. Of few rows each program reads 16 KB of the router, nearly all of it on its way
# at once: 40 programs for one token of 2560 depths and 64 experts. Many rows reuse what they read of it.
_FEW_ROWS = 256
_FEW = {"TOKENS": 16, "EXPERTS": 16, "DEPTHS": 32, "num_warps": 4, "num_stages": 7}
_MANY = {"TOKENS": 32, "EXPERTS": 64, "DEPTHS": 16, "num_warps": 4, "num_stages": 3}

_CHOOSERS = 4
"""Tokens for which a program chooses at least, a warp each."""

_LAST_SCORES = 2048
"""What one program chooses among and sorts alone, sooner than launches begin: 32 tokens of 64 experts."""


def route(
    x: Tensor, router: Tensor, correction_bias: Tensor, experts_per_token: int, norm_min: float
) -> tuple[Tensor, Tensor]:
    """As `tern.ops.reference.route`; of experts that are equal the first is chosen. Raises what `choose` raises."""
    weights, chosen, _ = choose(x, router, correction_bias, experts_per_token, norm_min)
    return weights, chosen


def choose(
    x: Tensor, router: Tensor, correction_bias: Tensor, experts_per_token: int, norm_min: float
) -> tuple[Tensor, Tensor, Routing | None]:
    """What `route` gives, and of few tokens the pairs sorted by expert, which come from the same launch.

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
    if not rows:
        return weights, chosen, None
    spans = triton.cdiv(depth, SPAN)
    sums = torch.empty(spans, rows, experts, dtype=torch.float32, device=x.device)
    tile = _FEW if rows <= _FEW_ROWS else _MANY
    grid = (triton.cdiv(rows, tile["TOKENS"]), triton.cdiv(experts, tile["EXPERTS"]), spans)
    factors = (x.contiguous(), router.contiguous(), sums)
    sizes = {"SPANS": spans, "K": experts_per_token, "LANES": triton.next_power_of_2(experts)}
    sizes["PLACES"] = triton.next_power_of_2(experts_per_token)
    choice = (correction_bias.contiguous(), weights, chosen)
    choosers = max(_CHOOSERS, triton.next_power_of_2(rows))
    if choosers * sizes["LANES"] <= _LAST_SCORES:
        order = torch.empty(rows * experts_per_token, dtype=torch.int32, device=x.device)
        starts = torch.empty(experts + 1, dtype=torch.int32, device=x.device)
        tensors = (*factors, *choice, order, starts, counters(x.device))
        _multiply_choose_and_sort[grid](
            *tensors, rows, experts, depth, norm_min, SPAN=SPAN, CHOOSERS=choosers, **sizes, **tile, **EARLY
        )
        return weights, chosen, Routing(order, starts, experts_per_token)
    _multiply[grid](*factors, rows, experts, depth, SPAN=SPAN, **tile)
    programs = triton.cdiv(rows, _CHOOSERS)
    _choose[(programs,)](sums, *choice, rows, experts, norm_min, **sizes, CHOOSERS=_CHOOSERS, num_warps=_CHOOSERS)
    return weights, chosen, None


@triton.jit(do_not_specialize=["rows"])
def _multiply_choose_and_sort(
    x,
    router,
    sums,
    bias,
    weights,
    chosen,
    order,
    starts,
    counter,
    rows,
    experts,
    depth,
    norm_min,
    SPAN: tl.constexpr,
    CHOOSERS: tl.constexpr,
    SPANS: tl.constexpr,
    K: tl.constexpr,
    LANES: tl.constexpr,
    PLACES: tl.constexpr,
    TOKENS: tl.constexpr,
    EXPERTS: tl.constexpr,
    DEPTHS: tl.constexpr,
):
    """`_multiply`; its last program to arrive chooses for all `rows` and sorts the pairs into `order`, `starts`."""
    announce()
    expert = tl.minimum(tl.program_id(1) * EXPERTS + tl.arange(0, EXPERTS), experts - 1)
    line = tl.minimum(tl.program_id(2) * SPAN + tl.arange(0, SPAN // 32) * 32, depth - 1)  # of 128 bytes
    ask_for(router + expert[:, None] * depth + line[None, :])
    wait()
    _multiply(x, router, sums, rows, experts, depth, SPAN, TOKENS, EXPERTS, DEPTHS)
    if is_last(counter, tl.num_programs(0) * tl.num_programs(1) * tl.num_programs(2)):
        choice = _choose_rows(
            sums, bias, weights, chosen, 0, rows, experts, norm_min, SPANS, K, LANES, PLACES, CHOOSERS
        )
        _sort(choice, order, starts, rows, experts, K, LANES, CHOOSERS)


# For few rows bound by how soon the router has come from the L2 cache, for many by float32 multiplications, which
# have no tensor cores: the choice among near experts takes all of float32. `tl.dot` gives them to ordinary ones, each
# sum by one thread in the order of the depths.
@triton.jit(do_not_specialize=["rows"])
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


@triton.jit(do_not_specialize=["rows"])
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
    CHOOSERS: tl.constexpr,
):
    """Tokens' `sums` [SPANS, rows, experts] -> their rows [K] of `weights` and of `chosen`."""
    first = tl.program_id(0).to(tl.int64) * CHOOSERS
    _choose_rows(sums, bias, weights, chosen, first, rows, experts, norm_min, SPANS, K, LANES, PLACES, CHOOSERS)


# Bound by latency: one warp a token, two of 64 experts a thread, so that no sum or maximum waits for another warp.
# They are of whole numbers: those of 32 bits take one instruction of a warp, and any order of additions gives the same.
@triton.jit
def _choose_rows(
    sums,
    bias,
    weights,
    chosen,
    first,
    rows,
    experts,
    norm_min,
    SPANS: tl.constexpr,
    K: tl.constexpr,
    LANES: tl.constexpr,
    PLACES: tl.constexpr,
    CHOOSERS: tl.constexpr,
):
    """Choose for the tokens from `first` on -> each expert's place among K, or K, int32 [CHOOSERS, LANES]."""
    token = first + tl.arange(0, CHOOSERS)[:, None]
    lane = tl.arange(0, LANES)[None, :]
    inside = (token < rows) & (lane < experts)
    logits = tl.zeros((CHOOSERS, LANES), dtype=tl.float32)
    for span in tl.static_range(SPANS):
        at = sums + (span * rows + token) * experts + lane
        logits += tl.load(at, mask=inside, other=0.0, cache_modifier=".cg")
    logits = tl.where(lane < experts, logits, -float("inf"))
    powers = tl.exp(logits - tl.max(logits, axis=1, keep_dims=True))
    probabilities = powers / _sum_of_powers(powers)
    scores = probabilities + tl.load(bias + lane, mask=lane < experts, other=0.0)

    # Whole numbers in the order of floats; the smallest stands for what cannot be chosen.
    lowest: tl.constexpr = -(2**31)
    bits = scores.to(tl.int32, bitcast=True)
    ordered = tl.maximum(bits ^ ((bits >> 31) & 0x7FFFFFFF), lowest + 1)
    keys = tl.where(lane < experts, ordered, lowest)
    place = tl.arange(0, PLACES)[None, :]
    weight_bits = probabilities.to(tl.int32, bitcast=True)
    row_weights = tl.zeros((CHOOSERS, PLACES), dtype=tl.float32)
    row_experts = tl.zeros((CHOOSERS, PLACES), dtype=tl.int32)
    places = tl.full((CHOOSERS, LANES), K, dtype=tl.int32)
    weight_sum = tl.zeros((CHOOSERS, 1), dtype=tl.float32)
    for k in range(K):
        largest = keys == tl.max(keys, axis=1, keep_dims=True)
        expert = tl.min(tl.where(largest, lane, LANES), axis=1, keep_dims=True)
        weight = tl.sum(tl.where(lane == expert, weight_bits, 0), axis=1, keep_dims=True).to(tl.float32, bitcast=True)
        weight_sum += weight
        row_weights = tl.where(place == k, weight, row_weights)
        row_experts = tl.where(place == k, expert, row_experts)
        places = tl.where(lane == expert, k, places)
        keys = tl.where(lane == expert, lowest, keys)
    kept = (token < rows) & (place < K)
    tl.store(weights + token * K + place, row_weights / tl.maximum(weight_sum, norm_min), mask=kept)
    tl.store(chosen + token * K + place, row_experts.to(tl.int64), mask=kept)
    return places


@triton.jit
def _sum_of_powers(powers):
    """The sums of rows [rows, lanes] of numbers from 0 to 1, in steps of 2^-32; NaN where one is."""
    steps = tl.where(powers == powers, powers * 4294967296.0, 1125899906842624.0).to(tl.int64)
    total = tl.sum(steps, axis=1, keep_dims=True)
    return tl.where(total < 1125899906842624, total.to(tl.float32) * 2.3283064365386963e-10, float("nan"))


@triton.jit
def _sort(places, order, starts, rows, experts, K: tl.constexpr, LANES: tl.constexpr, CHOOSERS: tl.constexpr):
    """What `_choose_rows` found for all rows -> the pairs t * K + k by expert, and where an expert's begin.

    A token's experts differ, so that an expert's pairs follow each other as their tokens do.
    """
    token, expert = tl.arange(0, CHOOSERS)[:, None], tl.arange(0, LANES)
    own = ((places < K) & (token < rows)).to(tl.int32)
    counts = tl.sum(own, axis=0)
    begin = tl.cumsum(counts, axis=0) - counts
    at = begin[None, :] + tl.cumsum(own, axis=0) - own
    tl.store(order + at, token * K + places, mask=own == 1)
    tl.store(starts + expert, begin, mask=expert < experts)
    tl.store(starts + experts, rows * K)
