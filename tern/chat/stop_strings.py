"""Stop strings in text that comes in pieces: found across any border, with the least possible held back.

Knows text only. Each string is followed by Knuth, Morris and Pratt's automaton (1977): constant amortised time for a
character and string, and the automaton's state is how much of the text's end may still become the string.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache


@lru_cache(maxsize=256)
def _borders(string: str) -> tuple[int, ...]:
    """Of the first 1, 2, ... characters: how long a proper beginning is also their end.

    The choices of a request share these tables.
    """
    borders = [0] * len(string)
    border = 0
    for i in range(1, len(string)):
        while border and string[i] != string[border]:
            border = borders[border - 1]
        border += string[i] == string[border]
        borders[i] = border
    return tuple(borders)


class _Matcher:
    """One string, and how many of its characters the text ends with."""

    def __init__(self, string: str) -> None:
        self.string = string
        self.matched = 0
        self._fallback = _borders(string)

    def advance(self, char: str) -> bool:
        """Take one character; whether it completes the string."""
        matched = self.matched
        while matched and char != self.string[matched]:
            matched = self._fallback[matched - 1]
        matched += char == self.string[matched]
        self.matched = matched
        return matched == len(self.string)


class StopStrings:
    """Watches text for the first end of any of the strings; of two that end together the longer counts.

    `include` lets the stop string itself through.
    """

    def __init__(self, strings: Sequence[str], *, include: bool = False) -> None:
        self._matchers = [_Matcher(string) for string in sorted(set(strings), key=len, reverse=True)]
        self._include = include
        self._held = ""
        self.found: str | None = None

    def push(self, text: str) -> str:
        """Take the next piece; returns what can be released. Once a string is found, nothing more is."""
        if self.found is not None or not self._matchers:
            return "" if self.found is not None else text
        for at, char in enumerate(text):
            ended = [matcher for matcher in self._matchers if matcher.advance(char)]
            if ended:
                self.found = ended[0].string
                seen = self._held + text[: at + 1]
                self._held = ""
                return seen if self._include else seen[: -len(self.found)]
        seen = self._held + text
        keep = max(matcher.matched for matcher in self._matchers)
        self._held = seen[len(seen) - keep :]
        return seen[: len(seen) - keep]

    def finish(self) -> str:
        """The text is over: what was held back. What may come is another text."""
        held, self._held = self._held, ""
        for matcher in self._matchers:
            matcher.matched = 0
        return held
