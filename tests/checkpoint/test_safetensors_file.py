"""Safetensors headers: what is sound is read and mapped, what is not is refused before any data is touched."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from safetensors.torch import save_file

from tern.checkpoint.safetensors_file import MAX_HEADER_BYTES, WEIGHT_DTYPES, MappedFiles, read_entries
from tern.errors import CheckpointError
from tests.fuzzing import fuzz


def write(path: Path, header: Any, data: bytes = b"") -> Path:
    """A safetensors file with whatever header."""
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(content)) + content + data)
    return path


def record(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize("dtype", WEIGHT_DTYPES.values())
def test_reads_what_the_library_writes(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {
        "matrix": torch.randn(3, 5).to(dtype),
        "scalar": torch.tensor(2.5).to(dtype),
        "empty": torch.empty(0, 4, dtype=dtype),
        "名字": torch.randn(7).to(dtype),
    }
    save_file(tensors, tmp_path / "it.safetensors", metadata={"format": "pt"})
    files = MappedFiles()
    found = {entry.name: files.tensor(entry) for entry in read_entries(tmp_path / "it.safetensors")}
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == dtype
        assert found[name].shape == tensor.shape
        assert torch.equal(found[name], tensor)


@pytest.mark.parametrize("padding", range(8))
def test_unaligned_data_is_copied_not_misread(tmp_path: Path, padding: int) -> None:
    header = json.dumps({"w": record()}).encode()
    path = write(tmp_path / "it.safetensors", header + b" " * padding, struct.pack("<2f", 1.5, -2.0))
    (entry,) = read_entries(path)
    assert MappedFiles().tensor(entry).tolist() == [1.5, -2.0]


@pytest.mark.parametrize(
    ("header", "complaint"),
    [
        ({"w": record(dtype="F31")}, "unknown dtype 'F31'"),
        ({"w": record(dtype=None)}, "unknown dtype 'None'"),
        ({"w": record(dtype=["F32"])}, "unknown dtype"),
        ({"w": record(shape=[-2])}, r"no valid shape: \[-2\]"),
        ({"w": record(shape=[2.0])}, "no valid shape"),
        ({"w": record(shape=[True, 2])}, "no valid shape"),
        ({"w": record(shape="2")}, "no valid shape"),
        ({"w": record(shape=[1] * 15 + [2, 1])}, "no valid shape"),
        ({"w": record(shape=[2**62, 2**62])}, "bytes, but its data_offsets span 8"),
        ({"w": record(shape=[2**64])}, "no valid shape"),
        ({"w": record(shape=[3])}, r"F32 \[3\], 12 bytes, but its data_offsets span 8"),
        ({"w": record(offsets=[8, 0])}, "no valid data_offsets"),
        ({"w": record(offsets=[0])}, "no valid data_offsets"),
        ({"w": record(offsets=[-8, 0])}, "no valid data_offsets"),
        ({"w": record(offsets=[8, 16])}, r"leaves a hole before it"),
        ({"v": record(), "w": record(offsets=[4, 12])}, "overlaps the tensor before it"),
        ({"v": record(), "w": record()}, "overlaps the tensor before it"),
        ({"w": record(shape=[4], offsets=[0, 16])}, r"truncated: its header asks for \d+ bytes and the file has \d+"),
        ({"w": record(shape=[1], offsets=[0, 4])}, r"longer than its header says: \d+ bytes expected, \d+ found"),
        ({"w": "nothing"}, "unknown dtype"),
        ([], "holds list where a JSON object must stand"),
        (b"{", "not valid JSON"),
        (b'{"w": \xff}', "not valid JSON"),
        (b'{"w": 1, "w": 2}', "the key 'w' occurs 2 times"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a": NaN}', "NaN is not a JSON number"),
    ],
)
def test_unsound_header_is_refused(tmp_path: Path, header: Any, complaint: str) -> None:
    path = write(tmp_path / "it.safetensors", header, b"\0" * 8)
    with pytest.raises(CheckpointError, match=complaint):
        read_entries(path)


def test_every_unsound_tensor_is_listed(tmp_path: Path) -> None:
    path = write(tmp_path / "it.safetensors", {"a": record(dtype="X"), "b": record(shape=[9]), "c": record()})
    with pytest.raises(CheckpointError) as caught:
        read_entries(path)
    assert [problem.split(" ")[1] for problem in caught.value.problems] == ["a", "b"]


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "truncated: it has 0 bytes"),
        (b"\1\0\0", "truncated: it has 3 bytes"),
        (struct.pack("<Q", 100) + b"{}", "truncated: its header alone takes 108 bytes and the file has 10"),
        (struct.pack("<Q", MAX_HEADER_BYTES + 1) + b"{}", f"over the limit of {MAX_HEADER_BYTES}"),
        (struct.pack("<Q", 2**64 - 1) + b"{}", f"over the limit of {MAX_HEADER_BYTES}"),
    ],
)
def test_impossible_header_length_is_refused(tmp_path: Path, content: bytes, complaint: str) -> None:
    path = tmp_path / "it.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=complaint):
        read_entries(path)


def test_file_that_shrinks_after_its_header_was_read_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "it.safetensors", {"w": record()}, b"\0" * 8)
    (entry,) = read_entries(path)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="has shrunk"):
        MappedFiles().tensor(entry)


@fuzz(300, HealthCheck.function_scoped_fixture)
@given(data=st.data())
def test_damaged_bytes_are_refused_or_harmless(tmp_path: Path, data: st.DataObject) -> None:
    """Flip, cut or lengthen a sound file anywhere: either one error, or views that stay inside the file."""
    path = tmp_path / "it.safetensors"
    save_file({"a": torch.ones(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}, path)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content
    path.unlink()
    path.write_bytes(content)
    try:
        entries = read_entries(path)
    except CheckpointError:
        return
    for entry in entries:
        assert 0 <= entry.start <= entry.start + entry.nbytes <= len(content)
        if entry.dtype in WEIGHT_DTYPES:
            assert MappedFiles().tensor(entry).nbytes == entry.nbytes
