"""The output of a batch: one line for each that was answered, written so that a batch that was cut off can go on.

Knows the file; knows no request. A line counts once its newline is there: what a cut-off left behind the last newline
is removed when the file is opened again.

    {"id": ..., "custom_id": "a", "response": {"status_code": 200, "request_id": ..., "body": {...}}, "error": null}
    {"id": ..., "custom_id": null, "response": null, "error": {"code": ..., "message": ...}}
"""

from __future__ import annotations

import fcntl
import json
import os
import time
import uuid
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from tern.errors import OptionError
from tern.server.batch.lines import FaultyLine, Line
from tern.server.body import JsonObject

SYNC_SECONDS = 1.0
"""How long a line may be in the system's hands alone before the disk has it."""

_FAULTY = "batch_line_"


class AnswerFile:
    """The answers in `path`, those of earlier runs included. `num_failed` of the `num_lines` carry an error.

    Use it in a `with` block; only one process at a time may. Raises `OptionError` for a file that cannot be written,
    that holds something else, or that another process writes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.num_lines = self.num_failed = 0
        self._custom_ids: set[str] = set()
        self._faulty: set[int] = set()
        self._synced = time.monotonic()
        self._file = _open(path)
        try:
            self._recall()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> AnswerFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.fsync(self._file.fileno())
        self._file.close()

    def has(self, line: Line | FaultyLine) -> bool:
        """Whether the line has been answered: by its name, or by its number if it is faulty."""
        if isinstance(line, FaultyLine):
            return line.number in self._faulty
        return line.custom_id in self._custom_ids

    def write(self, line: Line | FaultyLine, status: int = 0, body: Any = None) -> None:
        """Add the answer to a line: the `status` and `body` that its route gave, or what is wrong with it."""
        if isinstance(line, FaultyLine):
            answer = {"response": None, "error": {"code": line.code, "message": line.message}}
            answer_id = f"{_FAULTY}{line.number}"
        else:
            request_id = body.get("id") if isinstance(body, dict) else None
            response = {"status_code": status, "request_id": request_id or f"req_{uuid.uuid4().hex}", "body": body}
            answer = {"response": response, "error": None}
            answer_id = f"batch_req_{uuid.uuid4().hex}"
        entry = {"id": answer_id, "custom_id": line.custom_id, **answer}
        self._file.write(json.dumps(entry, ensure_ascii=False).encode() + b"\n")
        self._file.flush()
        self._count(entry)
        if time.monotonic() - self._synced >= SYNC_SECONDS:
            os.fsync(self._file.fileno())
            self._synced = time.monotonic()

    def _recall(self) -> None:
        """Read what earlier runs wrote, and cut off a line that has no end."""
        end = 0
        for number, raw in enumerate(self._file, 1):
            if not raw.endswith(b"\n"):
                break
            self._count(self._entry(number, raw))
            end += len(raw)
        self._file.truncate(end)
        self._file.seek(end)

    def _entry(self, number: int, raw: bytes) -> JsonObject:
        try:
            entry = json.loads(raw)
            if isinstance(entry, dict) and entry.keys() >= {"id", "custom_id", "response", "error"}:
                return entry
        except (ValueError, RecursionError):
            pass
        raise OptionError(f"{self.path} holds something else than answers of a batch (line {number}): name a new file.")

    def _count(self, entry: JsonObject) -> None:
        self.num_lines += 1
        response = entry["response"]
        self.num_failed += not isinstance(response, dict) or response.get("status_code") != 200
        number = str(entry["id"]).removeprefix(_FAULTY)
        if number.isdecimal():
            self._faulty.add(int(number))
        else:
            self._custom_ids.add(str(entry["custom_id"]))


def _open(path: Path) -> BinaryIO:
    """The file, made if there is none, for this process alone."""
    try:
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
    except OSError as error:
        raise OptionError(f"{path} cannot be written: {error.strerror}. Name another file.") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise OptionError(f"{path} is being written by another process: name another file, or wait for it.") from None
    return file
