"""One GGUF file: its metadata, and where its tensors lie, checked against the file. Knows no network and no tokenizer.

Knows the container (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md), versions 2 and 3, little endian:

    | "GGUF" | version | tensors | pairs | key, type, value ... | name, dimensions, type, offset ... | padding | data |
                                                                         offsets count from here ^

Nothing of a file is believed before it is checked: every length is compared with what is left of the file before it is
read, and a tensor's type, dimensions and offset must lie within the data and apart from the other tensors.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from tern.checkpoint.block_formats import BLOCK_FORMATS
from tern.checkpoint.safetensors_file import DTYPE_BYTES, TensorEntry
from tern.errors import CheckpointError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_HEADER_BYTES = 128 * 2**20
MAX_ITEMS = 2**22
"""Items of an array: as many as the largest vocabulary has tokens."""
MAX_RECORDS = 2**17
"""Pairs of metadata, and tensors, of one file."""
MAX_NAME_BYTES = 2**16
MAX_DIMENSIONS = 4
DEFAULT_ALIGNMENT = 32
MAX_ALIGNMENT = 2**20

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9

# Every type of tensor by its number in the file; which of them can be read says `readable`.
TENSOR_TYPES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1",
    10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K",
    16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS",
    24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 30: "BF16",
    34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4", 41: "Q1_0", 42: "Q2_0",
}  # fmt: skip
READABLE_TYPES = ("F32", "F16", "BF16", *BLOCK_FORMATS)


@dataclass(frozen=True)
class GgufFile:
    """`metadata` by key, arrays as lists; `entries` in the order of their data, shapes with the rows' width last."""

    path: Path
    metadata: Mapping[str, Any]
    entries: tuple[TensorEntry, ...]


def read_gguf(path: Path) -> GgufFile:
    """Read the header of a GGUF file.

    Raises `CheckpointError` for a file that is no sound GGUF, or holds tensors of a type that Tern does not read.
    """
    try:
        with path.open("rb", buffering=2**20) as file:
            return _read(_Cursor(file, os.fstat(file.fileno()).st_size, path))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror or error}).") from error


