"""The lines of a batch's input: each is a request to one of the application's routes, or it is said what is wrong.

    {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": [...]}}

Knows the format of the file; what a body must be is its route's business.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

from tern.errors import InvalidRequestError
from tern.server.body import JsonObject, parse_json_object

MAX_CUSTOM_ID = 512
FIELDS = ("custom_id", "method", "url", "body")


@dataclass(frozen=True)
class Line:
    """Line `number` of the input, counted from 1, that asks for `body` (JSON) at `url` under the name `custom_id`."""

    number: int
    custom_id: str
    url: str
    body: bytes


@dataclass(frozen=True)
class FaultyLine:
    """A line that is no request. `custom_id` is its name, if it has one that can be read."""

    number: int
    custom_id: str | None
    code: str
    message: str


class _FaultError(Exception):
    """What is wrong with a line: a stable word and a sentence."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


def read_lines(raw: Iterable[bytes], urls: Collection[str]) -> Iterator[Line | FaultyLine]:
    """The lines of a file in order, blank ones left out; only requests for one of `urls` are good."""
    seen: dict[str, int] = {}
    for number, line in enumerate(raw, 1):
        text = line.removeprefix(codecs.BOM_UTF8).strip()
        if not text:
            continue
        custom_id: str | None = None
        try:
            fields = _object(number, text)
            custom_id = _custom_id(number, fields, seen)
            yield Line(number, custom_id, _url(number, fields, urls), _body(number, fields))
        except _FaultError as fault:
            yield FaultyLine(number, custom_id, fault.code, str(fault))


def _object(number: int, text: bytes) -> JsonObject:
    try:
        fields = parse_json_object(text)
    except InvalidRequestError as error:
        sentence = str(error).replace("The body", f"Line {number}", 1)
        raise _FaultError(error.code or "invalid_json", sentence) from None
    for name in fields:
        if name not in FIELDS:
            raise _FaultError(
                "unknown_field", f"Line {number} has a field {name[:40]!r}: the fields are {', '.join(FIELDS)}."
            )
    return fields


def _custom_id(number: int, fields: JsonObject, seen: dict[str, int]) -> str:
    """The line's name, which no line before it has."""
    name = fields.get("custom_id")
    if not isinstance(name, str) or not 1 <= len(name) <= MAX_CUSTOM_ID:
        raise _FaultError(
            "invalid_custom_id",
            f"The custom_id of line {number} is {name!r:.40}: it must be text of 1 to {MAX_CUSTOM_ID} characters.",
        )
    if name in seen:
        raise _FaultError(
            "duplicate_custom_id",
            f"The custom_id of line {number}, {name[:40]!r}, is that of line {seen[name]} too: give each line its own.",
        )
    seen[name] = number
    return name


def _url(number: int, fields: JsonObject, urls: Collection[str]) -> str:
    method, url = fields.get("method", "POST"), fields.get("url")
    if method != "POST":
        raise _FaultError("invalid_method", f"The method of line {number} is {method!r:.40}: it must be 'POST'.")
    if not isinstance(url, str) or url not in urls:
        raise _FaultError(
            "invalid_url", f"The url of line {number} is {url!r:.80}: it must be one of {', '.join(sorted(urls))}."
        )
    return url


def _body(number: int, fields: JsonObject) -> bytes:
    body = fields.get("body")
    if not isinstance(body, dict):
        raise _FaultError("invalid_body", f"The body of line {number} is {body!r:.40}: it must be a JSON object.")
    if body.get("stream"):
        raise _FaultError(
            "stream_not_supported", f"The body of line {number} asks for a stream, which no file holds: leave it out."
        )
    return json.dumps(body, ensure_ascii=False).encode()
