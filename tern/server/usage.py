"""The `usage` of an answer: how many tokens it took. Knows endings; knows no text."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from tern.server.body import JsonObject
from tern.server.sink import Ending


@dataclass(frozen=True)
class Usage:
    """Tokens read, found in the prefix cache, generated, and generated inside a thought."""

    prompt: int
    cached: int
    completion: int
    reasoning: int

    def json(self) -> JsonObject:
        """OpenAI's object."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": self.cached},
            "completion_tokens_details": {"reasoning_tokens": self.reasoning},
        }


def total_usage(prompts: Iterable[Iterable[Ending]]) -> Usage:
    """The usage of several prompts, each with the endings of its choices in order.

    The choices of a prompt share it, so it counts once; what they found of each other's work is no saving of the
    caller's, so cached tokens are those of the first choice.
    """
    usage = Usage(0, 0, 0, 0)
    for endings in prompts:
        choices = list(endings)
        first = choices[0].finish
        usage = Usage(
            usage.prompt + first.num_prompt_tokens,
            usage.cached + first.num_cached_tokens,
            usage.completion + sum(choice.finish.num_generated_tokens for choice in choices),
            usage.reasoning + sum(choice.num_reasoning_tokens for choice in choices),
        )
    return usage


def running_usage(prompt: int, completion: int) -> JsonObject:
    """The usage while a stream goes on: what is only known at the end is left out."""
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
