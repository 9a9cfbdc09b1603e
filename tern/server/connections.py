"""Connections before they are requests: how many there may be, and how long one may take to say what it wants.

Knows uvicorn's protocol on h11; knows no application. A client that sends its headers byte by byte, or opens thousands
of connections, would otherwise hold them for ever.
"""

from __future__ import annotations

import asyncio
import json
import logging
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from tern.errors import EngineUnavailableError, InvalidRequestError
from tern.server.errors import ErrorAnswer, HeadersTooLargeError, answer_for
from tern.server.guard import MAX_HEADER_BYTES
from tern.server.request_log import ID_HEADER
from tern.server.request_record import accepted_id

logger = logging.getLogger("tern.server")

MAX_CONNECTIONS = 1024
REQUEST_SECONDS = 30.0
"""How long the headers of a request may take, and each pause inside its body."""

_REASONS = {400: b"Bad Request", 431: b"Request Header Fields Too Large", 503: b"Service Unavailable"}


def guarded_protocol(max_connections: int, request_seconds: float) -> type[H11Protocol]:
    """The protocol of a server with these limits; uvicorn makes one object of it for each connection."""

    class Guarded(GuardedProtocol):
        MAX_CONNECTIONS = max_connections
        REQUEST_SECONDS = request_seconds

    return Guarded


class GuardedProtocol(H11Protocol):
    """uvicorn's protocol, with limits."""

    MAX_CONNECTIONS = MAX_CONNECTIONS
    REQUEST_SECONDS = REQUEST_SECONDS
    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take the connection, or say that there are too many."""
        super().connection_made(transport)
        self.access_log = False  # `request_log` has more to say
        if len(self.connections) > self.MAX_CONNECTIONS:
            self._refuse(
                answer_for(EngineUnavailableError(f"{self.MAX_CONNECTIONS} connections are open: try again later."))
            )
        else:
            self._wait_for_request()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is gone."""
        self._stop_waiting()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take bytes; whoever has begun a request must go on with it."""
        super().data_received(data)
        state = self.conn.their_state
        if state is h11.SEND_BODY:
            self._stop_waiting()
            self._wait_for_request()
        elif state is h11.IDLE and self.conn.trailing_data[0]:
            if self._deadline is None:
                self._wait_for_request()
        else:
            self._stop_waiting()

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP, or too much of it, if nothing is being answered."""
        if len(self.conn.trailing_data[0]) > MAX_HEADER_BYTES:
            self._refuse(answer_for(HeadersTooLargeError(f"More than {MAX_HEADER_BYTES} bytes of headers came.")))
        else:
            self._refuse(answer_for(InvalidRequestError(msg, code="invalid_http")))

    def _refuse(self, answer: ErrorAnswer) -> None:
        """Send an answer that no application made, and close."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            request_id = accepted_id(None)
            logger.info("%s", answer.message, extra={"request_id": request_id})
            body = json.dumps(answer.body()).encode()
            headers = {
                "Content-Type": "application/json",
                "Content-Length": str(len(body)),
                "Connection": "close",
                ID_HEADER: request_id,
                **answer.headers,
            }
            start = h11.Response(status_code=answer.status, headers=[*headers.items()], reason=_REASONS[answer.status])
            for event in (start, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _wait_for_request(self) -> None:
        self._deadline = self.loop.call_later(self.REQUEST_SECONDS, self._give_up)

    def _stop_waiting(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _give_up(self) -> None:
        if self.flow is not None and self.flow.read_paused:  # it is the server that does not read on
            self._wait_for_request()
            return
        self._deadline = None
        logger.debug("a connection was closed: its request did not come within %g s", self.REQUEST_SECONDS)
        self.transport.close()


def protocol_settings(max_connections: int, request_seconds: float) -> dict[str, Any]:
    """What `uvicorn.Config` needs for connections with these limits."""
    return {
        "http": guarded_protocol(max_connections, request_seconds),
        "h11_max_incomplete_event_size": MAX_HEADER_BYTES,
    }
