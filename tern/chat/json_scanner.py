"""JSON, checked while it arrives: where a value ends, whether it can still become one, what a string says.

Knows RFC 8259 and nothing of tool calls. Both classes take text in any split, look at each character once and hold no
text: a value of several megabytes costs linear time and constant memory beside the caller's own buffer.
"""

from __future__ import annotations

import re
from enum import Enum

MAX_DEPTH = 128
"""Nesting beyond this is refused: what reads the arguments later may recurse."""

_WHITESPACE = re.compile(r"[ \t\n\r]*")
_STRING_RUN = re.compile(r'[^"\\\x00-\x1f]*')
_HEX = frozenset("0123456789abcdefABCDEF")
_DIGITS = "0123456789"
_LITERALS = {"t": "rue", "f": "alse", "n": "ull"}
_VALUE_STARTS = frozenset('"{[-' + _DIGITS).union(_LITERALS)

# A number as a small automaton: state -> (what each character leads to). States in _NUMBER_ENDS may end the number.
_NUMBER: dict[str, dict[str, str]] = {
    "minus": {"0": "zero"} | dict.fromkeys("123456789", "int"),
    "zero": {".": "dot", "e": "exp", "E": "exp"},
    "int": dict.fromkeys(_DIGITS, "int") | {".": "dot", "e": "exp", "E": "exp"},
    "dot": dict.fromkeys(_DIGITS, "frac"),
    "frac": dict.fromkeys(_DIGITS, "frac") | {"e": "exp", "E": "exp"},
    "exp": dict.fromkeys(_DIGITS, "power") | {"+": "sign", "-": "sign"},
    "sign": dict.fromkeys(_DIGITS, "power"),
    "power": dict.fromkeys(_DIGITS, "power"),
}
_NUMBER_ENDS = frozenset({"zero", "int", "frac", "power"})


class _Expect(Enum):
    VALUE = "a value"
    FIRST_ITEM = "a value or ]"
    FIRST_KEY = "a key or }"
    KEY = "a key"
    COLON = ":"
    AFTER = ", or the end"
    STRING = "the rest of a string"
    ESCAPE = "an escape"
    HEX = "hexadecimal digits"
    NUMBER = "the rest of a number"
    LITERAL = "the rest of a literal"
    DONE = "nothing"
    FAILED = "nothing any more"


class JsonScanner:
    """Follows one JSON value through text that comes in pieces."""

    def __init__(self) -> None:
        self._expect = _Expect.VALUE
        self._open: list[str] = []  # "{" and "[" not yet closed
        self._in_key = False
        self._number = ""
        self._literal = ""
        self._hex_left = 0
        self.entered = False  # the first value inside an object or list has begun, or one of them has ended

    @property
    def done(self) -> bool:
        """The value is complete."""
        return self._expect is _Expect.DONE

    @property
    def failed(self) -> bool:
        """No continuation makes this a JSON value."""
        return self._expect is _Expect.FAILED

    def scan(self, text: str, start: int = 0) -> int:
        """Read on from `text[start:]`; returns where reading stopped.

        That is the end of the text, or the place behind the finished value (a number ends at the first character that
        cannot continue it, so the last number of a text is never `done`), or the first wrong character.
        """
        at, end = start, len(text)
        while at < end and self._expect not in (_Expect.DONE, _Expect.FAILED):
            if self._expect is _Expect.STRING:
                at = _match_end(_STRING_RUN, text, at)
                if at < end:
                    at += self._string_stop(text[at])
            elif self._expect in _INSIDE_TOKEN:
                at += self._inside_token(text[at])
            else:
                at = _match_end(_WHITESPACE, text, at)
                if at < end:
                    at += self._between_tokens(text[at])
        return at

    def _fail(self) -> int:
        self._expect = _Expect.FAILED
        return 0

    def _go(self, expect: _Expect) -> int:
        self._expect = expect
        return 1

    def _value_ended(self) -> int:
        return self._go(_Expect.AFTER if self._open else _Expect.DONE)

    def _string_stop(self, char: str) -> int:
        if char == "\\":
            return self._go(_Expect.ESCAPE)
        if char != '"':
            return self._fail()
        return self._go(_Expect.COLON) if self._in_key else self._value_ended()

    def _inside_token(self, char: str) -> int:
        if self._expect is _Expect.NUMBER:
            state = _NUMBER[self._number].get(char)
            if state is not None:
                self._number = state
                return 1
            if self._number in _NUMBER_ENDS:
                self._value_ended()
                return 0  # the character belongs to what follows
            return self._fail()
        if self._expect is _Expect.LITERAL:
            if char != self._literal[0]:
                return self._fail()
            self._literal = self._literal[1:]
            return 1 if self._literal else self._value_ended()
        if self._expect is _Expect.HEX:
            if char not in _HEX:
                return self._fail()
            self._hex_left -= 1
            return 1 if self._hex_left else self._go(_Expect.STRING)
        if char == "u":
            self._hex_left = 4
            return self._go(_Expect.HEX)
        return self._go(_Expect.STRING) if char in '"\\/bfnrt' else self._fail()

    def _between_tokens(self, char: str) -> int:
        match self._expect:
            case _Expect.COLON:
                return self._go(_Expect.VALUE) if char == ":" else self._fail()
            case _Expect.AFTER:
                return self._after_value(char)
            case _Expect.KEY | _Expect.FIRST_KEY:
                if char == '"':
                    self._in_key = True
                    return self._go(_Expect.STRING)
                return self._close("{") if char == "}" and self._expect is _Expect.FIRST_KEY else self._fail()
            case _:
                if char == "]" and self._expect is _Expect.FIRST_ITEM:
                    return self._close("[")
                return self._begin_value(char)

    def _after_value(self, char: str) -> int:
        inside = self._open[-1]
        if char == ",":
            return self._go(_Expect.KEY if inside == "{" else _Expect.VALUE)
        return self._close(inside) if char == ("}" if inside == "{" else "]") else self._fail()

    def _close(self, bracket: str) -> int:
        assert self._open.pop() == bracket
        self.entered = True
        return self._value_ended()

    def _begin_value(self, char: str) -> int:
        self._in_key = False
        if char not in _VALUE_STARTS:
            return self._fail()
        self.entered = self.entered or bool(self._open)
        if char == '"':
            return self._go(_Expect.STRING)
        if char in "{[":
            if len(self._open) == MAX_DEPTH:
                return self._fail()
            self._open.append(char)
            return self._go(_Expect.FIRST_KEY if char == "{" else _Expect.FIRST_ITEM)
        if char in _LITERALS:
            self._literal = _LITERALS[char]
            return self._go(_Expect.LITERAL)
        self._number = {"-": "minus", "0": "zero"}.get(char, "int")
        return self._go(_Expect.NUMBER)


