"""From the model's text to reasoning, content and tool calls: one machine for streamed and whole responses.

Knows the tags of the text protocol and the newlines that frame them. Knows nothing of tokens, templates or HTTP.

        feed "…</th" "ink>\\n\\n<resp" "onse>\\nHi"          (any split of the text gives the same deltas, joined)
                 │
    REASONING ──</think>──▶ BETWEEN ──<response>──▶ RESPONSE ──</response>──▶ BETWEEN
        ▲                    │ │ │
        └──────<think>───────┘ │ └──<tool_call>──▶ CALL ──its JSON is whole──▶ AFTER_CALL ──</tool_call>──▶ BETWEEN
                               │                     └──its JSON is wrong──▶ BARE
                               └──other text──▶ BARE ──<tool_call>──▶ CALL

What is held back is only what could still become a tag or its framing newlines, and the JSON of a call until its name
is known and its arguments have begun. docs/chat.md says what each state does with text that fits nothing, and
docs/decisions/0001-malformed-tool-calls.md why.
"""

from __future__ import annotations

import logging
import re
import secrets
from collections.abc import Mapping, Sequence
from enum import StrEnum
from functools import cache
from typing import Any

from tern.chat.call_reader import CallReader
from tern.chat.events import (
    ContentDelta,
    ParsedMessage,
    ReasoningDelta,
    ResponseEvent,
    ToolCallDelta,
    collect_message,
)

_log = logging.getLogger(__name__)

THINK, END_THINK = "<think>", "</think>"
RESPONSE, END_RESPONSE = "<response>", "</response>"
TOOL_CALL, END_TOOL_CALL = "<tool_call>", "</tool_call>"
PROTOCOL_TAGS = (THINK, END_THINK, RESPONSE, END_RESPONSE, TOOL_CALL, END_TOOL_CALL)

_LONGEST_TAG = max(map(len, PROTOCOL_TAGS))
_OPENINGS = (RESPONSE, THINK, TOOL_CALL)
_INK = re.compile(r"\S")
_NOT_NEWLINE = re.compile(r"[^\n]")
_NOT_CLOSING = re.compile(r"[^ \t\r\n}\],]")


class ParserState(StrEnum):
    """Where in a response the text stands."""

    REASONING = "reasoning"  # inside the thought
    BETWEEN = "between"  # behind a part: nothing of the next one has been read
    RESPONSE = "response"  # inside <response>
    BARE = "bare"  # in an answer without <response>, or a call that turned out to be text
    CALL = "call"  # inside the JSON of a <tool_call>
    AFTER_CALL = "after_call"  # behind that JSON, before </tool_call>


def state_after_prompt(prompt: str) -> ParserState:
    """The state in which a response to this prompt begins: the one in which the rendered prompt ends."""
    end = prompt.rstrip("\n")
    if end.endswith(THINK):
        return ParserState.REASONING
    if end.endswith(RESPONSE):
        return ParserState.RESPONSE
    if end.endswith(TOOL_CALL):
        return ParserState.CALL
    return ParserState.BETWEEN


