"""Reads the JSON documents of a checkpoint within bounds. Knows no meaning of their keys."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from tern.errors import CheckpointError

MAX_JSON_BYTES = 100_000_000


def read_json_object(path: Path) -> dict[str, Any]:
    """Return the object that a JSON file holds.

    Raises `CheckpointError` if the file is unreadable, larger than `MAX_JSON_BYTES`, not UTF-8, not JSON or no object.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:  # what a link leads to may be longer than it says
            content = b"" if size > MAX_JSON_BYTES else file.read(MAX_JSON_BYTES + 1)
        if (size := max(size, len(content))) > MAX_JSON_BYTES:
            raise CheckpointError(f"{path} has {size} bytes; a JSON file of a checkpoint has at most {MAX_JSON_BYTES}.")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror or error}): check the path.") from error
    return parse_json_object(content, f"{path}")


def parse_json_object(content: bytes, origin: str) -> dict[str, Any]:
    """Return the object that `content` encodes; `origin` names it in the `CheckpointError` otherwise raised.

    NaN and infinities, which JSON does not have, and a key given twice are refused.
    """
    try:
        value = json.loads(content.decode("utf-8"), parse_constant=_refuse_constant, object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise CheckpointError(f"{origin} is not valid JSON ({reason}): download or write it again.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{origin} holds {type(value).__name__} where a JSON object must stand.")
    return value


def _refuse_constant(text: str) -> float:
    raise ValueError(f"{text} is not a JSON number")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        key, times = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key {key[:100]!r} occurs {times} times")
    return result