_INSIDE_TOKEN = frozenset({_Expect.ESCAPE, _Expect.HEX, _Expect.NUMBER, _Expect.LITERAL})
_ESCAPES = {'"': '"', "\\": "\\", "/": "/", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}


class JsonStringDecoder:
    """Says what a JSON string says, piece by piece. Begins behind the opening quote.

    A surrogate that has no partner cannot stand in text; it is given back as it was written (`\\ud800`), which inside
    a string of a second layer of JSON means the same.
    """

    def __init__(self) -> None:
        self._escape = ""  # an escape that is not complete
        self._high: int | None = None  # the first half of a surrogate pair
        self.done = False
        self.failed = False

    def decode(self, text: str, start: int = 0) -> tuple[str, int]:
        """Read on from `text[start:]`; returns what it says and where reading stopped (see `JsonScanner.scan`)."""
        said: list[str] = []
        at, end = start, len(text)
        while at < end and not self.done and not self.failed:
            char = text[at]
            if self._escape:
                at += self._in_escape(char, said)
            elif char == "\\":
                self._escape = char
                at += 1
            else:
                self._release_high(said)
                stop = _match_end(_STRING_RUN, text, at)
                said.append(text[at:stop])
                at = stop
                if at < end and text[at] == '"':
                    self.done = True
                    at += 1
                elif at < end and text[at] != "\\":
                    self.failed = True
        return "".join(said), at

    def _in_escape(self, char: str, said: list[str]) -> int:
        if self._escape == "\\" and char in _ESCAPES:
            self._release_high(said)
            said.append(_ESCAPES[char])
            self._escape = ""
            return 1
        if not (char == "u" if self._escape == "\\" else char in _HEX):
            self.failed = True
            return 0
        self._escape += char
        if len(self._escape) == len("\\uXXXX"):
            self._code_unit(int(self._escape[2:], 16), said)
            self._escape = ""
        return 1

    def _code_unit(self, unit: int, said: list[str]) -> None:
        if self._high is not None and 0xDC00 <= unit <= 0xDFFF:
            said.append(chr(0x10000 + ((self._high - 0xD800) << 10) + (unit - 0xDC00)))
            self._high = None
            return
        self._release_high(said)
        if 0xD800 <= unit <= 0xDBFF:
            self._high = unit
        else:
            said.append(_text_of(unit))

    def _release_high(self, said: list[str]) -> None:
        if self._high is not None:
            said.append(_text_of(self._high))
            self._high = None


def _text_of(unit: int) -> str:
    return f"\\u{unit:04x}" if 0xD800 <= unit <= 0xDFFF else chr(unit)


def _match_end(pattern: re.Pattern[str], text: str, at: int) -> int:
    match = pattern.match(text, at)
    assert match is not None  # the patterns match the empty text
    return match.end()
