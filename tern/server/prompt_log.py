"""What `--enable-log-requests` logs of a request before it is computed. Nothing of it is logged otherwise.

Texts of the sampling values (stop strings, bad words, grammars) are counted and not shown; the beginnings of prompts
are shown only where their length was asked for.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from tern.chat import Tokenizer
from tern.engine import SamplingParams

logger = logging.getLogger("tern.requests")


def log_request(
    prompts: Sequence[tuple[int, ...]], params: SamplingParams, tokenizer: Tokenizer, max_log_len: int
) -> None:
    """Log the sampling values that are set and, up to `max_log_len` characters of each, the prompts."""
    values = shown_values(params)
    found: dict[str, Any] = {"prompt_tokens": [len(prompt) for prompt in prompts], "params": values}
    words = f"received {len(prompts)} prompts of {sum(map(len, prompts))} tokens, {values}"
    if max_log_len > 0:
        found["prompts"] = texts = [beginning(prompt, tokenizer, max_log_len) for prompt in prompts]
        words += f": {texts}"
    logger.info("%s", words, extra={"fields": found})


def shown_values(params: SamplingParams) -> dict[str, Any]:
    """The values that are not the defaults; of what holds more than a number, how much it holds."""
    defaults = SamplingParams()
    changed = {field.name: getattr(params, field.name) for field in fields(params)}
    return {
        name: value if isinstance(value, int | float) or value is None else f"<{_size(value)}>"
        for name, value in changed.items()
        if value != getattr(defaults, name)
    }


def _size(value: Any) -> str:
    return str(len(value)) if hasattr(value, "__len__") else type(value).__name__


def beginning(prompt: tuple[int, ...], tokenizer: Tokenizer, length: int) -> str:
    """The first `length` characters of a prompt; a token is at least a character or part of one."""
    return tokenizer.decode(prompt[: 4 * length], skip_special_tokens=False)[:length]
