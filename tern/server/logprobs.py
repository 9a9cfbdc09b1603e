"""Log-probabilities in OpenAI's two forms, and those of a prompt in vLLM's. Knows tokens, their bytes; no request.

Tokens that were forced and not chosen by the model have no probability; the chat form leaves them out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tern.chat import Detokenizer, Tokenizer
from tern.engine import GeneratedToken, ScoredToken, TokenLogprob
from tern.server.body import JsonObject

LOWEST = -9999.0
"""What OpenAI sends for "hardly possible"; JSON has no minus infinity."""


def chat_logprobs(
    tokenizer: Tokenizer, tokens: Iterable[GeneratedToken], num_top: int, *, as_ids: bool = False
) -> JsonObject:
    """`{"content": [{"token", "logprob", "bytes", "top_logprobs": [...]}]}`, one entry for each sampled token.

    With `as_ids` tokens are called by their ids.
    """
    content = [
        {
            **_entry(tokenizer, token.logprob, as_ids=as_ids),
            "top_logprobs": [_entry(tokenizer, top, as_ids=as_ids) for top in token.top_logprobs[:num_top]],
        }
        for token in tokens
        if token.logprob is not None
    ]
    return {"content": content, "refusal": None}


def _entry(tokenizer: Tokenizer, candidate: TokenLogprob, *, as_ids: bool) -> JsonObject:
    raw = token_bytes(tokenizer, candidate.token_id)
    return {
        "token": token_name(tokenizer, candidate.token_id, as_ids=as_ids),
        "logprob": max(candidate.logprob, LOWEST),
        "bytes": list(raw),
    }


def prompt_logprobs(
    tokenizer: Tokenizer, tokens: Iterable[ScoredToken], num_top: int
) -> list[dict[str, JsonObject] | None]:
    """For each token of a prompt its candidates by id: itself and the `num_top` likeliest, in vLLM's form.

    `tokens` are those behind the first; the first has no score.
    """
    return [
        None,
        *(
            {
                str(each.token_id): {
                    "logprob": max(each.logprob, LOWEST),
                    "rank": each.rank,
                    "decoded_token": token_name(tokenizer, each.token_id),
                }
                for each in _candidates(token, num_top)
            }
            for token in tokens
        ),
    ]


def _candidates(token: ScoredToken, num_top: int) -> list[TokenLogprob]:
    own = [token.logprob] if token.logprob else []
    return [*own, *(top for top in token.top_logprobs[:num_top] if top.token_id != token.token_id)]


def token_name(tokenizer: Tokenizer, token_id: int, *, as_ids: bool = False) -> str:
    """A token as text; one that is part of a character is written `bytes:\\xe4\\xbd`, as OpenAI does.

    With `as_ids` it is called `token_id:123` instead, as vLLM does, which tells all tokens apart.
    """
    if as_ids:
        return f"token_id:{token_id}"
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
    characters of the choice's text that are complete before the token. With `as_ids` tokens are called by their ids.
    """

    def __init__(self, tokenizer: Tokenizer, num_top: int, *, skip_special_tokens: bool, as_ids: bool = False) -> None:
        self._tokenizer = tokenizer
        self._num_top = num_top
        self._as_ids = as_ids
        self._text = Detokenizer(tokenizer, skip_special_tokens=skip_special_tokens)
        self._offset = 0

    def with_prompt(self, text: str, prompt: Sequence[ScoredToken], tokens: Iterable[GeneratedToken]) -> JsonObject:
        """The lists for a prompt that is echoed as `text`, and for the first tokens behind it."""
        completion = self._text
        self._text = Detokenizer(self._tokenizer, skip_special_tokens=False, continuation=False)
        echoed = self.lists(prompt)
        self._text, self._offset = completion, len(text)
        behind = self.lists(tokens)
        return {name: values + behind[name] for name, values in echoed.items()}

    def lists(self, tokens: Iterable[ScoredToken]) -> JsonObject:
        """The lists for the next tokens."""
        names: list[str] = []
        chosen: list[float | None] = []
        tops: list[dict[str, float] | None] = []
        offsets: list[int] = []
        for token in tokens:
            names.append(self._name(token.token_id))
            offsets.append(self._offset)
            if token.token_id < self._tokenizer.vocab_size:
                self._offset += len(self._text.push(token.token_id))
            chosen.append(max(token.logprob.logprob, LOWEST) if token.logprob else None)
            tops.append(self._top(token) if token.logprob else None)
        return {"tokens": names, "token_logprobs": chosen, "top_logprobs": tops, "text_offset": offsets}

    def _top(self, token: ScoredToken) -> dict[str, float]:
        candidates = [*token.top_logprobs[: self._num_top], *([token.logprob] if token.logprob else [])]
        return {self._name(each.token_id): max(each.logprob, LOWEST) for each in candidates}

    def _name(self, token_id: int) -> str:
        return token_name(self._tokenizer, token_id, as_ids=self._as_ids)
