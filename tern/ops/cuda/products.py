"""The product of rows with a weight of any kind: one launch behind linear layers, SwiGLUs and experts.

Knows kinds of weights, sums and tiles; knows neither layers nor which expert a token chose, nor how a tile is computed:
that is `product_kernel`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tern.ops.cuda.arrival import MOST, counters
from tern.ops.cuda.fp8 import round_rows_to_fp8
from tern.ops.cuda.launch import EARLY, INTERPRETED, tl, triton
from tern.ops.cuda.product_kernel import product_tile
from tern.ops.cuda.tiles import PROCESSORS, Kind, Shape, Sums, Tile, choose
from tern.ops.gpu_weights import BLOCK, Fp8Rows, Fp8Weight, GpuWeight, RowPackedWeight, Rows, plain_rows

_GROUP_T = 8  # tiles of rows that share a weight's tile while it is in the cache


@dataclass(frozen=True)
class Routing:
    """Which rows belong to which expert.

    `order` [T * K] int32: the pairs t * K + k sorted by expert; `starts` [E + 1] int32: where an expert's begin.
    """

    order: Tensor
    starts: Tensor
    experts_per_token: int

    @property
    def experts(self) -> int:
        """E."""
        return self.starts.shape[0] - 1


@dataclass(frozen=True)
class Beside:
    """A product that the launch of a product of experts computes too: `x` [T, in] by `weight` [out, in] -> `out`.

    Of the kind, type and gating of the experts' product, and without a bias. `out` [T, out], or [T, out / 2] if gated.
    """

    x: Rows
    weight: GpuWeight
    out: Tensor


def kind_of(weight: GpuWeight) -> Kind:
    """What the kernel calls this kind of weight."""
    if isinstance(weight, Fp8Weight):
        return "fp8"
    if isinstance(weight, RowPackedWeight):
        return "int8" if weight.bits == 8 else "int4"
    return "plain"


def multiply(
    x: Rows,
    weight: GpuWeight,
    bias: Tensor | None = None,
    *,
    gated: bool = False,
    routing: Routing | None = None,
    tiling: tuple[Sums, Tile] | None = None,
    beside: Beside | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """`x` [T, in] times `weight` [out, in] -> [T, out]; silu(gate) * up of its halves [T, out / 2] if `gated`.

    With `routing` the weight is a stack [E, out, in], and there is a row of result for each pair of a token and an
    expert: a gated product takes tokens [T, in] and leaves its rows sorted by expert, the other takes those and leaves
    them in the order of pairs. A gated product with plain weights rounds gate, up and silu(gate) to the type of `x`,
    as the reference does; others round once.

    `tiling` takes the place of what `choose` finds. The product `beside` is added up as the experts' are, in one chunk,
    so that its sums do not depend on the number of its rows. The results go to `out`, if given, and are what the type
    of `x` holds in whatever type it has.

    Raises `ValueError` if rows and weight differ in depth, or plain ones in type.
    """
    weight_rows, depth = weight.shape[-2:]
    if x.shape[1] != depth:
        raise ValueError(f"rows of {x.shape[1]} numbers cannot meet a weight of {depth}: they must be as long")
    if isinstance(weight, Tensor) and weight.dtype != x.dtype:
        raise ValueError(f"rows of {x.dtype} cannot meet a weight of {weight.dtype}: they must be of one type")
    columns = weight_rows // 2 if gated else weight_rows
    rows = x.shape[0] if routing is None else routing.order.shape[0]
    if out is None:
        out = torch.empty(rows, columns, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    kind = kind_of(weight)
    values, x_scales = _operand(x, kind)
    shape = Shape(kind, columns, depth, gated, routing is not None, values.element_size())
    sums, tile = tiling or choose(shape, rows if routing is None else -(-rows // routing.experts))
    tiles_n, tiles_t = -(-columns // tile.block_n), _tiles_of_rows(rows, routing, tile)
    apart = sums.splits > 1 and tiles_n * tiles_t < PROCESSORS
    assert not apart or tiles_n * tiles_t <= MOST, "a tile whose chunks are apart has a counter"
    even = depth % sums.block_k == 0 and (beside is None or beside.weight.shape[-1] % sums.block_k == 0)
    stored = _stored(weight)
    scales, *strides = _scales(weight)
    parts, arrived = out, out
    if apart:
        parts = torch.empty(sums.splits, rows, weight_rows, dtype=torch.float32, device=x.device)
        arrived = counters(x.device)
    order, starts = (values, values) if routing is None else (routing.order, routing.starts)
    added = scales if bias is None else bias
    read = out, values, x_scales, *stored, scales
    numbers = rows, columns, depth, x_scales.stride(1), stored[0].shape[-1]
    others, other_numbers, other_tiles = _beside(beside, read, kind, tile, gated=gated)
    product_tile[(other_tiles + tiles_n * tiles_t, sums.splits if apart else 1)](
        *(*read, added, order, starts, parts, arrived, *others),
        *(*numbers, sums.chunk(depth), tiles_n, tiles_t, *strides, *other_numbers),
        **_constants(routing, tile),
        BESIDE=beside is not None,
        CHUNKS=sums.splits,
        APART=apart,
        EVEN_K=even,
        UP_APART=gated and any(size % BLOCK for size in (columns, other_numbers[1])),
        DTYPE=_TYPES[x.dtype],
        BLOCK_K=sums.block_k,
        KIND=kind,
        GATED=gated,
        HAS_BIAS=bias is not None,
        INTERPRETED=INTERPRETED,
        **EARLY,
    )
    return out


def _beside(
    beside: Beside | None, read: tuple[Tensor, ...], kind: Kind, tile: Tile, *, gated: bool
) -> tuple[tuple[Tensor, ...], tuple[int, ...], int]:
    """The kernel's tensors and numbers of the other product, and its tiles; without one `read` in their place."""
    if beside is None:
        return read, (0,) * 9, 0
    weight_rows, depth = beside.weight.shape
    x = beside.x
    if x.shape[1] != depth or kind_of(beside.weight) != kind:
        raise ValueError(f"rows {list(x.shape)} cannot meet {list(beside.weight.shape)} beside experts of {kind}")
    values, x_scales = _operand(x, kind)
    columns = weight_rows // 2 if gated else weight_rows
    stored = _stored(beside.weight)
    scales, _, scales_row, scales_depth = _scales(beside.weight)
    tiles_n, tiles_t = -(-columns // tile.block_n), -(-x.shape[0] // tile.block_t)
    sizes = (x.shape[0], columns, depth, x_scales.stride(1), stored[0].shape[-1])
    numbers = (*sizes, tiles_n, tiles_t, scales_row, scales_depth)
    return (beside.out, values, x_scales, *stored, scales), numbers, tiles_n * tiles_t


def _operand(x: Rows, kind: Kind) -> tuple[Tensor, Tensor]:
    """Rows as the kernel reads them beside this kind of weight, and their scales; in place of none, the rows."""
    if kind == "fp8":
        rounded = x if isinstance(x, Fp8Rows) else round_rows_to_fp8(x)
        assert rounded.scales.stride(0) == 1, "scales of neighbouring rows lie side by side: see `empty_fp8_rows`"
        return rounded.values, rounded.scales
    plain = plain_rows(x).contiguous()
    return plain, plain


def _constants(routing: Routing | None, tile: Tile) -> dict[str, int]:
    """What the kernel is compiled for of experts and tiles."""
    sizes = {"BLOCK_N": tile.block_n, "BLOCK_T": tile.block_t, "GROUP_T": _GROUP_T}
    sizes |= {"num_warps": tile.warps, "num_stages": tile.stages}
    if routing is None:
        return sizes | {"PAIRS": 0, "EXPERTS": 0, "EXPERTS_PADDED": 1}
    padded = triton.next_power_of_2(routing.experts)
    return sizes | {"PAIRS": routing.experts_per_token, "EXPERTS": routing.experts, "EXPERTS_PADDED": padded}


_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def _tiles_of_rows(rows: int, routing: Routing | None, tile: Tile) -> int:
    """How many tiles of rows there are, or with experts, may be: each that has rows may leave one tile part empty."""
    chosen = 1 if routing is None else min(rows, routing.experts)
    if routing is None:
        return -(-rows // tile.block_t)
    return (rows + chosen * (tile.block_t - 1)) // tile.block_t


def _stored(weight: GpuWeight) -> tuple[Tensor, Tensor]:
    """Values, and factors four to a word; in their place something else where there are none."""
    values = (weight if isinstance(weight, Tensor) else weight.values).contiguous()
    if not isinstance(weight, RowPackedWeight) or weight.factors is None:
        return values, values
    return values, weight.factors.contiguous().view(torch.int32)


def _scales(weight: GpuWeight) -> tuple[Tensor, int, int, int]:
    """The scales, and how far those of the next expert, of the next 128 columns and of the next 128 depths are."""
    if isinstance(weight, Tensor):
        return weight, 0, 0, 0
    scales = weight.scales.contiguous()
    if isinstance(weight, RowPackedWeight):
        return scales, 0, 0, 0
    rows, depths = scales.shape[-2:]
    return scales, rows * depths, depths if weight.block_wise else 0, 1 if weight.block_wise else 0
