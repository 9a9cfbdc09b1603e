"""The arithmetic of the network in plain torch: the truth that every faster version is compared with.

Knows tensors and their shapes; knows no layers, batches or requests. Letters in shapes: T tokens, H hidden size,
N query heads, G key/value heads, D head dim, F feed-forward width, E experts, I expert width, K experts per token.

Each row of a result depends on its own inputs only, so that a token's value does not change with what else is in the
batch. In exact arithmetic that is free; in float32 it also takes `linear`'s and attention's care for how a matrix
product is rounded (see `pad_rows`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from tern.ops.gpu_weights import FP8, FP8_MAX
from tern.ops.rounding import round_to_bytes
from tern.ops.swiglu import SwiGLUWeights

Gated = Callable[[Tensor], Tensor]
"""Something that computes `silu_mul`."""

# A float32 product with fewer rows than this is computed with rows of padding: see `pad_rows`.
_STABLE_ROWS = 16
SCALE_BYTES = 4
"""Of the scale that stands beside a token's int8 key or value in one head."""


def embed(token_ids: Tensor, table: Tensor) -> Tensor:
    """Rows of the embedding: `token_ids` [T], `table` [V, H] -> [T, H]."""
    return functional.embedding(token_ids, table)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm over the last axis (arXiv 1910.07467): `x` [T, H], `weight` [H] -> [T, H].

    Computed in float32 and rounded to the type of `x` before it is scaled.
    """
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return (wide * scale).to(x.dtype) * weight


def add_rms_norm(delta: Tensor | None, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Add `delta` [T, H] to the residual stream [T, H] and norm the sum -> (normed, new residual).

    `delta` None: there is nothing to add yet.
    """
    if delta is not None:
        residual = residual + delta
    return rms_norm(residual, weight, eps), residual


