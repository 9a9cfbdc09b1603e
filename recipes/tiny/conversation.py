"""One training or evaluation example: a chat, its tools and the turn the model should write.

Knows the chat template and the output protocol; knows no tokenizer and no skill. Prompts are rendered by the very
template file that ships with the checkpoint, in the environment transformers renders it in.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

Language = Literal["en", "zh"]
Message = dict[str, Any]
Tool = dict[str, Any]

CHECKPOINT = Path(__file__).parents[2] / "tern" / "embedded" / "tiny"
TEMPLATE = CHECKPOINT / "chat_template.jinja"
END_OF_TURN = "<|im_end|>"
OUT_OF_BUDGET = {
    "en": "I have thought long enough; I will answer now with what I have.",
    "zh": "我已经想得够久了，现在就根据已有的思考作答。",
}
"""The sentences with which Tern ends a thought that has spent its budget."""


@dataclass(frozen=True)
class Call:
    """A tool call as the model writes it."""

    name: str
    arguments: dict[str, Any]

    def text(self) -> str:
        """The call's JSON, on one line."""
        return json.dumps({"name": self.name, "arguments": self.arguments}, ensure_ascii=False)


@dataclass
class Turn:
    """What the assistant writes: a thought, then an answer, calls or both."""

    reasoning: str
    content: str | None = None
    calls: list[Call] = field(default_factory=list)

    def completion(self, opening: str = "") -> str:
        """The turn in the output protocol, to be continued after a prompt that already holds `opening`."""
        parts = [f"{self.reasoning}\n</think>\n"]
        if self.content is not None:
            parts.append(f"<response>\n{self.content}\n</response>\n")
        parts += [f"<tool_call>\n{call.text()}\n</tool_call>\n" for call in self.calls]
        text = "\n".join(parts) + END_OF_TURN
        if not text.startswith(opening):
            raise ValueError(f"the turn does not begin with {opening!r}: {text!r}")
        return text[len(opening) :]

    def message(self) -> Message:
        """The turn as a message of a later prompt's history."""
        message: Message = {"role": "assistant", "reasoning_content": self.reasoning, "content": self.content}
        if self.calls:
            message["tool_calls"] = [
                {"type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in self.calls
            ]
        return message


@dataclass
class Example:
    """A prompt and the turn that answers it."""

    skill: str
    language: Language
    messages: list[Message]
    turn: Turn
    tools: list[Tool] = field(default_factory=list)
    result: dict[str, Any] | None = None
    """The tool's result that the answer must use, if this is such an example."""
    opening: str = ""
    """Text of the turn that the engine has written already: a thought forced to close, or an empty one."""

    def prompt(self) -> str:
        """The text before the model's first token."""
        return render(self.messages, self.tools) + self.opening

    def completion(self) -> str:
        """The text the model should write, its end-of-turn tag included."""
        return self.turn.completion(self.opening)


def without_thinking(example: Example) -> Example:
    """The same question with thinking switched off: an empty thought, closed by the prompt.

    Without tools the prompt opens the answer too; with tools the model may still choose between an answer and a call.
    """
    example.turn = Turn("", example.turn.content, example.turn.calls)
    example.opening = "\n</think>\n\n" if example.tools else "\n</think>\n\n<response>\n"
    return example


def with_thought_cut(example: Example, length: int) -> Example:
    """The same question, its thought stopped after `length` characters by the engine's reasoning budget."""
    reasoning = f"{example.turn.reasoning[:length]}\n\n{OUT_OF_BUDGET[example.language]}"
    example.turn = Turn(reasoning, spoken(example), example.turn.calls)
    example.opening = f"{reasoning}\n</think>\n\n<response>\n"
    return example


def spoken(example: Example) -> str:
    """An answer for turns that must say something, also those that only call a tool."""
    if example.turn.content is not None:
        return example.turn.content
    names = ", ".join(dict.fromkeys(call.name for call in example.turn.calls))
    return f"I call {names}." if example.language == "en" else f"我调用 {names}。"


def user(text: str) -> Message:
    """A user's message."""
    return {"role": "user", "content": text}


@cache
def _template() -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment.globals["raise_exception"] = raise_exception
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8"))


def render(messages: list[Message], tools: list[Tool] | None = None, **options: Any) -> str:
    """The prompt's text, up to and including the opened thought."""
    return _template().render(messages=messages, tools=tools or None, add_generation_prompt=True, **options)
