"""Reads a request's body as a JSON object, within the limit, and refuses whatever later code could stumble over.

Knows bytes and JSON; knows no field of any API.
"""

from __future__ import annotations

import json
import math
from typing import Any, NamedTuple

from fastapi import Request
from starlette.requests import ClientDisconnect

from tern.errors import InvalidRequestError
from tern.server.errors import BodyTooLargeError, ClientGoneError
from tern.server.offload import Offload

JsonObject = dict[str, Any]

MAX_DEPTH = 200
"""Levels of lists and objects in a body: what handles them later may recurse."""


class Body(NamedTuple):
    """A request's body: its fields and how many bytes they were."""

    fields: JsonObject
    size: int


async def read_json(request: Request, limit: int, offload: Offload) -> Body:
    """The body as a JSON object.

    Raises `BodyTooLargeError` past `limit` bytes, whether or not the client announced the length, and
    `InvalidRequestError` for anything but an object of finite numbers and encodable text, and `ClientGoneError` if the
    client leaves before it has sent everything.
    """
    raw = await _read_limited(request, limit)
    return Body(await offload.run(len(raw), parse_json_object, raw), len(raw))


async def _read_limited(request: Request, limit: int) -> bytes:
    announced = request.headers.get("content-length", "")
    size = int(announced) if announced.isdecimal() and announced.isascii() else 0
    pieces: list[bytes] = []
    read = 0
    # A client that is still sending reads no answer, so up to a second `limit` of bytes is taken in and dropped.
    if size <= 2 * limit:
        try:
            async for piece in request.stream():
                read += len(piece)
                if read <= limit:
                    pieces.append(piece)
                if read > 2 * limit:
                    break
        except ClientDisconnect:
            raise ClientGoneError from None
    if max(read, size) > limit:
        raise BodyTooLargeError(
            f"The body has {_at_least(read, size)} bytes, more than the {limit} that this server reads: "
            "send less, or raise the server's limit."
        )
    return b"".join(pieces)


def _at_least(read: int, announced: int) -> str:
    return str(announced) if announced else f"at least {read}"


def parse_json_object(raw: bytes) -> JsonObject:
    """Decode UTF-8 JSON; raises `InvalidRequestError` in a sentence that says where it went wrong."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidRequestError(
            f"The body is not UTF-8: byte {error.start} is 0x{raw[error.start]:02x}.", code="invalid_utf8"
        ) from None
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise InvalidRequestError(
            f"The body is not JSON: {error.msg} at line {error.lineno}, column {error.colno}.", code="invalid_json"
        ) from None
    except RecursionError:
        raise _too_deep() from None
    except ValueError:
        raise InvalidRequestError(
            "The body's JSON has a whole number with too many digits.", code="invalid_json"
        ) from None
    if not isinstance(value, dict):
        raise InvalidRequestError("The body must be a JSON object, such as {...}.", code="invalid_json")
    _check_leaves(value)
    return value


_CHECKED = (float, str, dict, list)
"""What can be wrong or hold something wrong; a long list of whole numbers costs no paths."""


def _check_leaves(root: JsonObject) -> None:
    """Refuse numbers that JSON does not have, text that UTF-8 cannot hold and deep nesting, wherever they stand.

    Python's json reads `NaN`, `1e999` and lone surrogates such as `"\\ud800"`; a template or a tokenizer would fail on
    them much later.
    """
    pending: list[tuple[str, int, Any]] = [("", 1, root)]
    while pending:
        path, depth, value = pending.pop()
        if depth > MAX_DEPTH and isinstance(value, dict | list):
            raise _too_deep()
        if isinstance(value, float) and not math.isfinite(value):
            raise InvalidRequestError(f"{path} is {value}: it must be a finite number.", param=path or None)
        if isinstance(value, str):
            _check_text(path, value)
        elif isinstance(value, dict):
            for key in value:
                _check_text(path, key)
            pending.extend((f"{path}.{key}" if path else key, depth + 1, item) for key, item in value.items())
        elif isinstance(value, list):
            items = ((at, item) for at, item in enumerate(value) if isinstance(item, _CHECKED))
            pending.extend((f"{path}[{at}]", depth + 1, item) for at, item in items)


def _too_deep() -> InvalidRequestError:
    return InvalidRequestError(
        f"The body's JSON is nested too deeply: at most {MAX_DEPTH} levels are read.", code="invalid_json"
    )


def _check_text(path: str, text: str) -> None:
    if text.isascii():
        return
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InvalidRequestError(
            f"{path or 'The body'} holds half of a surrogate pair at character {error.start}: send whole characters.",
            param=path or None,
        ) from None