class ResponseParser:
    """Turns a response that arrives in pieces into typed deltas.

    `tools` are the request's, in OpenAI form; without any, a `<tool_call>` is text. `start` is the state in which the
    prompt ended (`state_after_prompt`). Never raises on what a model may write.
    """

    def __init__(
        self, tools: Sequence[Mapping[str, Any]] | None = None, *, start: ParserState = ParserState.REASONING
    ) -> None:
        self._tool_names = {_tool_name(tool) for tool in tools or ()}
        self._state = start
        self._pending = ""  # text not yet understood; shorter than a tag and its newline
        self._events: list[ResponseEvent] = []
        self._at_start = True  # nothing but whitespace has been read in this part
        self._drop_newline = False  # the next newline belongs to a <think> that was opened again
        self._separate_thoughts = False  # a second thought begins: it goes on a line of its own
        self._reasoned = False
        self._response_open = False  # a call stands where a response's text was expected: </response> may still come
        self._content_open = start is ParserState.BARE  # content has been said, and no call since
        self._newlines = 0  # newlines read behind content, said only if more content follows
        self._raw = False  # inside a call that turned out to be text: another <tool_call> in it is text too
        self._call_ends = False  # text stands behind the JSON of a call: its </tool_call> is still to come
        self._num_calls = 0
        self._announced = False
        self._block: list[str] = []  # the current call as it was written, tag included
        self._call = CallReader()
        self._finished = False
        if start is ParserState.CALL:
            self._begin_call()

    @property
    def state(self) -> ParserState:
        """Where the text fed so far stands."""
        return self._state

    def feed(self, text: str) -> list[ResponseEvent]:
        """Take the next piece of the response; returns the deltas that have become certain."""
        if self._finished:
            raise RuntimeError("feed() was called after finish(): use a new ResponseParser for the next response.")
        text = self._pending + text
        at, end = 0, len(text)
        while at < end:
            state = self._state
            stop = _STEPS[state](self, text, at)
            if stop == at and self._state is state:
                break
            at = stop
        self._pending = text[at:]
        return self._take_events()

    def finish(self) -> list[ResponseEvent]:
        """The response has ended, by itself or cut off: returns what was held back. Nothing is made up."""
        pending, self._pending = self._pending, ""
        if not self._finished:
            self._finished = True
            match self._state:
                case ParserState.REASONING:
                    self._reason(pending)
                case ParserState.RESPONSE | ParserState.BETWEEN:
                    self._say(pending)
                case ParserState.BARE:
                    self._say_before_newlines(pending)
                    newlines, self._newlines = self._newlines, 0
                    self._say("\n" * newlines)
                case ParserState.CALL:
                    if self._call.name is not None:
                        self._hand_on_call()
                case ParserState.AFTER_CALL:
                    pass
        return self._take_events()

    # What each state does with text[at:]: returns how far it came. No progress in the same state means: need more text.

    def _step_reasoning(self, text: str, at: int) -> int:
        if self._drop_newline:
            self._drop_newline = False
            if text[at] == "\n":
                return at + 1
        if self._at_start:
            inked = _INK.search(text, at)
            if inked is not None and text.startswith(THINK, inked.start()):
                self._reason(text[at : inked.start()])
                self._drop_newline = True  # opened again by the model: as if it were not written
                return inked.start() + len(THINK)
            if inked is not None and not _is_beginning(text, inked.start(), (THINK,)):
                self._at_start = False
        found = text.find(END_THINK, at)
        if found < 0:
            stop = _held_from(text, at, (END_THINK, THINK) if self._at_start else (END_THINK,), newline=True)
            self._reason(text[at:stop])
            return stop
        self._reason(_without_newline(text[at:found]))
        return self._enter(ParserState.BETWEEN, found + len(END_THINK))

    def _step_between(self, text: str, at: int) -> int:
        stop = _next_ink(text, at)
        self._newlines += stop - at
        if stop == len(text):
            return stop
        if text.startswith(RESPONSE, stop):
            return self._enter(ParserState.RESPONSE, stop + len(RESPONSE))
        if text.startswith(THINK, stop):
            self._drop_newline = True
            self._separate_thoughts = True
            return self._enter(ParserState.REASONING, stop + len(THINK))
        if text.startswith(TOOL_CALL, stop):
            return self._open_call(stop)
        if self._response_open and text.startswith(END_RESPONSE, stop):
            self._response_open = False
            return stop + len(END_RESPONSE)
        if _is_beginning(text, stop, (*_OPENINGS, END_RESPONSE) if self._response_open else _OPENINGS):
            return stop
        return self._enter(ParserState.BARE, stop)

    def _step_response(self, text: str, at: int) -> int:
        if self._at_start:
            stop = _next_ink(text, at)
            if stop > at or stop == len(text):
                return stop
            if self._tool_names and text.startswith(TOOL_CALL, at):
                self._response_open = True
                return self._open_call(at)
            if self._tool_names and _is_beginning(text, at, (TOOL_CALL,)):
                return at
            self._at_start = False
        found = text.find(END_RESPONSE, at)
        if found < 0:
            stop = _held_from(text, at, (END_RESPONSE,), newline=True)
            self._say(text[at:stop])
            return stop
        self._say(_without_newline(text[at:found]))
        return self._enter(ParserState.BETWEEN, found + len(END_RESPONSE))

    def _step_bare(self, text: str, at: int) -> int:
        opens_calls = self._tool_names and not self._raw
        tags = (
            END_TOOL_CALL,
            *((TOOL_CALL,) if opens_calls else ()),
            *((END_RESPONSE,) if self._response_open else ()),
        )
        found = _any_of(tags).search(text, at)
        if found is None:
            stop = _held_from(text, at, tags)
            self._say_before_newlines(text[at:stop])
            return stop
        self._say_before_newlines(text[at : found.start()])
        if found.group() == TOOL_CALL:
            return self._open_call(found.start())
        if found.group() == END_RESPONSE:
            newlines, self._newlines = max(0, self._newlines - 1), 0
            self._say("\n" * newlines)
            self._response_open = False
        elif self._call_ends:
            self._newlines = 0
        else:
            self._say(END_TOOL_CALL)
        return self._enter(ParserState.BETWEEN, found.end())

    def _step_call(self, text: str, at: int) -> int:
        stop = self._call.read(text, at)
        self._block.append(text[at:stop])
        if self._call.certain:
            self._hand_on_call()
        if self._call.wrong and not (self._announced and self._call.arguments_complete):
            return self._give_up_call(stop)
        if self._call.wrong:
            _log.warning("tool call %d: its arguments are whole, what follows them is not JSON", self._num_calls)
        if self._call.wrong or self._call.complete:
            self._num_calls += 1
            self._newlines = 0
            self._content_open = False
            return self._enter(ParserState.AFTER_CALL, stop)
        return stop

    def _step_after_call(self, text: str, at: int) -> int:
        found = _NOT_CLOSING.search(text, at)
        stop = len(text) if found is None else found.start()
        if text[at:stop].strip(" \t\r\n"):
            _log.warning("tool call %d is followed by a surplus bracket, which is left out", self._num_calls - 1)
        if found is None:
            return stop
        if text.startswith(END_TOOL_CALL, stop):
            return self._enter(ParserState.BETWEEN, stop + len(END_TOOL_CALL))
        if text[stop] == "{":
            self._begin_call(opening="")
            return self._enter(ParserState.CALL, stop)
        next_tags = (*_OPENINGS, END_RESPONSE)
        if text.startswith(next_tags, stop):
            return self._enter(ParserState.BETWEEN, stop)
        if _is_beginning(text, stop, (END_TOOL_CALL, *next_tags)):
            return stop
        _log.warning("tool call %d is followed by text inside its block, which is content", self._num_calls - 1)
        self._enter(ParserState.BARE, stop)
        self._call_ends = True
        return stop

    def _enter(self, state: ParserState, at: int) -> int:
        self._state = state
        self._at_start = True
        self._raw = False
        self._call_ends = False
        return at

    # Tool calls.

    def _open_call(self, at: int) -> int:
        if not self._tool_names:
            self._enter(ParserState.BARE, at)
            self._say(TOOL_CALL)
            return at + len(TOOL_CALL)
        self._begin_call()
        return self._enter(ParserState.CALL, at + len(TOOL_CALL))

    def _begin_call(self, opening: str = TOOL_CALL) -> None:
        self._call = CallReader()
        self._block = [opening]
        self._announced = False

    def _hand_on_call(self) -> None:
        arguments = self._call.take_arguments()
        if self._announced:
            if arguments:
                self._events.append(ToolCallDelta(self._num_calls, None, None, arguments))
            return
        name = self._call.name
        if name not in self._tool_names:
            _log.warning("the model calls %r, which is none of the request's tools; the call is handed on", name)
        self._announced = True
        self._events.append(ToolCallDelta(self._num_calls, f"call_{secrets.token_hex(12)}", name, arguments))

    def _give_up_call(self, at: int) -> int:
        self._num_calls += self._announced
        block = "".join(self._block)
        _log.warning("a tool call is not valid JSON after %d characters; it is handed on as text", len(block))
        self._enter(ParserState.BARE, at)
        self._raw = block.removeprefix(TOOL_CALL).lstrip(" \t\r\n").startswith("{")
        self._say_before_newlines(block)
        return at

    # What goes out.

    def _reason(self, text: str) -> None:
        if not text:
            return
        if self._separate_thoughts and self._reasoned:
            text = "\n" + text
        self._separate_thoughts = False
        self._reasoned = True
        self._events.append(ReasoningDelta(text))

    def _say(self, text: str) -> None:
        if not text:
            return
        if self._content_open:
            text = "\n" * self._newlines + text
        self._newlines = 0
        self._content_open = True
        self._events.append(ContentDelta(text))

    def _say_before_newlines(self, text: str) -> None:
        """Say `text` without the newlines at its end: they are said if more content follows."""
        said = text.rstrip("\n")
        self._say(said)
        self._newlines += len(text) - len(said)

    def _take_events(self) -> list[ResponseEvent]:
        events, self._events = self._events, []
        return events


