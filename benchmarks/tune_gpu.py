"""Time tiles of the GPU's products on the shapes of ERNIE-4.5-21B-A3B, and write the table that Tern reads.

    python -m benchmarks.tune_gpu [--rule] [--kinds int4 fp8]

Each candidate is checked as it will be before it is launched, timed with the cache cleared in between, and the fastest
of a block of rows is kept. How K is split is kept from the rule: it decides how sums round, not how fast a tile is.
`--rule` writes the rule's own tiles, which needs no GPU.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from itertools import product

import torch

from tern.ops.cuda import products, tiles
from tern.ops.cuda.experts import sort_by_expert
from tern.ops.cuda.launch import triton
from tern.ops.cuda.tiles import BLOCKS_T, Entry, Kind, Shape, Tile
from tern.ops.gpu_weights import Fp8Weight, GpuWeight, RowPackedWeight

EXPERTS, PER_TOKEN = 64, 6
KINDS: tuple[Kind, ...] = ("plain", "int8", "int4", "fp8")
# (columns, depth, gated, routed): an expert's products; queries, keys and values; attention's output; the shared
# expert's; layer 0's; what joins a token and its predecessor for the predictor of more tokens; the head.
PRODUCTS = [
    (1536, 2560, True, True),
    (2560, 1536, False, True),
    (3584, 2560, False, False),
    (2560, 2560, False, False),
    (3072, 2560, True, False),
    (2560, 3072, False, False),
    (12288, 2560, True, False),
    (2560, 12288, False, False),
    (2560, 5120, False, False),
    (103424, 2560, False, False),
]


def shapes(kinds: list[Kind]) -> Iterator[Shape]:
    """The products of the model."""
    for kind, (columns, depth, gated, routed) in product(kinds, PRODUCTS):
        yield Shape(kind, columns, depth, gated, routed, 1 if kind == "fp8" else 2)


def candidates(shape: Shape, block_t: int) -> Iterator[Tile]:
    """Tiles that the shape allows."""
    sums = tiles.usual_sums(shape)
    for block_n, warps, stages in product((64, 128, 256), (4, 8), (2, 3, 4, 5, 6)):
        tile = Tile(block_n, block_t, warps, stages)
        if tiles.problem(shape, sums, tile) is None:
            yield tile


def random_weight(shape: Shape) -> GpuWeight:
    """A weight, or a stack, of random bytes."""
    rows = shape.columns * (2 if shape.gated else 1)
    stack = (EXPERTS,) if shape.routed else ()
    device = torch.device("cuda")
    if shape.kind == "plain":
        return torch.randn(*stack, rows, shape.depth, device=device, dtype=torch.bfloat16)
    if shape.kind == "fp8":
        values = torch.randn(*stack, rows, shape.depth, device=device, dtype=torch.bfloat16).to(torch.float8_e4m3fn)
        return Fp8Weight(values, torch.rand(*stack, -(-rows // 128), shape.depth // 128, device=device))
    scales = torch.rand(*stack, rows, device=device)
    if shape.kind == "int8":
        values = torch.randint(-127, 128, (*stack, rows, shape.depth), device=device, dtype=torch.int8)
        return RowPackedWeight(values.view(torch.int32), None, scales, shape.depth)
    values = torch.randint(-128, 128, (*stack, rows, shape.depth // 2), device=device, dtype=torch.int8)
    factors = torch.randint(1, 9, (*stack, rows, shape.depth // 32), device=device, dtype=torch.int8)
    return RowPackedWeight(values.view(torch.int32), factors, scales, shape.depth)


def time_tile(shape: Shape, weight: GpuWeight, tile: Tile) -> float:
    """Milliseconds of a step that takes this tile: of 16 tokens, of more, or of a prompt."""
    tokens = {16: 16, 32: 32, 64: 64, 128: 2048}[tile.block_t]
    if shape.routed and tile.block_t > 16:  # as many rows for each expert
        tokens = tile.block_t * EXPERTS // PER_TOKEN
    routing = None
    if shape.routed:
        chosen = torch.rand(tokens, EXPERTS, device="cuda").topk(PER_TOKEN).indices
        routing = sort_by_expert(chosen, EXPERTS)
    rows = tokens if not shape.routed or shape.gated else tokens * PER_TOKEN
    x = torch.randn(rows, shape.depth, device="cuda", dtype=torch.bfloat16)
    tiling = (tiles.usual_sums(shape), tile)

    def compute() -> torch.Tensor:
        return products.multiply(x, weight, gated=shape.gated, routing=routing, tiling=tiling)

    return float(triton.testing.do_bench(compute, quantiles=[0.5]))


def tune(shape: Shape) -> Entry:
    """The fastest tile for each block of rows."""
    weight = random_weight(shape)
    best: dict[int, Tile] = {}
    for block_t in BLOCKS_T:
        times = {tile: time_tile(shape, weight, tile) for tile in candidates(shape, block_t)}
        if times:
            best[block_t] = min(times, key=times.__getitem__)
            print(f"{shape}: {best[block_t]}, {times[best[block_t]] * 1000:.1f} us", flush=True)
    return tiles.usual_sums(shape), best


def by_rule(shape: Shape) -> Entry:
    """The rule's tiles."""
    sums = tiles.usual_sums(shape)
    found = [tiles.usual_tile(shape, sums, block_t) for block_t in BLOCKS_T]
    return sums, {tile.block_t: tile for tile in found}


def main() -> int:
    """Write the table; 1 where there is no GPU to time on."""
    parser = argparse.ArgumentParser(description="Time tiles of a GPU's products and write Tern's table of them.")
    parser.add_argument("--rule", action="store_true", help="write the rule's tiles without timing any")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    options = parser.parse_args()
    if not options.rule and not torch.cuda.is_available():
        print("torch finds no NVIDIA GPU here: run this where there is one, or with --rule", file=sys.stderr)
        return 1
    table = {shape: by_rule(shape) if options.rule else tune(shape) for shape in shapes(options.kinds)}
    origin = "the rule of tern/ops/cuda/tiles.py, not timed" if options.rule else torch.cuda.get_device_name()
    tiles.write_table(tiles.TABLE, origin, table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
