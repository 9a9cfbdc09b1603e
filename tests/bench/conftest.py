"""What the tests of benchmarks share: a stand-in for the server that is loaded."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import ThreadingHTTPServer

import pytest
from standin_server import StandInHandler, StandInServer


@pytest.fixture
def stand_in() -> Iterator[StandInServer]:
    made = StandInServer()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (StandInHandler,), {"stand_in": made}))
    server.daemon_threads = True
    made.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield made
    server.shutdown()
    thread.join()
    server.server_close()
