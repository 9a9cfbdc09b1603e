"""Which tensors a checkpoint directory holds, in which file each one lies. Knows no tensor names and no network.

A checkpoint is one `model.safetensors`, which counts first, or shards listed by `model.safetensors.index.json`, whose
`weight_map` gives the file of each tensor. Pickle files can run code when they are read: they are refused by name and
never opened.
"""

from __future__ import annotations

import os
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from tern.checkpoint.json_file import read_json_object
from tern.checkpoint.problems import Problems
from tern.checkpoint.safetensors_file import TensorEntry, read_entries
from tern.errors import CheckpointError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PICKLE_SUFFIXES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pdparams"}


@dataclass(frozen=True)
class Inventory:
    """The tensors that can be read, and the names of those whose file is missing or damaged, which is reported."""

    entries: list[TensorEntry] = field(default_factory=list)
    lost: frozenset[str] = frozenset()


def file_names(directory: Path) -> list[str]:
    """The names of what a directory holds, sorted. Raises `CheckpointError` if it cannot be read."""
    try:
        return sorted(os.listdir(directory))
    except OSError as error:
        raise CheckpointError(f"{directory} cannot be read ({error.strerror}): check the path.") from error


def take_inventory(directory: Path, problems: Problems) -> Inventory:
    """List the tensors of the checkpoint in `directory`; what is wrong with the files goes to `problems`."""
    present = file_names(directory)
    if SINGLE_FILE in present:
        return Inventory(_read_file(directory / SINGLE_FILE, problems) or [])
    if INDEX_FILE in present:
        return _read_shards(directory, present, problems)
    problems.add("no weights", _explain_absence(present))
    return Inventory()


def _read_file(path: Path, problems: Problems) -> list[TensorEntry] | None:
    """The tensors of one file, or None after noting why it cannot be read."""
    try:
        return read_entries(path)
    except CheckpointError as error:
        for finding in error.problems or (str(error),):
            problems.add("damaged file", finding)
        return None


def _read_shards(directory: Path, present: list[str], problems: Problems) -> Inventory:
    """The tensors of all shards. A tensor that its shard lacks is left to whoever needs it to miss it."""
    names_of: dict[str, set[str]] = defaultdict(set)
    for name, shard in _read_weight_map(directory / INDEX_FILE, problems).items():
        names_of[shard].add(name)
    there = set(present)
    entries: list[TensorEntry] = []
    lost: set[str] = set()
    for shard, expected in sorted(names_of.items()):
        if shard not in there:
            problems.add("missing file", f"{shard}, which holds {len(expected)} tensors; download the checkpoint again")
            lost |= expected
            continue
        found = _read_file(directory / shard, problems)
        if found is None:
            lost |= expected
            continue
        for entry in found:
            if entry.name in expected:
                entries.append(entry)
            else:
                problems.add("surplus", f"{entry.name} in {shard}, where {INDEX_FILE} does not place it")
    return Inventory(entries, frozenset(lost))


def _read_weight_map(path: Path, problems: Problems) -> dict[str, str]:
    """Tensor name -> file name, without the records that could lead outside the directory."""
    try:
        weight_map = read_json_object(path).get("weight_map")
    except CheckpointError as error:
        problems.add("damaged file", str(error))
        return {}
    if not isinstance(weight_map, dict) or not weight_map:
        problems.add("damaged file", f"{path.name} has no weight_map; download it again")
        return {}
    refused = {str(file) for file in weight_map.values() if not _is_plain_shard_name(file)}
    for file in sorted(refused):
        problems.add("refused file", f"{path.name} names {file[:200]!r}; a shard is a .safetensors file beside it")
    return {name: file for name, file in weight_map.items() if str(file) not in refused}


def _is_plain_shard_name(file: object) -> bool:
    return (
        isinstance(file, str)
        and file.endswith(".safetensors")
        and not any(character in file for character in "/\\:\0")
        and not file.startswith(".")
    )


def _explain_absence(present: list[str]) -> str:
    pickles = [name for name in present if Path(name).suffix in PICKLE_SUFFIXES]
    if pickles:
        return (
            f"{pickles[0]} is a pickle, which can run code when it is read, and is refused; "
            "use the model's safetensors files or convert it"
        )
    other = [name for name in present if name.endswith((".safetensors", ".gguf"))]
    beside = f" (found {', '.join(other[:4])})" if other else ""
    return f"neither {SINGLE_FILE} nor {INDEX_FILE} is there{beside}; give the directory of a whole checkpoint"
