"""How log lines look: for people or as JSON, with the request's id, and never more than one line for one event.

Knows logging; knows nothing of what is logged. Text from outside (a path, a tool's name, an error that quotes a
request) may hold anything: what could end a line, colour a terminal or turn the direction of reading is spelt out.
"""

from __future__ import annotations

import json
import logging
import time
from typing import Any

from tern.errors import OptionError
from tern.server.request_record import current_record

LEVELS = ("debug", "info", "warning", "error")
FORMATS = ("text", "json")
_CONTINUED = "\n    | "
"""Begins each line of a traceback: no line of one can pass for a log line of its own."""


def configure_logging(level: str, form: str = "text", uvicorn_level: str | None = None) -> None:
    """Write all log lines of `level` and above to standard error; `uvicorn_level` holds for what uvicorn logs.

    Raises `OptionError` for a level or a format that there is not.
    """
    for name, value, known in (
        ("--log-level", level, LEVELS),
        ("--uvicorn-log-level", uvicorn_level or level, LEVELS),
        ("--log-format", form, FORMATS),
    ):
        if value.lower() not in known:
            raise OptionError(f"{name} is {value!r}: it must be {', '.join(known[:-1])} or {known[-1]}.")
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines() if form.lower() == "json" else TextLines())
    logging.basicConfig(level=level.upper(), handlers=[handler])
    if uvicorn_level is not None:
        logging.getLogger("uvicorn").setLevel(uvicorn_level.upper())


def one_line(text: str) -> str:
    """The text with everything that is not printable spelt out, as in `\\n` and `\\x1b`; letters of any script stay."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def request_id_of(record: logging.LogRecord) -> str | None:
    """The id of the request that a line is about: what the line says itself, else that of the task that wrote it."""
    current = current_record()
    found = getattr(record, "request_id", None) or (current and current.request_id)
    return None if found is None else str(found)


class TextLines(logging.Formatter):
    """`12:00:00 INFO tern.server [request id]: message`."""

    def format(self, record: logging.LogRecord) -> str:
        """One line, and below it those of a traceback, each marked."""
        request_id = request_id_of(record)
        about = f" [{one_line(request_id)}]" if request_id else ""
        at = time.strftime("%H:%M:%S", time.localtime(record.created))
        line = f"{at} {record.levelname} {record.name}{about}: {one_line(record.getMessage())}"
        return line + "".join(_CONTINUED + one_line(part) for part in _traceback(self, record))


class JsonLines(logging.Formatter):
    """One JSON object a line: time (UTC), level, logger, message, request_id, and what the line has of its own."""

    def format(self, record: logging.LogRecord) -> str:
        """The object; json.dumps leaves no line break and no control character."""
        at = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        entry: dict[str, Any] = {
            "time": f"{at}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if request_id := request_id_of(record):
            entry["request_id"] = request_id
        entry.update(getattr(record, "fields", {}))
        if parts := _traceback(self, record):
            entry["exception"] = "\n".join(parts)
        return json.dumps(entry)


def _traceback(formatter: logging.Formatter, record: logging.LogRecord) -> list[str]:
    """The lines of what a record says of an exception; the text of the exception itself may have several."""
    parts = [formatter.formatException(record.exc_info)] if record.exc_info else []
    if record.stack_info:
        parts.append(record.stack_info)
    return [line for part in parts for line in part.split("\n")]
