"""How large the tiles of a product are: a table for shapes that were timed, a rule for all others, one check for both.

Knows sizes; launches nothing. What a token's sums depend on, `block_k` and `splits`, follows from the weight alone, so
that they add up alike in any batch. The rest may follow from the number of rows.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import torch

from tern.ops.gpu_weights import BLOCK
from tern.ops.packed import round_up

Kind = Literal["plain", "int8", "int4", "fp8"]

TABLE = Path(__file__).with_name("tiles_hopper.json")
BLOCKS_T = (16, 32, 64, 128)
"""Rows of a tile."""
PROCESSORS = 132
"""Streaming multiprocessors of an H100 or H200. A constant, for sums must not depend on the card."""
_MIN_CHUNK = 512  # depths: eight tiles of bfloat16, enough to fill the pipeline of loads
# KiB of shared memory that a program may have, by compute capability; of those, what changing layouts takes.
_SHARED_KIB: dict[object, int] = {(8, 0): 163, (8, 7): 163, 9: 227, 10: 227, 11: 227}
_LEAST_SHARED_KIB = 99  # on every other card
_LAYOUTS_KIB = 27
_SHARED_BYTES = 200 * 1024  # what remains on a Hopper GPU
_SHARED_BYTES_OF_TWO = 96 * 1024
_SUMS_PER_THREAD = 128  # float32 registers of 255
_SUMS_PER_THREAD_FLOAT32 = 64  # without tensor cores, whose operands lie in shared memory, those take the others


@dataclass(frozen=True)
class Shape:
    """A product: `columns` of the output, `depth` added up, twice as many weight rows if `gated`.

    A `routed` one belongs to experts. `x_bytes` are an activation's.
    """

    kind: Kind
    columns: int
    depth: int
    gated: bool
    routed: bool
    x_bytes: int

    @property
    def tile_bits(self) -> int:
        """Of a stored weight."""
        return {"plain": 8 * self.x_bytes, "int8": 8, "int4": 4, "fp8": 8}[self.kind]


@dataclass(frozen=True)
class Sums:
    """How a result is added up: `splits` chunks of K apart, then in order; `block_k` depths a tile."""

    block_k: int
    splits: int

    def chunk(self, depth: int) -> int:
        """Depths of a chunk, whole tiles; the last may have fewer."""
        return round_up(-(-depth // self.splits), self.block_k)


@dataclass(frozen=True)
class Tile:
    """`block_n` columns by `block_t` rows, computed by `warps` with `stages` tiles of loads in flight."""

    block_n: int
    block_t: int
    warps: int
    stages: int


def choose(shape: Shape, rows: int) -> tuple[Sums, Tile]:
    """The sums and the tile for `rows` rows; of an expert's rows, how many it has on average."""
    block_t = next((block for block in BLOCKS_T if block >= rows), BLOCKS_T[-1])
    known = _table().get(shape)
    if known is None:
        return usual_sums(shape), usual_tile(shape, usual_sums(shape), block_t, _room())
    sums, tiles = known
    return sums, tiles.get(block_t) or usual_tile(shape, sums, block_t, _room())


