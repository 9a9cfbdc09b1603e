"""What the offline door hands back, in vLLM's form. Knows names and types; computes nothing."""

from __future__ import annotations

from dataclasses import dataclass

from tern.chat import ParsedMessage


@dataclass(frozen=True)
class Logprob:
    """One candidate of one step: natural log-probability, rank among the vocabulary (1 = likeliest), its text."""

    logprob: float
    rank: int
    decoded_token: str


@dataclass
class CompletionOutput:
    """One generated sequence.

    `token_ids` includes the end token that stopped it; `text` does not. `logprobs[i]` maps candidate ids of token i to
    their `Logprob`, token i itself first. `finish_reason` is "stop", "length", "cancelled" or "error"; `stop_reason` is
    the stop string or the stop token id where one of those ended it. `message` is the parsed answer of a chat, None for
    plain prompts.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None
    logprobs: list[dict[int, Logprob]] | None
    finish_reason: str | None
    stop_reason: int | str | None = None
    error: str | None = None
    message: ParsedMessage | None = None


@dataclass
class RequestOutput:
    """All outputs of one prompt. `num_cached_tokens` of its prompt came from the prefix cache.

    `prompt_logprobs[i]`, if they were asked for, maps candidate ids of prompt token i to their `Logprob`, the token
    itself first; the first prompt token has None.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool = True
    num_cached_tokens: int = 0
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
