"""From a chat that was read to the HTTP answer in some family's form, whole or streamed.

Knows that a form is a writer of events; knows none of the forms.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from typing import Protocol

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from tern.errors import InvalidRequestError
from tern.server.body import JsonObject
from tern.server.choices import Plan, start
from tern.server.generation import Generation
from tern.server.progress import json_size
from tern.server.sink import Update
from tern.server.state import AppState
from tern.server.streaming import EventStream, while_connected, with_comments
from tern.server.translation import Translation


class AnswerWriter(Protocol):
    """The form of one answer: either `whole` is called once, or the others, in the order in which they stand here."""

    @property
    def silent(self) -> bytes | None:
        """What is sent when nothing has been for a while; None is a comment."""

    def whole(self, updates: Sequence[Update]) -> JsonObject:
        """The answer that does not stream, from all updates."""

    def opening(self) -> Iterable[bytes]:
        """What is sent before anything is known of the answer."""

    def chunks(self, updates: Sequence[Update]) -> Iterable[bytes]:
        """The events for what just came."""

    def closing(self) -> Iterable[bytes]:
        """The last events."""

    def failed(self, error: Exception) -> Iterable[bytes]:
        """The last events of an answer that could not be finished."""


async def deliver(
    state: AppState, http: Request, plan: Plan, chat: Translation, writer: AnswerWriter, *, stream: bool
) -> Response:
    """Generate what is planned and answer; what the engine refuses is named as the request has it."""
    generation = start(state, plan)
    try:
        await generation.submit(state.offload)
    except InvalidRequestError as error:
        raise chat.named(error) from None
    if stream:
        return EventStream(generation, _events(writer, generation, state.options.keep_alive_seconds), writer.failed)
    return await deliver_whole(state, http, generation, writer.whole)


async def deliver_whole(
    state: AppState, http: Request, generation: Generation, write: Callable[[Sequence[Update]], JsonObject]
) -> Response:
    """The answer of a submitted generation that does not stream, made of all its updates by `write`."""
    async with generation:
        updates = await while_connected(http.receive, generation.all_updates())
    # a response writes its JSON as it is made: not on the loop, if it is long
    return await state.offload.run(json_size(updates), lambda: JSONResponse(write(updates)))


async def _events(writer: AnswerWriter, generation: Generation, silence: float) -> AsyncIterator[bytes]:
    for event in writer.opening():
        yield event
    async for event in with_comments(generation, writer.chunks, silence, writer.silent):
        yield event
    for event in writer.closing():
        yield event