@cache
def usual_sums(shape: Shape) -> Sums:
    """For a shape that was not timed: enough chunks that two programs run on every processor.

    An expert's sums are one chunk: several experts fill the processors.
    """
    block_k = 128 if shape.kind != "plain" else 128 // shape.x_bytes
    if shape.routed:
        return Sums(block_k, 1)
    splits = max(1, min(2 * PROCESSORS // -(-shape.columns // 64), shape.depth // _MIN_CHUNK))
    chunk = Sums(block_k, splits).chunk(shape.depth)
    return Sums(block_k, max(1, -(-shape.depth // chunk)))  # no chunk without depths


@cache
def usual_tile(shape: Shape, sums: Sums, block_t: int, room: int = _SHARED_BYTES) -> Tile:
    """For a shape that was not timed: the widest tile that fits into `room` bytes, and as many stages.

    Of few rows two programs run on a processor, so that one reads while the other waits. Of many, plain weights of two
    bytes have tiles of 256 weight rows where a thread's registers hold the sums and there is room for stages enough:
    those ask the second cache for three quarters of what 128 by 128 do.

    64 columns are what the tensor cores' instructions of a Hopper GPU take at least; where they do not fit, no such
    GPU is there.
    """
    wide = shape.kind == "plain" and shape.x_bytes == 2 and block_t == BLOCKS_T[-1] and room >= _SHARED_BYTES
    widest = (64 if block_t < 64 else 256 if wide else 128) // (2 if shape.gated else 1)
    sizes = [(n, t) for t in reversed(BLOCKS_T) for n in (256, 128, 64) if n <= max(64, widest) and t <= block_t]
    sizes += [(32, BLOCKS_T[0])]
    of_two = min(_SHARED_BYTES_OF_TWO, room // 2)
    for shared_bytes in (of_two, room)[block_t >= 64 :]:
        for block_n, size_t in sizes:
            warps = 4 if block_n * size_t * (1 + shape.gated) <= 4096 else 8
            for stages in (6, 5, 4, 3, 2):
                tile = Tile(block_n, size_t, warps, stages)
                if problem(shape, sums, tile, shared_bytes) is None:
                    return tile
    raise AssertionError(f"no tile fits {shape} with {sums}")


def _room() -> int:
    """Bytes of shared memory that the tiles in flight of a program may take, on the GPU that is here."""
    capability = _capability()
    most = _SHARED_KIB.get(capability) or _SHARED_KIB.get(capability[0]) or _LEAST_SHARED_KIB
    return (most - _LAYOUTS_KIB) * 1024


def problem(shape: Shape, sums: Sums, tile: Tile, shared_bytes: int = _SHARED_BYTES) -> str | None:
    """Why these tiles cannot serve the shape, in a sentence, or None."""
    blocks = {"block_n": tile.block_n, "block_t": tile.block_t, "block_k": sums.block_k, "warps": tile.warps}
    for name, value in blocks.items():
        if value < 1 or value & (value - 1):
            return f"{name} is {value} and must be a power of two"
    if min(tile.block_n, tile.block_t) < 16:
        return f"a tile of {tile.block_n} columns by {tile.block_t} rows is below the 16 by 16 of a matrix instruction"
    if sums.block_k % 16 if shape.kind == "plain" else sums.block_k != BLOCK:
        return f"block_k is {sums.block_k} and must be {'a multiple of 16' if shape.kind == 'plain' else BLOCK}"
    if not 1 <= sums.splits <= max(1, -(-shape.depth // sums.block_k)):
        return f"splits is {sums.splits}: there are {shape.depth} depths in tiles of {sums.block_k}"
    if sums.splits > 1 and (shape.routed or (sums.splits - 1) * sums.chunk(shape.depth) >= shape.depth):
        return f"splits is {sums.splits}, which leaves a chunk empty or belongs to experts"
    if not 1 <= tile.warps <= 16 or not 1 <= tile.stages <= 8:
        return f"{tile.warps} warps and {tile.stages} stages are outside of 1 to 16 and 1 to 8"
    parts = 2 if shape.gated else 1
    held = tile.block_n * tile.block_t * (parts * (2 if sums.splits > 1 else 1) + (shape.kind == "fp8"))
    most = _SUMS_PER_THREAD_FLOAT32 if shape.x_bytes == 4 else _SUMS_PER_THREAD
    if held > most * 32 * tile.warps:
        return f"{held} sums of a tile pass the {most} of each of {32 * tile.warps} threads"
    if shape.kind == "fp8" and tile.block_n > BLOCK:
        return f"a tile of {tile.block_n} columns has more than one scale of fp8 for {BLOCK} depths"
    weights = parts * tile.block_n * sums.block_k
    # Integers become bfloat16 in registers, but float32 through shared memory.
    widened = weights * shape.x_bytes if shape.kind in ("int8", "int4") and shape.x_bytes == 4 else 0
    stage = weights * shape.tile_bits // 8 + tile.block_t * sums.block_k * shape.x_bytes
    if tile.stages * stage + widened > shared_bytes:
        return f"{tile.stages} stages of {stage} bytes and {widened} widened pass {shared_bytes} of shared memory"
    return None


Entry = tuple[Sums, dict[int, Tile]]


def read_table(path: Path) -> dict[Shape, Entry]:
    """The entries of a table. Raises `ValueError` for one that its shape does not allow."""
    table: dict[Shape, Entry] = {}
    for line in json.loads(path.read_text(encoding="utf-8"))["products"]:
        shape, sums = Shape(**line["shape"]), Sums(**line["sums"])
        tiles = {found.block_t: found for found in (Tile(**tile) for tile in line["tiles"])}
        for tile in tiles.values():
            if (wrong := problem(shape, sums, tile)) is not None:
                raise ValueError(f"{path.name}, {shape}: {wrong}; time it anew with benchmarks/tune_gpu.py")
        table[shape] = (sums, tiles)
    return table


def write_table(path: Path, origin: str, table: dict[Shape, Entry]) -> None:
    """Write entries, and in `origin` where they come from."""
    lines = [
        json.dumps({"shape": vars(shape), "sums": vars(sums), "tiles": [vars(tile) for tile in tiles.values()]})
        for shape, (sums, tiles) in table.items()
    ]
    text = f'{{"origin": {json.dumps(origin)}, "products": [\n' + ",\n".join(lines) + "\n]}\n"
    path.write_text(text, encoding="utf-8")


@cache
def _table() -> dict[Shape, Entry]:
    return read_table(TABLE) if torch.cuda.is_available() and _capability()[0] == 9 else {}


def _capability() -> tuple[int, int]:
    """The GPU's compute capability; without one a Hopper's, for which kernels are interpreted and compiled then."""
    if not torch.cuda.is_available():
        return 9, 0
    major, minor = torch.cuda.get_device_capability()
    return major, minor
