"""A request while the engine works on it: its tokens so far, how many of them are computed, and its cache blocks.

Knows neither tensors nor the order of service. One notion runs through the whole engine:

    token_ids            | prompt ................ | generated ... |
    num_computed_tokens  |--------------->|                            keys and values exist up to here
    uncomputed                            | x x x x x x x x x x x x |   the next steps compute these

A decode is one uncomputed token, a prompt many, tokens forced by a sink several, a preempted sequence all of them. When
none is left uncomputed after a step, that step's last row of logits gives the next token.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from enum import Enum, auto
from typing import TYPE_CHECKING

from tern.engine.request import Request

if TYPE_CHECKING:
    from tern.engine.drafts import DraftState
    from tern.engine.sampling_state import SamplingState


class SequenceStatus(Enum):
    """Where a sequence stands with the scheduler."""

    NEW = auto()  # not added yet
    WAITING = auto()
    RUNNING = auto()
    FINISHED = auto()


class Sequence:
    """The runtime state of one request.

    `token_ids` and `block_table` are int64 arrays, so that a step copies them into tensors without a Python loop;
    `digests[i]` identifies the content of full block i and everything before it. `max_length` bounds prompt and
    generated tokens together, and `stop_ids` are the tokens that end the sequence when sampled. Sequences go in
    ascending `order`: priority, then arrival.
    """

    __slots__ = (
        "arrival",
        "block_table",
        "digests",
        "drafting",
        "max_length",
        "num_cached_tokens",
        "num_computed_tokens",
        "num_prompt_tokens",
        "request",
        "sampling",
        "status",
        "stop_ids",
        "token_ids",
    )

    def __init__(self, request: Request, *, max_length: int, stop_ids: frozenset[int], sampling: SamplingState) -> None:
        self.request = request
        self.token_ids = array("q", request.prompt_token_ids)
        self.num_prompt_tokens = len(self.token_ids)
        self.max_length = max_length
        self.stop_ids = stop_ids
        self.sampling = sampling
        self.num_computed_tokens = 0
        self.num_cached_tokens: int | None = None  # prompt tokens found in the cache; None until first scheduled
        self.block_table = array("q")
        self.digests: list[bytes] = []
        self.status = SequenceStatus.NEW
        self.arrival = 0
        self.drafting: DraftState | None = None  # made when first needed

    @property
    def request_id(self) -> str:
        """The caller's name for the request."""
        return self.request.request_id

    @property
    def order(self) -> tuple[int, int]:
        """Sequences are served in ascending order of this."""
        return (self.request.priority, self.arrival)

    @property
    def ahead(self) -> tuple[int, ...]:
        """Tokens that are read with it but not appended yet: none."""
        return ()

    @property
    def num_uncomputed_tokens(self) -> int:
        """Tokens whose keys and values are still missing."""
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def num_draftable_tokens(self) -> int:
        """Drafts that can be of use: the last token that fits is drawn after them."""
        return self.max_length - len(self.token_ids) - 1

    @property
    def num_generated_tokens(self) -> int:
        """Tokens after the prompt, sampled and forced."""
        return len(self.token_ids) - self.num_prompt_tokens

    def __repr__(self) -> str:
        return (
            f"Sequence({self.request_id!r}, {self.status.name}, tokens={len(self.token_ids)}, "
            f"computed={self.num_computed_tokens}, blocks={list(self.block_table)})"
        )


class Continuation:
    """A sequence as it will stand when the tokens `ahead` have been appended: what the sampler reads of it."""

    __slots__ = ("_ahead", "_sequence", "sampling")

    def __init__(self, sequence: Sequence, ahead: Iterable[int]) -> None:
        self._sequence = sequence
        self._ahead = array("q", ahead)
        self.sampling = sequence.sampling

    @property
    def ahead(self) -> array[int]:
        """The tokens that are not appended yet."""
        return self._ahead

    @property
    def token_ids(self) -> array[int]:
        """A copy of the prompt and all tokens after it."""
        return self._sequence.token_ids + self._ahead

    @property
    def num_generated_tokens(self) -> int:
        """Tokens after the prompt."""
        return self._sequence.num_generated_tokens + len(self._ahead)
