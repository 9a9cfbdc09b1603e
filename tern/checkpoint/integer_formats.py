"""Weights kept as integers with a scale and a zero point for each group: AWQ, GPTQ, compressed-tensors -> floats.

Knows which tensors stand for one weight [out, in], how integers lie in words of 32 bits, and what `quantization_config`
says of it. Knows no layouts and moves no data into the network. A weight is `scale * (integer - zero)`, group by group
along the inputs; `per` integers share a word, the first in its lowest bits:

    GPTQ                qweight [in / per, out], qzeros [groups, out / per], scales [groups, out], g_idx [in]
                        zeros are stored less one ("gptq") or as they are ("gptq_v2"); g_idx: the group of each input
    AWQ ("gemm")        qweight [in, out / per], qzeros [groups, out / per], scales [groups, out]
                        the eight columns of a word lie in the order 0 2 4 6 1 3 5 7
    compressed-tensors  weight_packed [out, in / per], weight_scale [out, groups], weight_shape [2], less 2^(bits-1);
    ("pack-quantized")  weight_zero_point [out / per, groups] likewise, or int8 [out, groups]; weight_g_idx [in]
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tern.checkpoint.problems import Problems
from tern.checkpoint.safetensors_file import WEIGHT_DTYPES, MappedFiles, TensorEntry
from tern.errors import CheckpointError, UnsupportedConfigError

WORD_BITS = 32
AWQ_SHIFTS = (0, 16, 4, 20, 8, 24, 12, 28)
"""Where in a word each of its eight columns lies, in bits."""


class Method(StrEnum):
    """Who wrote the weights, as `quant_method` calls it."""

    GPTQ = "gptq"
    AWQ = "awq"
    COMPRESSED = "compressed-tensors"


@dataclass(frozen=True)
class IntegerScheme:
    """What a checkpoint says of its integers. `zero_offset` is what is to be added to stored zero points."""

    method: Method
    bits: int
    zero_offset: int = 0


@dataclass(frozen=True)
class QuantisedEntry:
    """A weight of `shape` [out, in] in files, made up of the tensors `parts`, by the last part of their names."""

    name: str
    scheme: IntegerScheme
    shape: tuple[int, ...]
    parts: Mapping[str, TensorEntry]

    @property
    def dtype(self) -> str:
        """How the weights are kept, for messages."""
        return f"{self.scheme.method} {self.scheme.bits} bit"

    @property
    def nbytes(self) -> int:
        """Bytes of all parts in the files."""
        return sum(part.nbytes for part in self.parts.values())


# --- quantization_config ---------------------------------------------------------------------------------------------


def read_scheme(fields: Mapping[str, Any], path: Path) -> IntegerScheme | None:
    """The scheme of a `quantization_config`, None for a method that is none of these.

    Raises `UnsupportedConfigError` for a variant that Tern does not read.
    """
    method = fields.get("quant_method")
    if method == Method.GPTQ:
        bits: Any = fields.get("bits")
        form = fields.get("checkpoint_format") or "gptq"
        _require(path, "GPTQ weights", "bits", bits, (4, 8))
        _require(path, "GPTQ weights", "checkpoint_format", form, ("gptq", "gptq_v2"))
        return IntegerScheme(Method.GPTQ, int(bits), zero_offset=int(form == "gptq"))
    if method == Method.AWQ:
        _require(path, "AWQ weights", "bits", fields.get("bits", fields.get("w_bit")), (4,))
        _require(path, "AWQ weights", "version", str(fields.get("version") or "gemm").lower(), ("gemm",))
        return IntegerScheme(Method.AWQ, 4)
    return _read_compressed(fields, path) if method == Method.COMPRESSED else None


def _read_compressed(fields: Mapping[str, Any], path: Path) -> IntegerScheme:
    what = "compressed-tensors weights"
    _require(path, what, "format", fields.get("format"), ("pack-quantized",))
    groups = fields.get("config_groups")
    schemes = list(groups.values()) if isinstance(groups, Mapping) else []
    pairs = [(s, s["weights"]) for s in schemes if isinstance(s, Mapping) and isinstance(s.get("weights"), Mapping)]
    if not pairs or len(pairs) != len(schemes):
        raise UnsupportedConfigError(f"{path} describes {what} without sound config_groups: download it again.")
    for scheme, each in pairs:
        _require(path, what, "num_bits", each.get("num_bits"), (4, 8))
        _require(path, what, "type", each.get("type", "int"), ("int",))
        _require(path, what, "strategy", each.get("strategy"), ("group", "channel"))
        _require(path, what, "input_activations", scheme.get("input_activations"), (None,))
    return IntegerScheme(Method.COMPRESSED, min(int(each["num_bits"]) for _, each in pairs))


def _require(path: Path, what: str, key: str, value: object, known: tuple[object, ...]) -> None:
    if isinstance(value, bool) or value not in known:
        raise UnsupportedConfigError(
            f"{path} describes {what} whose {key} is {str(value)[:40]!r}: Tern reads {' and '.join(map(str, known))}, "
            "so get the model in another form."
        )


# --- the tensors that stand for one weight ---------------------------------------------------------------------------

_MAIN = {Method.GPTQ: "qweight", Method.AWQ: "qweight", Method.COMPRESSED: "weight_packed"}
_PARTS = {
    Method.GPTQ: {"qweight", "qzeros", "scales", "g_idx"},
    Method.AWQ: {"qweight", "qzeros", "scales"},
    Method.COMPRESSED: {"weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx"},
}
_NEEDED = {
    Method.GPTQ: ("qzeros", "scales"),
    Method.AWQ: ("qzeros", "scales"),
    Method.COMPRESSED: ("weight_scale", "weight_shape"),
}


def join_parts(
    entries: Iterable[TensorEntry], lost: Set[str], scheme: IntegerScheme, problems: Problems
) -> tuple[list[TensorEntry | QuantisedEntry], frozenset[str]]:
    """Put the tensors that stand for one weight together, under the name that the weight would have.

    Returns the entries and the names of `lost` weights; what does not fit goes to `problems`.
    """
    joined: list[TensorEntry | QuantisedEntry] = []
    groups: dict[str, dict[str, TensorEntry]] = defaultdict(dict)
    for entry in entries:
        stem, _, last = entry.name.rpartition(".")
        if last in _PARTS[scheme.method]:
            groups[stem][last] = entry
        else:
            joined.append(entry)
    gone = {_weight_name(name, scheme) for name in lost}
    files = MappedFiles()
    for stem, parts in groups.items():
        name = f"{stem}.weight"
        missing = [each for each in (_MAIN[scheme.method], *_NEEDED[scheme.method]) if each not in parts]
        if missing:
            if name not in gone:
                problems.add("missing", f"{stem}.{missing[0]}, needed beside {next(iter(parts.values())).name}")
                gone.add(name)
            continue
        found = _join(name, parts, scheme, files, problems)
        if found is None:
            gone.add(name)
        else:
            joined.append(found)
    return joined, frozenset(gone)


def _weight_name(name: str, scheme: IntegerScheme) -> str:
    stem, _, last = name.rpartition(".")
    return f"{stem}.weight" if last in _PARTS[scheme.method] else name


def _join(
    name: str, parts: Mapping[str, TensorEntry], scheme: IntegerScheme, files: MappedFiles, problems: Problems
) -> QuantisedEntry | None:
    """The weight that these tensors make up, or None after noting which of them does not fit the others."""
    main = parts[_MAIN[scheme.method]]
    if len(main.shape) != 2:
        problems.add("misshapen", f"{main.name} is {list(main.shape)} instead of a matrix")
        return None
    if scheme.method is Method.COMPRESSED:
        shape = _shape_of(parts["weight_shape"], files)
        bits = next((bits for bits in (4, 8) if (shape[0], _words(shape[1], bits)) == main.shape), None)
        if bits is None:
            problems.add("misshapen", f"{main.name} is {list(main.shape)}, which holds no weight {list(shape)}")
            return None
        scheme = IntegerScheme(scheme.method, bits, scheme.zero_offset)
    else:
        per = WORD_BITS // scheme.bits
        rows, columns = main.shape
        shape = (columns, rows * per) if scheme.method is Method.GPTQ else (columns * per, rows)
    entry = QuantisedEntry(name, scheme, shape, parts)
    wrong = [part for key, part in parts.items() if not _fits(entry, key, part)]
    for part in wrong:
        problems.add("misshapen", f"{part.name} is {part.dtype} {list(part.shape)}, which fits no weight {list(shape)}")
    return None if wrong else entry


def _shape_of(entry: TensorEntry, files: MappedFiles) -> tuple[int, int]:
    """What `weight_shape` says; zeros if it says nothing that can be."""
    if entry.dtype not in ("I32", "I64") or entry.shape != (2,):
        return 0, 0
    out, depth = files.tensor(entry).tolist()
    return (out, depth) if min(out, depth) > 0 else (0, 0)


def _words(count: int, bits: int) -> int:
    return -(-count * bits // WORD_BITS)


def _fits(entry: QuantisedEntry, key: str, part: TensorEntry) -> bool:
    """Whether a part has a dtype and shape that go with the weight's."""
    out, depth = entry.shape
    if key in ("g_idx", "weight_g_idx"):
        return part.dtype == "I32" and part.shape == (depth,)
    if key == "weight_shape":
        return True
    if key in ("qweight", "weight_packed"):
        return part.dtype == "I32"
    groups = _groups(entry)
    if groups == 0 or depth % groups:
        return False
    if key == "scales":
        return part.dtype in WEIGHT_DTYPES and part.shape == (groups, out)
    if key == "weight_scale":
        return part.dtype in WEIGHT_DTYPES and part.shape == (out, groups)
    words = _words(out, entry.scheme.bits)
    if key == "qzeros":
        return part.dtype == "I32" and part.shape == (groups, words) and words * WORD_BITS == out * entry.scheme.bits
    return (part.dtype, part.shape) in (("I32", (words, groups)), ("I8", (out, groups)))