def rotary_frequencies(head_dim: int, theta: float, device: torch.device) -> Tensor:
    """The angle that each element of a head turns by per position: [D] float32, pairs 2j and 2j+1 alike (RoFormer)."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    return (1.0 / theta**exponents).repeat_interleave(2)


def rotary_table(positions: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and signed sines for `positions` [T] int64 and `frequencies` [D] -> two [T, D] float32.

    Element 2j's sine is negated: a pair (a, b) turns into (a cos - b sin, b cos + a sin). Angles are float32 products
    as in transformers: past position 100 000 other roundings would give other angles than the model was trained with.
    """
    angles = positions.to(torch.float32)[:, None] * frequencies
    signs = torch.tensor([-1.0, 1.0], device=angles.device).repeat(frequencies.shape[0] // 2)
    return angles.cos(), angles.sin() * signs


def apply_rotary(x: Tensor, cosines: Tensor, signed_sines: Tensor) -> Tensor:
    """Rotary embedding on interleaved pairs: `x` [T, heads, D], tables [T, D] -> [T, heads, D] in the type of `x`.

    Elements 2j and 2j+1 are a pair (as in GPT-J), not j and j + D/2. Computed in float32.
    """
    wide = x.float()
    swapped = wide.view(*wide.shape[:-1], wide.shape[-1] // 2, 2).flip(-1).flatten(-2)
    return (wide * cosines[:, None] + swapped * signed_sines[:, None]).to(x.dtype)


def pad_rows(x: Tensor) -> Tensor:
    """`x` [..., rows, n] with rows of zeros added, so that a product rounds each row alike however many there are.

    On the CPU a float32 product of one to three rows goes through other kernels than one of many, which add in another
    order; a token would get other last bits alone than in a batch. Fewer than 16 rows therefore become 4, 8 or 16
    (which about doubles the time of a single one). bf16 products are rounded once, from float32 sums, and come out
    alike.
    """
    rows = x.shape[-2]
    if rows >= _STABLE_ROWS or rows == 0 or x.dtype != torch.float32 or x.device.type != "cpu":
        return x
    return functional.pad(x, (0, 0, 0, max(4, 1 << (rows - 1).bit_length()) - rows))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x` [T, in], `weight` [out, in], `bias` [out] -> [T, out]."""
    return functional.linear(pad_rows(x), weight, bias)[: x.shape[0]]


def silu_mul(gate_up: Tensor) -> Tensor:
    """The gate of SwiGLU (arXiv 2002.05202): `gate_up` [T, 2F], gate first -> silu(gate) * up, [T, F]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.silu(gate) * up


def swiglu(x: Tensor, layer: SwiGLUWeights, gated: Gated = silu_mul) -> Tensor:
    """down(silu(gate(x)) * up(x)): `x` [T, in] -> [T, out]. `gated` is what computes `silu_mul`."""
    assert isinstance(layer.gate_up, Tensor)
    assert isinstance(layer.down, Tensor)
    return linear(gated(linear(x, layer.gate_up, layer.gate_up_bias)), layer.down, layer.down_bias)


def route(
    x: Tensor, router: Tensor, correction_bias: Tensor, experts_per_token: int, norm_min: float
) -> tuple[Tensor, Tensor]:
    """Choose the experts of each token -> (weights [T, K] float32, experts [T, K] int64).

    `x` [T, H], `router` [E, H] float32, `correction_bias` [E] float32. All in float32: p = softmax(x W); the experts
    are the top K of p + bias; their weights are the unbiased p, divided by max(sum, `norm_min`).
    """
    probabilities = linear(x.float(), router).softmax(dim=-1)
    experts = torch.topk(probabilities + correction_bias, experts_per_token, dim=-1).indices
    weights = probabilities.gather(-1, experts)
    return weights / weights.sum(dim=-1, keepdim=True).clamp(min=norm_min), experts


def mix_experts(
    x: Tensor,
    weights: Tensor,
    experts: Tensor,
    gate_up: Tensor,
    down: Tensor,
    shared: SwiGLUWeights | None = None,
    gated: Gated = silu_mul,
) -> Tensor:
    """The weighted sum of each token's experts, SwiGLUs without bias, plus the shared expert -> [T, H] like `x`.

    `x` [T, H], `weights` [T, K] float32, `experts` [T, K], `gate_up` [E, 2I, H], `down` [E, H, I]. Tokens are sorted by
    expert once, and only the experts that a token chose are read. A token's terms are added in float32, in the order
    of the experts' numbers. `gated` is what computes `silu_mul`.
    """
    order = experts.flatten().argsort(stable=True)
    tokens = order // experts.shape[1]
    inputs = x[tokens]
    row_weights = weights.flatten()[order, None]
    mixed = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    counts = torch.bincount(experts.flatten(), minlength=gate_up.shape[0]).tolist()
    start = 0
    for expert, count in enumerate(counts):
        if count == 0:
            continue
        rows = slice(start, start + count)
        output = linear(gated(linear(inputs[rows], gate_up[expert])), down[expert])
        mixed.index_add_(0, tokens[rows], output.float() * row_weights[rows])
        start += count
    routed = mixed.to(x.dtype)
    return routed if shared is None else routed + swiglu(x, shared, gated)


def kv_cache_shapes(
    num_blocks: int, block_size: int, kv_heads: int, head_dim: int, dtype: torch.dtype, *, gpu: bool = False
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of one layer's cache.

    Keys [G, blocks, W / u, block_size, u], values [G, blocks, block_size / r, W, r]. u is how many numbers of `dtype`
    fill four bytes (or 1 where D is no multiple of that): neighbours along D lie together and each of them for all of a
    block's keys, so that a product with a query runs over keys side by side, by the instructions that multiply pairs of
    bf16 or quads of int8. r is 4 with int8, so that four tokens' values lie together, else 1. W is D, and with int8
    `SCALE_BYTES` more for a token's float32 scale in this head: the last unit of its key, and the element D + token % 4
    of its row of values. On a `gpu` u is D: a token's key lies together, as its value does, for wide loads.

    Raises `ValueError` for int8 on a GPU, and unless D and `block_size` are multiples of 4.
    """
    if gpu:
        if dtype == torch.int8:
            raise ValueError("an int8 cache is for processors: a GPU's narrow cache is float8_e4m3fn")
        return (kv_heads, num_blocks, 1, block_size, head_dim), (kv_heads, num_blocks, block_size, head_dim, 1)
    unit = max(1, 4 // dtype.itemsize)
    if dtype != torch.int8:
        unit = unit if head_dim % unit == 0 else 1
        return (kv_heads, num_blocks, head_dim // unit, block_size, unit), (
            kv_heads,
            num_blocks,
            block_size,
            head_dim,
            1,
        )
    if head_dim % unit or block_size % unit:
        raise ValueError(f"an int8 cache takes heads and blocks of multiples of 4, not {head_dim} and {block_size}")
    width = head_dim + SCALE_BYTES
    return (kv_heads, num_blocks, width // unit, block_size, unit), (
        kv_heads,
        num_blocks,
        block_size // unit,
        width,
        unit,
    )


def cached_head_dim(value_cache: Tensor) -> int:
    """D of a cache's values [..., W, r]; see `kv_cache_shapes`."""
    return value_cache.shape[-2] - (SCALE_BYTES if value_cache.dtype == torch.int8 else 0)


def write_kv(key_cache: Tensor, value_cache: Tensor, keys: Tensor, values: Tensor, slots: Tensor) -> None:
    """Store one layer's new keys and values, in place.

    Caches as in `kv_cache_shapes`; `keys`, `values` [T, G, D]; `slots` [T] are block * block_size + offset. Beyond the
    range of a float8_e4m3fn cache its end is stored.
    """
    key_cache, value_cache = key_cache.transpose(0, 1), value_cache.transpose(0, 1)
    block_size, rows, head_dim = key_cache.shape[3], value_cache.shape[4], keys.shape[2]
    blocks, offsets = slots // block_size, slots % block_size
    quads, tokens = offsets // rows, offsets % rows
    if value_cache.dtype == torch.int8:
        keys, key_scales = round_to_bytes(keys)
        values, value_scales = round_to_bytes(values)
        key_cache[blocks, :, -1, offsets] = _as_bytes(key_scales)
        value_cache[blocks, :, quads, head_dim + tokens] = _as_bytes(value_scales)
    units = keys.view(*keys.shape[:2], head_dim // key_cache.shape[4], key_cache.shape[4])
    if value_cache.dtype == FP8:
        units, values = (x.float().clamp(-FP8_MAX, FP8_MAX).to(FP8).view(torch.uint8) for x in (units, values))
        key_cache, value_cache = key_cache.view(torch.uint8), value_cache.view(torch.uint8)
    key_cache[blocks, :, : units.shape[2], offsets] = units.to(key_cache.dtype)
    value_cache[blocks, :, quads, :head_dim, tokens] = values.to(value_cache.dtype)


def read_kv(key_cache: Tensor, value_cache: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
    """What `write_kv` stored in `slots` [T]: keys and values [T, G, D], float32 where the cache is of 8 bits."""
    key_cache, value_cache = key_cache.transpose(0, 1), value_cache.transpose(0, 1)
    block_size, rows, head_dim = key_cache.shape[3], value_cache.shape[4], cached_head_dim(value_cache)
    blocks, offsets = slots // block_size, slots % block_size
    quads, tokens = offsets // rows, offsets % rows
    dtype = value_cache.dtype
    if dtype == FP8:
        key_cache, value_cache = key_cache.view(torch.uint8), value_cache.view(torch.uint8)
    keys = key_cache[blocks, :, : head_dim // key_cache.shape[4], offsets].flatten(2)
    values = value_cache[blocks, :, quads, :head_dim, tokens]
    if dtype == FP8:
        return keys.view(FP8).float(), values.view(FP8).float()
    if dtype != torch.int8:
        return keys, values
    key_scales = key_cache[blocks, :, -1, offsets].view(torch.float32)
    value_scales = value_cache[blocks, :, quads, head_dim + tokens].view(torch.float32)
    return keys * key_scales, values * value_scales


def _as_bytes(scales: Tensor) -> Tensor:
    """float32 [T, G] -> int8 [T, G, SCALE_BYTES]."""
    return scales[..., None].contiguous().view(torch.int8)


def rotate_and_store(
    qkv: Tensor, cosines: Tensor, signed_sines: Tensor, slots: Tensor, key_cache: Tensor, value_cache: Tensor
) -> Tensor:
    """Turn queries and keys, store keys and values -> the queries [T, N, D].

    `qkv` [T, (N + 2G) * D] are all of a token's heads: queries, keys, values. Tables [T, D], `slots` [T] and caches as
    in `apply_rotary` and `write_kv`.
    """
    kv_heads, head_dim = value_cache.shape[0], cached_head_dim(value_cache)
    heads = qkv.view(qkv.shape[0], qkv.shape[1] // head_dim, head_dim)
    rotated = apply_rotary(heads[:, :-kv_heads], cosines, signed_sines)
    write_kv(key_cache, value_cache, rotated[:, -kv_heads:], heads[:, -kv_heads:], slots)
    return rotated[:, :-kv_heads]
