"""The JSON files beside a tokenizer. Knows how they are written, not what is in them for whom."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tern.errors import CheckpointError


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file, empty if there is no file. Raises `CheckpointError` for anything else in it."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}): download it again.") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds {type(value).__name__}, not an object: download it again.")
    return value


def token_text(value: object) -> str | None:
    """A token as configurations name it: text, or an object whose `content` is the text."""
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) else None
