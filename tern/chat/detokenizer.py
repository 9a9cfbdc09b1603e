"""Tokens to text, one token at a time, never half a UTF-8 character.

Knows bytes and UTF-8. Works on the bytes of each token, so a token costs constant time and the pieces of any sequence,
joined, are exactly the text of the whole.
"""

from __future__ import annotations

import codecs
from typing import Protocol


class TokenBytes(Protocol):
    """The part of a tokenizer that is needed here."""

    @property
    def special_ids(self) -> frozenset[int]: ...

    @property
    def strips_leading_space(self) -> bool: ...

    def token_bytes(self, token_id: int) -> bytes: ...


class Detokenizer:
    """Turns a sequence of tokens into text as they come.

    Bytes that cannot be UTF-8 become U+FFFD, one for each maximal wrong piece. With `continuation` the text follows
    other text and keeps the space before its first word.
    """

    def __init__(self, tokenizer: TokenBytes, *, skip_special_tokens: bool = True, continuation: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._strip = tokenizer.strips_leading_space and not continuation

    @property
    def inside_character(self) -> bool:
        """The tokens so far end with the first bytes of a character."""
        return bool(self._decoder.getstate()[0])

    def push(self, token_id: int) -> str:
        """The text that this token completes, often empty."""
        if token_id in self._skipped:
            return ""
        return self._cut(self._decoder.decode(self._tokenizer.token_bytes(token_id)))

    def finish(self) -> str:
        """The sequence is over: an unfinished character, as U+FFFD."""
        return self._cut(self._decoder.decode(b"", final=True))

    def _cut(self, text: str) -> str:
        if self._strip and text:
            self._strip = False
            return text.removeprefix(" ")
        return text