_STEPS = {
    ParserState.REASONING: ResponseParser._step_reasoning,
    ParserState.BETWEEN: ResponseParser._step_between,
    ParserState.RESPONSE: ResponseParser._step_response,
    ParserState.BARE: ResponseParser._step_bare,
    ParserState.CALL: ResponseParser._step_call,
    ParserState.AFTER_CALL: ResponseParser._step_after_call,
}


def parse_response(
    text: str, tools: Sequence[Mapping[str, Any]] | None = None, *, start: ParserState = ParserState.REASONING
) -> ParsedMessage:
    """Parse a whole response; the same machine as `ResponseParser`, fed once."""
    parser = ResponseParser(tools, start=start)
    return collect_message([*parser.feed(text), *parser.finish()])


@cache
def _any_of(tags: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(tags))


def _tool_name(tool: Mapping[str, Any]) -> str:
    function = tool.get("function")
    return str(function.get("name")) if isinstance(function, Mapping) else str(tool.get("name"))


def _next_ink(text: str, at: int) -> int:
    """Where the first character that is no newline stands at or behind `at`."""
    found = _NOT_NEWLINE.search(text, at)
    return len(text) if found is None else found.start()


def _without_newline(text: str) -> str:
    return text[:-1] if text.endswith("\n") else text


def _is_beginning(text: str, at: int, tags: tuple[str, ...]) -> bool:
    """Whether `text[at:]` may still become one of the tags. Looks at no more of it than a tag is long."""
    rest = text[at : at + _LONGEST_TAG + 1]
    return any(tag.startswith(rest) for tag in tags)


def _held_from(text: str, at: int, tags: tuple[str, ...], *, newline: bool = False) -> int:
    """Where the end of `text[at:]` begins that may still become one of the tags; the text's end if none may.

    With `newline`, the newline before a tag, or one that such a tag may follow, is part of it.
    """
    end = len(text)
    opening = text.rfind("<", at)
    start = opening if opening >= 0 and _is_beginning(text, opening, tags) else end
    return start - 1 if newline and start > at and text[start - 1] == "\n" else start
