"""Weights of 4 and 8 bits in the layouts that a GPU's kernels read, and their products in plain torch, the truth.

Knows the numbers and their places; knows no kernels. A GPU wants a row's numbers side by side, where `PackedWeight` has
panels for processors; the numbers are the same, so that a model packed once answers alike on both.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from tern.ops.packed import GROUP, PackedWeight

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
BLOCK = 128
"""Rows and depths of an fp8 weight that share a scale, and depths of an activation that do."""
ROUNDED_NUMBERS = 2**23
"""Numbers of a weight that are rounded to fp8 together, above those of an expert: 32 MiB in float32."""


@dataclass(frozen=True, eq=False)
class RowPackedWeight:
    """A `PackedWeight` [out, in], or a stack [experts, out, in], row by row.

    w = scale * v with v int8 for 8 bits, w = scale * factor * q for 4. `values`: int32 [..., out, depth * bits / 32],
    words of v or q (see `_words`). `factors`: int8 [..., out, depth / 32] for 4 bits. `scales`: float32
    [..., out]. `depth` is `in_features` rounded up to blocks of 128 with zeros. Every v and every factor * q is a whole
    number that bfloat16 holds exactly, so that a product with a row's integers needs the scale only at its end.
    """

    values: Tensor
    factors: Tensor | None
    scales: Tensor
    in_features: int

    @classmethod
    def of(cls, weight: PackedWeight) -> RowPackedWeight:
        """The same numbers, on the device of `weight`."""
        if weight.experts is not None:
            rows = [cls.of(weight[expert]) for expert in range(weight.experts)]
            factors = [row.factors for row in rows if row.factors is not None]
            return cls(
                torch.stack([row.values for row in rows]),
                torch.stack(factors) if factors else None,
                torch.stack([row.scales for row in rows]),
                weight.in_features,
            )
        scales = _rows(weight.scales, weight)
        if weight.factors is None:
            return cls(_words(_rows(weight.integers(), weight), 8), None, scales, weight.in_features)
        groups = _rows(weight.group_factors(), weight)
        groups = functional.pad(groups, (0, -groups.shape[1] % (BLOCK // GROUP)))
        return cls(_words(_rows(weight.quotients(), weight), 4), groups, scales, weight.in_features)

    @property
    def bits(self) -> int:
        """Bits of a value."""
        return 8 if self.factors is None else 4

    @property
    def quantization(self) -> str:
        """The name of this form."""
        return f"wint{self.bits}"

    @property
    def experts(self) -> int | None:
        """How many weights a stack holds; None for a single one."""
        return self.scales.shape[0] if self.scales.dim() == 2 else None

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the weight before it was packed."""
        return (*self.scales.shape, self.in_features)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(tensor.nbytes for tensor in (self.values, self.factors, self.scales) if tensor is not None)

    def __getitem__(self, expert: int) -> RowPackedWeight:
        """One weight of a stack."""
        factors = None if self.factors is None else self.factors[expert]
        return replace(self, values=self.values[expert], factors=factors, scales=self.scales[expert])

    def to(self, device: torch.device) -> RowPackedWeight:
        """The same on another device."""
        factors = None if self.factors is None else self.factors.to(device)
        return replace(self, values=self.values.to(device), factors=factors, scales=self.scales.to(device))

    def integers(self) -> Tensor:
        """v, or factor * q: [..., out, depth] int8."""
        whole = _whole(self.values, self.bits)
        return whole if self.factors is None else whole * self.factors.repeat_interleave(GROUP, dim=-1)

    def floats(self) -> Tensor:
        """The weights that the numbers stand for, float32 in `shape`."""
        return (self.integers().float() * self.scales[..., None])[..., : self.in_features]


