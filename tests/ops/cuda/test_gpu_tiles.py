"""The tiles of products fit every shape, and sums follow from the weight alone."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import pytest
import torch

from benchmarks import tune_gpu
from tern.ops.cuda import tiles
from tern.ops.cuda.tiles import (
    BLOCKS_T,
    TABLE,
    Shape,
    Sums,
    Tile,
    choose,
    problem,
    read_table,
    usual_sums,
    usual_tile,
    write_table,
)

KINDS = [("plain", 2), ("plain", 4), ("int8", 2), ("int8", 4), ("int4", 2), ("int4", 4), ("fp8", 1)]
SIZES = [(1, 1), (70, 260), (2560, 1536), (3584, 2560), (2560, 12288), (103424, 2560), (8192, 28672)]


@pytest.mark.parametrize(("kind", "x_bytes"), KINDS)
@pytest.mark.parametrize(("columns", "depth"), SIZES)
def test_the_rule_fits_every_shape(kind: str, x_bytes: int, columns: int, depth: int) -> None:
    for gated, routed, block_t in product((False, True), (False, True), BLOCKS_T):
        shape = Shape(kind, columns, depth, gated, routed, x_bytes)  # type: ignore[arg-type]
        sums = usual_sums(shape)
        assert problem(shape, sums, usual_tile(shape, sums, block_t)) is None
        assert (sums.splits - 1) * sums.chunk(depth) < depth <= sums.splits * sums.chunk(depth)


@pytest.mark.parametrize(("kind", "x_bytes"), KINDS)
@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (10, 0), (12, 0)])
def test_tiles_fit_the_card(
    kind: str, x_bytes: int, capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("is_available", True), ("get_device_capability", capability)):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    has = {(8, 0): 163, (10, 0): 227}.get(capability, 99) * 1024
    monkeypatch.setattr(tiles, "_table", dict)
    for (columns, depth), gated, routed, rows in product(SIZES, (False, True), (False, True), (1, 30, 64, 500)):
        shape = Shape(kind, columns, depth, gated, routed, x_bytes)  # type: ignore[arg-type]
        sums, tile = choose(shape, rows)
        assert sums == usual_sums(shape), "sums are those of every card"
        assert problem(shape, sums, tile, has - 20 * 1024) is None


def test_sums_do_not_follow_from_the_rows() -> None:
    shape = Shape("int4", 3584, 2560, False, False, 2)
    assert len({choose(shape, rows)[0] for rows in (1, 16, 17, 100, 5000)}) == 1


def test_the_table_fits_its_shapes() -> None:
    table = read_table(TABLE)
    assert Shape("int4", 1536, 2560, True, True, 2) in table
    assert all({16, 32, 64} <= set(tiles) for _, tiles in table.values())


@pytest.mark.parametrize(
    ("sums", "tile", "complaint"),
    [
        (Sums(128, 1), Tile(64, 48, 4, 3), "block_t is 48"),
        (Sums(64, 1), Tile(64, 16, 4, 3), "block_k is 64"),
        (Sums(128, 9), Tile(64, 16, 4, 3), "splits is 9"),
        (Sums(128, 1), Tile(256, 128, 4, 2), "sums of a tile"),
        (Sums(128, 1), Tile(128, 128, 8, 8), "shared memory"),
        (Sums(128, 1), Tile(256, 16, 8, 2), "more than one scale"),
        (Sums(128, 1), Tile(8, 16, 4, 3), "below the 16 by 16"),
        (Sums(128, 1), Tile(64, 16, 4, 9), "stages"),
    ],
)
def test_a_wrong_entry_is_refused(sums: Sums, tile: Tile, complaint: str, tmp_path: Path) -> None:
    shape = Shape("fp8", 640, 1024, False, False, 1)
    assert complaint in (problem(shape, sums, tile) or "")
    path = tmp_path / "table.json"
    write_table(path, "a test", {shape: (sums, {tile.block_t: tile})})
    with pytest.raises(ValueError, match="tune_gpu"):
        read_table(path)


def test_a_table_is_read_as_it_was_written(tmp_path: Path) -> None:
    shape = Shape("int8", 640, 1024, True, False, 2)
    table = {shape: (Sums(128, 2), {16: Tile(64, 16, 4, 3), 64: Tile(64, 64, 8, 2)})}
    path = tmp_path / "table.json"
    write_table(path, "a test", table)
    assert read_table(path) == table
    assert json.loads(path.read_text(encoding="utf-8"))["origin"] == "a test"


def test_timing_without_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["tune_gpu"])
    before = TABLE.read_bytes()
    assert tune_gpu.main() == 1
    assert "--rule" in capsys.readouterr().err
    assert TABLE.read_bytes() == before


def test_every_block_of_rows_has_candidates() -> None:
    for shape in tune_gpu.shapes(list(tune_gpu.KINDS)):
        for block_t in (16, 32, 64):
            assert any(tune_gpu.candidates(shape, block_t))
