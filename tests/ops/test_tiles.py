"""Emulated tile registers do what Intel's manual says, and products in tiles match the reference bit for bit."""

from __future__ import annotations

import struct

import pytest
import torch
from torch import Tensor

from tern.ops import cpu, reference_packed
from tern.ops.cpu import _kernels
from tern.ops.reference_packed import pack
from tern.ops.swiglu import SwiGLUWeights

TILED = [found.name for found in cpu.instruction_sets() if found.available and found.name.startswith("amx")]
EMULATED = [name for name in TILED if name == "amx-emulated"]
FEW_ROWS, TILE_ROWS, TILE_DEPTH = 8, 16, 64
"""Up to `FEW_ROWS` rows no tile is used; a tile has at most 16 rows of activations, and 64 depths."""


def config(*shapes: tuple[int, int], palette: int = 1, **at: int) -> bytes:
    """64 bytes for LDTILECFG: (rows, bytes of a row) of the first tiles; byte `bN` set to a value on top."""
    rows, row_bytes = zip(*(list(shapes) + [(0, 0)] * (8 - len(shapes))), strict=True)
    laid = bytearray(struct.pack("<BB14x8H16x8B8x", palette, 0, *row_bytes, *rows))
    for place, value in at.items():
        laid[int(place[1:])] = value
    return bytes(laid)


def random_bytes(*shape: int, dtype: torch.dtype) -> Tensor:
    limits = torch.iinfo(dtype)
    return torch.randint(limits.min, limits.max + 1, shape, generator=torch.Generator().manual_seed(7)).to(dtype)


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def same(actual: Tensor, expected: Tensor) -> bool:
    return actual.shape == expected.shape and torch.allclose(actual, expected, rtol=0, atol=0, equal_nan=True)


# --- the registers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "quads", "columns"), [(16, 16, 16), (1, 1, 1), (5, 7, 3), (9, 16, 16), (16, 2, 11)])
def test_products_of_signed_rows_and_unsigned_quads_are_added_up(rows: int, quads: int, columns: int) -> None:
    tiles = _kernels.EmulatedTiles()
    tiles.configure(config((rows, 4 * columns), (rows, 4 * quads), (quads, 4 * columns)))
    a = random_bytes(rows, 4 * quads, dtype=torch.int8)
    b = random_bytes(quads, columns, 4, dtype=torch.uint8)
    start = random_bytes(rows, columns, dtype=torch.int8).int()
    sums = torch.empty(rows, columns, dtype=torch.int32)
    tiles.load(0, start.data_ptr(), 4 * columns)
    tiles.load(1, a.data_ptr(), 4 * quads)
    tiles.load(2, b.data_ptr(), 4 * columns)
    tiles.add_products(0, 1, 2)
    tiles.add_products(0, 1, 2)
    tiles.store(0, sums.data_ptr(), 4 * columns)
    assert torch.equal(sums, start + 2 * (a.int() @ b.permute(0, 2, 1).flatten(0, 1).int()))
    assert tiles.products == 2


def test_rows_are_loaded_and_stored_at_their_distance_and_no_byte_beyond_them() -> None:
    tiles = _kernels.EmulatedTiles()
    tiles.configure(config((3, 8)))
    source = random_bytes(3, 20, dtype=torch.uint8)
    target = torch.zeros(4, 30, dtype=torch.uint8)
    tiles.load(0, source.data_ptr(), 20)
    tiles.store(0, target.data_ptr(), 30)
    assert torch.equal(target[:3, :8], source[:, :8])
    assert target.sum() == target[:3, :8].sum()
    tiles.clear(0)
    tiles.store(0, target.data_ptr(), 30)
    assert target.sum() == 0


def test_a_configuration_clears_every_tile() -> None:
    tiles = _kernels.EmulatedTiles()
    source, target = random_bytes(4, 8, dtype=torch.uint8), torch.ones(4, 8, dtype=torch.uint8)
    tiles.configure(config((4, 8)))
    tiles.load(0, source.data_ptr(), 8)
    tiles.configure(config((4, 8)))
    tiles.store(0, target.data_ptr(), 8)
    assert target.sum() == 0


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        (config((4, 8), palette=2), "no palette 2"),
        (config((17, 8)), "17 rows of 8 bytes"),
        (config((4, 65)), "4 rows of 65 bytes"),
        (config((4, 0)), "4 rows of 0 bytes"),
        (config((0, 8)), "0 rows of 8 bytes"),
        (config((4, 8), b1=16), "row 16"),
        *((config((4, 8), **{f"b{byte}": 1}), "reserved") for byte in (2, 15, 32, 47, 56, 63)),
    ],
)
def test_a_configuration_that_the_processor_would_refuse_is_refused(wrong: bytes, complaint: str) -> None:
    with pytest.raises(RuntimeError, match=f"#GP.*{complaint}"):
        _kernels.EmulatedTiles().configure(wrong)


