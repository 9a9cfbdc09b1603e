"""Checkpoints whose weights are packed in the kernels' own layout: written once, then mapped as they are.

A directory like any other: safetensors shards with an index, `config.json`, tokenizer and template. A packed weight is
stored as its tensors `NAME.values`, `NAME.factors` and `NAME.scales`, the others under their canonical names. The index
holds a checksum of every tensor (XXH3, 64 bits), and `config.json`, which is written last, says

    "quantization_config": {"quant_method": "tern", "bits": 4, "format": 1}

While it is being written, `unfinished.json` says of what; a run that was cut short goes on where it stopped.
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import xxhash

from tern import ops
from tern.checkpoint.inventory import INDEX_FILE, file_names, take_inventory
from tern.checkpoint.json_file import read_json_object
from tern.checkpoint.problems import Problems
from tern.checkpoint.progress import byte_progress
from tern.checkpoint.quantisation import (
    PACKED_FORMAT,
    PACKED_METHOD,
    UNFINISHED,
    packed_bits,
    packed_parts,
    packed_shapes,
    parameter_bytes,
)
from tern.checkpoint.safetensors_file import (
    WEIGHT_DTYPES,
    MappedFiles,
    TensorEntry,
    read_entries,
    write_tensors,
)
from tern.checkpoint.source import ModelSource
from tern.errors import CheckpointError, OptionError
from tern.model import ErnieConfig, float32_parameters, parameter_shapes

CONFIG = "config.json"
WEIGHT_SUFFIXES = (".safetensors", ".safetensors.index.json", ".bin", ".pt", ".pth", ".gguf", ".pdparams", ".partial")
MAX_COPIED_BYTES = 200_000_000
CHECKSUMS = "xxh3_64"
SPARE_BYTES = 64 * 2**20  # that must stay free beside the weights

Parameters = Iterator[tuple[str, ops.Weight]]


# --- writing ---------------------------------------------------------------------------------------------------------


def write_packed(
    source: ModelSource,
    destination: Path,
    bits: int,
    dtype: torch.dtype,
    parameters: Callable[[Iterable[str]], Parameters],
    *,
    progress: bool = True,
) -> None:
    """Write the network of `source`, packed in `bits` bits, to the directory `destination`.

    `parameters(names)` yields those parameters, packed where they are to be; it is asked for a layer at a time, so that
    no more than a layer is in memory. Raises `OptionError` if `destination` holds something else, `CheckpointError` if
    it cannot be written.
    """
    shapes = _present_shapes(source, parameters)
    shards = _shards(shapes)
    try:
        _begin(source, destination, bits, sum(parameter_bytes(shapes, source.config, dtype, f"wint{bits}").values()))
        weight_map: dict[str, str] = {}
        checksums: dict[str, str] = {}
        total = sum(math.prod(shape) for shape in shapes.values())
        with byte_progress(f"Packing {source.name}", 2 * total, enabled=progress) as advance:
            for number, names in enumerate(shards, 1):
                path = destination / f"model-{number:05d}-of-{len(shards):05d}.safetensors"
                if not path.exists():
                    write_tensors(path, _tensors(parameters(names)))
                entries = read_entries(path)
                weight_map |= {entry.name: path.name for entry in entries}
                checksums |= _checksums(entries, MappedFiles())
                advance(2 * sum(math.prod(shapes[name]) for name in names))
        _finish(source, destination, bits, weight_map, checksums)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            reason = "the disk is full: make room and run the same command again, which goes on where this one stopped"
        else:
            reason = error.strerror or str(error)
        raise CheckpointError(f"{destination} cannot be written ({reason}).") from error


def _present_shapes(
    source: ModelSource, parameters: Callable[[Iterable[str]], Parameters]
) -> dict[str, tuple[int, ...]]:
    """The parameters to write: all, less those of an MTP block that the source lacks."""
    shapes = packed_shapes(parameter_shapes(source.config), source.config)
    mtp = [name for name in shapes if name.startswith("mtp.")]
    lacking = mtp and next(parameters(mtp[:1]), None) is None
    return {name: shape for name, shape in shapes.items() if not (lacking and name in mtp)}


def _shards(names: Iterable[str]) -> list[list[str]]:
    """The parameters of each file: those of one layer, or those of no layer."""
    groups: dict[str, list[str]] = {}
    for name in names:
        room, number, *_ = [*name.split("."), ""]
        groups.setdefault({"layers": f"layers.{number}", "mtp": "mtp"}.get(room, ""), []).append(name)
    return list(groups.values())


def _begin(source: ModelSource, destination: Path, bits: int, needed: int) -> None:
    """Make the directory, or take up one that a run of the same work left unfinished."""
    destination.mkdir(parents=True, exist_ok=True)
    present = file_names(destination)
    work = {"source": source.name, "bits": bits, "format": PACKED_FORMAT, "files": _stamps(source)}
    marker = destination / UNFINISHED
    if present and UNFINISHED not in present:
        raise OptionError(f"{destination} is not empty: give a new directory for the packed checkpoint.")
    if present and read_json_object(marker) != work:
        raise OptionError(
            f"{destination} is the unfinished work of another command: remove it, or give another directory."
        )
    for name in present:
        if name.endswith(".partial"):
            (destination / name).unlink()
    done = sum((destination / name).stat().st_size for name in file_names(destination))
    free = shutil.disk_usage(destination).free
    if needed - done + SPARE_BYTES > free:
        raise CheckpointError(
            f"{destination} has {free / 1e9:.1f} GB free, but the packed weights take {(needed - done) / 1e9:.1f} GB: "
            "make room, or give a directory on another disk."
        )
    marker.write_text(json.dumps(work), encoding="utf-8")


def _stamps(source: ModelSource) -> dict[str, list[int]]:
    """Sizes and times of the source's files, by which a changed source is noticed."""
    if source.entries is None:
        names = file_names(source.directory)
    else:
        names = sorted({entry.path.name for entry in source.entries})
    stats = {name: (source.directory / name).stat() for name in names}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}


