"""The JSON of one tool call, `{"name": ..., "arguments": {...}}`, read while it is being written.

Knows which keys a call has and when its arguments may be handed on. Knows nothing of the tags around it, nor of events.
Keys may come in any order and others may stand between them; `name` must be text, `arguments` an object, or a string
that holds one. `null` or absent arguments (a call of `name` alone) are the empty object.
"""

from __future__ import annotations

import json
import re
from enum import Enum

from tern.chat.json_scanner import JsonScanner, JsonStringDecoder

_NOT_SPACE = re.compile(r"[^ \t\n\r]")
_HALF_CHARACTER = re.compile("[\ud800-\udfff]")  # which JSON can spell and UTF-8 cannot write


class _Arguments:
    """The value behind the key `arguments`; `pieces` gathers what is sure to be a prefix of one JSON object."""

    def __init__(self) -> None:
        self._json = JsonScanner()
        self._string: JsonStringDecoder | None = None
        self._kind = ""  # the first character of the value: { or " or n
        self._inner_begun = False  # of a string: the brace of what it holds has been seen
        self._spoilt = False
        self.pieces: list[str] = []

    @property
    def begun(self) -> bool:
        """The object's first value has begun, or the object is empty: this is no stray brace."""
        return self._kind in ("{", '"') and self._json.entered

    @property
    def done(self) -> bool:
        if self._string is not None:
            return self._string.done and self._json.done and not self._spoilt
        return self._json.done

    @property
    def failed(self) -> bool:
        if self._string is not None:
            return self._string.failed or (self._string.done and not self.done)
        return self._spoilt or self._json.failed

    def read(self, text: str, at: int) -> int:
        """Read on from `text[at:]`, where the first call sees the value's first character; returns where it stopped."""
        if not self._kind:
            self._kind = text[at]
            if self._kind == '"':
                self._string = JsonStringDecoder()
                at += 1
            elif self._kind not in "{n":
                self._spoilt = True
                return at
        if self._string is not None:
            said, at = self._string.decode(text, at)
            self._read_said(said)
            return at
        stop = self._json.scan(text, at)
        if self._kind == "{":
            self.pieces.append(text[at:stop])
        elif self._json.done:
            self.pieces.append("{}")
        return stop

    def _read_said(self, said: str) -> None:
        """The inner text of a string. What is wrong in it counts when the string ends: only there is the place sure."""
        if not self._inner_begun:
            said = said.lstrip(" \t\n\r")
            self._inner_begun = said != ""
            self._spoilt = self._inner_begun and said[0] != "{"
        if self._spoilt or not said:
            return
        stop = self._json.scan(said)
        self.pieces.append(said[:stop])
        self._spoilt = self._json.failed or _NOT_SPACE.search(said, stop) is not None


class _Place(Enum):
    BRACE = "the opening brace"
    FIRST_KEY = "a key or the closing brace"
    KEY = "a key"
    IN_KEY = "the rest of a key"
    COLON = "a colon"
    VALUE = "a value"
    IN_VALUE = "the rest of a value"
    IN_ARGUMENTS = "the rest of the arguments"
    NEXT = "a comma or the closing brace"
    COMPLETE = "nothing"
    WRONG = "nothing any more"


class CallReader:
    """Reads one call; `name` is None until it is known."""

    def __init__(self) -> None:
        self._place = _Place.BRACE
        self._scanner = JsonScanner()
        self._collected: list[str] = []  # the text of a key, or of the name
        self._keys = 0
        self._key = ""
        self._arguments: _Arguments | None = None
        self.name: str | None = None

    @property
    def complete(self) -> bool:
        """The closing brace has been read and the call is whole."""
        return self._place is _Place.COMPLETE

    @property
    def wrong(self) -> bool:
        """Whatever follows, this is no call."""
        return self._place is _Place.WRONG

    @property
    def certain(self) -> bool:
        """The name is known and the arguments have really begun: the call may be announced."""
        return self.name is not None and (self.complete or (self._arguments is not None and self._arguments.begun))

    @property
    def arguments_complete(self) -> bool:
        """The arguments have been read to their end."""
        return self._arguments is not None and self._arguments.done

    def take_arguments(self) -> str:
        """The arguments' JSON text read since the last time."""
        if self._arguments is None:
            return ""
        taken = "".join(self._arguments.pieces)
        self._arguments.pieces.clear()
        return taken

    def read(self, text: str, at: int) -> int:
        """Read on from `text[at:]`; returns where it stopped: the end, behind the call, or at what is wrong."""
        end = len(text)
        while at < end and not self.complete and not self.wrong:
            if self._place in (_Place.IN_KEY, _Place.IN_VALUE):
                at = self._read_token(text, at)
            elif self._place is _Place.IN_ARGUMENTS:
                at = self._read_arguments(text, at)
            else:
                found = _NOT_SPACE.search(text, at)
                at = end if found is None else found.start()
                if at < end:
                    at = self._punctuation(text[at], at)
        return at

    def _go(self, place: _Place, at: int) -> int:
        self._place = place
        return at

    def _punctuation(self, char: str, at: int) -> int:
        place = self._place
        if place is _Place.BRACE and char == "{":
            return self._go(_Place.FIRST_KEY, at + 1)
        if place in (_Place.FIRST_KEY, _Place.KEY) and char == '"':
            return self._begin_token(_Place.IN_KEY, at)
        if place is _Place.COLON and char == ":":
            return self._go(_Place.VALUE, at + 1)
        if place is _Place.VALUE:
            return self._begin_value(char, at)
        if place is _Place.NEXT and char == ",":
            return self._go(_Place.KEY, at + 1)
        if place is _Place.NEXT and char == "}":
            return self._close(at)
        return self._go(_Place.WRONG, at)

    def _begin_token(self, place: _Place, at: int) -> int:
        self._scanner = JsonScanner()
        self._collected = []
        return self._go(place, at)

    def _begin_value(self, char: str, at: int) -> int:
        if self._key == "arguments":
            if self._arguments is not None:
                return self._go(_Place.WRONG, at)
            self._arguments = _Arguments()
            return self._go(_Place.IN_ARGUMENTS, at)
        if self._key == "name" and (self.name is not None or char != '"'):
            return self._go(_Place.WRONG, at)
        return self._begin_token(_Place.IN_VALUE, at)

    def _read_token(self, text: str, at: int) -> int:
        stop = self._scanner.scan(text, at)
        if self._place is _Place.IN_KEY or self._key == "name":
            self._collected.append(text[at:stop])
        if self._scanner.failed:
            return self._go(_Place.WRONG, stop)
        if not self._scanner.done:
            return stop
        if self._place is _Place.IN_KEY:
            self._key = json.loads("".join(self._collected))
            self._keys += 1
            return self._go(_Place.COLON, stop)
        if self._key == "name":
            name = json.loads("".join(self._collected))
            self.name = None if _HALF_CHARACTER.search(name) else name or None
        return self._go(_Place.NEXT if self._key != "name" or self.name else _Place.WRONG, stop)

    def _read_arguments(self, text: str, at: int) -> int:
        assert self._arguments is not None
        stop = self._arguments.read(text, at)
        if self._arguments.failed:
            return self._go(_Place.WRONG, stop)
        return self._go(_Place.NEXT, stop) if self._arguments.done else stop

    def _close(self, at: int) -> int:
        if self._arguments is None and self.name is not None and self._keys == 1:
            self._arguments = _Arguments()
            self._arguments.read("null", 0)
        if self.name is None or self._arguments is None:
            return self._go(_Place.WRONG, at + 1)
        return self._go(_Place.COMPLETE, at + 1)
