"""What an engine refuses before it takes a request. Knows the model's vocabulary and length; changes nothing."""

from __future__ import annotations

from array import array
from collections.abc import Iterable

from tern.engine.request import Request
from tern.errors import ContextLengthError, InvalidRequestError


def check_request(request: Request, stop_ids: frozenset[int], *, vocab_size: int, max_model_len: int) -> None:
    """Raise `InvalidRequestError` for what can never be computed, `ContextLengthError` if that is its length.

    `stop_ids` are all tokens that end the request.
    """
    params = request.params
    try:
        prompt = array("q", request.prompt_token_ids)
    except (TypeError, OverflowError):
        raise InvalidRequestError(
            "The prompt holds something that is no token id: give whole numbers.", param="prompt"
        ) from None
    if not prompt:
        raise InvalidRequestError("The prompt is empty: give at least one token.", param="prompt")
    named = {
        "prompt": prompt,
        "stop_token_ids": params.stop_token_ids,
        "logit_bias": params.logit_bias,
        "allowed_token_ids": params.allowed_token_ids or (),
    }
    for name, ids in named.items():
        check_ids(name, ids, vocab_size)
    for words in request.bad_token_sequences:
        check_ids("bad_words", words, vocab_size)
        if not words:
            raise InvalidRequestError("bad_words contains an empty word: leave it out.", param="bad_words")
    if params.structured_outputs is not None and request.grammar is None:
        raise InvalidRequestError(
            "structured_outputs is given to the engine itself, which knows no text: make a grammar of it.",
            param="structured_outputs",
        )
    _check_length(len(prompt), params.max_tokens, max_model_len)
    _check_choice(request, stop_ids, vocab_size)


def check_ids(name: str, ids: Iterable[int], vocab_size: int) -> None:
    """Raise `InvalidRequestError` if any of the ids called `name` is none of the model's."""
    low, high = min(ids, default=0), max(ids, default=0)
    if low < 0 or high >= vocab_size:
        raise InvalidRequestError(
            f"{name} holds token id {low if low < 0 else high}: the model knows ids 0 to {vocab_size - 1}.",
            param=name,
        )


def _check_length(num_prompt: int, max_tokens: int | None, limit: int) -> None:
    # These are OpenAI's words: clients look for them to tell a full context from other mistakes.
    known = f"This model's maximum context length is {limit} tokens, prompt and answer together, but"
    if num_prompt >= limit + (max_tokens == 0):
        raise ContextLengthError(f"{known} the prompt has {num_prompt}: shorten the prompt.")
    if max_tokens is not None and num_prompt + max_tokens > limit:
        raise ContextLengthError(
            f"{known} the prompt has {num_prompt} and max_tokens is {max_tokens}, which makes "
            f"{num_prompt + max_tokens}: shorten the prompt or set max_tokens to at most {limit - num_prompt}."
        )


def _check_choice(request: Request, stop_ids: frozenset[int], vocab_size: int) -> None:
    """Refuse a request that forbids its first token whatever the model says."""
    banned = {words[0] for words in request.bad_token_sequences if len(words) == 1}
    if request.params.min_tokens > 0:
        banned |= stop_ids
    if len(banned) >= vocab_size:
        raise InvalidRequestError(
            f"bad_words and the end tokens that min_tokens holds back are all {vocab_size} tokens there are: "
            "forbid fewer.",
            param="min_tokens" if request.params.min_tokens > 0 else "bad_words",
        )
    allowed = frozenset(request.params.allowed_token_ids or ())
    if allowed and allowed <= banned:
        raise InvalidRequestError(
            f"Each of the {len(allowed)} allowed_token_ids is forbidden by bad_words or held back by min_tokens: "
            "allow more.",
            param="allowed_token_ids",
        )
