"""Serving: sockets, the metrics port, signals and the end. Knows uvicorn; knows no route.

SIGTERM, SIGINT -> new requests get 503, /ready says no -> what runs is finished, for at most `shutdown_timeout`
                -> the engine stops, what is left ends with an error -> connections close -> return
a second signal -> the last two steps at once
"""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import uvicorn
from prometheus_client import start_http_server

from tern.chat import ChatProtocol
from tern.errors import OptionError
from tern.server.app import create_app
from tern.server.engine_door import EngineDoor, ModelIdentity
from tern.server.options import ServerOptions
from tern.server.state import AppState

logger = logging.getLogger("tern.server")

FLUSH_SECONDS = 5
"""What answers that are already generated get to reach their clients once the engine has stopped."""

IDLE_CONNECTION_SECONDS = 75
"""How long a connection may idle between requests: longer than the pools of common clients and proxies keep theirs."""


def run_server(
    engine: EngineDoor,
    protocol: ChatProtocol,
    model: ModelIdentity,
    options: ServerOptions | None = None,
    *,
    on_ready: Callable[[str], None] | None = None,
) -> None:
    """Start the engine's thread and serve until SIGTERM or SIGINT; return when everything has ended.

    Call it on the main thread. `on_ready` is called with the server's URL once requests are taken. Raises
    `OptionError` if an address is taken or is none of this machine's.
    """
    options = options or ServerOptions()
    with listen(options.host, options.port) as listener:
        state = AppState.create(engine, protocol, model, options)
        with metrics_server(state):
            server = _DrainingServer(server_config(state), engine, options.shutdown_timeout)
            engine.start()
            try:
                url = _url(listener)
                logger.info("serving %s at %s", state.model_name, url)
                if on_ready is not None:
                    on_ready(url)
                server.run(sockets=[listener])
            finally:
                engine.stop()
                state.offload.close()


def server_config(state: AppState) -> uvicorn.Config:
    """How uvicorn serves the application: plain HTTP/1.1, the caller's logging, headers that tell nothing."""
    return uvicorn.Config(
        create_app(state),
        http="h11",
        ws="none",
        lifespan="off",
        log_config=None,
        server_header=False,
        timeout_keep_alive=IDLE_CONNECTION_SECONDS,
        timeout_graceful_shutdown=FLUSH_SECONDS,
    )


class _DrainingServer(uvicorn.Server):
    """A server that goes on answering, with 503 to new work, while the engine finishes what it has."""

    def __init__(self, config: uvicorn.Config, engine: EngineDoor, shutdown_timeout: float) -> None:
        super().__init__(config)
        self._engine = engine
        self._shutdown_timeout = shutdown_timeout
        self._draining = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002
        """Begin to drain at the first signal, end at once at the second."""
        if not self._draining:
            self._draining = True
            logger.info("signal %d: finishing what runs, for at most %g s", sig, self._shutdown_timeout)
            threading.Thread(target=self._drain, name="tern-drain", daemon=True).start()
        else:
            threading.Thread(target=self._end, name="tern-end", daemon=True).start()

    def _drain(self) -> None:
        if not self._engine.drain(self._shutdown_timeout):
            logger.warning("some requests were not done after %g s and end now", self._shutdown_timeout)
        self._end()

    def _end(self) -> None:
        """Stop the engine, so that open streams end with an error, and then the server."""
        try:
            self._engine.stop()
        finally:
            self.should_exit = True


@contextmanager
def listen(host: str, port: int) -> Iterator[socket.socket]:
    """A listening socket for the API."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host.strip("[]"), port), family=family, backlog=2048)
    except OSError as error:
        raise OptionError(f"Cannot listen on {host} port {port}: {error.strerror or error}.") from None
    with listener:
        yield listener


@contextmanager
def metrics_server(state: AppState) -> Iterator[None]:
    """/metrics on its own port, if it has one."""
    options = state.options
    if options.metrics_port is None:
        yield
        return
    try:
        server, thread = start_http_server(options.metrics_port, options.host.strip("[]"), state.metrics.registry)
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
