"""One safetensors file: its header, checked against the file, and its tensors, mapped into memory.

Knows the file format (https://github.com/huggingface/safetensors, "Format"); knows no tensor names and no layouts.

    | 8 bytes: N, little endian | N bytes: JSON header | data                                   |
                                                        ^ offsets in the header count from here

Nothing of a file is believed before it is checked: the header's length is bounded, and every tensor's dtype, shape and
offsets must agree with each other, with its neighbours and with the size of the file. Only then is the file mapped, so
that no view can reach outside it.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from tern.checkpoint.json_file import parse_json_object
from tern.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000
MAX_DIMENSIONS = 16
LENGTH_BYTES = 8

# Bytes an element takes, for every dtype of the format whose elements are whole bytes.
DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "F64": 8, "C64": 8,
}  # fmt: skip

# The dtypes that weights are read from. Paddle saves bfloat16 through numpy, which has no such type, and calls it U16
# (https://github.com/foundation-model-stack/fastsafetensors/pull/24).
WEIGHT_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "U16": torch.bfloat16}

# The dtypes that tensors are mapped as: weights, the bytes of packed ones, and the integers of quantised ones.
STORED_DTYPES = {**WEIGHT_DTYPES, "U8": torch.uint8, "I8": torch.int8, "I32": torch.int32, "I64": torch.int64}
DATA_ALIGNMENT = 64


@dataclass(frozen=True)
class TensorEntry:
    """A tensor in a file: `start` is its offset from the beginning of the file and `nbytes` its length, in bytes."""

    name: str
    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


def read_entries(path: Path) -> list[TensorEntry]:
    """Return the tensors of a safetensors file, in the order of their data.

    Raises `CheckpointError` whose `problems` list everything that does not fit.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            header_bytes = _read_header(file.read(LENGTH_BYTES), size, path.name)
            content = file.read(header_bytes)
    except OSError as error:
        raise CheckpointError(f"{path.name} cannot be read ({error.strerror or error}).") from error
    header = parse_json_object(content, f"the header of {path.name}")
    header.pop("__metadata__", None)
    data_start = LENGTH_BYTES + header_bytes
    problems: list[str] = []
    entries = [_entry(name, value, path, data_start, problems) for name, value in header.items()]
    known = sorted((entry for entry in entries if entry is not None), key=lambda entry: (entry.start, entry.nbytes))
    if not problems:
        problems += _gaps(known, data_start, size, path.name)
    if problems:
        raise CheckpointError(f"{path.name} is not a sound safetensors file.", problems=problems)
    return known


def _read_header(length: bytes, size: int, name: str) -> int:
    if len(length) < LENGTH_BYTES:
        raise CheckpointError(f"{name} is truncated: it has {size} bytes, too few for a safetensors header.")
    header_bytes = int.from_bytes(length, "little")
    if header_bytes > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{name} announces a header of {header_bytes} bytes, over the limit of {MAX_HEADER_BYTES}: "
            "it is damaged or no safetensors file."
        )
    if LENGTH_BYTES + header_bytes > size:
        raise CheckpointError(
            f"{name} is truncated: its header alone takes {LENGTH_BYTES + header_bytes} bytes and the file has {size}; "
            "download it again."
        )
    return header_bytes


def _entry(name: str, value: Any, path: Path, data_start: int, problems: list[str]) -> TensorEntry | None:
    """The header's record of one tensor, or None after noting what is wrong with it."""
    fields = value if isinstance(value, dict) else {}
    dtype = fields.get("dtype")
    shape, offsets = _sizes(fields.get("shape")), _sizes(fields.get("data_offsets"))
    where = f"{path.name}: {name}"
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        problems.append(f"{where} has the unknown dtype {str(dtype)[:40]!r}")
        return None
    if shape is None or len(shape) > MAX_DIMENSIONS:
        problems.append(f"{where} has no valid shape: {str(fields.get('shape'))[:80]}")
        return None
    if offsets is None or len(offsets) != 2 or offsets[0] > offsets[1]:
        problems.append(f"{where} has no valid data_offsets: {str(fields.get('data_offsets'))[:80]}")
        return None
    start, nbytes = data_start + offsets[0], math.prod(shape) * DTYPE_BYTES[dtype]
    if nbytes != offsets[1] - offsets[0]:
        span = offsets[1] - offsets[0]
        problems.append(f"{where} is {dtype} {list(shape)}, {nbytes} bytes, but its data_offsets span {span}")
        return None
    return TensorEntry(name, path, dtype, shape, start, nbytes)


