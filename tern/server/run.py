"""Serving: sockets, the metrics port, signals and the end. Knows uvicorn; knows no route.

listen          -> every request gets 503 while the model loads; a signal ends that at once
SIGTERM, SIGINT -> new requests get 503, /ready says no -> what runs is finished, for at most `shutdown_timeout`
                -> the engine stops, what is left ends with an error -> connections close -> return
a second signal -> the last two steps at once
the engine fails -> /health says so, open requests end with an error -> connections close -> `EngineFailedError`
"""

from __future__ import annotations

import gc
import logging
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

import uvicorn
from prometheus_client import CollectorRegistry, start_http_server
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from tern.chat import ChatProtocol
from tern.errors import EngineFailedError, EngineUnavailableError, OptionError
from tern.server.app import create_app
from tern.server.connections import REQUEST_SECONDS, protocol_settings
from tern.server.engine_door import EngineDoor, ModelIdentity
from tern.server.errors import answer_for
from tern.server.options import ServerOptions, is_loopback
from tern.server.page import wants_html
from tern.server.request_log import RequestLog
from tern.server.state import AppState
from tern.server.tracing import Tracing

logger = logging.getLogger("tern.server")

FLUSH_SECONDS = 5
"""What answers that are already generated get to reach their clients once the engine has stopped."""

SIGNAL_SECONDS = 0.2
"""How long a signal may go unnoticed.

Python runs handlers on the main thread, but the system may hand a signal to any other, or just before the main thread
begins to wait: neither wakes it.
"""

IDLE_CONNECTION_SECONDS = 75
"""How long a connection may idle between requests: longer than the pools of common clients and proxies keep theirs."""

LOADING_PAGE_SECONDS = 2
"""After how long a browser asks for the page again while the model loads."""

DEAF_CLIENT_SECONDS = 300
"""How long a client may take nothing of what was sent before the system closes its connection (where it is Linux).

Else one that vanished without a word, or never reads, would keep its connection for as long as the server lives.
"""

SWITCH_SECONDS = 0.001
"""After which a thread that works on a text lets the event loop run, if that has something to do."""


@dataclass(frozen=True)
class Loaded:
    """What a server answers with: an engine that is not started yet, the text protocol and the model's identity."""

    engine: EngineDoor
    protocol: ChatProtocol
    model: ModelIdentity


def run_server(
    load: Callable[[], Loaded],
    options: ServerOptions | None = None,
    *,
    on_ready: Callable[[str, str], None] | None = None,
) -> None:
    """Listen, load, start the engine's thread and serve until SIGTERM or SIGINT; return when everything has ended.

    Call it on the main thread, where `load` runs too. `on_ready` is called with the model's name and the server's URL
    once requests are taken. Raises `OptionError` if an address is taken or is none of this machine's,
    `EngineFailedError` if the engine dies under the server, and whatever `load` raises.
    """
    options = options or ServerOptions()
    sys.setswitchinterval(SWITCH_SECONDS)
    gate, registry = _LoadingGate(options), CollectorRegistry()
    with (
        listen(options.host, options.port) as listener,
        metrics_server(options, registry),
        _tracing(options) as tracing,
        ThreadPoolExecutor(1, "tern-http") as pool,
    ):
        server = uvicorn.Server(server_config(gate, max_connections=options.max_connections))
        logger.info("listening on %s: %s", _url(listener), _who_may_ask(options))
        ending = _Ending(server, options.shutdown_timeout)
        try:
            with ending.on_signals():
                serving = pool.submit(server.run, sockets=[listener])
                loaded = load()
                state = AppState.create(loaded.engine, loaded.protocol, loaded.model, options, registry, tracing)
                app = create_app(state)
                with running(state), _collector_spared():
                    ending.engine = loaded.engine
                    gate.open(app)
                    url = _url(listener)
                    logger.info("serving %s at %s", state.model_name, url)
                    if on_ready is not None:
                        on_ready(state.model_name, url)
                    _wait(serving, server, loaded.engine)
        except _StoppedWhileLoadingError:
            logger.info("stopped while loading")
        finally:
            server.should_exit = True


@contextmanager
def _collector_spared() -> Iterator[None]:
    """Take what is loaded, and stays, out of the garbage collector's sight.

    Requests with many parts make it look through everything, a tenth of a second in which no thread runs.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _wait(serving: Future[None], server: uvicorn.Server, engine: EngineDoor) -> None:
    """Until the server has ended, with signals handled all the while; an engine that fails ends it."""
    while not wait([serving], timeout=SIGNAL_SECONDS).done:
        server.should_exit |= engine.state == "failed"
    serving.result()
    if engine.state == "failed":
        raise EngineFailedError("The engine has failed, so the server has ended: its log says why. Start it again.")


@contextmanager
def running(state: AppState) -> Iterator[None]:
    """The engine's thread inside the block, which ends before the text threads do."""
    state.engine.start()
    try:
        yield
    finally:
        state.engine.stop()
        state.offload.close()


