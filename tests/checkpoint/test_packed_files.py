"""Packed checkpoints: what is written is what is loaded, cut-short runs go on, and damage is found."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from test_layouts import logits

from tern import ops
from tern.checkpoint import load_model, load_tensors, packed_files, quantise_checkpoint, resolve_model
from tern.checkpoint.quantisation import UNFINISHED
from tern.errors import CheckpointError, OptionError, UnsupportedConfigError


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model in 4 bits."""
    directory = tmp_path_factory.mktemp("packed") / "tiny"
    quantise_checkpoint(resolve_model(None), directory, 4)
    return directory


def copy_of(directory: Path, place: Path) -> Path:
    return Path(shutil.copytree(directory, place / "copy"))


@pytest.mark.parametrize("model", [None, "dummy:tiny"])
@pytest.mark.parametrize("bits", [4, 8])
def test_what_was_written_is_what_packing_while_loading_gives(tmp_path: Path, model: str | None, bits: int) -> None:
    source = resolve_model(model)
    quantise_checkpoint(source, tmp_path / "out", bits)
    written = load_tensors(resolve_model(tmp_path / "out"))
    for name, weight in load_tensors(source, quantization=f"wint{bits}").items():
        found = written.pop(name)
        if isinstance(weight, ops.PackedWeight):
            assert isinstance(found, ops.PackedWeight)
            assert (found.shape, found.bits, found.parts) == (weight.shape, weight.bits, weight.parts)
            assert torch.equal(found.values, weight.values), name
            assert torch.equal(found.scales, weight.scales), name
            assert found.factors is None or torch.equal(found.factors, weight.factors), name
        else:
            assert torch.equal(found, weight), name
    assert not written


def test_it_is_a_whole_checkpoint(packed: Path) -> None:
    source = resolve_model(packed)
    assert source.stored_bits == 4
    assert not (packed / UNFINISHED).exists()
    assert {"tokenizer.json", "chat_template.jinja", "generation_config.json"} <= {
        path.name for path in packed.iterdir()
    }
    assert logits(load_model(source), [5, 6, 7]).isfinite().all()
    assert load_model(source, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_large_tensors_begin_at_whole_cache_lines(packed: Path) -> None:
    for weight in load_tensors(resolve_model(packed)).values():
        if isinstance(weight, ops.PackedWeight):
            assert weight.values.data_ptr() % 64 == 0


def test_a_run_that_was_cut_short_goes_on_where_it_stopped(
    tmp_path: Path, packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []
    original = packed_files.write_tensors

    def failing(path: Path, tensors: dict[str, torch.Tensor]) -> None:
        if len(written) == 3:
            path.with_name(path.name + ".partial").write_bytes(b"half")
            raise OSError(28, "No space left on device")
        original(path, tensors)
        written.append(path.name)

    monkeypatch.setattr(packed_files, "write_tensors", failing)
    with pytest.raises(CheckpointError, match="the disk is full: make room and run the same command again"):
        quantise_checkpoint(resolve_model(None), tmp_path / "out", 4)
    with pytest.raises(CheckpointError, match="half written"):
        resolve_model(tmp_path / "out")
    with pytest.raises(OptionError, match="unfinished work of another command"):
        quantise_checkpoint(resolve_model(None), tmp_path / "out", 8)

    def counting(path: Path, tensors: dict[str, torch.Tensor]) -> None:
        original(path, tensors)
        written.append(path.name)

    monkeypatch.setattr(packed_files, "write_tensors", counting)
    quantise_checkpoint(resolve_model(None), tmp_path / "out", 4)
    assert len(written) == len(set(written)) == len(list(packed.glob("*.safetensors")))
    for path in packed.iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes(), path.name
    assert len(list((tmp_path / "out").iterdir())) == len(list(packed.iterdir()))


def test_a_directory_that_holds_anything_is_left_alone(tmp_path: Path, packed: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(OptionError, match="is not empty"):
        quantise_checkpoint(resolve_model(None), tmp_path, 4)
    with pytest.raises(OptionError, match="packed in 4 bits already"):
        quantise_checkpoint(resolve_model(packed), tmp_path / "again", 8)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_too_small_a_disk_is_said_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_files.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**7, 0, 10**7))
    with pytest.raises(CheckpointError, match="GB free, but the packed weights take"):
        quantise_checkpoint(resolve_model(None), tmp_path / "out", 4)


def test_every_flipped_bit_is_found(tmp_path: Path, packed: Path) -> None:
    directory = copy_of(packed, tmp_path)
    for shard in sorted(directory.glob("*.safetensors"))[:3]:
        whole = shard.read_bytes()
        for place in (len(whole) - 1, len(whole) // 2):
            shard.write_bytes(whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1 :])
            with pytest.raises(CheckpointError, match=f"in {shard.name} is not what was written"):
                load_tensors(resolve_model(directory))
        shard.write_bytes(whole)
    load_tensors(resolve_model(directory))


def test_files_cut_short_missing_or_of_another_network_are_listed(tmp_path: Path, packed: Path) -> None:
    directory = copy_of(packed, tmp_path)
    first, second, third, *_ = sorted(directory.glob("*.safetensors"))
    first.write_bytes(first.read_bytes()[:-5])
    second.unlink()
    third.write_bytes(b"")
    with pytest.raises(CheckpointError) as caught:
        load_tensors(resolve_model(directory))
    for path in (first, second, third):
        assert path.name in str(caught.value)

    directory = copy_of(packed, tmp_path / "other")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "moe_num_experts": config["moe_num_experts"] + 1}))
    with pytest.raises(CheckpointError, match=r"misshapen: layers\.1\.moe\.gate_up\.values is U8"):
        load_tensors(resolve_model(directory))


@pytest.mark.parametrize("packing", [{"bits": 3}, {"format": 2}, {"bits": True}, {"bits": None}, {"bits": [4]}])
def test_another_format_is_refused_with_its_name(tmp_path: Path, packed: Path, packing: dict[str, object]) -> None:
    directory = copy_of(packed, tmp_path)
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] |= packing
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedConfigError, match="reads format 1 in 4 or 8 bits"):
        resolve_model(directory)


def test_an_index_without_checksums_is_refused(tmp_path: Path, packed: Path) -> None:
    directory = copy_of(packed, tmp_path)
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": json.loads(index.read_text())["weight_map"]}))
    with pytest.raises(CheckpointError, match="holds no checksums"):
        load_tensors(resolve_model(directory))


def test_the_quantization_of_a_packed_checkpoint_cannot_be_changed(packed: Path) -> None:
    with pytest.raises(OptionError, match="packed in 4 bits already: leave it out"):
        load_tensors(resolve_model(packed), quantization="wint8")
    load_tensors(resolve_model(packed), quantization="wint4")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(OptionError, match="no NVIDIA GPU can be used here"):
        load_tensors(resolve_model(packed), device="cuda")
