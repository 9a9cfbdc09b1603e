"""One HTTP request while the engine works on it: its choices are submitted together and taken back together.

Knows the engine's service and the mailbox; knows no JSON. Whoever leaves the `async with` block, for whatever reason
(done, client gone, error), leaves nothing running.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from types import TracebackType

from tern.engine import FinishReason, PromptProgress, Request
from tern.errors import EngineUnavailableError, TernError
from tern.server.engine_door import EngineDoor
from tern.server.errors import GenerationError, RequestTimeoutError, SlowReaderError
from tern.server.offload import Offload
from tern.server.sink import MOST_UNREAD, Ending, Mailbox, MailboxFullError, Update

logger = logging.getLogger("tern.server")

ENDLESS = 3600.0


@dataclass(frozen=True)
class TimeLimit:
    """A request that `arrived` then, by `time.monotonic()`, may take so many seconds, whatever they are spent on."""

    seconds: float
    arrived: float

    @property
    def left(self) -> float:
        """Seconds until it is over; 0 or less when it is."""
        return self.arrived + self.seconds - time.monotonic()


class Generation:
    """The choices of one request: `submit` them, then read their `updates` inside `async with`.

    `endings` holds the ending of each choice that has ended, by index. A reader that takes so little that the mailbox
    is full has its choices taken back at once, whether or not it ever reads on.
    """

    def __init__(
        self, engine: EngineDoor, mailbox: Mailbox, requests: Sequence[Request], limit: TimeLimit | None = None
    ) -> None:
        self.requests = tuple(requests)
        self.endings: dict[int, Ending] = {}
        self._engine = engine
        self._mailbox = mailbox
        self._mailbox.on_full = self._stop_for_slow_reader
        self._limit = limit
        self._open = {request.request_id for request in requests}
        self._abandoned = False

    async def submit(self, offload: Offload) -> None:
        """Queue every choice. Raises what the engine refuses the request with; nothing stays queued then."""
        size = sum(len(request.prompt_token_ids) for request in self.requests)
        try:
            await offload.run(size, self._submit_all)
        except BaseException:
            self.abandon()
            raise

    def _submit_all(self) -> None:
        for request in self.requests:
            self._engine.submit(request)
        # The loop may have abandoned us while this thread was submitting: what its cancels missed is taken back here.
        if self._abandoned:
            self._cancel_all()

    def abandon(self) -> None:
        """Take back every choice that has not ended."""
        self._abandoned = True
        self._mailbox.close()
        self._cancel_all()

    def _cancel_all(self) -> None:
        for request_id in tuple(self._open):
            self._engine.cancel(request_id)

    async def __aenter__(self) -> Generation:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abandon()

    async def updates(self, silence: float = ENDLESS) -> AsyncIterator[list[Update]]:
        """The updates of all choices as they come, until each has ended; an empty list after `silence` seconds.

        Raises `GenerationError` when the engine failed on a choice, `EngineUnavailableError` when the server took it
        back, `RequestTimeoutError` when it took too long and `SlowReaderError` when the reader did; what the choice had
        said until then is yielded first, without the ending.
        """
        while self._open:
            updates = await self._take(silence)
            failure: TernError | None = None
            for position, update in enumerate(updates):
                if update.ending is None:
                    continue
                self._open.discard(self.requests[update.index].request_id)
                self.endings[update.index] = update.ending
                if (error := _failure(update.ending)) is not None:
                    failure = failure or error
                    updates[position] = replace(update, ending=None)
            yield updates
            if failure is not None:
                raise failure

    async def _take(self, silence: float) -> list[Update]:
        left = silence if self._limit is None else min(silence, self._limit.left)
        try:
            updates = await self._mailbox.take(max(0.0, left))
        except MailboxFullError:
            raise SlowReaderError(
                f"The client read so slowly that {MOST_UNREAD} tokens waited for it: read the stream as it comes."
            ) from None
        if not updates and self._limit is not None and self._limit.left <= 0:
            raise RequestTimeoutError(
                f"The request was not done within the {self._limit.seconds:g} s that this server gives one: "
                "ask for fewer tokens, or try again when it has less to do."
            )
        return updates

    def _stop_for_slow_reader(self) -> None:
        logger.warning("request %s ends: its client reads too slowly", self.requests[0].request_id)
        self._cancel_all()

    def progress(self) -> PromptProgress | None:
        """How far the prompt of the first choice has been read that has not begun to answer, if there is one."""
        found = (self._engine.progress(request.request_id) for request in self.requests)
        return next((each for each in found if each is not None), None)

    async def all_updates(self) -> list[Update]:
        """Every update of every choice, once all have ended."""
        return [update async for updates in self.updates() for update in updates]


def _failure(ending: Ending) -> TernError | None:
    """What went wrong, if the choice did not end by itself or by its limits."""
    if ending.finish.reason is FinishReason.ERROR:
        return GenerationError(ending.finish.message or "The engine failed on this request.")
    if ending.finish.reason is FinishReason.CANCELLED:
        return EngineUnavailableError(ending.finish.message or "The server took the request back: send it again.")
    return None