def _sizes(value: object) -> tuple[int, ...] | None:
    """A list of lengths or offsets as a tuple, or None if it is anything else."""
    if not isinstance(value, list) or not all(type(item) is int and 0 <= item < 2**63 for item in value):
        return None
    return tuple(value)


def _gaps(entries: Iterable[TensorEntry], data_start: int, size: int, name: str) -> list[str]:
    """The tensors must follow each other without hole or overlap and end where the file ends."""
    end = data_start
    for entry in entries:
        if entry.start != end:
            fault = "overlaps the tensor before it" if entry.start < end else "leaves a hole before it"
            return [f"{name}: {entry.name} {fault} ({entry.start} instead of {end})"]
        end = entry.start + entry.nbytes
    if size < end:
        return [f"{name} is truncated: its header asks for {end} bytes and the file has {size}; download it again"]
    if size > end:
        return [f"{name} is longer than its header says: {end} bytes expected, {size} found; download it again"]
    return []


class MappedFiles:
    """Maps files on first use and gives views of their tensors, without copying.

    The mapping is private and lives as long as any view does. A file must not be changed in place while it is mapped
    (replacing it by a new file is harmless): its pages are read when they are first touched.
    """

    def __init__(self) -> None:
        self._storages: dict[Path, torch.UntypedStorage] = {}

    def tensor(self, entry: TensorEntry) -> torch.Tensor:
        """Return the tensor, a view of the mapped file, or a copy if the file stores it at an unaligned offset."""
        dtype = STORED_DTYPES[entry.dtype]
        raw = self.raw(entry)
        aligned = entry.start % dtype.itemsize == 0
        return (raw if aligned else raw.clone()).view(dtype).view(entry.shape)

    def raw(self, entry: TensorEntry) -> torch.Tensor:
        """Return the bytes of the tensor, a view of the mapped file: [nbytes] uint8."""
        storage = self._storage(entry.path)
        if storage.nbytes() < entry.start + entry.nbytes:
            raise CheckpointError(f"{entry.path} has shrunk since its header was read: load the checkpoint again.")
        raw = torch.empty(0, dtype=torch.uint8)
        raw.set_(storage, entry.start, (entry.nbytes,))  # type: ignore[call-overload]
        return raw

    def _storage(self, path: Path) -> torch.UntypedStorage:
        if path not in self._storages:
            try:
                storage = torch.UntypedStorage.from_file(str(path), shared=False, nbytes=path.stat().st_size)
            except (OSError, RuntimeError) as error:
                reason = str(error).partition("\n")[0][:200]
                raise CheckpointError(f"{path} cannot be mapped into memory ({reason}).") from error
            self._storages[path] = cast(torch.UntypedStorage, storage)
        return self._storages[path]


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write a safetensors file of tensors on the CPU, whole or not at all: under another name until it is on the disk.

    Data begins at a multiple of `DATA_ALIGNMENT` bytes, and tensors whose size is such a multiple come first, so that
    each of those begins at one too.
    """
    names = sorted(tensors, key=lambda name: (tensors[name].nbytes % DATA_ALIGNMENT != 0, name))
    dtypes = {dtype: name for name, dtype in reversed(STORED_DTYPES.items())}
    header: dict[str, Any] = {}
    end = 0
    for name in names:
        start, end = end, end + tensors[name].nbytes
        shape = list(tensors[name].shape)
        header[name] = {"dtype": dtypes[tensors[name].dtype], "shape": shape, "data_offsets": [start, end]}
    encoded = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    encoded += b" " * (-(LENGTH_BYTES + len(encoded)) % DATA_ALIGNMENT)
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.write(len(encoded).to_bytes(LENGTH_BYTES, "little"))
        file.write(encoded)
        for name in names:
            file.write(tensors[name].contiguous().view(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
