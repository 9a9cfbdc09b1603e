"""How many prompt tokens a step computes, so that nobody waits for it too long. Knows seconds; knows no requests.

What a token costs depends on the machine, the weights, the depth and what else runs, so it is not modelled: after each
step the number of tokens is scaled by how far the step was off its aim. Whatever the cost of a step is, as long as more
tokens cost more, that converges.
"""

from __future__ import annotations

FIRST_TOKENS = 64
"""What is tried before anything was measured: a tenth of a second on slow machines, and doubled from step to step."""

LEAST_TOKENS = 16
"""However slow the machine is, a prompt advances by this many tokens a step."""

ALONE = 4
"""A step beside which nobody decodes may take so many times the aim: only newcomers and cancellations wait for it."""

_MOST_CHANGE = 2.0  # from one step to the next: one slow step may have been somebody else's fault
_SMOOTHING = 0.3


class PromptRoom:
    """Bounds the prompt tokens of a step, at most `most`, so that the step takes about `aim` seconds.

    Prompts get as long as the decodes beside them, even where those alone take more than half of the aim: neither waits
    for the other for ever.
    """

    def __init__(self, aim: float, most: int) -> None:
        self._aim = aim
        self._most = most
        self._least = min(LEAST_TOKENS, most)
        self._beside = self._alone = float(min(FIRST_TOKENS, most))
        self._decode_seconds: dict[int, float] = {}  # of steps of decodes alone, by how many there were

    def tokens(self, decodes: int) -> int:
        """Prompt tokens that the next step may compute beside so many decodes."""
        return int(self._beside if decodes else self._alone)

    def learn(self, decodes: int, tokens: int, seconds: float) -> None:
        """Note a step of so many decodes and prompt tokens that took `seconds`."""
        if not tokens:
            before = self._decode_seconds.get(decodes, seconds)
            self._decode_seconds[decodes] = before + _SMOOTHING * (seconds - before)
        elif decodes:
            aim = max(self._aim, 2 * self._seconds_of(decodes))
            self._beside = self._adapted(self._beside, tokens, aim / max(seconds, 1e-9))
        else:
            self._alone = self._adapted(self._alone, tokens, ALONE * self._aim / max(seconds, 1e-9))

    def _seconds_of(self, decodes: int) -> float:
        """How long the decodes take alone: as measured, or as the next smaller number of them did."""
        known = [count for count in self._decode_seconds if count <= decodes]
        return self._decode_seconds[max(known)] if known else 0.0

    def _adapted(self, allowed: float, tokens: int, ratio: float) -> float:
        """The number to allow from now on, when `tokens` could have taken `ratio` times as long as they took.

        Few tokens, the end of a prompt, say nothing about many, save that what they fit into is not too much.
        """
        fit = tokens * min(_MOST_CHANGE, max(1 / _MOST_CHANGE, ratio))
        if tokens < int(allowed):
            fit = min(allowed, fit) if ratio < 1 else max(allowed, fit)
        return min(float(self._most), max(float(self._least), fit))
