"""A request of another API family as a chat request, and what its sender called each of the chat's places.

Knows how turns become messages and tools become function tools; knows no family's fields and no form of an answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tern.errors import ContextLengthError, InvalidRequestError
from tern.server.body import JsonObject
from tern.server.chat_plan import Asked, read_chat
from tern.server.schemas.chat import ChatRequest
from tern.server.schemas.fields import read_fields, short
from tern.server.state import AppState

LIMITS = {"max_tokens", "max_completion_tokens"}
"""The chat's names of the most tokens to generate."""


@dataclass(frozen=True)
class Translation:
    """The `fields` of a chat request, and `names`: the sender's name of a place, by the chat's.

    A name stands for everything below it too: `messages[1]` as `input[3]` makes `messages[1].content` be
    `input[3].content`.
    """

    fields: JsonObject
    names: Mapping[str, str]

    def read(self, state: AppState) -> Asked:
        """Check and render the chat. Raises what is wrong with it, under the sender's names."""
        try:
            return read_chat(state, read_fields(ChatRequest, self.fields))
        except InvalidRequestError as error:
            raise self.named(error) from None

    def named(self, error: InvalidRequestError) -> InvalidRequestError:
        """A complaint about the chat as one about the request that was sent."""
        text = self._sent(str(error))
        for limit in LIMITS & self.names.keys():  # a complaint may speak of it without blaming it
            text = text.replace(limit, self.names[limit])
        place = error.param and self._sent(error.param)
        if isinstance(error, ContextLengthError):
            return ContextLengthError(text, param=place)
        return InvalidRequestError(text, param=place, code=error.code)

    def _sent(self, text: str) -> str:
        """The text with the place at its beginning, if one stands there, under the sender's name."""
        known = max((name for name in self.names if _is_place(text, name)), key=len, default="")
        return self.names.get(known, "") + text[len(known) :]


def _is_place(text: str, name: str) -> bool:
    behind = text[len(name) : len(name) + 1]
    return text.startswith(name) and not (behind.isalnum() or behind == "_")


@dataclass
class Conversation:
    """A chat's messages while they are put together, and the sender's names of their places.

    What the assistant thinks, says and calls, one behind the other, is one message.
    """

    messages: list[JsonObject] = field(default_factory=list)
    names: dict[str, str] = field(default_factory=dict)

    def say(self, role: str, content: Any, place: str) -> None:
        """A message of anyone but the assistant; what its content is, the chat room checks."""
        self._add({"role": role, "content": content}, place)

    def result(self, call_id: Any, content: Any, place: str, id_name: str) -> None:
        """What a call gave; the sender has the call's id under `id_name`."""
        path = self._add({"role": "tool", "tool_call_id": call_id, "content": content}, place)
        self.names[f"{path}.tool_call_id"] = f"{place}.{id_name}"

    def think(self, text: str, place: str) -> None:
        """A piece of the assistant's thought; another piece is on a line of its own."""
        _, turn = self._turn(place)
        before = turn.get("reasoning_content")
        turn["reasoning_content"] = text if before is None else f"{before}\n{text}"

    def answer(self, part: Any, place: str, *, apart: bool = False) -> None:
        """A part of what the assistant says: `{"type": "text", "text"}`; `apart` sets it off by a blank line."""
        path, turn = self._turn(place)
        parts = turn.setdefault("content", [])
        if apart and parts:
            parts.append({"type": "text", "text": "\n\n"})
        self.names[f"{path}.content[{len(parts)}]"] = place
        parts.append(part)

    def call(self, call_id: Any, name: Any, arguments: Any, place: str, id_name: str) -> None:
        """A call of the assistant's."""
        path, turn = self._turn(place)
        calls = turn.setdefault("tool_calls", [])
        at = f"{path}.tool_calls[{len(calls)}]"
        calls.append({"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}})
        self.names |= {at: place, f"{at}.id": f"{place}.{id_name}", f"{at}.function": place}

    def _turn(self, place: str) -> tuple[str, JsonObject]:
        """The assistant's message under way and its path."""
        if not self.messages or self.messages[-1]["role"] != "assistant":
            self._add({"role": "assistant"}, place)
        return f"messages[{len(self.messages) - 1}]", self.messages[-1]

    def _add(self, message: JsonObject, place: str) -> str:
        path = f"messages[{len(self.messages)}]"
        self.messages.append(message)
        self.names[path] = place
        return path


@dataclass
class Toolbox:
    """The function tools of a chat while they are put together, and the sender's names of their places."""

    tools: list[JsonObject] = field(default_factory=list)
    names: dict[str, str] = field(default_factory=dict)

    def offer(self, tool: Mapping[str, Any], place: str, schema_name: str) -> None:
        """A tool whose sender has its parts side by side, the schema of its arguments under `schema_name`."""
        path = f"tools[{len(self.tools)}]"
        parts = {"name": "name", "description": "description", "parameters": schema_name, "strict": "strict"}
        function = {part: tool[key] for part, key in parts.items() if tool.get(key) is not None}
        self.tools.append({"type": "function", "function": function})
        self.names |= {
            path: place,
            f"{path}.function": place,
            f"{path}.function.parameters": f"{place}.{schema_name}",
        }

    def choice(self, name: Any) -> JsonObject:
        """The chat's way to name a tool that must be called. Raises `InvalidRequestError` for one not on offer."""
        offered = [tool["function"].get("name") for tool in self.tools]
        if not isinstance(name, str) or name not in offered:
            raise InvalidRequestError(
                f"tool_choice names {short(name)}, which is none of the tools that the model is shown: "
                "name one with a schema, or send 'auto'.",
                param="tool_choice",
            )
        return {"type": "function", "function": {"name": name}}


def is_object(value: Any, place: str) -> Mapping[str, Any]:
    """The value, which must be a JSON object. Raises `InvalidRequestError`."""
    if not isinstance(value, Mapping):
        raise InvalidRequestError(f"{place} is {short(value)}: it must be an object with a type.", param=place)
    return value


def is_text(value: Any, place: str) -> str:
    """The value, which must be text. Raises `InvalidRequestError`."""
    if not isinstance(value, str):
        raise InvalidRequestError(f"{place} is {short(value)}: it must be text.", param=place)
    return value


def is_role(value: Any, roles: Sequence[str], place: str) -> str:
    """The value, which must be one of the roles. Raises `InvalidRequestError`."""
    if value not in roles:
        raise InvalidRequestError(f"{place} is {short(value)}: it must be one of {', '.join(roles)}.", param=place)
    return str(value)
