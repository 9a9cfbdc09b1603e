"""The requests of POST /v1/messages and /v1/messages/count_tokens, in Anthropic's form.

Knows their fields; what blocks are, `message_input` knows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field

from tern.errors import InvalidRequestError
from tern.server.schemas.fields import Schema, short
from tern.server.schemas.sampling import FLAG, NAME, NUMBER, WHOLE

EFFORTS = {"low": "low", "medium": "medium", "high": "high", "xhigh": "high", "max": "high"}
"""Anthropic's efforts as a chat's."""

THINKING = ("enabled", "adaptive", "disabled", "between_tools")
"""Kinds of thinking; the last two are none: the model writes no thoughts elsewhere than before its answer."""


class ThinkingOptions(Schema):
    """Whether the answer has a thought, how long it may be, and whether it is shown."""

    type: str = Field(description=f"one of {', '.join(THINKING)}")
    budget_tokens: int | None = Field(None, description=WHOLE)
    display: str | None = Field(None, description="'summarized' or 'omitted'")

    @property
    def on(self) -> bool:
        """Whether the client asks for a thought."""
        return self.type in ("enabled", "adaptive")


class OutputOptions(Schema):
    """How long to think, and the schema of the answer."""

    effort: str | None = Field(None, description=f"one of {', '.join(EFFORTS)}")
    format: dict[str, Any] | None = Field(None, description="an object with a type and a schema")


class CountTokensRequest(Schema):
    """What the model would read."""

    ignored: ClassVar[Mapping[str, str]] = {
        "cache_control": "says where a prefix ends; the prefix cache finds them itself",
        "context_management": "lets a provider clear old parts of the prompt; prompts are read whole here",
        "diagnostics": "asks why a prefix was not found; usage says how much was",
        "inference_geo": "chooses where a provider computes",
        "speed": "chooses a price",
        "user_profile_id": "names the end user, for the provider's own accounting",
        "workspace_id": "names the customer, for the provider's own accounting",
    }
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {"container": (), "mcp_servers": ([],)}

    model: str | None = Field(None, description=NAME)
    messages: list[Any] = Field(description="a list of messages")
    system: str | list[Any] | None = Field(None, description="text or a list of text blocks")
    tools: list[Any] | None = Field(None, description="a list of tools")
    tool_choice: dict[str, Any] | None = Field(None, description="an object, such as {'type': 'auto'}")
    thinking: ThinkingOptions | None = Field(None, description="an object, such as {'type': 'adaptive'}")
    output_config: OutputOptions | None = Field(None, description="an object, such as {'effort': 'low'}")

    def check(self) -> None:
        """Refuse words that the fields do not have."""
        thinking, output = self.thinking, self.output_config
        if thinking is not None:
            _one_of("thinking.type", thinking.type, THINKING)
            _one_of("thinking.display", thinking.display, (None, "summarized", "omitted"))
            if (thinking.budget_tokens is None) == (thinking.type == "enabled"):
                need = "it needs budget_tokens" if thinking.type == "enabled" else "it has no budget_tokens"
                raise InvalidRequestError(
                    f"thinking.type is {thinking.type!r}: {need}.", param="thinking.budget_tokens"
                )
        if output is not None:
            _one_of("output_config.effort", output.effort, (None, *EFFORTS))

    @property
    def shows_thought(self) -> bool:
        """Whether the answer has a block for the thought."""
        return self.thinking is not None and self.thinking.on


class MessagesRequest(CountTokensRequest):
    """What the model shall read, and how it shall answer."""

    max_tokens: int = Field(description=WHOLE)
    stop_sequences: list[Any] | None = Field(None, description="a list of texts")
    stream: bool = Field(False, description=FLAG)
    temperature: float | None = Field(None, description=NUMBER)
    top_p: float | None = Field(None, description=NUMBER)
    top_k: int | None = Field(None, description=WHOLE)

    def check(self) -> None:
        """Refuse words that the fields do not have, and a thought that leaves no room for an answer."""
        super().check()
        budget = None if self.thinking is None else self.thinking.budget_tokens
        if budget is not None and budget >= self.max_tokens:
            raise InvalidRequestError(
                f"thinking.budget_tokens is {budget} but max_tokens is {self.max_tokens}, for thought and answer "
                "together: lower the one or raise the other.",
                param="thinking.budget_tokens",
            )


def _one_of(name: str, value: str | None, allowed: tuple[str | None, ...]) -> None:
    if value not in allowed:
        words = ", ".join(word for word in allowed if word is not None)
        raise InvalidRequestError(f"{name} is {short(value)}: it must be one of {words}.", param=name)
