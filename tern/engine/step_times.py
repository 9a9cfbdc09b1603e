"""How long steps take, by their sequences and rows, and which of them are best. Knows seconds; knows no drafts.

A step that computes more rows takes longer, by how much depends on the machine, the weights and the depth; so it is
measured. Only steps of decodes count here: `sequences` of them and `rows` in all, one for each and those of drafts.
"""

from __future__ import annotations

from collections import deque

FEWEST_SAMPLES = 2  # before the time of plain steps is believed
_SAMPLES = 8
_STALE_STEPS = 256  # a time that old was measured at another depth, or while the machine did something else


class StepTimes:
    """The times of decode steps, and the estimate for those not measured."""

    def __init__(self) -> None:
        self._steps = 0
        self._seconds: dict[tuple[int, int], deque[float]] = {}
        self._measured: dict[tuple[int, int], int] = {}  # when, in steps

    def add(self, sequences: int, rows: int, seconds: float) -> None:
        """Note a step that took `seconds`."""
        self._steps += 1
        key = (sequences, rows)
        if not self._fresh(key):
            self._seconds[key] = deque(maxlen=_SAMPLES)
        self._seconds[key].append(seconds)
        self._measured[key] = self._steps

    def known(self, sequences: int) -> bool:
        """Whether the time of plain steps, a row for each sequence, is known well enough to compare with."""
        key = (sequences, sequences)
        return self._fresh(key) and len(self._seconds[key]) >= FEWEST_SAMPLES

    def curve(self, sequences: int) -> TimeCurve:
        """The time of a step of so many sequences as a function of its rows; plain steps must be known."""
        points = {
            rows: min(samples)  # other work on the machine only ever lengthens a step
            for (count, rows), samples in self._seconds.items()
            if count == sequences and self._fresh((count, rows))
        }
        return TimeCurve(sorted(points.items()))

    def _fresh(self, key: tuple[int, int]) -> bool:
        return self._steps - self._measured.get(key, -_STALE_STEPS - 1) <= _STALE_STEPS


class TimeCurve:
    """Seconds by rows, linear between measured `points` (rows, seconds) and beyond them.

    With a single point rows are taken to be free: the first step that tries them tells.
    """

    def __init__(self, points: list[tuple[int, float]]) -> None:
        self._points = points

    def __call__(self, rows: int) -> float:
        low, high = self._points[0], self._points[-1]
        for point in self._points:
            if point[0] <= rows:
                low = point
            elif point[0] > rows:
                high = point
                break
        if low[0] == high[0]:  # at the last point, or beyond it: along the line from the first
            low = self._points[0]
        if low[0] == high[0]:
            return low[1]
        slope = max(0.0, (high[1] - low[1]) / (high[0] - low[0]))
        return low[1] + slope * (rows - low[0])