def _tensors(parameters: Parameters) -> dict[str, torch.Tensor]:
    """The tensors that a file holds for these parameters."""
    tensors: dict[str, torch.Tensor] = {}
    for name, weight in parameters:
        if isinstance(weight, ops.PackedWeight):
            parts = {"values": weight.values, "factors": weight.factors, "scales": weight.scales}
            tensors |= {f"{name}.{part}": tensor for part, tensor in parts.items() if tensor is not None}
        else:
            assert isinstance(weight, torch.Tensor), "files hold weights as processors take them"
            tensors[name] = weight
    return tensors


def _finish(
    source: ModelSource, destination: Path, bits: int, weight_map: dict[str, str], checksums: dict[str, str]
) -> None:
    """Everything beside the weights; `config.json` makes the checkpoint whole."""
    for name, content in (source.text_files or {}).items():
        (destination / name).write_bytes(content)
    for name in file_names(source.directory) if source.text_files is None else ():
        path = source.directory / name
        if name == CONFIG or name.endswith(WEIGHT_SUFFIXES) or not path.is_file() or name.startswith("."):
            continue
        if path.stat().st_size <= MAX_COPIED_BYTES:
            shutil.copyfile(path, destination / name)
    _write_json(destination / INDEX_FILE, {"metadata": {CHECKSUMS: checksums}, "weight_map": weight_map})
    packing = {"quant_method": PACKED_METHOD, "bits": bits, "format": PACKED_FORMAT}
    config = {**source.raw_config, "quantization_config": packing}
    _write_json(destination / CONFIG, config)
    (destination / UNFINISHED).unlink()


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(path)


# --- reading ---------------------------------------------------------------------------------------------------------


def load_packed(
    source: ModelSource, bits: int, dtype: torch.dtype | None, *, progress: bool = True
) -> dict[str, ops.Weight]:
    """The parameters of a packed checkpoint, mapped where they lie; norms and the embedding in `dtype`, if given.

    Every tensor is compared with its checksum, by the mapping that the kernels will read, so that no step has to wait
    for a page to be mapped. Raises `CheckpointError` that lists
    all that is missing, misshapen or damaged.
    """
    problems = Problems()
    entries = {entry.name: entry for entry in take_inventory(source.directory, problems).entries}
    expected = _expected(source.config, bits, entries)
    _compare(entries, expected, problems)
    files = MappedFiles()
    if not problems:
        _verify(source, list(entries.values()), files, problems, progress)
    if problems:
        problems.fail(source.directory)
    wide = float32_parameters(source.config)
    tensors: dict[str, ops.Weight] = {}
    for name, shape in packed_shapes(parameter_shapes(source.config), source.config).items():
        if packed_bits(name, f"wint{bits}") and f"{name}.values" in entries:
            found = {part: files.tensor(entries[f"{name}.{part}"]) for part in _parts(name, bits)}
            rows, width = shape[-2:]
            tensors[name] = ops.PackedWeight(
                found["values"], found.get("factors"), found["scales"], rows, width, packed_parts(name)
            )
        elif name in entries:
            tensor = files.tensor(entries[name])
            tensors[name] = tensor if dtype is None or name in wide else tensor.to(dtype)
    return tensors


