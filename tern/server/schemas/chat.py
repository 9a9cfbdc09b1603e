"""The request of POST /v1/chat/completions. Knows no template: what messages and tools must be is the chat room's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field

from tern.chat import AnswerRules
from tern.errors import InvalidRequestError
from tern.server.schemas.sampling import FLAG, WHOLE, SamplingFields

EFFORTS = ("none", "low", "medium", "high")
TEMPLATE_KWARGS = ("enable_thinking",)
OTHER_NAMES = {
    "max_tokens": "max_completion_tokens",
    "logprobs": "top_logprobs",
    "reasoning_max_tokens": "thinking_budget",
}
"""Values of `SamplingParams` that a chat request may give under another name."""


class ChatRequest(SamplingFields):
    """OpenAI's chat request with vLLM's and FastDeploy's additions."""

    messages: list[Any] = Field(description="a list of messages")
    tools: list[Any] | None = Field(None, description="a list of tools")
    tool_choice: str | dict[str, Any] | None = Field(None, description="'auto', 'none', 'required' or an object")
    parallel_tool_calls: bool = Field(True, description=FLAG)
    max_completion_tokens: int | None = Field(None, description=WHOLE)
    logprobs: bool = Field(False, description=FLAG)
    top_logprobs: int | None = Field(None, description=WHOLE)
    reasoning_effort: str | None = Field(None, description=f"one of {', '.join(EFFORTS)}")
    reasoning_max_tokens: int | None = Field(None, description=WHOLE)
    thinking_budget: int | None = Field(None, description=WHOLE)
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="an object")

    def check(self) -> None:
        """Refuse fields that contradict each other and values that are not served yet."""
        self.check_common()
        self._check_tool_choice()
        _check_same(self, "max_tokens", "max_completion_tokens")
        _check_same(self, "reasoning_max_tokens", "thinking_budget")
        if self.top_logprobs and not self.logprobs:
            raise InvalidRequestError(
                f"top_logprobs is {self.top_logprobs} but logprobs is not true: set it, or leave top_logprobs out.",
                param="top_logprobs",
            )
        if self.reasoning_effort is not None and self.reasoning_effort not in EFFORTS:
            raise InvalidRequestError(
                f"reasoning_effort is {self.reasoning_effort[:40]!r}: it must be one of {', '.join(EFFORTS)}.",
                param="reasoning_effort",
            )
        check_template_kwargs(self.chat_template_kwargs)
        if self.reasoning_effort == "none" and (self.chat_template_kwargs or {}).get("enable_thinking"):
            raise InvalidRequestError(
                "reasoning_effort is 'none' but chat_template_kwargs.enable_thinking is true: give only one of them.",
                param="reasoning_effort",
            )

    def _check_tool_choice(self) -> None:
        """Refuse a choice that is none, or that the tools leave no room for; the tools themselves are checked later."""
        choice = self.tool_choice
        if choice is None or choice in ("auto", "none"):
            return
        name = _chosen_name(choice)
        if choice != "required" and name is None:
            raise InvalidRequestError(
                f"tool_choice is {str(choice)[:60]!r}: it must be 'auto', 'none', 'required' or "
                "{'type': 'function', 'function': {'name': ...}}.",
                param="tool_choice",
            )
        names = [str(_function_of(tool).get("name")) for tool in self.tools or []]
        if not names:
            raise InvalidRequestError(
                "tool_choice demands a call but there are no tools: send some, or leave tool_choice out.",
                param="tool_choice",
            )
        if name is not None and name not in names:
            raise InvalidRequestError(
                f"tool_choice names {name[:64]!r}, which is none of the tools: they are {', '.join(names):.200}.",
                param="tool_choice.function.name",
            )

    @property
    def answer_rules(self) -> AnswerRules:
        """What must hold of the answer. Raises what is wrong with its form."""
        name = _chosen_name(self.tool_choice)
        return AnswerRules(
            form=self.answer_form(),
            tools=self.offered_tools or (),
            choice=("named", name) if name is not None else "required" if self.tool_choice == "required" else "auto",
            one_call=not self.parallel_tool_calls,
        )

    @property
    def offered_tools(self) -> list[Any] | None:
        """The tools that the model may call; with tool_choice none it is shown none, so that it cannot."""
        return None if self.tool_choice == "none" else self.tools or None

    @property
    def token_limit(self) -> int | None:
        """Most tokens to generate; None is as many as fit."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def named(self, error: InvalidRequestError) -> InvalidRequestError:
        """A complaint about a value of `SamplingParams`, under the name that the request gave it."""
        name = error.param or ""
        other = OTHER_NAMES.get(name)
        if other is None or getattr(self, other) is None:
            return error
        return InvalidRequestError(str(error).replace(name, other, 1), param=other)

    @property
    def thinking_limit(self) -> int | None:
        """Most tokens of the thought, as asked for in tokens."""
        return self.reasoning_max_tokens if self.thinking_budget is None else self.thinking_budget


def check_template_kwargs(kwargs: Mapping[str, Any] | None) -> None:
    """Refuse template variables other than the few that are known to be harmless."""
    for name, value in (kwargs or {}).items():
        path = f"chat_template_kwargs.{name[:40]}"
        if name not in TEMPLATE_KWARGS:
            raise InvalidRequestError(f"{path} is not allowed: allowed are {', '.join(TEMPLATE_KWARGS)}.", param=path)
        if not isinstance(value, bool):
            raise InvalidRequestError(f"{path} is {str(value)[:40]!r}: it must be true or false.", param=path)


def _function_of(tool: object) -> Mapping[str, Any]:
    function = tool.get("function") if isinstance(tool, Mapping) else None
    return function if isinstance(function, Mapping) else {}


def _chosen_name(choice: object) -> str | None:
    """The tool that a `tool_choice` names, if it does."""
    if not isinstance(choice, Mapping) or choice.get("type") != "function":
        return None
    name = _function_of(choice).get("name")
    return name if isinstance(name, str) else None


def _check_same(request: ChatRequest, one: str, other: str) -> None:
    """Refuse two names of one thing with different values."""
    first, second = getattr(request, one), getattr(request, other)
    if first is not None and second is not None and first != second:
        raise InvalidRequestError(f"{one} is {first} but {other} is {second}: give only one of them.", param=one)