def _groups(entry: QuantisedEntry) -> int:
    """Into how many groups the inputs are divided; 0 for scales that are no matrix."""
    compressed = entry.scheme.method is Method.COMPRESSED
    shape = entry.parts["weight_scale" if compressed else "scales"].shape
    return (shape[1] if compressed else shape[0]) if len(shape) == 2 else 0


# --- integers to floats ----------------------------------------------------------------------------------------------


def dequantise_rows(entry: QuantisedEntry, rows: slice, files: MappedFiles) -> Tensor:
    """Rows of the weight, [rows, in] float32. They begin at a multiple of eight.

    Raises `CheckpointError` for an input whose group there is not.
    """
    read = {key: files.tensor(part) for key, part in entry.parts.items()}
    make = {Method.GPTQ: _gptq, Method.AWQ: _awq, Method.COMPRESSED: _compressed}[entry.scheme.method]
    integers, zeros, scales = make(entry, read, rows)
    groups = scales.shape[1]
    index = read.get("g_idx", read.get("weight_g_idx"))
    if index is None:
        index = torch.arange(entry.shape[1]) // (entry.shape[1] // groups)
    elif bool(((index < 0) | (index >= groups)).any()):
        raise CheckpointError(f"{entry.name} has inputs in groups that there are not, of {groups}: download it again.")
    return (integers - zeros[:, index]) * scales.float()[:, index]


