"""Reads a response whose content a grammar held: what stands in it is content, whatever it looks like.

Knows that such an answer is canonical, so that its content runs from the newline behind `<response>` to the last
`</response>`. A JSON string or a choice may spell tags; to `ResponseParser` they would be tags.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from tern.chat.events import ContentDelta, ParsedMessage, ResponseEvent, collect_message
from tern.chat.parser import END_RESPONSE, ParserState, ResponseParser

_CLOSING = f"\n{END_RESPONSE}\n"
_UP_TO_BRACKET = re.compile(r"[^>]*>|[^>]+")


class HeldResponseParser:
    """As `ResponseParser`, for an answer that is thought, then content in the form asked for, or calls.

    A prompt that opens the response has its newline, too.
    """

    def __init__(
        self, tools: Sequence[Mapping[str, Any]] | None = None, *, start: ParserState = ParserState.REASONING
    ) -> None:
        self._before = ResponseParser(tools, start=start)
        self._at_start = start is not ParserState.RESPONSE
        self._pending = ""  # may turn out to be the end of the response
        self._finished = False

    @property
    def state(self) -> ParserState:
        """Where the text fed so far stands."""
        return self._before.state

    def feed(self, text: str) -> list[ResponseEvent]:
        """Take the next piece; returns the deltas that have become certain."""
        events: list[ResponseEvent] = []
        for piece in _UP_TO_BRACKET.findall(text):  # a tag ends with a bracket: behind none is content taken for a tag
            if self.state is ParserState.RESPONSE:
                events += self._say(piece)
            else:
                events += self._before.feed(piece)
        return events

    def finish(self) -> list[ResponseEvent]:
        """The response has ended, by itself or cut off: returns what was held back."""
        if self._finished or self.state is not ParserState.RESPONSE:
            return [] if self._finished else self._end()
        self._finished = True
        pending, self._pending = self._pending, ""
        return [] if pending in ("", _CLOSING) else [ContentDelta(pending)]

    def _end(self) -> list[ResponseEvent]:
        self._finished = True
        return self._before.finish()

    def _say(self, text: str) -> list[ResponseEvent]:
        if self._at_start:
            self._at_start = False
            text = text.removeprefix("\n")
        text = self._pending + text
        stop = next((at for at in _newlines(text) if _CLOSING.startswith(text[at:])), len(text))
        self._pending = text[stop:]
        return [ContentDelta(text[:stop])] if stop else []


def parse_held_response(
    text: str, tools: Sequence[Mapping[str, Any]] | None = None, *, start: ParserState = ParserState.REASONING
) -> ParsedMessage:
    """Parse a whole response; the same machine as `HeldResponseParser`, fed once."""
    parser = HeldResponseParser(tools, start=start)
    return collect_message([*parser.feed(text), *parser.finish()])


def _newlines(text: str) -> list[int]:
    """Where the newlines stand from which on a closing tag may have begun."""
    return [at for at in range(max(0, len(text) - len(_CLOSING)), len(text)) if text[at] == "\n"]
