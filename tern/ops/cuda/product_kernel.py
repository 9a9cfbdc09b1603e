"""The kernel of products: a tile of rows times a weight of any kind. Knows numbers in memory; knows no tensors.

A tile has the weight's rows as its first side and tokens as its second, so that the tensor cores' instruction is the
same for 16 tokens and for 128, a token's sums round alike among however many, and weights of few bits become floats in
registers.

K is added up in chunks, each from zero, and the chunks are added in order. With few rows a program computes one chunk
and the last of a tile's programs adds them; with many it computes them all. The sums are the same.
"""

from __future__ import annotations

from tern.ops.cuda.arrival import is_last
from tern.ops.cuda.integers import integers, nibbles
from tern.ops.cuda.launch import announce, ask_for, dot, narrow, tl, triton, wait


# With few rows it is bound by reading the weight once: 64 weight rows of 128 bytes a tile, 64 for 4 bits, several
# stages of which two programs a processor keep in flight. With many rows it is bound by the tensor cores and the second
# cache: tiles of 128 by 128, or 256 by 128 of plain weights in one chunk, half of them gates where it is gated, and
# tiles of rows in groups, so that a weight's tile is read from memory once a group.
# What follows from the number of rows is not compiled in: else there would be a kernel for each kind of number.
@triton.jit(do_not_specialize=["rows", "tiles_t", "other_rows", "other_tiles_t"])
def product_tile(
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
