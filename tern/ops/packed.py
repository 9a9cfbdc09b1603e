"""Weights of 4 and 8 bits in the layout that kernels read, files store and processes share. Knows no kernels.

A weight [out, in] becomes columns (its rows: a column of the output each) and depths, both rounded up with zeros:
columns to panels of 16, depths to groups of 32. In words of one column:

    8 bit    w = scale * v              v in -127..127
    4 bit    w = scale * factor * q     q in -8..7, and for every 32 depths one factor in -8..-1, 1..8

So a 4-bit weight too is an 8-bit integer, factor * q, times one float: integer products add up exactly over any depth,
and only the end needs floats. It takes 4.125 bits a weight and errs like plain 4-bit groups of 32 with float16 scales,
which take 4.5. The factors' sign lets the larger side of a group use the larger side of -8..7 (as in GGML's Q4_0).
`csrc/packed.h` draws the bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

PANEL, QUAD, GROUP = 16, 4, 32
"""Columns computed together; depths added up by one instruction; depths that share a factor."""
FACTORS = (*range(-8, 0), *range(1, 9))
"""What the sixteen codes of a factor mean."""


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A weight [out, in] of 4 or 8 bits, or a stack of them [experts, out, in], whose tensors have one more axis first.

    `values` uint8: for 8 bits [panels, depth / 4, 16, 4], v + 128; for 4 bits [panels, depth / 32, 4, 16, 4], q + 8,
    the low nibble of quad 2i and the high one of quad 2i + 1. `factors` uint8 [panels, depth / 32, 8] for 4 bits: codes
    of `FACTORS`, low nibbles of the columns 0..7, high ones of 8..15. `scales` float32 [panels * 16].

    `out_features` and `in_features` are the sizes before rounding up. The rows of a weight with two `parts`, gate and
    up, are rounded up half by half, so that each begins a panel.
    """

    values: Tensor
    factors: Tensor | None
    scales: Tensor
    out_features: int
    in_features: int
    parts: int = 1

    @property
    def bits(self) -> int:
        """Bits of a value."""
        return 8 if self.factors is None else 4

    @property
    def experts(self) -> int | None:
        """How many weights a stack holds; None for a single one."""
        return self.scales.shape[0] if self.scales.dim() == 2 else None

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the weight before it was packed."""
        single = (self.out_features, self.in_features)
        return single if self.experts is None else (self.experts, *single)

    @property
    def columns(self) -> int:
        """`out_features`, each part rounded up to whole panels."""
        return self.scales.shape[-1]

    @property
    def depth(self) -> int:
        """`in_features`, rounded up to whole groups."""
        return round_up(self.in_features, GROUP)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(tensor.nbytes for tensor in (self.values, self.factors, self.scales) if tensor is not None)

    @property
    def quantization(self) -> str:
        """The name of this form."""
        return f"wint{self.bits}"

    def __getitem__(self, expert: int) -> PackedWeight:
        """One weight of a stack."""
        factors = None if self.factors is None else self.factors[expert]
        return replace(self, values=self.values[expert], factors=factors, scales=self.scales[expert])

    def to(self, device: torch.device) -> PackedWeight:
        """The same on another device."""
        factors = None if self.factors is None else self.factors.to(device)
        return replace(self, values=self.values.to(device), factors=factors, scales=self.scales.to(device))

    def copy_(self, other: PackedWeight) -> None:
        """Take over the values of a weight of the same sizes."""
        self.values.copy_(other.values)
        self.scales.copy_(other.scales)
        if self.factors is not None and other.factors is not None:
            self.factors.copy_(other.factors)

    def integers(self) -> Tensor:
        """v, or factor * q, of a single weight: [columns, depth] int8."""
        if self.factors is None:
            return (self.values.to(torch.int16) - 128).to(torch.int8).transpose(1, 2).reshape(self.columns, self.depth)
        return self.quotients() * self.group_factors().repeat_interleave(GROUP, dim=1)

    def quotients(self) -> Tensor:
        """q of a single weight of 4 bits: [columns, depth] int8."""
        quads = torch.stack((self.values & 15, self.values >> 4), dim=3).to(torch.int8) - 8
        # [panels, groups, pairs, 2, 16, 4] -> [panels, 16, groups, 32]
        return quads.permute(0, 4, 1, 2, 3, 5).reshape(self.columns, self.depth)

    def group_factors(self) -> Tensor:
        """The factor of every group of a single weight of 4 bits: [columns, depth / 32] int8."""
        assert self.factors is not None, "a weight of 8 bits has no factors"
        codes = torch.cat((self.factors & 15, self.factors >> 4), dim=2).to(torch.int8)
        factors = codes - 8 + (codes >= 8).to(torch.int8)  # `FACTORS`, without a copy that a GPU would wait for
        return factors.transpose(1, 2).reshape(self.columns, -1)


def round_up(size: int, multiple: int) -> int:
    """The next multiple of `multiple`."""
    return -(-size // multiple) * multiple


def unpack(weight: PackedWeight) -> Tensor:
    """The weights that the integers stand for, in the shape before packing, float32."""
    if weight.experts is not None:
        return torch.stack([unpack(weight[expert]) for expert in range(weight.experts)])
    whole = weight.integers().float() * weight.scales[:, None]
    halves = whole.view(weight.parts, -1, weight.depth)
    return halves[:, : weight.out_features // weight.parts, : weight.in_features].flatten(0, 1)


def packed_shapes(shape: tuple[int, ...], bits: int, parts: int = 1) -> dict[str, tuple[int, ...]]:
    """The shapes of a packed weight's tensors, or of a stack's, for a weight of this shape."""
    *stack, out, depth = shape
    columns = parts * round_up(out // parts, PANEL)
    panels, groups = columns // PANEL, round_up(depth, GROUP) // GROUP
    if bits == 8:
        return {"values": (*stack, panels, groups * GROUP // QUAD, PANEL, QUAD), "scales": (*stack, columns)}
    values = (*stack, panels, groups, GROUP // (2 * QUAD), PANEL, QUAD)
    return {"values": values, "factors": (*stack, panels, groups, PANEL // 2), "scales": (*stack, columns)}


def empty(shape: tuple[int, ...], bits: int, parts: int = 1) -> PackedWeight:
    """A packed weight, or a stack, for a weight of this shape, whose tensors are still to be filled."""
    shapes = packed_shapes(shape, bits, parts)
    factors = torch.empty(shapes["factors"], dtype=torch.uint8) if "factors" in shapes else None
    values, scales = torch.empty(shapes["values"], dtype=torch.uint8), torch.empty(shapes["scales"])
    return PackedWeight(values, factors, scales, shape[-2], shape[-1], parts)