@contextmanager
def _tracing(options: ServerOptions) -> Iterator[Tracing | None]:
    """Spans for as long as the server runs, if they are wanted."""
    if options.otlp_traces_endpoint is None:
        yield None
        return
    tracing = Tracing.to(options.otlp_traces_endpoint)
    try:
        yield tracing
    finally:
        tracing.close()


def _who_may_ask(options: ServerOptions) -> str:
    keys = (
        f"{len(options.api_keys)} API key{'s' if len(options.api_keys) > 1 else ''}" if options.api_keys else "no key"
    )
    if is_loopback(options.host):
        return f"only this machine can reach it, {keys} asked for"
    return f"other machines can reach it, {keys} asked for"


def server_config(
    app: ASGIApp, *, max_connections: int = 1024, request_seconds: float = REQUEST_SECONDS
) -> uvicorn.Config:
    """How uvicorn serves the application: plain HTTP/1.1, the caller's logging, headers that tell nothing.

    `max_connections` may be open, and each has `request_seconds` to send the headers of a request.
    """
    return uvicorn.Config(
        app,
        **protocol_settings(max_connections, request_seconds),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=IDLE_CONNECTION_SECONDS,
        timeout_graceful_shutdown=FLUSH_SECONDS,
    )


class _LoadingGate:
    """Answers 503 until it is given the application."""

    def __init__(self, options: ServerOptions) -> None:
        self._app: ASGIApp = RequestLog(_loading, access_log=options.access_log)

    def open(self, app: ASGIApp) -> None:
        """From now on `app` answers."""
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, send)


async def _loading(scope: Scope, receive: Receive, send: Send) -> None:
    answer = answer_for(EngineUnavailableError("The model is loading: try again later."))
    response: Response = answer.response(scope["path"])
    if scope["path"] == "/" and wants_html(Request(scope)):  # a browser asks again by itself until the page is there
        again = {"Refresh": str(LOADING_PAGE_SECONDS), "Retry-After": response.headers["retry-after"]}
        response = PlainTextResponse("The model is loading. This page opens by itself.\n", 503, headers=again)
    await response(scope, receive, send)


class _StoppedWhileLoadingError(BaseException):
    """A signal came before there was anything to finish; no `except Exception` on the way may swallow it."""


class _Ending:
    """What signals do. Until there is an `engine`: give up loading. Then: drain, and at a second signal end at once.

    The server goes on answering, with 503 to new work, while the engine finishes what it has.
    """

    def __init__(self, server: uvicorn.Server, shutdown_timeout: float) -> None:
        self.engine: EngineDoor | None = None
        self._server = server
        self._shutdown_timeout = shutdown_timeout
        self._draining = False

    @contextmanager
    def on_signals(self) -> Iterator[None]:
        """Handle SIGTERM and SIGINT inside the block."""
        before = {number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        if self.engine is None:
            raise _StoppedWhileLoadingError
        if not self._draining:
            self._draining = True
            logger.info("signal %d: finishing what runs, for at most %g s", number, self._shutdown_timeout)
            threading.Thread(target=self._drain, args=[self.engine], name="tern-drain", daemon=True).start()
        else:
            threading.Thread(target=self._end, args=[self.engine], name="tern-end", daemon=True).start()

    def _drain(self, engine: EngineDoor) -> None:
        if not engine.drain(self._shutdown_timeout):
            logger.warning("some requests were not done after %g s and end now", self._shutdown_timeout)
        self._end(engine)

    def _end(self, engine: EngineDoor) -> None:
        """Stop the engine, so that open streams end with an error, and then the server."""
        try:
            engine.stop()
        finally:
            self._server.should_exit = True


@contextmanager
def listen(host: str, port: int) -> Iterator[socket.socket]:
    """A listening socket for the API."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host.strip("[]"), port), family=family, backlog=2048)
    except OSError as error:
        raise OptionError(f"Cannot listen on {host} port {port}: {error.strerror or error}.") from None
    with listener:
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # its connections have it too: no event waits
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, DEAF_CLIENT_SECONDS * 1000)
        yield listener


@contextmanager
def metrics_server(options: ServerOptions, registry: CollectorRegistry) -> Iterator[None]:
    """/metrics on its own port, if it has one."""
    if options.metrics_port is None:
        yield
        return
    try:
        server, thread = start_http_server(options.metrics_port, options.host.strip("[]"), registry)
    except OSError as error:
        raise OptionError(
            f"Cannot listen on {options.host} metrics port {options.metrics_port}: {error.strerror or error}."
        ) from None
    logger.info("metrics at http://%s:%d/metrics", options.host, server.server_port)
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