@dataclass(frozen=True, eq=False)
class Fp8Weight:
    """A weight [out, in], or a stack [experts, out, in], in float8_e4m3fn with float32 scales.

    `scales` [..., ceil(out / 128), ceil(in / 128)] for one scale a block of 128 x 128, [..., 1, 1] for one a weight.
    """

    values: Tensor
    scales: Tensor

    @property
    def block_wise(self) -> bool:
        """Whether there is a scale a block; if not, there is one for the whole weight."""
        rows, depths = (-(-size // BLOCK) for size in self.values.shape[-2:])
        return tuple(self.scales.shape[-2:]) == (rows, depths)

    @property
    def quantization(self) -> str:
        """The name of this form; of a weight of one block, which has one scale in any case, "fp8"."""
        return "fp8" if tuple(self.scales.shape[-2:]) == (1, 1) else "block_wise_fp8"

    @property
    def experts(self) -> int | None:
        """How many weights a stack holds; None for a single one."""
        return self.values.shape[0] if self.values.dim() == 3 else None

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the weight before it was rounded."""
        return tuple(self.values.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of values and scales."""
        return self.values.nbytes + self.scales.nbytes

    def __getitem__(self, expert: int) -> Fp8Weight:
        """One weight of a stack."""
        return Fp8Weight(self.values[expert], self.scales[expert])

    def to(self, device: torch.device) -> Fp8Weight:
        """The same on another device."""
        return Fp8Weight(self.values.to(device), self.scales.to(device))

    def floats(self) -> Tensor:
        """The weights that the numbers stand for, float32 in `shape`."""
        return self.values.float() * _spread(self.scales, self.shape)


@dataclass(frozen=True, eq=False)
class Fp8Rows:
    """Activations [T, in] as products with an fp8 weight take them: `round_rows_to_fp8`, done once for all readers.

    `values` float8_e4m3fn [T, in], `scales` float32 [T, ceil(in / 128)]. `dtype` is the type of the rows before
    rounding, and of what is made from these; `plain` [T, in] are those rows, None where nobody reads them.
    """

    values: Tensor
    scales: Tensor
    dtype: torch.dtype
    plain: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        """[T, in]."""
        return self.values.shape

    @property
    def device(self) -> torch.device:
        """Where the rows lie."""
        return self.values.device


GpuWeight = Tensor | RowPackedWeight | Fp8Weight
"""What a GPU's linear layer multiplies with."""
Weight = GpuWeight | PackedWeight
"""What a linear layer multiplies with."""
Rows = Tensor | Fp8Rows
"""What a linear layer multiplies: activations [T, in]."""
RowForm = Literal["plain", "fp8", "both"]
"""How whoever makes rows should hand them on: a tensor, `Fp8Rows`, or `Fp8Rows` with the plain rows beside them."""


def row_form(*readers: Weight) -> RowForm:
    """The form of rows that are multiplied with these weights."""
    fp8 = {isinstance(reader, Fp8Weight) for reader in readers}
    if len(fp8) == 2:
        return "both"
    return "fp8" if True in fp8 else "plain"


def plain_rows(rows: Rows) -> Tensor:
    """The rows as they were before rounding. Raises `ValueError` if they were not kept."""
    if isinstance(rows, Tensor):
        return rows
    if rows.plain is None:
        raise ValueError("rows in fp8 alone cannot meet a weight that is not in fp8: ask for both forms")
    return rows.plain


def round_to_fp8(weight: Tensor, *, block_wise: bool) -> Fp8Weight:
    """Round `weight` [..., out, in]: the largest magnitude under a scale becomes 448.

    In runs of rows of about `ROUNDED_NUMBERS` numbers: beside the result that is all the memory it takes.
    """
    *stack, rows, depth = weight.shape
    blocks = (-(-rows // BLOCK), -(-depth // BLOCK)) if block_wise else (1, 1)
    values = torch.empty(weight.shape, dtype=FP8, device=weight.device)
    scales = torch.empty((*stack, *blocks), dtype=torch.float32, device=weight.device)
    matrices = weight.reshape(-1, rows, depth), values.view(-1, rows, depth), scales.view(-1, *blocks)
    for matrix, its_values, its_scales in zip(*matrices, strict=True):
        _round_matrix(matrix, its_values, its_scales)
    return Fp8Weight(values, scales)


def _round_matrix(matrix: Tensor, values: Tensor, scales: Tensor) -> None:
    """Fill `values` [out, in] and `scales`, a scale a block or one for all, from `matrix` [out, in]."""
    step = max(1, ROUNDED_NUMBERS // max(1, BLOCK * matrix.shape[1])) * BLOCK
    runs = torch.split(matrix, step)
    block_wise = scales.numel() > 1
    if not block_wise:
        scales.copy_(_scales(torch.stack([run.abs().max() for run in runs]).max()))
    for place, run in enumerate(runs):
        own = scales
        if block_wise:
            own = scales[place * step // BLOCK :][: -(-run.shape[0] // BLOCK)]
            own.copy_(_scales(_block_peaks(run)))
        wide = run.float() / _spread(own, tuple(run.shape))
        values[place * step :][: run.shape[0]].copy_(wide.clamp_(-FP8_MAX, FP8_MAX))


def _block_peaks(rows: Tensor) -> Tensor:
    """The largest magnitudes of the blocks of `rows` [out, in] -> [ceil(out / 128), ceil(in / 128)]."""
    padded = functional.pad(rows.abs(), (0, -rows.shape[1] % BLOCK, 0, -rows.shape[0] % BLOCK))
    return padded.view(-(-rows.shape[0] // BLOCK), BLOCK, -1, BLOCK).amax(dim=(1, 3))


def _scales(peaks: Tensor) -> Tensor:
    """The float32 scales that bring `peaks` to the largest number of fp8."""
    wide = peaks.float()
    return torch.where(wide > 0, wide / FP8_MAX, 1.0)


def round_rows_to_fp8(x: Tensor) -> Fp8Rows:
    """Round activations `x` [T, in], each token's groups of 128 by a scale of their own."""
    wide = functional.pad(x.float(), (0, -x.shape[1] % BLOCK)).view(x.shape[0], -(-x.shape[1] // BLOCK), BLOCK)
    peaks = wide.abs().amax(dim=2)
    scales = torch.where(peaks > 0, peaks / FP8_MAX, 1.0)
    values = (wide / scales[..., None]).clamp(-FP8_MAX, FP8_MAX).flatten(1)[:, : x.shape[1]]
    return Fp8Rows(values.to(FP8), scales, x.dtype, x)


def product(x: Tensor, weight: GpuWeight) -> Tensor:
    """`x` [T, in] times a weight [out, in] -> [T, out] float32, as a GPU's kernels do it.

    Beside an fp8 weight the activations are rounded to fp8, token by token in groups of 128; beside a packed one they
    stay what they are.
    """
    if isinstance(weight, Fp8Weight):
        rows = round_rows_to_fp8(x)
        spread = rows.scales.repeat_interleave(BLOCK, dim=1)[:, : x.shape[1]]
        return (rows.values.float() * spread) @ weight.floats().t()
    if isinstance(weight, RowPackedWeight):
        depth = weight.integers().shape[1]
        padded = functional.pad(x.float(), (0, depth - x.shape[1]))
        return padded @ weight.integers().float().t() * weight.scales
    return x.float() @ weight.float().t()


def _spread(scales: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A scale for every number of a weight of this shape, or the only one."""
    if scales.shape[-2:] == (1, 1):
        return scales
    spread = scales.repeat_interleave(BLOCK, dim=-2).repeat_interleave(BLOCK, dim=-1)
    return spread[..., : shape[-2], : shape[-1]]


def _rows(columns: Tensor, weight: PackedWeight) -> Tensor:
    """The columns of a weight without those that fill its parts up to panels."""
    parts = columns.view(weight.parts, -1, *columns.shape[1:])
    return parts[:, : weight.out_features // weight.parts].flatten(0, 1).contiguous()


def _words(whole: Tensor, bits: int) -> Tensor:
    """v, or q for 4 bits, int8 [rows, in], as words int32 [rows, depth * bits / 32].

    A block of 128 depths is 4 * `bits` words. With its depths as [16 / bits, bits / 2, 2, 4, 2], axes i, u, h, t and j,
    word (t, h, u) holds at its bits 16 * j + bits * i the number of depth (i, u, h, t, j), q as q + 8: these are the
    numbers that a thread needs of a row as operands of a tensor core, side by side, two under one mask.
    """
    rows, depth = whole.shape
    blocks = functional.pad(whole, (0, -depth % BLOCK)).view(rows, -(-depth // BLOCK), 16 // bits, bits // 2, 2, 4, 2)
    parts = blocks.permute(0, 1, 5, 4, 3, 6, 2)
    if bits == 4:
        nibbles = (parts + 8).to(torch.uint8)
        parts = nibbles[..., ::2] | (nibbles[..., 1::2] << 4)
    return parts.reshape(rows, blocks.shape[1] * BLOCK * bits // 8).view(torch.int32)


def _whole(words: Tensor, bits: int) -> Tensor:
    """The numbers of `_words`, of whose rows there may be stacks: int8 [..., rows, depth]."""
    parts = words.contiguous().view(torch.int8 if bits == 8 else torch.uint8)
    if bits == 4:
        parts = torch.stack((parts & 15, parts >> 4), dim=-1).to(torch.int8) - 8
    blocks = parts.reshape(-1, 4, 2, bits // 2, 2, 16 // bits).permute(0, 5, 3, 2, 1, 4)
    return blocks.reshape(*words.shape[:-1], words.shape[-1] * 32 // bits)