@pytest.mark.parametrize(
    "shapes",
    [
        ((5, 64), (4, 64), (16, 64)),  # sums have other rows than a
        ((4, 60), (4, 64), (16, 64)),  # and other columns than b
        ((4, 64), (4, 60), (16, 64)),  # a has other quads than b
        ((4, 62), (4, 64), (16, 62)),  # a broken quad
        ((4, 64), (4, 62), (15, 64)),
        ((4, 64), (4, 64)),  # b has no shape
    ],
)
def test_operands_that_do_not_fit_each_other_are_refused(shapes: tuple[tuple[int, int], ...]) -> None:
    tiles = _kernels.EmulatedTiles()
    tiles.configure(config(*shapes))
    with pytest.raises(RuntimeError, match="#UD"):
        tiles.add_products(0, 1, 2)


def test_no_tile_is_used_twice_or_without_a_shape() -> None:
    tiles = _kernels.EmulatedTiles()
    memory = torch.zeros(16, 64, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="#UD: tiles are not configured"):
        tiles.clear(0)
    tiles.configure(config((16, 64), (16, 64)))
    for operands in ((0, 0, 1), (0, 1, 0), (1, 0, 0)):
        with pytest.raises(RuntimeError, match="two operands"):
            tiles.add_products(*operands)
    for tile in (2, 8, -1):
        with pytest.raises(RuntimeError, match=f"#UD.*tile {tile}"):
            tiles.load(tile, memory.data_ptr(), 64)
    for end in (tiles.release, lambda: tiles.configure(bytes(64))):
        tiles.configure(config((16, 64)))
        end()
        with pytest.raises(RuntimeError, match="not configured"):
            tiles.store(0, memory.data_ptr(), 64)


# --- products in them -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TILED)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("out", "depth"), [(16, 64), (40, 256), (48, 320), (100, 576)])
def test_any_number_of_rows_matches_the_reference_bit_for_bit(name: str, bits: int, out: int, depth: int) -> None:
    weight = pack(gaussian(out, depth), bits)
    x = gaussian(200, depth, seed=1) * 3
    x[40, 3], x[41, depth - 1], x[60] = float("nan"), float("inf"), 0
    expected = reference_packed.linear_packed(x, weight)
    with cpu.use_machine(name, 1):
        # From many to few, so that a tile's rows behind the last one hold those of the product before it.
        for rows in (200, 145, 129, 128, 113, *range(70, FEW_ROWS - 1, -1)):
            assert same(cpu.linear_packed(x[:rows], weight), expected[:rows]), rows


@pytest.mark.parametrize("name", TILED)
@pytest.mark.parametrize("bits", [4, 8])
def test_the_largest_integers_add_up_exactly(name: str, bits: int) -> None:
    weight = pack(-torch.ones(32, 256), bits)  # factor * q = 64, or v = -127, everywhere
    x = torch.ones(24, 256) * torch.tensor([1.0, -1.0]).repeat(12)[:, None]
    with cpu.use_machine(name, 1):
        assert torch.equal(cpu.linear_packed(x, weight), reference_packed.linear_packed(x, weight))


@pytest.mark.parametrize("name", TILED)
@pytest.mark.parametrize(("bits", "threads"), [(4, 1), (4, 3), (8, 2)])
def test_experts_and_the_shared_one_go_through_tiles(name: str, bits: int, threads: int) -> None:
    hidden, width, rows = 320, 128, 90
    gate_up = pack(gaussian(4, 2 * width, hidden) / hidden**0.5, bits, parts=2)
    down = pack(gaussian(4, hidden, width, seed=1) / width**0.5, bits)
    shared = SwiGLUWeights(pack(gaussian(128, hidden, seed=2), bits, parts=2), pack(gaussian(hidden, 64, seed=3), bits))
    scores = torch.rand(rows, 4, generator=torch.Generator().manual_seed(1))
    scores[6:, 0] = -1  # so that one expert has few rows
    given = (gaussian(rows, hidden, seed=4), scores.softmax(1)[:, :2], scores.topk(2).indices, gate_up, down, shared)
    with cpu.use_machine(name, threads):
        assert same(cpu.mix_experts_packed(*given), reference_packed.mix_experts_packed(*given))


@pytest.mark.parametrize("name", EMULATED)
@pytest.mark.parametrize("bits", [4, 8])
def test_many_rows_are_multiplied_in_tiles_and_few_are_not(name: str, bits: int) -> None:
    panels, depth = 5, 320
    deep, ragged = pack(gaussian(16 * panels, depth), bits), pack(gaussian(16, 96), bits)
    with cpu.use_machine(name, 1):
        for rows, weight in ((FEW_ROWS, deep), (FEW_ROWS + 1, deep), (32, deep), (33, deep), (40, ragged)):
            before = _kernels.emulated_tiles().products
            cpu.linear_packed(gaussian(rows, weight.in_features), weight)
            expected = -(-rows // TILE_ROWS) * panels * (depth // TILE_DEPTH)
            if rows <= FEW_ROWS or weight is ragged:
                expected = 0
            assert _kernels.emulated_tiles().products - before == expected, rows


def test_emulated_tiles_are_never_chosen_by_themselves() -> None:
    assert cpu.choose_instruction_set(None) != "amx-emulated"
    names = [found.name for found in cpu.instruction_sets()]
    assert "amx-emulated" not in names or names.index("amx-emulated") > names.index("portable")
