"""Server-sent events, and the client on the other end of them: who leaves is noticed, who waits hears a comment.

Knows ASGI and the SSE format; what the events say is each API family's business.
"""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterable, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from tern.engine import PromptProgress
from tern.server.body import JsonObject
from tern.server.errors import ClientGoneError, answer_for
from tern.server.generation import Generation
from tern.server.sink import Update

DONE = b"data: [DONE]\n\n"

Result = TypeVar("Result")


def sse(value: JsonObject) -> bytes:
    """A JSON value as one event."""
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def named_sse(value: JsonObject) -> bytes:
    """A JSON value as one event of the name that its `type` gives."""
    return b"event: " + str(value["type"]).encode() + b"\n" + sse(value)


async def with_comments(
    generation: Generation,
    chunks: Callable[[Sequence[Update]], Iterable[bytes]],
    silence: float,
    silent: bytes | None = None,
) -> AsyncIterator[bytes]:
    """The events that `chunks` makes of a generation's updates.

    After `silence` seconds without one comes `silent`, or else a comment that says how far the prompt has been read.
    """
    said = time.monotonic()
    async for updates in generation.updates(silence):
        for event in chunks(updates):
            yield event
            said = time.monotonic()
        if not updates or time.monotonic() - said >= silence:
            yield silent or keep_alive(generation.progress())
            said = time.monotonic()


def keep_alive(progress: PromptProgress | None) -> bytes:
    """A comment for a client that waits, and for the one who reads along there."""
    if progress is None:
        return b": keep-alive\n\n"
    if progress.waiting:
        return f": keep-alive, {progress.prompt_tokens} prompt tokens wait in the queue\n\n".encode()
    left = "" if progress.seconds_left is None else f", about {math.ceil(progress.seconds_left)} s left"
    return f": keep-alive, {progress.read_tokens} of {progress.prompt_tokens} prompt tokens read{left}\n\n".encode()


async def while_connected(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of `work`; if the client leaves first, `work` is cancelled and `ClientGoneError` raised."""
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGoneError
        return working.result()
    finally:
        await _end(working)
        await _end(watching)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _end(task: asyncio.Future[Any]) -> None:
    """Cancel a task and wait until it has cleaned up."""
    task.cancel()
    await asyncio.wait({task})


class EventStream(Response):
    """Streams the events of a submitted generation; when the client leaves, the generation is abandoned.

    Status and headers go out before the first event is there. An error after that becomes the events that `failure`
    makes of it: by default one with the usual envelope, and the end of the stream.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        generation: Generation,
        events: AsyncIterator[bytes],
        failure: Callable[[Exception], Iterable[bytes]] | None = None,
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._generation = generation
        self._events = events
        self._failure = failure or _failed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002
        """Answer one ASGI request."""
        async with self._generation:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            try:
                await while_connected(receive, self._pump(send))
            except (ClientGoneError, OSError):
                return

    async def _pump(self, send: Send) -> None:
        async with aclosing(self._guarded()) as events:
            async for event in events:
                await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _guarded(self) -> AsyncGenerator[bytes]:
        try:
            async for event in self._events:
                yield event
        except Exception as error:
            for event in self._failure(error):
                yield event


def _failed(error: Exception) -> Iterable[bytes]:
    return [sse(answer_for(error).body()), DONE]
