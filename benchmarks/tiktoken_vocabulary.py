"""A vocabulary out of a `.tiktoken` file (a token's bytes in base64 and its rank, a line each), for measurements.

Knows the file and `tern.chat.Tokenizer`. It is no checkpoint's tokenizer: what ends an answer is one id more.
"""

from __future__ import annotations

import base64
from pathlib import Path

from tern.chat import Tokenizer

END = "<|endoftext|>"


class TiktokenVocabulary:
    """The tokens of a file, the end token behind them. Text is encoded by the longest token that fits."""

    strips_leading_space = False

    def __init__(self, path: Path) -> None:
        pairs = (line.split() for line in path.read_bytes().splitlines() if line)
        ranks = {base64.b64decode(token): int(rank) for token, rank in pairs}
        self._bytes = [b""] * (max(ranks.values()) + 1)
        for token, rank in ranks.items():
            self._bytes[rank] = token
        self._ranks = ranks
        self._longest = max(map(len, ranks))
        self._end_id = len(self._bytes)
        self.size = self._end_id + 1
        self.special_ids = frozenset({self._end_id})

    def encode(self, text: str, *, allow_special: bool, add_special_tokens: bool) -> list[int]:
        """The ids of `text`, never the end token's."""
        del allow_special, add_special_tokens
        return self.encode_continuation(text)

    def encode_continuation(self, text: str) -> list[int]:
        """The same as `encode`."""
        left, ids = text.encode(), []
        while left:
            length = next(n for n in range(min(self._longest, len(left)), 0, -1) if left[:n] in self._ranks)
            ids.append(self._ranks[left[:length]])
            left = left[length:]
        return ids

    def id_of(self, token: str) -> int | None:
        """The id of one token."""
        return self._end_id if token == END else self._ranks.get(token.encode())

    def token_bytes(self, token_id: int) -> bytes:
        """What a token stands for."""
        return END.encode() if token_id == self._end_id else self._bytes[token_id]


def read_tiktoken(path: Path) -> Tokenizer:
    """A tokenizer of the file's tokens."""
    return Tokenizer(TiktokenVocabulary(path), names={"eos_token": END})
