"""GGML's block formats: the bytes of a block of weights -> floats. Knows no files and no names.

A row of a tensor is a run of blocks. In one block (ggml-common.h; `d` and `m` are float16, little endian):

    Q4_0   32 weights,  18 bytes: d | nibbles: the low ones are weights 0..15, the high ones 16..31    w = d (q - 8)
    Q8_0   32 weights,  34 bytes: d | 32 int8                                                          w = d q
    Q4_K  256 weights, 144 bytes: d | m | 12 bytes of scales | nibbles                                 w = d s q - m t
    Q5_K  256 weights, 176 bytes: d | m | 12 bytes of scales | 32 bytes of fifth bits | nibbles        w = d s q - m t
    Q6_K  256 weights, 210 bytes: low nibbles | upper pairs of bits | 16 int8 scales s | d             w = d s (q - 32)

The products are made in this order in float32, as GGML makes them, so that results are equal to the bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class BlockFormat:
    """`weights` take `nbytes` bytes together; `bits` is what each is rounded to.

    `to_floats` takes blocks [n, nbytes] uint8 and returns their weights [n, weights] float32.
    """

    weights: int
    nbytes: int
    bits: int
    to_floats: Callable[[Tensor], Tensor]


def dequantise(rows: Tensor, block: BlockFormat) -> Tensor:
    """Rows of blocks [..., bytes] uint8 -> their weights [..., width] float32."""
    floats = block.to_floats(rows.reshape(-1, block.nbytes))
    return floats.view(*rows.shape[:-1], rows.shape[-1] // block.nbytes * block.weights)


def _halves(blocks: Tensor, start: int, count: int) -> Tensor:
    """`count` float16 numbers from byte `start` on, as float32 [n, count]."""
    return blocks[:, start : start + 2 * count].contiguous().view(torch.float16).float()


def _nibbles(packed: Tensor) -> Tensor:
    """[n, runs, bytes] -> [n, runs, 2, bytes]: the low nibbles of each run, then its high ones."""
    return torch.stack((packed & 15, packed >> 4), dim=2)


def _q4_0(blocks: Tensor) -> Tensor:
    q = _nibbles(blocks[:, None, 2:]).flatten(1).to(torch.int8) - 8
    return _halves(blocks, 0, 1) * q


def _q8_0(blocks: Tensor) -> Tensor:
    return _halves(blocks, 0, 1) * blocks[:, 2:].view(torch.int8)


def _q4_k(blocks: Tensor) -> Tensor:
    return _scaled(blocks, _nibbles(blocks[:, 16:].reshape(-1, 4, 32)).flatten(1, 2))


def _q5_k(blocks: Tensor) -> Tensor:
    low = _nibbles(blocks[:, 48:].reshape(-1, 4, 32)).flatten(1, 2)
    fifth = blocks[:, None, 16:48] >> torch.arange(8, dtype=torch.uint8)[:, None] & 1
    return _scaled(blocks, low | fifth << 4)


def _scaled(blocks: Tensor, q: Tensor) -> Tensor:
    """d s q - m t for q [n, 8, 32]: eight scales s and eight t of six bits each, in 12 bytes.

    Bytes 0..3 hold the first four s and bytes 4..7 the first four t in their low six bits; bytes 8..11 hold the low
    nibbles of the other s and t, whose upper two bits are the upper ones of bytes 0..7.
    """
    first, second, third = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    s = torch.cat((first & 63, third & 15 | first >> 6 << 4), dim=1)
    t = torch.cat((second & 63, third >> 4 | second >> 6 << 4), dim=1)
    d, m = _halves(blocks, 0, 2).unbind(1)
    return ((d[:, None] * s)[..., None] * q - (m[:, None] * t)[..., None]).flatten(1)


def _q6_k(blocks: Tensor) -> Tensor:
    """Of each half, 128 weights, the four runs of 32 take the low or high nibbles and one pair of bits of each byte."""
    low = _nibbles(blocks[:, :128].reshape(-1, 2, 64)).view(-1, 2, 4, 32)
    high = blocks[:, 128:192].reshape(-1, 2, 1, 32) >> torch.tensor([0, 2, 4, 6], dtype=torch.uint8)[:, None] & 3
    q = (low | high << 4).to(torch.int8) - 32
    scales = _halves(blocks, 208, 1) * blocks[:, 192:208].view(torch.int8)
    return (scales[..., None] * q.view(-1, 16, 16)).flatten(1)


BLOCK_FORMATS = {
    "Q4_0": BlockFormat(32, 18, 4, _q4_0),
    "Q8_0": BlockFormat(32, 34, 8, _q8_0),
    "Q4_K": BlockFormat(256, 144, 4, _q4_k),
    "Q5_K": BlockFormat(256, 176, 5, _q5_k),
    "Q6_K": BlockFormat(256, 210, 6, _q6_k),
}
