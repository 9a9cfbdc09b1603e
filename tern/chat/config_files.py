"""The files of a checkpoint that concern text. Knows where they are and how JSON is written, not what is in them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tern.errors import CheckpointError

MAX_FILE_BYTES = 200_000_000
"""Several times the largest tokenizer there is."""


@dataclass(frozen=True)
class TextFiles:
    """The files in `directory`, or those `given` in their place, name -> bytes, where a checkpoint is a single file."""

    directory: Path
    given: Mapping[str, bytes] | None = None

    def has(self, name: str) -> bool:
        """Whether there is such a file."""
        return self.path(name).is_file() if self.given is None else name in self.given

    def path(self, name: str) -> Path:
        """Where the file is, or would be: for messages."""
        return self.directory / name

    def read(self, name: str) -> bytes:
        """The bytes of a file that there is. Raises `CheckpointError` if it cannot be read or is absurdly large."""
        if self.given is not None:
            return self.given[name]
        path = self.path(name)
        try:
            size = path.stat().st_size
            with path.open("rb") as file:  # what a link leads to may be longer than it says
                content = b"" if size > MAX_FILE_BYTES else file.read(MAX_FILE_BYTES + 1)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read ({error.strerror or error}).") from None
        if max(size, len(content)) > MAX_FILE_BYTES:
            raise CheckpointError(
                f"{path} has {max(size, len(content))} bytes: a tokenizer's or template's file has at most "
                f"{MAX_FILE_BYTES}."
            )
        return content

    def read_text(self, name: str) -> str:
        """The text of a file that there is. Raises `CheckpointError` if it cannot be read or is not UTF-8."""
        try:
            return self.read(name).decode()
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{self.path(name)} is not UTF-8 ({error}): download it again.") from None

    def read_object(self, name: str) -> dict[str, Any]:
        """The object in a JSON file, empty if there is no file. Raises `CheckpointError` for anything else in it."""
        if not self.has(name):
            return {}
        try:
            value = json.loads(self.read(name).decode())
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{self.path(name)} is not valid JSON ({error}): download it again.") from None
        if not isinstance(value, dict):
            raise CheckpointError(f"{self.path(name)} holds {type(value).__name__}, not an object: download it again.")
        return value


def token_text(value: object) -> str | None:
    """A token as configurations name it: text, or an object whose `content` is the text."""
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) else None
