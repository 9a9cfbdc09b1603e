"""The product of rows with a weight of any kind: one kernel behind linear layers, SwiGLUs and experts.

Knows kinds of weights, sums and tiles; knows neither layers nor which expert a token chose. A tile has the weight's
rows as its first side and tokens as its second, so that the tensor cores' instruction is the same for 16 tokens and for
128, a token's sums round alike among however many, and weights of few bits become floats in registers.

K is added up in chunks, each from zero, and the chunks are added in order. With few rows a program computes one chunk
and the last of a tile's programs adds them; with many it computes them all. The sums are the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tern.ops.cuda.arrival import MOST, counters, is_last
from tern.ops.cuda.fp8 import round_rows_to_fp8
from tern.ops.cuda.integers import integers, nibbles
from tern.ops.cuda.launch import EARLY, INTERPRETED, announce, ask_for, dot, narrow, tl, triton, wait
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
    _product[(other_tiles + tiles_n * tiles_t, sums.splits if apart else 1)](
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


# With few rows it is bound by reading the weight once: 64 weight rows of 128 bytes a tile, 64 for 4 bits, several
# stages of which two programs a processor keep in flight. With many rows it is bound by the tensor cores and the second
# cache: tiles of 128 by 128, or 256 by 128 of plain weights in one chunk, half of them gates where it is gated, and
# tiles of rows in groups, so that a weight's tile is read from memory once a group.
# What follows from the number of rows is not compiled in: else there would be a kernel for each kind of number.
@triton.jit(do_not_specialize=["rows", "tiles_t", "other_rows", "other_tiles_t"])
def _product(
    out,
    x,
    x_scales,
    values,
    factors,
    scales,
    bias,
    order,
    starts,
    parts,
    arrived,
    other_out,
    other_x,
    other_x_scales,
    other_values,
    other_factors,
    other_scales,
    rows,
    columns,
    depth,
    x_pitch,
    pitch,
    chunk,
    tiles_n,
    tiles_t,
    scales_expert,
    scales_row,
    scales_depth,
    other_rows,
    other_columns,
    other_depth,
    other_x_pitch,
    other_pitch,
    other_tiles_n,
    other_tiles_t,
    other_scales_row,
    other_scales_depth,
    PAIRS: tl.constexpr,
    EXPERTS: tl.constexpr,
    EXPERTS_PADDED: tl.constexpr,
    BESIDE: tl.constexpr,
    CHUNKS: tl.constexpr,
    APART: tl.constexpr,
    EVEN_K: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_T: tl.constexpr,
    KIND: tl.constexpr,
    GATED: tl.constexpr,
    UP_APART: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """A tile of `out` [rows, columns]. With `APART` a program adds up one chunk only, and leaves it in `parts` [CHUNKS,
    rows, weight rows] float32; the last of a tile's programs to arrive finishes the tile.
    """
    announce()
    program = tl.program_id(0)
    others = other_tiles_n * other_tiles_t if BESIDE else 0
    routed = program >= others  # the other product comes first: its weight is deeper, its programs take the longest
    if BESIDE:
        if routed:
            program -= others
        else:
            out, x, x_scales = other_out, other_x, other_x_scales
            values, factors, scales = other_values, other_factors, other_scales
        rows, columns = tl.where(routed, rows, other_rows), tl.where(routed, columns, other_columns)
        depth, pitch = tl.where(routed, depth, other_depth), tl.where(routed, pitch, other_pitch)
        x_pitch = tl.where(routed, x_pitch, other_x_pitch)
        chunk = tl.where(routed, chunk, depth)
        tiles_n, tiles_t = tl.where(routed, tiles_n, other_tiles_n), tl.where(routed, tiles_t, other_tiles_t)
        scales_row = tl.where(routed, scales_row, other_scales_row)
        scales_depth = tl.where(routed, scales_depth, other_scales_depth)
    tile_n, tile_t = _place(program, tiles_n, tiles_t, GROUP_T)
    column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    kept = tl.minimum(column, columns - 1)
    begin = tl.program_id(1) * chunk
    if BLOCK_T == 16 and (BESIDE or not EXPERTS):  # noqa: SIM102 - the compiler decides; of few rows with a known weight
        if not routed or not EXPERTS:
            _ask_for_weights(values, kept, pitch, begin, tl.minimum(begin + chunk, depth), KIND)
            if GATED:
                _ask_for_weights(values, kept + columns, pitch, begin, tl.minimum(begin + chunk, depth), KIND)
    wait()
    expert, first, end = tile_t * 0, tile_t * BLOCK_T, rows
    if EXPERTS:
        if routed:
            expert, first, end = _rows_of_expert(starts, tile_t, EXPERTS, EXPERTS_PADDED, BLOCK_T)
        if expert >= EXPERTS:
            return
    places = first + tl.arange(0, BLOCK_T)
    inside = places < end
    places = tl.minimum(places, end - 1)  # rows past the end are computed again and not stored
    read, written = places, places
    if EXPERTS:
        pairs = tl.load(order + places, mask=places < tl.where(routed, end, 0), other=0)
        if GATED:
            read = tl.where(routed, pairs // PAIRS, places)
        else:
            written = tl.where(routed, pairs, places)
    scales_read = read
    if not (EXPERTS and GATED):  # rows follow each other, and so do their scales, past the end too
        x_scales += first
        scales_read = tl.arange(0, BLOCK_T)
    halves: tl.constexpr = 2 if GATED else 1
    row = kept.to(tl.int64) + expert * columns * halves
    # A tile's rows share a scale for each 128 depths; those of `up` do where gate ends with a block of 128.
    scale_at = expert * scales_expert + tile_n * BLOCK_N // 128 * scales_row
    if UP_APART:
        up_scale_at = expert * scales_expert + ((kept + columns) // 128)[:, None] * scales_row
    else:
        up_scale_at = scale_at + columns // 128 * scales_row
    if not APART:
        scale, shift, up_scale, up_shift = _line(scales, bias, row[:, None], columns, KIND, GATED, HAS_BIAS)
    gate, up = _chunk(
        *(x, x_scales, read, scales_read, x_pitch, values, factors, scales, row, row + columns),
        *(scale_at, up_scale_at, scales_depth),
        *(begin, tl.minimum(begin + chunk, depth), depth, pitch),
        *(EVEN_K, DTYPE, BLOCK_N, BLOCK_T, BLOCK_K, KIND, GATED, INTERPRETED),
    )
    for index in range(1, 1 if APART else CHUNKS):
        begin = index * chunk
        more, more_up = _chunk(
            *(x, x_scales, read, scales_read, x_pitch, values, factors, scales, row, row + columns),
            *(scale_at, up_scale_at, scales_depth),
            *(begin, tl.minimum(begin + chunk, depth), depth, pitch),
            *(EVEN_K, DTYPE, BLOCK_N, BLOCK_T, BLOCK_K, KIND, GATED, INTERPRETED),
        )
        gate += more
        if GATED:
            up += more_up
    stored = inside[None, :] & (column < columns)[:, None]
    place = written.to(tl.int64)[None, :] * columns + column[:, None]
    if APART:
        width = columns * halves
        sums = parts + written[None, :] * width + column[:, None]
        own = sums + tl.program_id(1) * (rows * width)
        tl.store(own, gate, mask=stored)
        if GATED:
            tl.store(own + columns, up, mask=stored)
        if is_last(arrived + tl.program_id(0), CHUNKS):
            scale, shift, up_scale, up_shift = _line(scales, bias, row[:, None], columns, KIND, GATED, HAS_BIAS)
            whole = _added(sums, rows * width, stored, CHUNKS)
            whole_up = whole
            if GATED:
                whole_up = _added(sums + columns, rows * width, stored, CHUNKS)
            line = scale, shift, up_scale, up_shift
            result = _finish(whole, whole_up, *line, DTYPE, KIND, GATED, HAS_BIAS, INTERPRETED)
            tl.store(out + place, result, mask=stored)
    else:
        result = _finish(gate, up, scale, shift, up_scale, up_shift, DTYPE, KIND, GATED, HAS_BIAS, INTERPRETED)
        tl.store(out + place, result, mask=stored)


@triton.jit
def _ask_for_weights(values, row, pitch, begin, end, KIND: tl.constexpr):
    """Have the first KiB of each of a weight's `row`s from depth `begin` on brought to the second cache.

    That is done while the kernel before ends. A KiB: with the 64 KiB of a tile, those of all programs that fit on the
    card at once take half of that cache.
    """
    depths: tl.constexpr = 8 if KIND == "int4" else 4 if KIND == "int8" else 1  # of a stored number
    line: tl.constexpr = 1024 // values.dtype.element_ty.primitive_bitwidth
    at = tl.minimum(begin // depths + tl.arange(0, 8) * line, (end - 1) // depths)
    ask_for(values + row.to(tl.int64)[:, None] * pitch + at[None, :])


@triton.jit
def _added(first, pitch, stored, CHUNKS: tl.constexpr):
    """A tile's sums of all chunks, `pitch` apart from `first` on, in their order; past the processor's own cache."""
    total = tl.load(first, mask=stored, other=0.0, cache_modifier=".cg")
    for index in tl.static_range(1, CHUNKS):
        total += tl.load(first + index * pitch, mask=stored, other=0.0, cache_modifier=".cg")
    return total


@triton.jit
def _place(program, tiles_n, tiles_t, GROUP_T: tl.constexpr):
    """The tile of a program: `GROUP_T` tiles of rows go through all columns together."""
    group = program // (GROUP_T * tiles_n)
    within = program % (GROUP_T * tiles_n)
    size = tl.minimum(tiles_t - group * GROUP_T, GROUP_T)
    return within // size, group * GROUP_T + within % size


@triton.jit
def _rows_of_expert(starts, tile, EXPERTS: tl.constexpr, EXPERTS_PADDED: tl.constexpr, BLOCK_T: tl.constexpr):
    """The expert whose rows tile number `tile` has, its first row there and its end; `EXPERTS` or more past the last.

    Each program finds this by itself: it costs a load of `starts` and a scan, where a table would cost a launch.
    """
    expert = tl.arange(0, EXPERTS_PADDED)
    known = expert < EXPERTS
    begin = tl.load(starts + expert, mask=known, other=0)
    end = tl.load(starts + expert + 1, mask=known, other=0)
    tiles = (end - begin + BLOCK_T - 1) // BLOCK_T
    found = tl.sum((tl.cumsum(tiles, axis=0) <= tile).to(tl.int32), axis=0)
    before = tl.sum(tl.where(expert < found, tiles, 0), axis=0)
    first = tl.sum(tl.where(expert == found, begin, 0), axis=0) + (tile - before) * BLOCK_T
    return found, first, tl.sum(tl.where(expert == found, end, 0), axis=0)


@triton.jit
def _chunk(
    x,
    x_scales,
    x_row,
    x_scales_row,
    x_pitch,
    values,
    factors,
    scales,
    row,
    up_row,
    scale_at,
    up_scale_at,
    scales_depth,
    begin,
    end,
    depth,
    pitch,
    EVEN_K: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    KIND: tl.constexpr,
    GATED: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """The sums [BLOCK_N, BLOCK_T] over `begin` <= k < `end` for the weight's `row`s, and for `up_row`s if `GATED`."""
    tl.assume(begin < end)  # sums that a loop without rounds would leave at zero make each product wait for the last
    gate = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
    up = gate
    x_at = x + x_row.to(tl.int64)[None, :] * depth
    x_scale_at = x_scales + x_scales_row
    # Scales are loaded a tile ahead: unlike operands of `dot`, the compiler does not do that. Those of many rows would
    # take too many registers, and arrive while their tile is multiplied.
    AHEAD: tl.constexpr = BLOCK_T < 64
    if KIND == "fp8":
        if AHEAD:
            x_scale = tl.load(x_scale_at + begin // 128 * x_pitch)
        scale = tl.load(scales + scale_at + (begin // 128) * scales_depth)
        up_scale = tl.load(scales + up_scale_at + (begin // 128) * scales_depth)
    for k in range(begin, end, BLOCK_K):
        depths = k + tl.arange(0, BLOCK_K)
        if EVEN_K:
            tokens = tl.load(x_at + depths[:, None])
        else:
            tokens = tl.load(x_at + depths[:, None], mask=(depths < depth)[:, None], other=0.0)
        weights = _weights(values, factors, row, pitch, k, EVEN_K, DTYPE, BLOCK_N, BLOCK_K, KIND, INTERPRETED)
        if KIND == "fp8":
            ahead = tl.minimum(k + BLOCK_K, end - 1) // 128
            if AHEAD:
                next_x_scale = tl.load(x_scale_at + ahead * x_pitch)
            else:
                x_scale = tl.load(x_scale_at + k // 128 * x_pitch)
            next_scale = tl.load(scales + scale_at + ahead * scales_depth)
            sums = dot(weights, tokens, tl.zeros((BLOCK_N, BLOCK_T), tl.float32), INTERPRETED)
            gate += sums * (scale * x_scale)[None, :]
            scale = next_scale
        else:
            gate = dot(weights, tokens, gate, INTERPRETED)
        if GATED:
            weights = _weights(values, factors, up_row, pitch, k, EVEN_K, DTYPE, BLOCK_N, BLOCK_K, KIND, INTERPRETED)
            if KIND == "fp8":
                next_up_scale = tl.load(scales + up_scale_at + ahead * scales_depth)
                sums = dot(weights, tokens, tl.zeros((BLOCK_N, BLOCK_T), tl.float32), INTERPRETED)
                up += sums * (up_scale * x_scale[None, :])
                up_scale = next_up_scale
            else:
                up = dot(weights, tokens, up, INTERPRETED)
        if KIND == "fp8" and AHEAD:
            x_scale = next_x_scale
    return gate, up


@triton.jit
def _weights(
    values,
    factors,
    row,
    pitch,
    k,
    EVEN_K: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    KIND: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """A tile [BLOCK_N, BLOCK_K] of a weight from depth `k` on: as it is, or the integers as floats. Zero past its end.

    Whole numbers lie in blocks of 128 depths, of which there are as many as tiles begin: they need no mask.
    """
    if KIND == "int4":
        tl.static_assert(BLOCK_K == 128)
        words = _tile(values, row, pitch, k // 128 * 16, 16, True)
        factor = tl.load(factors + row * (pitch // 16) + k // 128)
        tile = nibbles(words, factor, DTYPE, BLOCK_N, INTERPRETED)
    elif KIND == "int8":
        tl.static_assert(BLOCK_K == 128)
        tile = integers(_tile(values, row, pitch, k // 128 * 32, 32, True), DTYPE, BLOCK_N, INTERPRETED)
    else:
        tile = _tile(values, row, pitch, k, BLOCK_K, EVEN_K)
    return tile


@triton.jit
def _tile(values, row, pitch, first, WIDTH: tl.constexpr, EVEN_K: tl.constexpr):
    """`WIDTH` values of each `row` of `pitch` values, from `first` on."""
    place = first + tl.arange(0, WIDTH)
    at = values + row[:, None] * pitch + place[None, :]
    return tl.load(at) if EVEN_K else tl.load(at, mask=(place < pitch)[None, :], other=0.0)


@triton.jit
def _line(scales, bias, row, columns, KIND: tl.constexpr, GATED: tl.constexpr, HAS_BIAS: tl.constexpr):
    """Scale and bias of a weight's `row`s, and of those `columns` further if `GATED`; neutral ones where none are."""
    scale, shift, up_scale, up_shift = 1.0, 0.0, 1.0, 0.0
    if KIND == "int8" or KIND == "int4":
        scale = tl.load(scales + row)
        if GATED:
            up_scale = tl.load(scales + row + columns)
    if HAS_BIAS:
        shift = tl.load(bias + row).to(tl.float32)
        if GATED:
            up_shift = tl.load(bias + row + columns).to(tl.float32)
    return scale, shift, up_scale, up_shift


@triton.jit
def _finish(
    gate,
    up,
    scale,
    shift,
    up_scale,
    up_shift,
    DTYPE: tl.constexpr,
    KIND: tl.constexpr,
    GATED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """The results of sums: scaled, with the bias, and gated; see `_line`."""
    gate = _scaled(gate, scale, shift, KIND, HAS_BIAS)
    if GATED:
        up = _scaled(up, up_scale, up_shift, KIND, HAS_BIAS)
        if KIND == "plain":
            gate = narrow(gate, DTYPE, INTERPRETED).to(tl.float32)
            up = narrow(up, DTYPE, INTERPRETED).to(tl.float32)
        gate = gate / (1.0 + tl.exp(-gate))
        if KIND == "plain":
            gate = narrow(gate, DTYPE, INTERPRETED).to(tl.float32)
        gate *= up
    return narrow(gate, DTYPE, INTERPRETED)


@triton.jit
def _scaled(sums, scale, shift, KIND: tl.constexpr, HAS_BIAS: tl.constexpr):
    """Sums with the scale of their row of a packed weight, and with the bias."""
    if KIND == "int8" or KIND == "int4":
        sums *= scale
    if HAS_BIAS:
        sums += shift
    return sums
