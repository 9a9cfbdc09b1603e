"""A tokenizer as grammars see it: the bytes of every token, and which tokens a thought may not hold.

Knows tokens, bytes and the tag that ends a thought. Knows no grammar. Made once for a tokenizer, because it looks at
every token.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from tern.chat.parser import END_THINK
from tern.chat.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLTokenizer

_TAG = END_THINK.encode()
Mask = npt.NDArray[np.uint32]


class GrammarVocabulary:
    """The tokens of a tokenizer, those in `end_ids` ending an answer. Thread-safe once made.

    `thought_masks[k]` are the tokens that may come inside a thought whose text ends with the first k bytes of
    `</think>`: none that ends the answer there, and none in which something else than newlines follows the tag, since
    what follows is the grammar's.
    """

    def __init__(self, tokenizer: Tokenizer, end_ids: Iterable[int]) -> None:
        from llguidance import LLTokenizer, TokenizerWrapper

        self.size = tokenizer.vocab_size
        self.end_ids = frozenset(token_id for token_id in end_ids if token_id < self.size)
        self.bytes = [tokenizer.token_bytes(token_id) for token_id in range(self.size)]
        self.special_ids = tokenizer.special_ids | self.end_ids
        self.num_words = -(-self.size // 32)
        self.end_mask = self._mask(self.end_ids)
        self.thought_masks = [self._thought_mask(matched) for matched in range(len(_TAG))]
        self.library: LLTokenizer = LLTokenizer(
            TokenizerWrapper(_Words(self, tokenizer)), eos_token=sorted(self.end_ids) or [tokenizer.pad_id]
        )

    def read_thought(self, matched: int, token_id: int) -> tuple[int, bytes | None]:
        """Where a token leads from a thought's text that ends with the first `matched` bytes of `</think>`.

        Returns how many bytes the text ends with then, and what follows the tag if the token completes it.
        """
        if token_id >= self.size or token_id in self.special_ids:  # no text of the answer
            return matched, None
        text = _TAG[:matched] + self.bytes[token_id]
        found = text.find(_TAG)
        if found >= 0:
            return 0, text[found + len(_TAG) :]
        tail = text[text.rfind(b"<") :] if b"<" in text else b""
        return (len(tail) if _TAG.startswith(tail) else 0), None

    def spell(self, text: bytes) -> list[int]:
        """Tokens that spell `text`, whichever."""
        ids: list[int] = self.library.greedy_tokenize(text.decode(errors="replace"))
        return ids

    def _thought_mask(self, matched: int) -> Mask:
        rest = _TAG[matched:]
        closing = (i for i, text in enumerate(self.bytes) if b">" in text and (text.startswith(rest) or _TAG in text))
        forbidden = set(self.special_ids if matched else self.end_ids)  # shown as text they would break the tag
        for token_id in closing:
            follows = self.read_thought(matched, token_id)[1]
            if follows is not None and follows.strip(b"\n"):
                forbidden.add(token_id)
        return ~self._mask(forbidden)

    def _mask(self, token_ids: Iterable[int]) -> Mask:
        mask = np.zeros(self.num_words, np.uint32)
        for token_id in token_ids:
            mask[token_id >> 5] |= np.uint32(1 << (token_id & 31))
        return mask


class _Words:
    """What llguidance asks of a tokenizer; it is called for the canonical spelling of text that a grammar forces."""

    bos_token_id: int | None = None

    def __init__(self, vocabulary: GrammarVocabulary, tokenizer: Tokenizer) -> None:
        self.tokens = vocabulary.bytes
        self.special_token_ids = sorted(vocabulary.special_ids)
        self.eos_token_id = min(vocabulary.end_ids, default=tokenizer.pad_id)
        self._tokenizer = tokenizer

    def __call__(self, text: str | bytes) -> list[int]:
        return self._tokenizer.encode_continuation(text.decode() if isinstance(text, bytes) else text)
