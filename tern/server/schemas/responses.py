"""The request of POST /v1/responses. Knows its fields and vLLM's sampling; what items are, `response_input` knows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field

from tern.errors import InvalidRequestError, UnsupportedFeatureError
from tern.server.schemas.fields import Schema, short
from tern.server.schemas.sampling import FLAG, NAME, WHOLE, SamplingFields

LOGPROBS = "message.output_text.logprobs"
INCLUDABLE = (
    LOGPROBS,
    "reasoning.encrypted_content",
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "message.input_image.image_url",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
)
"""What OpenAI lets a request ask for. All but the first concern what is never part of an answer here."""

EFFORTS = {"minimal": "low", "xhigh": "high", "max": "high"}
"""Efforts that a chat does not know, as the nearest one that it does."""

ELSEWHERE: Mapping[str, str] = {
    "max_tokens": "write max_output_tokens",
    "n": "send the request several times",
    "prompt_logprobs": "ask /v1/chat/completions for scores of a prompt",
    "response_format": "write text.format",
    "return_token_ids": "ask /v1/chat/completions for token ids",
    "return_tokens_as_token_ids": "ask /v1/chat/completions for token ids",
}
"""Fields that other families have."""

KEPT_NOWHERE = "answers are not kept here: send the earlier items in input"


class TextOptions(Schema):
    """The form of the answer's text."""

    format: dict[str, Any] | None = Field(None, description="an object with a type")
    verbosity: str | None = Field(None, description="'low', 'medium' or 'high'")


class ReasoningOptions(Schema):
    """How long to think. A summary is never written: the thought itself is part of the answer."""

    effort: str | None = Field(None, description="one of none, minimal, low, medium, high, xhigh, max")
    summary: str | None = Field(None, description="'auto', 'concise' or 'detailed'")
    generate_summary: str | None = Field(None, description="'auto', 'concise' or 'detailed'")
    context: str | None = Field(None, description="'auto' or 'all_turns'")


class ResponsesRequest(SamplingFields):
    """OpenAI's request of a response, with vLLM's additions to sampling."""

    ignored: ClassVar[Mapping[str, str]] = {
        "client_metadata": "labels for the provider's own accounting",
        "max_tool_calls": "bounds calls of tools that a provider runs; none are run here",
        "prompt_cache_options": "hints at how to cache; the prefix cache finds prompts itself",
    }
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "background": (False,),
        "context_management": ([],),
        "moderation": (),
        "prompt": (),
    }

    input: str | list[Any] = Field(description="text or a list of items")
    instructions: str | None = Field(None, description=NAME)
    tools: list[Any] | None = Field(None, description="a list of tools")
    tool_choice: str | dict[str, Any] | None = Field(None, description="'auto', 'none', 'required' or an object")
    parallel_tool_calls: bool = Field(True, description=FLAG)
    text: TextOptions | None = Field(None, description="an object, such as {'format': {'type': 'text'}}")
    reasoning: ReasoningOptions | None = Field(None, description="an object, such as {'effort': 'low'}")
    include: list[Any] | None = Field(None, description="a list of names")
    max_output_tokens: int | None = Field(None, description=WHOLE)
    top_logprobs: int | None = Field(None, description=WHOLE)
    metadata: dict[str, Any] | None = Field(None, description="an object of texts")
    previous_response_id: str | None = Field(None, description=NAME)
    conversation: str | dict[str, Any] | None = Field(None, description="text or an object")
    truncation: str | None = Field(None, description="'disabled'")

    def check(self) -> None:
        """Refuse what would change the answer and is not served; what a chat refuses is refused there."""
        for name, instead in ELSEWHERE.items():
            if name in self.model_fields_set and getattr(self, name) != type(self).model_fields[name].default:
                raise InvalidRequestError(
                    f"{name} is not a field of this request: {instead}.", param=name, code="unknown_field"
                )
        for name in ("previous_response_id", "conversation"):
            if getattr(self, name) is not None:
                raise UnsupportedFeatureError(f"{name} is not supported: {KEPT_NOWHERE}.", param=name)
        if self.truncation not in (None, "disabled"):
            raise UnsupportedFeatureError(
                f"truncation is {short(self.truncation)}: prompts are never cut here, send 'disabled' or leave it out.",
                param="truncation",
            )
        if self.reasoning is not None and self.reasoning.context not in (None, "auto", "all_turns"):
            raise UnsupportedFeatureError(
                f"reasoning.context is {short(self.reasoning.context)}: every thought that is sent is read, "
                "send 'auto' or 'all_turns', and only the thoughts that shall count.",
                param="reasoning.context",
            )
        for name in self.include or ():
            if name not in INCLUDABLE:
                raise InvalidRequestError(
                    f"include names {short(name)}: it may name {', '.join(INCLUDABLE)}.", param="include"
                )
        for label, value in (self.metadata or {}).items():
            if not isinstance(value, str):
                raise InvalidRequestError(
                    f"metadata.{label[:40]} is {short(value)}: it must be text.", param=f"metadata.{label[:40]}"
                )

    @property
    def num_top(self) -> int | None:
        """How many likely tokens to name beside each token of the text; None is no log-probabilities at all."""
        if self.top_logprobs is None:
            return 0 if LOGPROBS in (self.include or ()) else None
        return self.top_logprobs

    @property
    def effort(self) -> str | None:
        """The chat's `reasoning_effort`."""
        effort = None if self.reasoning is None else self.reasoning.effort
        return None if effort is None else EFFORTS.get(effort, effort)
