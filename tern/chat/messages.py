"""The messages of a chat request: checked, and brought into the one form that templates read.

Knows OpenAI's form of a conversation, as plain dicts. Knows nothing of templates or tokens. Every fault is an
`InvalidRequestError` that names its place (`messages[2].role`).
"""

from __future__ import annotations

import itertools
import json
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tern.errors import InvalidRequestError, UnsupportedFeatureError

MAX_MESSAGES = 10_000
MAX_TOOL_CALLS = 128
ROLES = ("system", "developer", "user", "assistant", "tool")

Message = dict[str, Any]


def validate_messages(messages: object, *, ids_required: bool = True) -> list[Message]:
    """Check a conversation and normalise it.

    In the result: `content` is text (None only for an assistant turn without any); `developer` is `system`, and system
    messages that follow one another are one, joined by a blank line; a thought is `reasoning_content`; the arguments
    of a tool call are an object, or the text that a model wrote in place of one. Unknown keys of a message are left
    out. A tool's result must answer a call of an earlier turn, each call once; without `ids_required`, calls and
    results that have no id are numbered: a result answers the earliest call that is open.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        raise InvalidRequestError(
            f"messages is {_kind(messages)}: it must be a list of messages, each with a role and content.",
            param="messages",
        )
    if not messages:
        raise InvalidRequestError("messages is empty: send at least one message.", param="messages")
    if len(messages) > MAX_MESSAGES:
        raise InvalidRequestError(
            f"messages has {len(messages)} entries: at most {MAX_MESSAGES} are allowed.", param="messages"
        )
    normal: list[Message] = []
    open_calls: set[str] = set()
    for index, raw in enumerate(messages if ids_required else _with_ids(messages)):
        message = _message(raw, f"messages[{index}]", open_calls)
        if normal and message["role"] == "system" == normal[-1]["role"]:
            normal[-1]["content"] += "\n\n" + message["content"]
        else:
            normal.append(message)
    return normal


def _with_ids(messages: Sequence[Any]) -> Iterator[Any]:
    """The messages, calls without an id numbered and each result without one given the next of those numbers."""
    numbers, waiting = itertools.count(), deque[str]()
    for message in messages:
        if not isinstance(message, Mapping):
            yield message
        elif message.get("role") == "tool" and message.get("tool_call_id") is None and waiting:
            yield {**message, "tool_call_id": waiting.popleft()}
        elif isinstance(calls := message.get("tool_calls"), list) and all(isinstance(c, Mapping) for c in calls):
            named = [call if call.get("id") else {**call, "id": f"call_{next(numbers)}"} for call in calls]
            waiting += [new["id"] for new, call in zip(named, calls, strict=True) if not call.get("id")]
            yield {**message, "tool_calls": named}
        else:
            yield message


def _message(raw: object, path: str, open_calls: set[str]) -> Message:
    if not isinstance(raw, Mapping):
        raise InvalidRequestError(f"{path} is {_kind(raw)}: it must be an object with a role and content.", param=path)
    role = raw.get("role")
    if role not in ROLES:
        raise InvalidRequestError(
            f"{path}.role is {_shown(role)}: it must be one of {', '.join(ROLES)}.", param=f"{path}.role"
        )
    if role == "assistant":
        return _assistant(raw, path, open_calls)
    message: Message = {"role": "system" if role == "developer" else role, "content": _content(raw, path)}
    if message["content"] is None:
        raise InvalidRequestError(f"{path} has no content: a {role} message needs text.", param=f"{path}.content")
    if role == "tool":
        message["tool_call_id"] = _answered_call(raw.get("tool_call_id"), path, open_calls)
    if isinstance(raw.get("name"), str):
        message["name"] = raw["name"]
    return message


def _assistant(raw: Mapping[str, Any], path: str, open_calls: set[str]) -> Message:
    message: Message = {"role": "assistant", "content": _content(raw, path)}
    reasoning = _reasoning(raw, path)
    if reasoning is not None:
        message["reasoning_content"] = reasoning
    calls = raw.get("tool_calls")
    if calls is not None and (not isinstance(calls, Sequence) or isinstance(calls, str)):
        raise InvalidRequestError(
            f"{path}.tool_calls is {_kind(calls)}: it must be a list of calls.", param=f"{path}.tool_calls"
        )
    if calls and len(calls) > MAX_TOOL_CALLS:
        raise InvalidRequestError(
            f"{path}.tool_calls has {len(calls)} entries: at most {MAX_TOOL_CALLS} are allowed.",
            param=f"{path}.tool_calls",
        )
    if calls:
        message["tool_calls"] = [_call(call, f"{path}.tool_calls[{i}]", open_calls) for i, call in enumerate(calls)]
    elif message["content"] is None and reasoning is None:
        raise InvalidRequestError(
            f"{path} has no content: an assistant message needs content, reasoning_content or tool_calls.",
            param=f"{path}.content",
        )
    return message


def _reasoning(raw: Mapping[str, Any], path: str) -> str | None:
    """The thought, under its older or its newer name."""
    given = {key: raw[key] for key in ("reasoning_content", "reasoning") if raw.get(key) is not None}
    for key, value in given.items():
        if not isinstance(value, str):
            raise InvalidRequestError(f"{path}.{key} is {_kind(value)}: it must be text.", param=f"{path}.{key}")
    return next(iter(given.values()), None)


def _content(raw: Mapping[str, Any], path: str) -> str | None:
    """The text of a message, its parts joined; None if it has no content."""
    content = raw.get("content")
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        raise InvalidRequestError(
            f"{path}.content is {_kind(content)}: it must be text or a list of text parts.", param=f"{path}.content"
        )
    return "".join(_part(part, f"{path}.content[{i}]") for i, part in enumerate(content))


def _part(part: object, path: str) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, Mapping):
        raise InvalidRequestError(f"{path} is {_kind(part)}: it must be an object with a type and text.", param=path)
    if part.get("type") not in ("text", "input_text", "output_text"):
        raise UnsupportedFeatureError(
            f"{path}.type is {_shown(part.get('type'))}: this model reads text only, send parts of type 'text'.",
            param=f"{path}.type",
        )
    text = part.get("text")
    if not isinstance(text, str):
        raise InvalidRequestError(f"{path}.text is {_kind(text)}: it must be text.", param=f"{path}.text")
    return text


def _call(raw: object, path: str, open_calls: set[str]) -> Message:
    function = raw.get("function") if isinstance(raw, Mapping) else None
    if not isinstance(raw, Mapping) or not isinstance(function, Mapping):
        raise InvalidRequestError(
            f"{path} is no function call: it must be an object with an id and a function.", param=path
        )
    name, call_id = function.get("name"), raw.get("id")
    if not isinstance(name, str) or not name:
        raise InvalidRequestError(
            f"{path}.function.name is {_shown(name)}: it must be the tool's name.", param=f"{path}.function.name"
        )
    if not isinstance(call_id, str) or not call_id:
        raise InvalidRequestError(
            f"{path}.id is {_shown(call_id)}: it must be the id that the call was given.", param=f"{path}.id"
        )
    open_calls.add(call_id)
    arguments = _arguments(function.get("arguments"), f"{path}.function.arguments")
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def _arguments(value: object, path: str) -> Mapping[str, Any] | str:
    """A call's arguments as an object; they come as JSON text or, from some clients, as the object itself.

    Text that is no JSON object stays as it is: a model wrote it, cut off or wrong, and is to see what it wrote.
    """
    if value is None or value == "":
        return {}
    if isinstance(value, str):
        try:
            parsed = json.loads(value)
        except (ValueError, RecursionError):
            return value
        return parsed if isinstance(parsed, dict) else value
    if not isinstance(value, Mapping):
        raise InvalidRequestError(f"{path} is {_kind(value)}: it must be the JSON text of an object.", param=path)
    return value


def _answered_call(call_id: object, path: str, open_calls: set[str]) -> str:
    if not isinstance(call_id, str) or not call_id:
        raise InvalidRequestError(
            f"{path}.tool_call_id is {_shown(call_id)}: a tool message needs the id of the call it answers.",
            param=f"{path}.tool_call_id",
        )
    if call_id not in open_calls:
        raise InvalidRequestError(
            f"{path}.tool_call_id is {_shown(call_id)}: no earlier assistant message made that call, or it has been "
            "answered already; send the call before its result.",
            param=f"{path}.tool_call_id",
        )
    open_calls.remove(call_id)
    return call_id


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _kind(value: object) -> str:
    names = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", str: "text", list: "a list"}
    return names.get(type(value), "an object" if isinstance(value, Mapping) else type(value).__name__)
