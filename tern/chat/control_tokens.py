"""Keeps control tokens that are spelt out in a conversation from becoming control tokens.

Knows text, and the shapes of JSON that hold it. Knows nothing of templates or of how tokens are encoded.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from tern.errors import InvalidRequestError

_PRIVATE_USE = range(0xE000, 0xF900)


class ControlTokens:
    """The control tokens of a tokenizer, to be found in text. Thread-safe."""

    def __init__(self, tokens: Iterable[str]) -> None:
        words = [token for token in tokens if len(token) > 1]
        self._spelt = re.compile(rf"(?={_any_of(words)})(.)", re.DOTALL) if words else None

    def guard(self, value: Any) -> tuple[Any, str]:
        """A copy of a JSON value in which each control token has a mark behind its first character, and the mark.

        The mark is a character that the value does not hold: what is written from the copy is cut at the marks, and
        the parts, each encoded by itself, spell no control token but the writer's own. Where the value spells none,
        it is returned as it is, with "" for a mark. Raises `InvalidRequestError` if no character is left for a mark,
        or the value is nested too deeply to be copied.
        """
        spelt = self._spelt
        if spelt is None or not any(spelt.search(text) for text in _texts(value)):
            return value, ""
        used = set().union(*_texts(value))
        mark = next((char for char in map(chr, _PRIVATE_USE) if char not in used), None)
        if mark is None:
            raise InvalidRequestError(
                "The messages spell control tokens and use every private-use character (U+E000 to U+F8FF): "
                "leave some of them out.",
                param="messages",
            )
        try:
            return _marked(value, spelt, rf"\1{mark}"), mark
        except RecursionError:
            raise InvalidRequestError(
                "The messages or tools are nested too deeply: send flatter ones.", param="messages"
            ) from None


def _any_of(words: Iterable[str]) -> str:
    """A pattern for any of the words, or the beginning of one that is a word itself.

    Their common beginnings are written once: ERNIE has a thousand `<|LOC_0|>`, and trying them one by one at every `<`
    of a long text takes minutes.
    """
    rests: dict[str, list[str]] = {}
    for word in words:
        if not word:
            return ""
        rests.setdefault(word[0], []).append(word[1:])
    return "(?:" + "|".join(re.escape(first) + _any_of(rest) for first, rest in rests.items()) + ")"


def _texts(value: Any) -> Iterator[str]:
    """Every text in a JSON value, keys included."""
    pending = [value]
    while pending:
        each = pending.pop()
        if isinstance(each, str):
            yield each
        elif isinstance(each, Mapping):
            pending += each
            pending += each.values()
        elif isinstance(each, list | tuple):
            pending += each


def _marked(value: Any, spelt: re.Pattern[str], marked: str) -> Any:
    if isinstance(value, str):
        return spelt.sub(marked, value)
    if isinstance(value, Mapping):
        return {_marked(key, spelt, marked): _marked(each, spelt, marked) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_marked(each, spelt, marked) for each in value]
    return value
