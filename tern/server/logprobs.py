"""Log-probabilities in OpenAI's two forms. Knows tokens and their bytes; knows no request.

Tokens that were forced and not chosen by the model have no probability; the chat form leaves them out.
"""

from __future__ import annotations

from collections.abc import Iterable

from tern.chat import Detokenizer, Tokenizer
from tern.engine import GeneratedToken, TokenLogprob
from tern.server.body import JsonObject

LOWEST = -9999.0
"""What OpenAI sends for "hardly possible"; JSON has no minus infinity."""


def chat_logprobs(tokenizer: Tokenizer, tokens: Iterable[GeneratedToken], num_top: int) -> JsonObject:
    """`{"content": [{"token", "logprob", "bytes", "top_logprobs": [...]}]}`, one entry for each sampled token."""
    content = [
        {
            **_entry(tokenizer, token.logprob),
            "top_logprobs": [_entry(tokenizer, top) for top in token.top_logprobs[:num_top]],
        }
        for token in tokens
        if token.logprob is not None
    ]
    return {"content": content, "refusal": None}


def _entry(tokenizer: Tokenizer, candidate: TokenLogprob) -> JsonObject:
    raw = token_bytes(tokenizer, candidate.token_id)
    return {
        "token": token_name(tokenizer, candidate.token_id),
        "logprob": max(candidate.logprob, LOWEST),
        "bytes": list(raw),
    }


def token_name(tokenizer: Tokenizer, token_id: int) -> str:
    """A token as text; one that is part of a character is written `bytes:\\xe4\\xbd`, as OpenAI does."""
    raw = token_bytes(tokenizer, token_id)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def token_bytes(tokenizer: Tokenizer, token_id: int) -> bytes:
    """A token's bytes; a network may know more ids than its tokenizer, and those have none."""
    return tokenizer.token_bytes(token_id) if token_id < tokenizer.vocab_size else b""


class LegacyLogprobs:
    """The parallel lists of /v1/completions for one choice, piece by piece: it remembers how far the text has come.

    `top_logprobs[i]` always holds the chosen token, besides the `num_top` likeliest. `text_offset[i]` counts the
    characters of the completion that are complete before the token.
    """

    def __init__(self, tokenizer: Tokenizer, num_top: int, *, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._num_top = num_top
        self._text = Detokenizer(tokenizer, skip_special_tokens=skip_special_tokens)
        self._offset = 0

    def lists(self, tokens: Iterable[GeneratedToken]) -> JsonObject:
        """The lists for the next tokens."""
        names: list[str] = []
        chosen: list[float | None] = []
        tops: list[dict[str, float] | None] = []
        offsets: list[int] = []
        for token in tokens:
            names.append(token_name(self._tokenizer, token.token_id))
            offsets.append(self._offset)
            if token.token_id < self._tokenizer.vocab_size:
                self._offset += len(self._text.push(token.token_id))
            chosen.append(max(token.logprob.logprob, LOWEST) if token.logprob else None)
            tops.append(self._top(token) if token.logprob else None)
        return {"tokens": names, "token_logprobs": chosen, "top_logprobs": tops, "text_offset": offsets}

    def _top(self, token: GeneratedToken) -> dict[str, float]:
        candidates = [*token.top_logprobs[: self._num_top], *([token.logprob] if token.logprob else [])]
        return {token_name(self._tokenizer, each.token_id): max(each.logprob, LOWEST) for each in candidates}
