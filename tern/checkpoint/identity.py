"""What tells the weights of one model from those of another, without reading them all. Knows files, and no tensors.

Whatever is kept of a model's work beyond the process, such as keys and values, is valid for these weights alone.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from tern.checkpoint.inventory import INDEX_FILE, file_names
from tern.checkpoint.json_file import read_json_object
from tern.checkpoint.packed_files import CHECKSUMS
from tern.checkpoint.source import ModelSource
from tern.errors import CheckpointError

SAMPLES = 16
SAMPLE_BYTES = 4096


def weights_identity(source: ModelSource) -> str:
    """A name for the network and the weights that `source` describes: 64 hexadecimal digits.

    Random weights are named by their seed, those packed by Tern by the checksums in their index. Other files are named
    by their names, sizes, times of modification and `SAMPLES` samples of each: times alone may all be one constant,
    where an archive or an image was unpacked, and samples alone may miss a change of a few tensors.

    Raises `CheckpointError` if the files cannot be read.
    """
    weights: Any
    if source.synthetic_seed is not None:
        weights = ["synthetic", source.synthetic_seed]
    elif source.stored_bits is not None:
        metadata = read_json_object(source.directory / INDEX_FILE).get("metadata")
        weights = ["packed", source.stored_bits, metadata.get(CHECKSUMS) if isinstance(metadata, dict) else None]
    else:
        weights = ["files", [[path.name, *_stamp(path)] for path in _weight_files(source)]]
    description = json.dumps([repr(source.config), weights], sort_keys=True)
    return hashlib.sha256(description.encode()).hexdigest()


def _weight_files(source: ModelSource) -> list[Path]:
    if source.entries is not None:
        return sorted({entry.path for entry in source.entries})
    names = file_names(source.directory)
    return [source.directory / name for name in names if name.endswith(".safetensors")]


def _stamp(path: Path) -> tuple[int, int, str]:
    """Size, time of modification (ns) and a digest of samples that lie evenly over the file, its header among them."""
    try:
        with path.open("rb") as file:
            stat = os.fstat(file.fileno())
            digest = hashlib.sha256()
            for number in range(SAMPLES):
                file.seek(max(0, stat.st_size - SAMPLE_BYTES) * number // (SAMPLES - 1))
                digest.update(file.read(SAMPLE_BYTES))
            return stat.st_size, stat.st_mtime_ns, digest.hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror or error}): check the path.") from error
