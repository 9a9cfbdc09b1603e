"""A stored tensor -> floats in their place in the network, whatever form the files keep them in.

Knows the forms: plain floats, GGML's blocks, integers with scales. Knows no names and no layouts. What is computed from
the stored bytes is computed in runs of about `RUN` weights: beside the tensor that is filled little memory is needed,
and what lies between bytes and floats stays in the processor's caches, which is four times as fast.
"""

from __future__ import annotations

import math

from torch import Tensor

from tern.checkpoint.block_formats import BLOCK_FORMATS, dequantise
from tern.checkpoint.integer_formats import QuantisedEntry, dequantise_rows
from tern.checkpoint.safetensors_file import WEIGHT_DTYPES, MappedFiles, TensorEntry

RUN = 1 << 17  # 512 KB of floats
ROWS_TOGETHER = 32
"""Rows of integers are computed in multiples of this: words that hold several rows' integers are not cut."""

StoredWeight = TensorEntry | QuantisedEntry


def is_plain(entry: StoredWeight) -> bool:
    """Whether the file holds the floats themselves."""
    return entry.dtype in WEIGHT_DTYPES


def is_readable(entry: StoredWeight) -> bool:
    """Whether floats can be made of what the files hold."""
    return is_plain(entry) or entry.dtype in BLOCK_FORMATS or isinstance(entry, QuantisedEntry)


def fill(
    place: Tensor, entry: StoredWeight, files: MappedFiles, *, transposed: bool = False, expert: int | None = None
) -> None:
    """Write the floats of a stored tensor, or of one `expert` of a stored stack, to `place`, in its dtype."""
    if isinstance(entry, QuantisedEntry):
        _fill_from_integers(place.t() if transposed else place, entry, files)
        return
    shape = place.shape if expert is None else entry.shape
    if is_plain(entry):
        stored = files.tensor(entry)
        whole = stored.t() if transposed else stored.view(shape)
        place.copy_(whole if expert is None else whole[expert])
        return
    block = BLOCK_FORMATS[entry.dtype]
    rows = files.raw(entry).view(*shape[:-1], shape[-1] // block.weights * block.nbytes)
    rows = rows if expert is None else rows[expert]
    step = max(1, RUN // max(1, math.prod(place.shape[1:])))
    for start in range(0, place.shape[0], step):
        place[start : start + step].copy_(dequantise(rows[start : start + step], block))


def _fill_from_integers(place: Tensor, entry: QuantisedEntry, files: MappedFiles) -> None:
    out, depth = entry.shape
    step = max(1, RUN // (depth * ROWS_TOGETHER)) * ROWS_TOGETHER
    for start in range(0, out, step):
        rows = slice(start, min(out, start + step))
        place[rows].copy_(dequantise_rows(entry, rows, files))
