"""What a response is made of: the typed deltas of a stream, and the message they add up to.

Knows the shape of a reasoning, content or tool-call delta. Knows nothing of tags, tokens or HTTP.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class ReasoningDelta:
    """The next piece of the thought."""

    text: str


@dataclass(frozen=True)
class ContentDelta:
    """The next piece of the answer."""

    text: str


@dataclass(frozen=True)
class ToolCallDelta:
    """The next piece of the tool call number `index` (0, 1, ... in order of appearance).

    `id` and `name` stand in a call's first delta and are None in its later ones. `arguments` is the next piece of JSON
    text: the pieces of one call, joined, are at every moment a prefix of one JSON object.
    """

    index: int
    id: str | None
    name: str | None
    arguments: str


ResponseEvent = ReasoningDelta | ContentDelta | ToolCallDelta


@dataclass
class ParsedToolCall:
    """One call of a finished message. `arguments` is JSON text, cut short if the tokens ran out inside it.

    Ids are drawn at random, so two parses of one text are equal without them.
    """

    name: str
    arguments: str
    id: str = field(default="", compare=False)


@dataclass
class ParsedMessage:
    """A whole response. A part that was not written, or is empty, is None (no calls: an empty list)."""

    reasoning_content: str | None = None
    content: str | None = None
    tool_calls: list[ParsedToolCall] = field(default_factory=list)

    def as_message(self) -> dict[str, Any]:
        """The message in OpenAI's form, ready to be put into a conversation."""
        calls = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in self.tool_calls
        ]
        message = {"role": "assistant", "content": self.content, "reasoning_content": self.reasoning_content}
        return {**message, "tool_calls": calls} if calls else message


def collect_message(events: Iterable[ResponseEvent]) -> ParsedMessage:
    """Add up the deltas of one response."""
    reasoning: list[str] = []
    content: list[str] = []
    heads: list[tuple[str, str]] = []
    arguments: list[list[str]] = []
    for event in events:
        match event:
            case ReasoningDelta(text):
                reasoning.append(text)
            case ContentDelta(text):
                content.append(text)
            case ToolCallDelta(index, call_id, name, piece):
                if index == len(heads):
                    heads.append((name or "", call_id or ""))
                    arguments.append([])
                arguments[index].append(piece)
    calls = [ParsedToolCall(name, "".join(pieces), id) for (name, id), pieces in zip(heads, arguments, strict=True)]
    return ParsedMessage("".join(reasoning) or None, "".join(content) or None, calls)
