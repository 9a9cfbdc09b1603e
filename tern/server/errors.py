"""How an exception becomes an answer in the path's envelope. The only module that pairs exceptions with HTTP statuses.

```
{"error": {"message": one sentence, "type": class of error, "param": the field or null, "code": a stable word or null}}
{"type": "error", "error": {"type": class of error, "message": one sentence}}            below /v1/messages: Anthropic's
```
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tern.errors import (
    EngineUnavailableError,
    InvalidRequestError,
    QueueFullError,
    TernError,
    UnknownModelError,
)

logger = logging.getLogger("tern.server")

RETRY_WHEN_UNAVAILABLE = 5
"""Seconds after which a client may ask a server again that is loading or draining."""


ANTHROPIC_PATH = "/v1/messages"
"""Where errors come in Anthropic's envelope: here, and below."""

ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
"""Anthropic's word for a status; any other is `invalid_request_error` or, from 500, `api_error`."""


METHODS = ("DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT")


class BodyTooLargeError(InvalidRequestError):
    """The request's body is longer than the server reads."""


class AuthenticationError(TernError):
    """The request carries no key, or a wrong one."""


class NotKeptError(TernError):
    """The request asks for an earlier answer; none is kept."""


class ForbiddenError(TernError):
    """The request comes from where this server takes none; `code` says what about it is foreign."""

    def __init__(self, message: str, *, code: str) -> None:
        super().__init__(message)
        self.code = code


class HeadersTooLargeError(TernError):
    """The request's headers are more than the server reads."""


class ClientGoneError(TernError):
    """The client closed the connection before the answer was ready."""


class RequestTimeoutError(TernError):
    """The request was not done within the time that the server gives one."""


class SlowReaderError(TernError):
    """The client took its answer so slowly that too much of it waited here."""


class GenerationError(TernError):
    """The engine gave up on a request through no fault of the caller; the text is meant for the user."""


@dataclass(frozen=True)
class ErrorAnswer:
    """The status, envelope and headers that answer an exception."""

    status: int
    message: str
    type: str
    param: str | None = None
    code: str | None = None
    headers: dict[str, str] = field(default_factory=dict)

    def body(self, path: str = "") -> dict[str, Any]:
        """The envelope of the errors of `path`, as a JSON value."""
        if path == ANTHROPIC_PATH or path.startswith(ANTHROPIC_PATH + "/"):
            other = "invalid_request_error" if self.status < 500 else "api_error"
            kind = ANTHROPIC_TYPES.get(self.status, other)
            return {"type": "error", "error": {"type": kind, "message": self.message}}
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def response(self, path: str) -> JSONResponse:
        """The envelope as the HTTP response to a request for `path`."""
        return JSONResponse(self.body(path), status_code=self.status, headers=self.headers)


def answer_for(error: Exception) -> ErrorAnswer:
    """The answer to any exception; what is not ours is logged and answered without its details."""
    message = str(error)
    match error:
        case BodyTooLargeError():
            return ErrorAnswer(
                413, message, "invalid_request_error", None, "request_too_large", {"Connection": "close"}
            )
        case InvalidRequestError():
            return ErrorAnswer(400, message, "invalid_request_error", error.param, error.code)
        case AuthenticationError():
            headers = {"WWW-Authenticate": "Bearer"}
            return ErrorAnswer(401, message, "authentication_error", None, "invalid_api_key", headers)
        case ForbiddenError():
            return ErrorAnswer(403, message, "permission_error", None, error.code)
        case HeadersTooLargeError():
            return ErrorAnswer(431, message, "invalid_request_error", None, "headers_too_large")
        case UnknownModelError():
            return ErrorAnswer(404, message, "invalid_request_error", "model", "model_not_found")
        case NotKeptError():
            return ErrorAnswer(404, message, "invalid_request_error", None, "not_found")
        case QueueFullError():
            headers = {"Retry-After": str(max(1, math.ceil(error.retry_after)))}
            return ErrorAnswer(429, message, "rate_limit_error", None, "queue_full", headers)
        case EngineUnavailableError():
            headers = {"Retry-After": str(RETRY_WHEN_UNAVAILABLE)}
            return ErrorAnswer(503, message, "service_unavailable_error", None, "unavailable", headers)
        case ClientGoneError():  # nginx's status; nobody reads it but the log
            return ErrorAnswer(499, "The client closed the connection.", "invalid_request_error", None, "client_gone")
        case RequestTimeoutError():  # not 408, which blames the client for sending too slowly
            return ErrorAnswer(504, message, "timeout_error", None, "timeout")
        case SlowReaderError():  # only ever an event: who reads nothing gets no answer
            return ErrorAnswer(408, message, "invalid_request_error", None, "client_too_slow")
        case GenerationError():
            return ErrorAnswer(500, message, "server_error", None, "generation_failed")
        case HTTPException():
            return _http_answer(error)
    logger.error("unexpected error", exc_info=error)
    return ErrorAnswer(500, "The server failed on this request; its log says why.", "server_error", None, "internal")


def _http_answer(error: HTTPException) -> ErrorAnswer:
    """The answer to what the router itself refuses: a path or a method that no route has."""
    messages = {
        404: "There is no such path: GET / lists what this server answers.",
        405: "This path does not answer that method: GET / lists what this server answers.",
    }
    codes = {404: "not_found", 405: "method_not_allowed"}
    return ErrorAnswer(
        error.status_code,
        messages.get(error.status_code, str(error.detail)),
        "invalid_request_error" if error.status_code < 500 else "server_error",
        None,
        codes.get(error.status_code),
        dict(error.headers or {}),
    )


def install_error_handlers(app: FastAPI, refused: Callable[[int], None]) -> None:
    """Make every exception of every route answer in its envelope; `refused` is told the status of each."""

    async def answer(request: Request, error: Exception) -> JSONResponse:
        found = answer_for(error)
        if found.status == 405:
            found.headers["Allow"] = _methods_of(request)
        refused(found.status)
        return found.response(request.url.path)

    for kind in (TernError, HTTPException):
        app.add_exception_handler(kind, answer)
    app.add_middleware(_UnexpectedErrors, refused=refused)


def _methods_of(request: Request) -> str:
    """The methods that the request's path answers; the router names only those of the first route that has the path."""
    tried = [{**request.scope, "method": method} for method in METHODS]
    fitting = [scope for scope in tried if any(route.matches(scope)[0] is Match.FULL for route in request.app.routes)]
    return ", ".join(scope["method"] for scope in fitting)


class _UnexpectedErrors:
    """Answers what no route expected.

    Starlette's own handler answers too, but raises the error again, whereupon uvicorn drops the connection.
    """

    def __init__(self, app: ASGIApp, refused: Callable[[int], None]) -> None:
        self._app = app
        self._refused = refused

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def watched(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except Exception as error:
            if started:
                raise
            found = answer_for(error)
            self._refused(found.status)
            await found.response(scope["path"])(scope, receive, send)