def _parts(name: str, bits: int) -> tuple[str, ...]:
    return ("values", "factors", "scales") if packed_bits(name, f"wint{bits}") == 4 else ("values", "scales")


def _expected(
    config: ErnieConfig, bits: int, entries: Mapping[str, TensorEntry]
) -> dict[str, tuple[tuple[int, ...], frozenset[str]]]:
    """Every tensor of the files: its shape and the dtypes that it may have. MTP may be absent as a whole."""
    floats = frozenset(WEIGHT_DTYPES)
    wide = float32_parameters(config)
    has_mtp = any(name.startswith("mtp.") for name in entries)
    expected: dict[str, tuple[tuple[int, ...], frozenset[str]]] = {}
    for name, shape in packed_shapes(parameter_shapes(config), config).items():
        if name.startswith("mtp.") and not has_mtp:
            continue
        packed = packed_bits(name, f"wint{bits}")
        if packed is None:
            expected[name] = (shape, frozenset({"F32"}) if name in wide else floats)
            continue
        shapes = ops.packed_shapes(shape, packed, packed_parts(name))
        for part in _parts(name, bits):
            expected[f"{name}.{part}"] = (shapes[part], frozenset({"F32" if part == "scales" else "U8"}))
    return expected


def _compare(
    entries: Mapping[str, TensorEntry],
    expected: Mapping[str, tuple[tuple[int, ...], frozenset[str]]],
    problems: Problems,
) -> None:
    for name, (shape, dtypes) in expected.items():
        entry = entries.get(name)
        if entry is None:
            problems.add("missing", f"{name} {list(shape)}")
        elif entry.shape != shape or entry.dtype not in dtypes:
            wanted = f"{' or '.join(sorted(dtypes))} {list(shape)}"
            problems.add("misshapen", f"{name} is {entry.dtype} {list(entry.shape)} instead of {wanted}")
    for name in entries.keys() - expected.keys():
        problems.add("surplus", f"{name} has no place in the network of config.json")


def _verify(
    source: ModelSource, entries: list[TensorEntry], files: MappedFiles, problems: Problems, progress: bool
) -> None:
    """Compare every tensor with its checksum."""
    metadata = read_json_object(source.directory / INDEX_FILE).get("metadata")
    noted = metadata.get(CHECKSUMS) if isinstance(metadata, dict) else None
    if not isinstance(noted, dict):
        problems.add("damaged file", f"{INDEX_FILE} holds no checksums; pack the checkpoint again")
        return
    total = sum(entry.nbytes for entry in entries)
    with byte_progress(f"Checking {source.name}", total, enabled=progress) as advance:
        for name, checksum in _checksums(entries, files, advance).items():
            if noted.get(name) != checksum:
                entry = next(entry for entry in entries if entry.name == name)
                problems.add("damaged file", f"{name} in {entry.path.name} is not what was written; pack it again")


def _checksums(
    entries: list[TensorEntry], files: MappedFiles, advance: Callable[[int], None] = lambda _: None
) -> dict[str, str]:
    """The checksum of every tensor, read on several threads."""
    views = {entry.name: files.tensor(entry) for entry in entries}

    def checksum(entry: TensorEntry) -> str:
        content = views[entry.name].reshape(-1).view(torch.uint8).numpy().data
        return str(xxhash.xxh3_64_hexdigest(content))

    checksums: dict[str, str] = {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for entry, digest in zip(entries, pool.map(checksum, entries), strict=True):
            checksums[entry.name] = digest
            advance(entry.nbytes)
    return checksums
