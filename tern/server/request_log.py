"""Around everything that answers: gives each request its id, and says at its end how it went.

Knows ASGI and the record; knows no route. The access line names method, path, status, time and counts of tokens. Query
strings, headers and bodies are never logged.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tern.server.request_record import RequestRecord, accepted_id, enter

access = logging.getLogger("tern.access")

ID_HEADER = "X-Request-Id"
TRACE_HEADERS = ("traceparent", "tracestate")
QUIET = frozenset({"/health", "/ready", "/metrics"})
"""Paths that machines ask for by the second: their lines are logged at the level debug."""

MAX_PATH = 200
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


class RequestLog:
    """An application with a record for each request; each of `observers` is shown it when the request has ended."""

    def __init__(
        self, app: ASGIApp, *, observers: Sequence[Callable[[RequestRecord], None]] = (), access_log: bool = True
    ) -> None:
        self._app = app
        self._observers = observers
        self._access_log = access_log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one ASGI request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = begin_record(scope)
        enter(record)

        async def watched(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                MutableHeaders(scope=message)[ID_HEADER] = record.request_id
            await send(message)
            if message["type"] == "http.response.body" and not message.get("more_body", False):
                record.complete = True

        try:
            await self._app(scope, receive, watched)
        finally:
            record.ended = time.monotonic()
            record.route = getattr(scope.get("route"), "path", "")
            for observe in self._observers:
                observe(record)
            if self._access_log:
                log_access(record)


def begin_record(scope: Scope) -> RequestRecord:
    """The record of a request that has just come."""
    headers = Headers(scope=scope)
    method = scope["method"]
    return RequestRecord(
        request_id=accepted_id(headers.get(ID_HEADER)),
        method=method if method in _METHODS else "other",
        path=scope["path"],
        trace_headers={name: headers[name] for name in TRACE_HEADERS if name in headers},
    )


def log_access(record: RequestRecord) -> None:
    """The line of a request that has ended."""
    path = record.path if len(record.path) <= MAX_PATH else record.path[:MAX_PATH] + "..."
    fields: dict[str, Any] = {
        "method": record.method,
        "path": path,
        "status": record.status,
        "duration_seconds": round(record.seconds, 6),
    }
    words = f"{record.method} {path} {record.status}, {record.seconds:.3f} s"
    if record.generates:
        fields |= {
            "outcome": record.outcome,
            "prompt_tokens": record.prompt_tokens,
            "generated_tokens": record.generated_tokens,
            "first_token_seconds": record.first_token_seconds,
            "answer_id": record.answer_id,
        }
        words += f", {record.outcome}: {record.prompt_tokens} prompt and {record.generated_tokens} generated tokens"
        if record.first_token_seconds is not None:
            words += f", the first after {record.first_token_seconds:.3f} s"
    level = logging.DEBUG if record.path in QUIET else logging.INFO
    access.log(level, "%s", words, extra={"fields": fields, "request_id": record.request_id})
