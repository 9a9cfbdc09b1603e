"""The name of a model's weights: the same for the same, another for any other."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from tern.checkpoint import ModelSource, embedded_model_directory, quantise_checkpoint, resolve_model, weights_identity
from tern.errors import CheckpointError


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The embedded model in a directory of its own, times of modification included."""
    return Path(shutil.copytree(embedded_model_directory(), tmp_path / "copy"))


def weights_of(directory: Path) -> Path:
    [path] = directory.glob("*.safetensors")
    return path


def overwrite(path: Path, offset: int) -> None:
    """Change a byte of a file and keep its time."""
    stat = path.stat()
    with path.open("r+b") as file:
        file.seek(offset, os.SEEK_SET if offset >= 0 else os.SEEK_END)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_a_copy_is_the_same_and_what_is_no_weight_does_not_count(copy: Path) -> None:
    name = weights_identity(resolve_model(None))
    assert len(name) == 64
    assert weights_identity(resolve_model(copy)) == name
    (copy / "README.md").write_text("changed")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "transformers_version": "9.9"}))
    assert weights_identity(resolve_model(copy)) == name


def test_a_changed_file_is_another(copy: Path) -> None:
    path = weights_of(copy)
    size = path.stat().st_size
    seen = {weights_identity(resolve_model(copy))}
    for offset in (0, size // 15 * 7 + 2000, -1):
        overwrite(path, offset)
        try:
            seen.add(weights_identity(replace(resolve_model(None), directory=copy)))
        finally:
            overwrite(path, offset)
    os.utime(path, ns=(1, 1))
    seen.add(weights_identity(resolve_model(copy)))
    path.rename(copy / "other.safetensors")
    seen.add(weights_identity(resolve_model(copy)))
    assert len(seen) == 6


def test_another_network_is_another(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.25}))
    assert weights_identity(resolve_model(copy)) != weights_identity(resolve_model(None))


def test_random_weights_go_by_their_seed() -> None:
    names = [weights_identity(resolve_model(f"dummy:tiny{query}")) for query in ("", "?seed=0", "?seed=1")]
    assert names[0] == names[1] != names[2]


def test_packed_weights_go_by_their_checksums(tmp_path: Path) -> None:
    for number, model in enumerate(("dummy:tiny", "dummy:tiny", "dummy:tiny?seed=1")):
        quantise_checkpoint(resolve_model(model), tmp_path / str(number), 8, progress=False)
    names = [weights_identity(resolve_model(tmp_path / str(number))) for number in range(3)]
    assert names[0] == names[1] != names[2]


def test_files_that_are_gone_are_a_sentence(tmp_path: Path) -> None:
    source = resolve_model(None)
    gone = ModelSource("gone", tmp_path / "nothing", source.config, source.generation)
    with pytest.raises(CheckpointError, match="cannot be read"):
        weights_identity(gone)
