"""From the engine's thread to the event loop: each token of a choice becomes text events there and wakes the loop here.

Knows tokens, the chat room's text machine and asyncio; knows no JSON and no HTTP.

    engine thread                                        event loop
    push(token) -> TextStream -> parser -> Update ──┐
    push(token) -> ...                  -> Update ──┤    Mailbox.take() -> [Update, Update, Update]
    finish(...)                         -> Update ──┘    (one wake-up for all that came meanwhile)
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from tern.chat import ContentDelta, ParserState, ResponseEvent, TextStream, ToolCallDelta
from tern.engine import CONTINUE, Finish, GeneratedToken, ScoredToken, Steering


@dataclass(frozen=True)
class Ending:
    """How a choice ended. `num_reasoning_tokens` of the generated ones belong to the thought.

    `stop_reason` is the stop string or stop token of the request that ended it, if one did. `inside_call`: it ended
    before the JSON of a tool call did.
    """

    finish: Finish
    num_reasoning_tokens: int
    stop_reason: str | int | None
    inside_call: bool = False


@dataclass(frozen=True)
class Update:
    """What one token, or the ending, brought to choice `index`. The last update of a choice carries its `ending`.

    `prompt` are tokens of its prompt with their scores, before all else.
    """

    index: int
    events: Sequence[ResponseEvent] = ()
    token: GeneratedToken | None = None
    ending: Ending | None = None
    prompt: Sequence[ScoredToken] = ()


MOST_UNREAD = 16_384
"""Tokens, and log-probabilities of others beside them, that may wait for their reader: some megabytes."""


class MailboxFullError(Exception):
    """The reader took too little of what came."""


class Mailbox:
    """Updates from any thread, for one reader on the event loop that made it.

    At most `most` are kept, each alternative token of an update counting as one more. When more come, `on_full` is
    called, once, by the thread that brings them; they are dropped, and so is all that follows.
    """

    def __init__(self, most: int = MOST_UNREAD) -> None:
        self.on_full: Callable[[], None] = lambda: None
        self._most = most
        self._unread = 0
        self._full = False
        self._loop = asyncio.get_running_loop()
        self._arrived = asyncio.Event()
        self._lock = threading.Lock()
        self._updates: list[Update] = []
        self._closed = False

    def post(self, update: Update) -> None:
        """Add an update, from any thread; after `close` it is dropped."""
        with self._lock:
            if self._closed or self._full:
                return
            self._unread += 1 + (len(update.token.top_logprobs) if update.token else 0)
            self._full = self._unread > self._most
            first = not self._updates
            if not self._full:
                self._updates.append(update)
            if first:
                self._wake()
        if self._full:
            self.on_full()

    def _wake(self) -> None:
        try:
            self._loop.call_soon_threadsafe(self._arrived.set)
        except RuntimeError:  # the loop is gone, and the reader with it
            self._closed = True

    async def take(self, timeout: float) -> list[Update]:
        """All that came since the last call; waits up to `timeout` seconds for the first, else returns nothing.

        Raises `MailboxFullError` when all was taken that was kept, and more had come.
        """
        try:
            async with asyncio.timeout(timeout):  # not wait_for: it loses a cancellation that comes with an update
                await self._arrived.wait()
        except TimeoutError:
            return []
        with self._lock:
            updates, self._updates = self._updates, []
            self._unread = 0
            if self._full and not updates:
                raise MailboxFullError
            if not self._full:
                self._arrived.clear()
        return updates

    def close(self) -> None:
        """Nobody reads any more."""
        with self._lock:
            self._closed = True
            self._updates.clear()


class EventParser(Protocol):
    """What turns text into events: the chat room's `ResponseParser`, or `PlainText`."""

    @property
    def state(self) -> ParserState: ...

    def feed(self, text: str) -> Sequence[ResponseEvent]: ...

    def finish(self) -> Sequence[ResponseEvent]: ...


class PlainText:
    """The parser of a completion: all text is content."""

    state = ParserState.BARE

    def feed(self, text: str) -> Sequence[ResponseEvent]:
        """The text as one event."""
        return [ContentDelta(text)] if text else []

    def finish(self) -> Sequence[ResponseEvent]:
        """Nothing is ever held back."""
        return []


class TokenObserver(Protocol):
    """Who counts tokens and endings (the metrics). Called on the engine's thread."""

    def token(self) -> None: ...

    def ended(self, ending: Ending) -> None: ...


@dataclass
class ChoiceSink:
    """The `TokenSink` of one choice; the engine calls it on its thread.

    `stop_token_ids` are those of the request; `hidden_token_ids` are all ending tokens whose text is not part of the
    answer. With `single_call` the choice ends where
    the model begins a second tool call, and nothing of that call is passed on.
    """

    index: int
    stream: TextStream
    parser: EventParser
    deliver: Callable[[Update], None]
    observer: TokenObserver
    stop_token_ids: frozenset[int] = frozenset()
    hidden_token_ids: frozenset[int] = frozenset()
    single_call: bool = False
    _cut: bool = field(default=False, init=False)

    def score(self, tokens: Sequence[ScoredToken]) -> None:
        """Take scores of the prompt: the `PromptSink` of the choice."""
        self.deliver(Update(self.index, prompt=tokens))

    def push(self, token: GeneratedToken) -> Steering:
        """Take one token; the answer says whether to stop or to write tokens before the model goes on."""
        self.observer.token()
        if token.token_id in self.hidden_token_ids and not token.forced:
            self.deliver(Update(self.index, (), token))
            return CONTINUE
        step = self.stream.push(token.token_id)
        events = self._allowed(self.parser.feed(step.text))
        self.deliver(Update(self.index, events, token))
        return Steering(stop=step.stop or self._cut, force=step.force)

    def finish(self, finish: Finish) -> None:
        """Take the ending; flushes what the text machine held back."""
        events: Sequence[ResponseEvent] = ()
        if not self._cut:
            events = self._allowed([*self.parser.feed(self.stream.finish()), *self.parser.finish()])
        stop_token = finish.stop_token_id if finish.stop_token_id in self.stop_token_ids else None
        stop_reason = stop_token if self.stream.stop_string is None else self.stream.stop_string
        inside_call = self.parser.state is ParserState.CALL and not self._cut
        ending = Ending(finish, self.stream.num_reasoning_tokens, stop_reason, inside_call)
        self.observer.ended(ending)
        self.deliver(Update(self.index, events, None, ending))

    def _allowed(self, events: Sequence[ResponseEvent]) -> Sequence[ResponseEvent]:
        """The events up to a second tool call, where only one may be made."""
        if not self.single_call:
            return events
        for position, event in enumerate(events):
            if isinstance(event, ToolCallDelta) and event.index > 0:
                self._cut = True
                return events[:position]
        return events
