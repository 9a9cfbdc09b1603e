"""What followed the last tokens when they stood in the text before. Knows token ids of one sequence, nothing else.

Answers that quote their prompt, edit code or repeat a tool's result say for long stretches what has been said already.
Every run of `shortest` tokens is filed under the place where it ended last, and each place points at the one before:

    tokens      a b c d . . a b c e . . a b c |      shortest 2
    latest      (b, c) -> 9                          the run that ends the text itself is not filed yet
    before[9] = 3                                    of a few such places the one with the longest match is copied
"""

from __future__ import annotations

from array import array

MOST_PLACES = 8  # earlier places that are compared; more find longer matches rarely


class NgramIndex:
    """An index of one growing sequence: a token is filed once, whatever is asked.

    A match has at least `shortest` tokens; tokens beyond `longest` do not make it better.
    """

    def __init__(self, shortest: int, longest: int) -> None:
        self.shortest = shortest
        self.longest = longest
        self._latest: dict[bytes, int] = {}  # the tokens of a run -> the position after it
        self._before = array("i", bytes(4 * shortest))  # by the position after a run; 0 is none

    def continuation(self, tokens: array[int], count: int) -> tuple[int, ...]:
        """`count` tokens that may follow `tokens`, or none; `tokens` are those of the last call and perhaps more."""
        self._file(tokens)
        if len(tokens) <= self.shortest:
            return ()
        place = self._latest.get(tokens[len(tokens) - self.shortest :].tobytes(), 0)
        best = best_length = 0
        for _ in range(MOST_PLACES):
            if place == 0 or best_length == self.longest:
                break
            length = self._match_length(tokens, place)
            if length > best_length:
                best, best_length = place, length
            place = self._before[place]
        return _copy(tokens, best, count) if best else ()

    def _file(self, tokens: array[int]) -> None:
        """File all runs but the one at the end, which would find itself."""
        for end in range(len(self._before), len(tokens)):
            run = tokens[end - self.shortest : end].tobytes()
            self._before.append(self._latest.get(run, 0))
            self._latest[run] = end

    def _match_length(self, tokens: array[int], place: int) -> int:
        length, most = self.shortest, min(self.longest, place)
        while length < most and tokens[place - length - 1] == tokens[-length - 1]:
            length += 1
        return length


def _copy(tokens: array[int], place: int, count: int) -> tuple[int, ...]:
    """`count` tokens from `place` on; where the text ends they are taken from the copy, so that a period goes on."""
    copied = list(tokens[place : place + count])
    period = len(tokens) - place
    while len(copied) < count:
        copied.append(copied[-period])
    return tuple(copied)
