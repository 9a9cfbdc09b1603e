"""Keeps web pages away from a server that asks for no key, and headers within bounds. Knows no route.

A page from anywhere may send requests to `localhost` from its reader's browser, in two ways. A simple POST needs no
permission, so the work is done although the page may not read the answer: such requests name their `Origin`, and a
foreign one is refused. And a page can have its own host's name point to 127.0.0.1 (DNS rebinding), whereupon the
browser takes the server for the page's own: such requests name that host, so a name of the domain system that this
server was not told of is refused. With API keys neither is needed: a page has no key.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from tern.errors import TernError
from tern.server.errors import ForbiddenError, HeadersTooLargeError, answer_for
from tern.server.options import ServerOptions, is_loopback

MAX_HEADERS = 128
MAX_HEADER_BYTES = 64 * 1024
"""Of all headers of a request together, names and values."""

_SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})


class Guard:
    """An application behind these checks; `refused` is told the status of each refusal."""

    def __init__(self, app: ASGIApp, *, options: ServerOptions, refused: Callable[[int], None]) -> None:
        self._app = app
        self._options = options
        self._refused = refused

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one ASGI request, or refuse it."""
        if scope["type"] == "http":
            try:
                check_headers(scope)
                check_browser(scope["method"], Headers(scope=scope), self._options)
            except TernError as error:
                answer = answer_for(error)
                self._refused(answer.status)
                await answer.response(scope["path"])(scope, receive, send)
                return
        await self._app(scope, receive, send)


def check_headers(scope: Scope) -> None:
    """Raise `HeadersTooLargeError` for more than anybody needs."""
    count = len(scope["headers"])
    size = sum(len(name) + len(value) for name, value in scope["headers"])
    if count > MAX_HEADERS or size > MAX_HEADER_BYTES:
        raise HeadersTooLargeError(
            f"The request has {count} headers of {size} bytes: at most {MAX_HEADERS} and {MAX_HEADER_BYTES} are read."
        )


def check_browser(method: str, headers: Headers, options: ServerOptions) -> None:
    """Raise `ForbiddenError` for what only a page from elsewhere would send to a server without keys."""
    if options.api_keys:
        return
    host, origin = headers.get("host", ""), headers.get("origin")
    if is_loopback(options.host) and not _is_own_host(host, options):
        raise ForbiddenError(
            f"The request is for the host {host[:100]!r}, which this server, open to this machine only, was not told "
            "of: start it with --allowed-hosts, or with --api-key.",
            code="host_not_allowed",
        )
    if origin is None or method in _SAFE_METHODS or "*" in options.allowed_origins or origin in options.allowed_origins:
        return
    if not _same_host(origin, host):
        raise ForbiddenError(
            f"The request comes from a page of {origin[:100]!r}: start the server with --allowed-origins for that, or "
            "with --api-key.",
            code="origin_not_allowed",
        )


def _is_own_host(host: str, options: ServerOptions) -> bool:
    """Whether no stranger can have this host's name point here: an address, a name without dots, or a known one."""
    name = _name_of(host)
    if "." not in name or name.endswith(".localhost") or name in {options.host.lower(), *options.allowed_hosts}:
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _name_of(host: str) -> str:
    try:
        return (urlsplit(f"//{host}").hostname or "").rstrip(".")
    except ValueError:  # brackets that hold no address
        return "no.host"


def _same_host(origin: str, host: str) -> bool:
    """Whether a page of this origin came from the server itself; which scheme a proxy speaks does not matter."""
    try:
        there, here = urlsplit(origin), urlsplit(f"//{host}")
        default = {"http": 80, "https": 443}.get(there.scheme)
        same_port = (there.port or default) == (here.port or default)
        return there.hostname is not None and there.hostname == here.hostname and same_port
    except ValueError:
        return False
