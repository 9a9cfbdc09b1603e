"""The values that cross the engine's door: a request going in, tokens and an ending coming out.

Knows no tensors and no text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

import numpy as np
import numpy.typing as npt

from tern.engine.sampling_params import SamplingParams


class FinishReason(StrEnum):
    """Why a sequence ended."""

    STOP = "stop"  # an end-of-sequence or stop token, or its sink said so (a stop string)
    LENGTH = "length"  # max_tokens or the model's length
    CANCELLED = "cancelled"  # the caller took it back
    ERROR = "error"  # the engine or the sink failed on it


@dataclass(frozen=True)
class TokenLogprob:
    """One candidate of a step: its natural log-probability under the unmodified model, and its rank (1 = likeliest)."""

    token_id: int
    logprob: float
    rank: int


@dataclass(frozen=True)
class GeneratedToken:
    """One token appended to a sequence.

    `logprob` and `top_logprobs` are present when the request asked for logprobs; a `forced` token was written by the
    sink's steering, not sampled, and carries none.
    """

    token_id: int
    logprob: TokenLogprob | None = None
    top_logprobs: tuple[TokenLogprob, ...] = ()
    forced: bool = False


@dataclass(frozen=True)
class Steering:
    """A sink's answer to one token: end the sequence here, or append these tokens before the model goes on."""

    stop: bool = False
    force: tuple[int, ...] = ()


CONTINUE = Steering()


@dataclass(frozen=True)
class Finish:
    """How a sequence ended. `stop_token_id` is the end or stop token that ended it (it was pushed too); `message`
    explains an ERROR in words meant for the user.
    """

    reason: FinishReason
    num_prompt_tokens: int
    num_generated_tokens: int
    num_cached_tokens: int
    stop_token_id: int | None = None
    message: str | None = None


class TokenSink(Protocol):
    """Where one sequence's tokens go. Called on the engine's thread: it must be quick and must not block.

    `push` is called once for every generated token, forced ones included, in order; `finish` exactly once, last.
    An exception raised here ends this request alone.
    """

    def push(self, token: GeneratedToken) -> Steering: ...

    def finish(self, finish: Finish) -> None: ...


class TokenGrammar(Protocol):
    """Says which tokens may come next in one sequence. Called on the engine's thread only.

    It knows the tokens that were accepted, none of the prompt's. `ended` is true once only the end may follow: the
    sequence then ends. An exception raised here ends this request alone.
    """

    @property
    def ended(self) -> bool: ...

    def fill(self, mask: npt.NDArray[np.uint32], ahead: Sequence[int]) -> bool:
        """Write what may come behind the accepted tokens and those `ahead`, which are not accepted by it.

        Token t is bit t % 32 of word t // 32 of `mask` [ceil(vocab / 32)], which comes as zeros. False says that
        nothing binds there, because the grammar is silent or because it refuses the tokens ahead.
        """

    def accept(self, token_id: int) -> None:
        """Take the next token, sampled or forced. Raises when it may not come."""


@dataclass(frozen=True)
class Request:
    """One sequence to generate (`n` choices are n requests that share their prompt's cache).

    `bad_token_sequences` are the tokenised `bad_words`. `cache_salt` keeps prefix-cache entries of different owners
    apart. Of equal `priority` the earlier request goes first; lower values go before higher ones.
    `choice_index` shifts the seed so that choices of one request differ. `grammar` binds this one sequence: it wins
    over `min_tokens`, `ignore_eos` and bad words where they would leave it no token.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    sink: TokenSink
    bad_token_sequences: tuple[tuple[int, ...], ...] = ()
    priority: int = 0
    cache_salt: bytes = b""
    choice_index: int = 0
    grammar: TokenGrammar | None = None
