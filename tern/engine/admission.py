"""Who may join the queue, and when those who may not should come back. Knows counts and seconds; knows no requests.

The seconds are those that steps took: while the engine has nothing to do, nothing is learned and nothing forgotten.
"""

from __future__ import annotations

from tern.engine.options import EngineOptions
from tern.errors import QueueFullError

UNKNOWN_SECONDS = 1.0
"""After what time to come back, before anything was measured."""

MOST_SECONDS = 600.0

_KEPT_READ = 0.95  # weight of what is known when one more step is seen
_KEPT_ENDED = 0.99


class Admission:
    """The limits of the queue, and the speeds at which it moves: of reading prompts, and of requests ending."""

    def __init__(self, options: EngineOptions) -> None:
        self._max_num_seqs = options.max_num_seqs
        self._max_queue, self._max_queue_tokens = options.max_queue, options.max_queue_tokens
        self._read_tokens = self._read_seconds = 0.0
        self._ended = self._seconds = 0.0

    def check(self, num_open: int, waiting_tokens: int, more_tokens: int) -> None:
        """Raise `QueueFullError` if there is no room for one more request of `more_tokens` prompt tokens.

        `num_open` unfinished requests fill the running places and then the queue; `waiting_tokens` are those of prompts
        that were not started yet. Where none wait, a prompt of any length may.
        """
        waiting, limit = num_open - self._max_num_seqs, self._max_queue
        if limit is not None and waiting >= limit:
            raise QueueFullError(
                f"{waiting} requests are waiting and max_queue is {limit}: try again later.",
                retry_after=_seconds(waiting - limit + 1, self._ended, self._seconds),
            )
        limit, together = self._max_queue_tokens, waiting_tokens + more_tokens
        if limit is not None and waiting_tokens and more_tokens and together > limit:
            raise QueueFullError(
                f"{waiting_tokens} prompt tokens are waiting, this request has {more_tokens} and max_queue_tokens is "
                f"{limit}: try again later.",
                retry_after=_seconds(min(waiting_tokens, together - limit), self._read_tokens, self._read_seconds),
            )

    def learn(self, prompt_tokens: int, seconds: float) -> None:
        """Note a step, and how many of its tokens were prompts'."""
        if prompt_tokens:
            self._read_tokens = self._read_tokens * _KEPT_READ + prompt_tokens
            self._read_seconds = self._read_seconds * _KEPT_READ + seconds
        self._ended *= _KEPT_ENDED
        self._seconds = self._seconds * _KEPT_ENDED + seconds

    def reading_seconds(self, tokens: int) -> float | None:
        """How long so many prompt tokens take to read; None while that is not known."""
        return tokens * self._read_seconds / self._read_tokens if self._read_tokens > 1e-6 else None

    def ended(self) -> None:
        """Note that a request has ended, and another may take its place."""
        self._ended += 1


def _seconds(amount: int, done: float, took: float) -> float:
    """How long `amount` takes where `done` took so many seconds."""
    return min(MOST_SECONDS, amount * took / done) if done > 1e-6 else UNKNOWN_SECONDS
