"""What the sampler must know of one sequence, in arrays that a whole batch concatenates. Knows numpy, not torch.

Sparse on purpose: penalties touch only the tokens a sequence has seen, so a request without them costs nothing and one
with them costs its own distinct tokens, never the vocabulary.
"""

from __future__ import annotations

import secrets
from array import array
from collections.abc import Sequence as Ordered
from typing import Protocol

import numpy as np
import numpy.typing as npt

from tern.engine.request import Request

_MASK64 = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15


def _mix(value: int) -> int:
    """splitmix64's output function (Steele, Lea & Flood, 2014): 64 bits in, 64 well-mixed bits out."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK64
    return value ^ (value >> 31)


def stream_of(seed: int | None, choice_index: int) -> int:
    """The 64-bit random stream of one choice of a request; no seed means a fresh stream."""
    if seed is None:
        return secrets.randbits(64)
    return _mix((_mix((seed + _GOLDEN) & _MASK64) + (choice_index + 1) * _GOLDEN) & _MASK64)


def uniform(stream: int, position: int) -> float:
    """A number in [0, 1) with 53 random bits that depends on nothing but the stream and the position in it.

    Counter-based, so the token at a position is the same however the request was batched, preempted or resumed.
    """
    return (_mix((stream + (position + 1) * _GOLDEN) & _MASK64) >> 11) * 2.0**-53


class TokenHistory:
    """The distinct tokens that penalties apply to, and how often each was generated.

    `ids`, `counts` [distinct]: prompt tokens are there only for the repetition penalty, with count 0 until generated.
    """

    def __init__(self, prompt_ids: npt.NDArray[np.int64]) -> None:
        distinct = np.unique(prompt_ids)
        self._ids = np.concatenate([distinct, np.empty(16, np.int64)])
        self._counts = np.zeros(len(self._ids), np.float32)
        self._place = {int(token): place for place, token in enumerate(distinct)}

    @property
    def ids(self) -> npt.NDArray[np.int64]:
        return self._ids[: len(self._place)]

    @property
    def counts(self) -> npt.NDArray[np.float32]:
        return self._counts[: len(self._place)]

    def add(self, token: int) -> None:
        """Count one generated token."""
        place = self._place.setdefault(token, len(self._place))
        if place == len(self._ids):
            self._ids = np.concatenate([self._ids, np.empty_like(self._ids)])
            self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
        self._ids[place] = token
        self._counts[place] += 1


class SamplingState:
    """One sequence's sampling parameters in the form the sampler reads, and its token history.

    `edits_logits` is true when the logits themselves are changed (bias, penalties, masks), at least for now.
    `ignored_ids` are the model's end tokens when they are to be ignored.
    """

    def __init__(self, request: Request, stop_ids: frozenset[int], ignored_ids: frozenset[int] = frozenset()) -> None:
        params = request.params
        self.params = params
        self.grammar = request.grammar
        self._ignored = np.array(sorted(ignored_ids), np.int64)
        self.stream = stream_of(params.seed, request.choice_index)
        self.greedy = params.greedy
        self.min_tokens = params.min_tokens
        self.stop_ids = np.array(sorted(stop_ids), np.int64)
        self.bias_ids = np.array(list(params.logit_bias), np.int64)
        self.bias_values = np.array(list(params.logit_bias.values()), np.float32)
        self.allowed_ids = np.array(sorted(set(params.allowed_token_ids or ())), np.int64)
        self._banned = np.array([words[0] for words in request.bad_token_sequences if len(words) == 1], np.int64)
        self._bad_sequences = [array("q", words) for words in request.bad_token_sequences if len(words) > 1]
        self._num_prompt_tokens = len(request.prompt_token_ids)
        self._num_seen = self._num_prompt_tokens
        repeats = params.repetition_penalty != 1.0
        self.penalised = repeats or params.presence_penalty != 0.0 or params.frequency_penalty != 0.0
        self.history = (
            TokenHistory(np.array(request.prompt_token_ids if repeats else (), np.int64)) if self.penalised else None
        )
        self._always_edits = bool(
            self.penalised or len(self.bias_ids) or request.bad_token_sequences or len(self.allowed_ids)
        )

    def edits_logits(self, num_generated: int) -> bool:
        """Whether the next token's logits must be edited before sampling."""
        return self._always_edits or num_generated < self.min_tokens

    def catch_up(self, token_ids: array[int]) -> None:
        """Count the tokens generated since the last call."""
        if self.history is not None:
            for token in token_ids[self._num_seen :]:
                self.history.add(token)
        self._num_seen = len(token_ids)

    def masked_ids(self, token_ids: array[int]) -> npt.NDArray[np.int64]:
        """Tokens that must not come next: ends before `min_tokens`, and those that would complete a bad word."""
        masked = self._banned
        if len(token_ids) - self._num_prompt_tokens < self.min_tokens:
            masked = np.concatenate([masked, self.stop_ids])
        if self._bad_sequences:
            longest = max(map(len, self._bad_sequences))
            tail = token_ids[max(self._num_prompt_tokens, len(token_ids) - longest) :]
            ends = [bad[-1] for bad in self._bad_sequences if tail[1 - len(bad) :] == bad[:-1]]
            masked = np.concatenate([masked, np.array(ends, np.int64)])
        return masked

    def narrow(self, mask: npt.NDArray[np.uint32], token_ids: array[int]) -> npt.NDArray[np.uint32]:
        """A grammar's `mask` [vocab / 32] without what must not come next, unless the grammar leaves nothing else."""
        banned = np.concatenate([self.masked_ids(token_ids), self._ignored])
        if not len(banned):
            return mask
        narrowed = mask.copy()
        np.bitwise_and.at(narrowed, banned >> 5, ~(np.uint32(1) << (banned & 31).astype(np.uint32)))
        return narrowed if narrowed.any() else mask


class SamplingRow(Protocol):
    """What the sampler reads of the sequence that a row of logits belongs to."""

    @property
    def sampling(self) -> SamplingState: ...

    @property
    def token_ids(self) -> array[int]: ...

    @property
    def num_generated_tokens(self) -> int: ...

    @property
    def ahead(self) -> Ordered[int]: ...