def _unpack(words: Tensor, bits: int, shifts: Iterable[int] | None = None) -> Tensor:
    """Integers from 0 on, [..., words * per] int32, of words [..., words]."""
    places = torch.tensor(list(range(0, WORD_BITS, bits) if shifts is None else shifts), dtype=torch.int32)
    return ((words[..., None] >> places) & ((1 << bits) - 1)).flatten(-2)


def _word_range(rows: slice, bits: int) -> slice:
    """The words that hold these integers of a row, the first of which begins a word."""
    return slice(rows.start * bits // WORD_BITS, _words(rows.stop, bits))


def _gptq(entry: QuantisedEntry, read: Mapping[str, Tensor], rows: slice) -> tuple[Tensor, Tensor, Tensor]:
    bits = entry.scheme.bits
    integers = _unpack(read["qweight"][:, rows].t(), bits)
    zeros = _unpack(read["qzeros"][:, _word_range(rows, bits)], bits) + entry.scheme.zero_offset
    return integers, zeros.t(), read["scales"][:, rows].t()


def _awq(entry: QuantisedEntry, read: Mapping[str, Tensor], rows: slice) -> tuple[Tensor, Tensor, Tensor]:
    words = _word_range(rows, entry.scheme.bits)
    integers, zeros = (_unpack(read[key][:, words], entry.scheme.bits, AWQ_SHIFTS) for key in ("qweight", "qzeros"))
    return integers.t(), zeros.t(), read["scales"][:, rows].t()


def _compressed(entry: QuantisedEntry, read: Mapping[str, Tensor], rows: slice) -> tuple[Tensor, Tensor, Tensor]:
    bits, half = entry.scheme.bits, 1 << (entry.scheme.bits - 1)
    integers = _unpack(read["weight_packed"][rows], bits)[:, : entry.shape[1]] - half
    scales = read["weight_scale"][rows]
    zeros = read.get("weight_zero_point")
    if zeros is None:
        return integers, torch.zeros(scales.shape, dtype=torch.int32), scales
    if zeros.dtype == torch.int8:
        return integers, zeros[rows].int(), scales
    packed = _unpack(zeros[_word_range(rows, bits)].t(), bits) - half
    return integers, packed[:, : scales.shape[0]].t(), scales
