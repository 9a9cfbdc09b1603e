"""The request of POST /v1/completions. Knows no tokenizer: it only tells the forms of a prompt apart."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from tern.errors import InvalidRequestError
from tern.server.schemas.sampling import FLAG, WHOLE, SamplingFields

DEFAULT_MAX_TOKENS = 16
"""OpenAI's default for completions."""

MAX_COMPLETIONS = 1024

Prompt = str | list[int]


class CompletionRequest(SamplingFields):
    """OpenAI's legacy completion request with vLLM's additions."""

    prompt: Any = Field(description="text, a list of texts, a list of token ids or a list of such lists")
    echo: bool = Field(False, description=FLAG)
    logprobs: int | None = Field(None, description=WHOLE)
    add_special_tokens: bool = Field(False, description=FLAG)

    def check(self) -> None:
        """Refuse fields that contradict each other."""
        self.check_common()
        if self.max_tokens == 0 and not self.echo and self.prompt_logprobs is None:
            raise InvalidRequestError(
                "max_tokens is 0, so that nothing would be answered: ask for at least 1, or for echo or "
                "prompt_logprobs.",
                param="max_tokens",
            )

    @property
    def num_scored_top(self) -> int | None:
        """How many likeliest tokens the engine shall name for each token of the prompt; None: it shall score none."""
        wanted = [self.prompt_logprobs, self.logprobs if self.echo else None, 0 if self.max_tokens == 0 else None]
        return max((count for count in wanted if count is not None), default=None)

    def prompts(self) -> list[Prompt]:
        """Every prompt, as text or as token ids."""
        prompt = self.prompt
        if isinstance(prompt, str) or _is_ids(prompt):
            found: list[Prompt] = [prompt]
        elif isinstance(prompt, list) and all(isinstance(each, str) or _is_ids(each) for each in prompt):
            found = prompt
        else:
            raise InvalidRequestError(
                "prompt must be text, a list of texts, a list of token ids or a list of such lists.", param="prompt"
            )
        if len(found) * self.n > MAX_COMPLETIONS:
            raise InvalidRequestError(
                f"prompt holds {len(found)} prompts and n is {self.n}: at most {MAX_COMPLETIONS} completions are made "
                "at once.",
                param="prompt",
            )
        if not found or not all(found):
            raise InvalidRequestError("prompt is empty: give at least one character or token id.", param="prompt")
        return found


def _is_ids(value: object) -> bool:
    if not isinstance(value, list) or not value:
        return False
    return all(isinstance(item, int) and not isinstance(item, bool) for item in value)