def _read(cursor: _Cursor) -> GgufFile:
    if cursor.take(len(MAGIC)) != MAGIC:
        raise CheckpointError(f"{cursor.path} is no GGUF file: it does not begin with {MAGIC.decode()}.")
    version = cursor.number("I")
    if version not in VERSIONS:
        order = " (or a big-endian file)" if version & 0xFFFF == 0 else ""
        raise CheckpointError(
            f"{cursor.path} is GGUF of version {version}{order}: Tern reads versions 2 and 3, little endian."
        )
    num_tensors = cursor.count("tensors", MAX_RECORDS)
    metadata: dict[str, Any] = {}
    for _ in range(cursor.count("pairs of metadata", MAX_RECORDS)):
        key = cursor.string(MAX_NAME_BYTES)
        if key in metadata:
            raise cursor.damaged(f"the key {key[:100]!r} occurs twice")
        metadata[key] = cursor.value(cursor.number("I"))
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if type(alignment) is not int or not 1 <= alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
        raise cursor.damaged(f"its alignment is {str(alignment)[:40]}, which is no power of two up to {MAX_ALIGNMENT}")
    records = [_record(cursor) for _ in range(num_tensors)]
    data_start = -(-cursor.position // alignment) * alignment
    _refuse_unreadable(cursor.path, records)
    entries = sorted((_entry(cursor, record, data_start) for record in records), key=lambda entry: entry.start)
    _check_places(cursor, entries)
    return GgufFile(cursor.path, metadata, tuple(entries))


@dataclass(frozen=True)
class _Record:
    """What the header says of one tensor; `offset` counts from the beginning of the data."""

    name: str
    shape: tuple[int, ...]
    type: str
    offset: int


def _record(cursor: _Cursor) -> _Record:
    name = cursor.string(MAX_NAME_BYTES)
    dimensions = cursor.number("I")
    if dimensions > MAX_DIMENSIONS:
        raise cursor.damaged(f"the tensor {name[:100]!r} has {dimensions} dimensions, more than {MAX_DIMENSIONS}")
    shape = tuple(cursor.number("Q") for _ in range(dimensions))[::-1]
    number = cursor.number("I")
    return _Record(name, shape, TENSOR_TYPES.get(number, f"number {number}"), cursor.number("Q"))


def _refuse_unreadable(path: Path, records: Iterable[_Record]) -> None:
    unreadable = [record for record in records if record.type not in READABLE_TYPES]
    if unreadable:
        types = ", ".join(sorted({record.type for record in unreadable}))
        raise CheckpointError(
            f"{path} stores {len(unreadable)} tensors in {types} ({unreadable[0].name[:100]!r} for one), but Tern "
            f"reads {', '.join(READABLE_TYPES)}: get the model in one of these."
        )


def _entry(cursor: _Cursor, record: _Record, data_start: int) -> TensorEntry:
    block = BLOCK_FORMATS.get(record.type)
    weights = math.prod(record.shape)
    if block is None:
        nbytes = weights * DTYPE_BYTES[record.type]
    elif not record.shape or record.shape[-1] % block.weights:
        raise cursor.damaged(
            f"the tensor {record.name[:100]!r} is {record.type} {list(record.shape)}, and its rows are no whole blocks "
            f"of {block.weights}"
        )
    else:
        nbytes = weights // block.weights * block.nbytes
    return TensorEntry(record.name, cursor.path, record.type, record.shape, data_start + record.offset, nbytes)


def _check_places(cursor: _Cursor, entries: Iterable[TensorEntry]) -> None:
    """The tensors must have names of their own, lie apart from each other and end within the file."""
    names: set[str] = set()
    end = 0
    for entry in entries:
        if entry.name in names:
            raise cursor.damaged(f"the tensor {entry.name[:100]!r} occurs twice")
        if entry.start < end:
            raise cursor.damaged(f"the tensor {entry.name[:100]!r} overlaps the one before it")
        names.add(entry.name)
        end = entry.start + entry.nbytes
    if end > cursor.size:
        raise CheckpointError(
            f"{cursor.path} is truncated: its header asks for {end} bytes and the file has {cursor.size}; "
            "download it again."
        )


class _Cursor:
    """Reads a header front to back, and never more than is there."""

    def __init__(self, file: BinaryIO, size: int, path: Path) -> None:
        self.path, self.size, self.position = path, size, 0
        self._file = file

    def damaged(self, reason: str) -> CheckpointError:
        """The error for a header that cannot be."""
        return CheckpointError(f"{self.path} is not a sound GGUF file ({reason}): download it again.")

    def take(self, nbytes: int) -> bytes:
        end = self.position + nbytes
        if end > min(self.size, MAX_HEADER_BYTES):
            if self.size >= MAX_HEADER_BYTES:
                raise self.damaged(f"its header goes on beyond {MAX_HEADER_BYTES} bytes")
            raise CheckpointError(
                f"{self.path} is truncated: its header goes on to byte {end} and the file has {self.size}; "
                "download it again."
            )
        self.position = end
        content = self._file.read(nbytes)
        if len(content) != nbytes:
            raise CheckpointError(f"{self.path} became shorter while it was read: download it again.")
        return content

    def number(self, code: str) -> Any:
        """One number of this `struct` code."""
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]

    def count(self, what: str, limit: int) -> int:
        count = int(self.number("Q"))
        if count > limit:
            raise self.damaged(f"it announces {count} {what}, more than {limit}")
        return count

    def string(self, limit: int = MAX_HEADER_BYTES) -> str:
        length = self.count("bytes of text", limit)
        try:
            return self.take(length).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.damaged(f"a text at byte {self.position - length} is not UTF-8: {error.reason}") from None

    def value(self, kind: int) -> Any:
        """One value of metadata. Arrays of arrays, which no model's metadata has, are refused."""
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            raise self.damaged(f"a value at byte {self.position} has the unknown type {kind}")
        item = self.number("I")
        count = self.count("items in an array", MAX_ITEMS)
        if item == _STRING:
            return [self.string() for _ in range(count)]
        if item not in _SCALARS:
            raise self.damaged(f"an array at byte {self.position} has items of type {item}")
        code = f"<{count}{_SCALARS[item]}"
        return list(struct.unpack(code, self.take(struct.calcsize(code))))
