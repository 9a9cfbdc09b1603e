"""Follows one answer token by token and says which may come next: in the thought nearly all, behind it the grammar's.

Knows a compiled grammar and token ids; it is what the engine asks of a grammar, by shape. Knows nothing of how the
grammar came about.

    accepted  | thought ... </think> | \\n \\n <response> ...     one `_Place` behind each token ahead,
    ahead                                  | t1 | t2 | t3         so that any number of them can be taken back
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from llguidance import LLMatcher

from tern.chat.grammar_vocabulary import GrammarVocabulary


class GrammarError(Exception):
    """A grammar cannot go on: a token came that it forbids, it allows none, or it has become too costly."""


class _Place(NamedTuple):
    """Where a token leads: inside a thought that ends with `matched` bytes of its closing tag (None: behind it), with
    `consumed` tokens taken by the matcher, and whether only the end can follow.
    """

    matched: int | None
    consumed: int
    ended: bool


class AnswerGrammar:
    """Holds one answer to a grammar. Used by one thread at a time.

    `matcher` stands at the grammar's beginning and is this answer's own; with `thinking` the answer begins inside a
    thought, and the grammar behind it.
    """

    def __init__(self, vocabulary: GrammarVocabulary, matcher: LLMatcher, *, thinking: bool) -> None:
        self._vocabulary = vocabulary
        self._matcher = matcher
        self._places = [_Place(0 if thinking else None, 0, False)]
        self._ahead: list[int] = []
        self._row = np.zeros(vocabulary.num_words, np.uint32)

    @property
    def ended(self) -> bool:
        """Nothing but the end can follow the accepted tokens."""
        return self._places[0].ended

    def fill(self, mask: npt.NDArray[np.uint32], ahead: Sequence[int]) -> bool:
        """Write which tokens may follow the accepted ones and those `ahead`: bits of `mask` [vocab / 32].

        False, and nothing written, if a token ahead may not come. Raises `GrammarError`.
        """
        if not self._go_to(ahead):
            return False
        place = self._places[-1]
        row = self._vocabulary.end_mask
        if place.matched is not None:
            row = self._vocabulary.thought_masks[place.matched]
            mask[len(row) :] = ~np.uint32(0)  # a network may have more ids than its tokenizer; they have no text
        elif not place.ended:
            row = self._allowed()
        count = min(len(mask), len(row))
        mask[:count] = row[:count]
        return True

    def accept(self, token_id: int) -> None:
        """Take the next token. Raises `GrammarError` if it may not come."""
        if not self._ahead or self._ahead[0] != token_id:
            self._go_to(())
            if not self._push(token_id):
                raise GrammarError(f"token {token_id} may not come here{self._reason()}")
        del self._ahead[0], self._places[0]

    def _go_to(self, ahead: Sequence[int]) -> bool:
        """Stand behind the tokens ahead, or the last of them that may come; whether all may."""
        common = 0
        while common < min(len(ahead), len(self._ahead)) and ahead[common] == self._ahead[common]:
            common += 1
        surplus = self._places[-1].consumed - self._places[common].consumed
        if surplus and not self._matcher.rollback(surplus):
            raise GrammarError(f"{surplus} tokens cannot be taken back{self._reason()}")
        del self._ahead[common:], self._places[common + 1 :]
        return all(map(self._push, ahead[common:]))

    def _push(self, token_id: int) -> bool:
        """Stand behind one more token; False if it may not come."""
        place = self._places[-1]
        if place.matched is not None:
            if token_id in self._vocabulary.end_ids:
                return False
            matched, follows = self._vocabulary.read_thought(place.matched, token_id)
            tokens = [] if follows is None else self._vocabulary.spell(follows)
            matched_then = matched if follows is None else None
        elif place.ended or token_id in self._vocabulary.end_ids:
            if token_id not in self._vocabulary.end_ids or not (place.ended or self._matcher.is_accepting()):
                return False
            matched_then, tokens = None, []
        elif token_id >= self._vocabulary.size:
            return False
        else:
            matched_then, tokens = None, [token_id]
        taken = self._matcher.try_consume_tokens(tokens) if tokens else 0
        if taken < len(tokens):
            if taken:
                self._matcher.rollback(taken)
            return False
        if self._matcher.is_error():
            raise GrammarError(f"a token could not be taken{self._reason()}")
        ended = matched_then is None and (token_id in self._vocabulary.end_ids or self._matcher.is_stopped())
        self._ahead.append(token_id)
        self._places.append(_Place(matched_then, place.consumed + taken, ended))
        return True

    def _allowed(self) -> npt.NDArray[np.uint32]:
        """The grammar's own mask. Ends are in it exactly where the answer may end."""
        row = self._row
        self._matcher.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)
        row &= ~self._vocabulary.end_mask
        if self._matcher.is_error():
            raise GrammarError(f"no mask{self._reason()}")
        if self._matcher.is_accepting():
            row |= self._vocabulary.end_mask
        if not row.any():
            raise GrammarError("no token may come next")
        return row

    def _reason(self) -> str:
        error = self._matcher.get_error()
        return f": {error}" if error else ""
