"""The blocks and tools of /v1/messages as a chat's messages and tools.

Knows every kind of block that Anthropic's clients send; knows no template and no engine.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tern.errors import InvalidRequestError, UnsupportedFeatureError
from tern.server.body import JsonObject
from tern.server.schemas.fields import short
from tern.server.schemas.messages import EFFORTS, CountTokensRequest, MessagesRequest
from tern.server.translation import Conversation, Toolbox, Translation, is_object, is_role, is_text
from tern.server.volatile_lines import without_volatile_lines

ROLES = ("user", "assistant", "system")

PROVIDER_BLOCKS = ("redacted_thinking", "server_tool_use", "mcp_tool_use")
"""What only the provider of an earlier turn can read, or ran by itself; nothing of it is text for the model."""

OTHER_NAMES = {
    "stop": "stop_sequences",
    "thinking_budget": "thinking.budget_tokens",
    "reasoning_effort": "output_config.effort",
    "response_format": "output_config.format",
    "response_format.json_schema": "output_config.format",
}
"""Fields of a chat that a request of a message has elsewhere, and where."""

CHOICES = {"auto": "auto", "any": "required", "none": "none"}


def as_chat(request: CountTokensRequest, *, drop_volatile_lines: bool) -> Translation:
    """The chat that a request asks for. Raises `InvalidRequestError` that names the place of what is wrong."""
    request.check()
    talk = Conversation()
    _add_system(talk, request.system, drop_volatile_lines)
    for index, raw in enumerate(request.messages):
        _add_message(talk, raw, f"messages[{index}]")
    if talk.messages and talk.messages[-1]["role"] == "assistant":
        last = f"messages[{len(request.messages) - 1}]"
        raise UnsupportedFeatureError(
            f"{last} is the assistant's, which would be continued: that is not supported, end with a user message.",
            param=last,
        )
    tools = Toolbox()
    for index, raw in enumerate(request.tools or ()):
        tool = is_object(raw, f"tools[{index}]")
        if tool.get("type") in (None, "custom"):
            tools.offer(tool, f"tools[{index}]", "input_schema")
    fields: JsonObject = {
        "model": request.model,
        "messages": talk.messages,
        "tools": tools.tools or None,
        **_choice(request.tool_choice, tools),
        **_thinking(request),
        **_sampling(request),
    }
    if request.output_config is not None and request.output_config.format is not None:
        fields["response_format"] = _format(request.output_config.format)
    return Translation(fields, {**OTHER_NAMES, **talk.names, **tools.names})


def _add_system(talk: Conversation, system: str | list[Any] | None, drop_volatile_lines: bool) -> None:
    """Each block as a system message: the chat room joins them by blank lines."""
    blocks = [system] if isinstance(system, str) else system or []
    for index, raw in enumerate(blocks):
        place = f"system[{index}]" if isinstance(system, list) else "system"
        text = raw if isinstance(system, str) else _text(raw, place)
        kept = without_volatile_lines(text) if drop_volatile_lines else text
        if kept:
            talk.say("system", kept, place)


def _text(raw: Any, place: str) -> str:
    block = is_object(raw, place)
    if block.get("type") != "text":
        raise UnsupportedFeatureError(
            f"{place}.type is {short(block.get('type'))}: this model reads text only, send blocks of type 'text'.",
            param=f"{place}.type",
        )
    return is_text(block.get("text"), f"{place}.text")


def _add_message(talk: Conversation, raw: Any, place: str) -> None:
    message = is_object(raw, place)
    role, content = is_role(message.get("role"), ROLES, f"{place}.role"), message.get("content")
    blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(blocks, list):
        raise InvalidRequestError(
            f"{place}.content is {short(content)}: it must be text or a list of blocks.", param=f"{place}.content"
        )
    if role == "assistant":
        for index, block in enumerate(blocks):
            _add_answer(talk, is_object(block, f"{place}.content[{index}]"), f"{place}.content[{index}]")
        return
    texts: list[str] = []
    for index, block in enumerate(blocks):
        at = f"{place}.content[{index}]"
        if is_object(block, at).get("type") == "tool_result":
            _flush(talk, role, texts, place)
            _add_result(talk, block, at)
        else:
            texts.append(_text(block, at))
    _flush(talk, role, texts, place)


def _flush(talk: Conversation, role: str, texts: list[str], place: str) -> None:
    """What was said between the results of tools is a message of its own."""
    if texts:
        talk.say(role, "".join(texts), place)
        texts.clear()


def _add_answer(talk: Conversation, block: Mapping[str, Any], place: str) -> None:
    match block.get("type"):
        case "thinking":
            if thought := is_text(block.get("thinking"), f"{place}.thinking"):
                talk.think(thought, place)
        case "text":
            talk.answer({"type": "text", "text": is_text(block.get("text"), f"{place}.text")}, place)
        case "tool_use":
            talk.call(block.get("id"), block.get("name"), block.get("input"), place, "id")
        case str() as kind if kind in PROVIDER_BLOCKS or kind.endswith("_tool_result"):
            pass
        case kind:
            raise UnsupportedFeatureError(
                f"{place}.type is {short(kind)}: an assistant's blocks are text, thinking and tool_use here.",
                param=f"{place}.type",
            )


def _add_result(talk: Conversation, block: Mapping[str, Any], place: str) -> None:
    content = block.get("content")
    if isinstance(content, list):
        content = "".join(_text(part, f"{place}.content[{index}]") for index, part in enumerate(content))
    text = is_text("" if content is None else content, f"{place}.content")
    # The model's protocol has no sign for a failure but words.
    talk.result(block.get("tool_use_id"), f"Error: {text}" if block.get("is_error") else text, place, "tool_use_id")


def _choice(choice: Mapping[str, Any] | None, tools: Toolbox) -> JsonObject:
    if choice is None:
        return {}
    kind, single = choice.get("type"), choice.get("disable_parallel_tool_use")
    if not isinstance(single, bool | None):
        name = "tool_choice.disable_parallel_tool_use"
        raise InvalidRequestError(f"{name} is {short(single)}: it must be true or false.", param=name)
    if not isinstance(kind, str) or kind not in (*CHOICES, "tool"):
        raise InvalidRequestError(
            f"tool_choice.type is {short(kind)}: it must be one of {', '.join(CHOICES)}, tool.",
            param="tool_choice.type",
        )
    chosen = tools.choice(choice.get("name")) if kind == "tool" else CHOICES[kind]
    return {"tool_choice": chosen, "parallel_tool_calls": not single}


def _thinking(request: CountTokensRequest) -> JsonObject:
    """The limits of the thought.

    Who does not ask for a thought knows nothing of one and gives it no tokens, so it gets no more than half of them.
    """
    thinking = request.thinking
    if thinking is not None and not thinking.on:
        return {"reasoning_effort": "none"}
    effort = None if request.output_config is None else request.output_config.effort
    budget = None if thinking is None else thinking.budget_tokens
    if thinking is None and isinstance(request, MessagesRequest):
        budget = max(1, request.max_tokens // 2)  # none at all would be another prompt
    return {"reasoning_effort": None if effort is None else EFFORTS[effort], "thinking_budget": budget}


def _sampling(request: CountTokensRequest) -> JsonObject:
    if not isinstance(request, MessagesRequest):
        return {}
    names = ("max_tokens", "temperature", "top_p", "top_k", "stream")
    return {**{name: getattr(request, name) for name in names}, "stop": request.stop_sequences}


def _format(given: Mapping[str, Any]) -> JsonObject:
    """`output_config.format` as a chat's `response_format`, which wants a name for the schema."""
    if given.get("type") != "json_schema":
        raise InvalidRequestError(
            f"output_config.format.type is {short(given.get('type'))}: it must be 'json_schema'.",
            param="output_config.format.type",
        )
    return {
        "type": "json_schema",
        "json_schema": {"name": "answer", "strict": True, **{k: v for k, v in given.items() if k != "type"}},
    }
