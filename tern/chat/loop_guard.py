"""Notices a thought that goes round in circles.

Knows token ids only. A thought loops when its end repeats one block of tokens word for word, often enough and for long
enough that no scratchpad, table or code does the same: at least `MIN_REPEATS` times and `MIN_LENGTH` tokens.
"""

from __future__ import annotations

from collections import deque

MAX_PERIOD = 384
"""The longest block that is noticed, in tokens."""
MIN_REPEATS = 4
MIN_LENGTH = 256
"""Tokens that the repetition must fill: a line of 40 dashes or a run of zeros is no loop."""
CHECK_EVERY = 64
"""Tokens between two looks; each look costs time linear in the window, so a token costs a constant."""

_WINDOW = MAX_PERIOD * MIN_REPEATS


class LoopGuard:
    """Watches a thought's tokens."""

    def __init__(self) -> None:
        self._recent: deque[int] = deque(maxlen=_WINDOW)
        self._since = 0

    def push(self, token_id: int) -> bool:
        """Take one token; whether the thought now goes round in circles."""
        self._recent.append(token_id)
        self._since += 1
        if self._since < CHECK_EVERY or len(self._recent) < MIN_LENGTH:
            return False
        self._since = 0
        return repeats(list(self._recent))


def repeats(tokens: list[int]) -> bool:
    """Whether the end of `tokens` repeats one block of 1 to `MAX_PERIOD` tokens as the module describes.

    The Z-function (Gusfield 1997) of the reversed tokens gives, for every period at once, how far back it holds.
    """
    backwards = tokens[::-1]
    size = len(backwards)
    same = [0] * size  # same[p]: how many tokens from the end agree with those p further back
    left = right = 0
    for i in range(1, size):
        k = min(right - i, same[i - left]) if i < right else 0
        while i + k < size and backwards[k] == backwards[i + k]:
            k += 1
        same[i] = k
        if i + k > right:
            left, right = i, i + k
    return any(
        same[period] + period >= max(MIN_LENGTH, MIN_REPEATS * period)
        for period in range(1, min(MAX_PERIOD, size - 1) + 1)
    )
