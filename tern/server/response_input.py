"""The items and tools of /v1/responses as a chat's messages and tools.

Knows every kind of item that OpenAI's clients send back; knows no template and no engine. Ids and statuses of items say
nothing to the model and may be missing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tern.errors import InvalidRequestError, UnsupportedFeatureError
from tern.server.body import JsonObject
from tern.server.schemas.fields import short
from tern.server.schemas.responses import ResponsesRequest
from tern.server.schemas.sampling import SamplingFields
from tern.server.translation import Conversation, Toolbox, Translation, is_object, is_role, is_text

ROLES = ("user", "assistant", "system", "developer")

PROVIDER_ITEMS = frozenset(
    {
        "web_search_call",
        "file_search_call",
        "code_interpreter_call",
        "image_generation_call",
        "mcp_list_tools",
        "mcp_approval_request",
        "mcp_approval_response",
    }
)
"""What a provider's own tools did before the conversation came here; nothing of it is text for the model."""

OTHER_NAMES = {
    "messages": "input",
    "max_tokens": "max_output_tokens",
    "max_completion_tokens": "max_output_tokens",
    "reasoning_effort": "reasoning.effort",
    "response_format": "text.format",
    "response_format.json_schema": "text.format",
    "verbosity": "text.verbosity",
}
"""Fields of a chat that a request of a response has elsewhere, and where."""


def as_chat(request: ResponsesRequest) -> Translation:
    """The chat that a request asks for. Raises `InvalidRequestError` that names the place of what is wrong."""
    request.check()
    talk = Conversation()
    if request.instructions is not None:
        talk.say("system", request.instructions, "instructions")
    if isinstance(request.input, str):
        talk.say("user", request.input, "input")
    else:
        for index, item in enumerate(request.input):
            _add_item(talk, item, f"input[{index}]")
    tools, choice = _tools(request)
    fields: JsonObject = {
        name: getattr(request, name) for name in SamplingFields.model_fields if name in request.model_fields_set
    }
    fields |= {
        "messages": talk.messages,
        "tools": tools.tools or None,
        "tool_choice": choice,
        "parallel_tool_calls": request.parallel_tool_calls,
        "max_completion_tokens": request.max_output_tokens,
        "logprobs": request.num_top is not None,
        "top_logprobs": request.num_top,
        "reasoning_effort": request.effort,
    }
    if request.text is not None:
        fields |= {"response_format": _format(request.text.format), "verbosity": request.text.verbosity}
    return Translation(fields, {**OTHER_NAMES, **talk.names, **tools.names})


def _add_item(talk: Conversation, raw: Any, place: str) -> None:
    item = is_object(raw, place)
    match item.get("type", "message"):
        case "message":
            _add_message(talk, item, place)
        case "reasoning":
            _add_thought(talk, item, place)
        case "function_call":
            talk.call(item.get("call_id"), item.get("name"), item.get("arguments"), place, "call_id")
        case "custom_tool_call":
            arguments = {"input": is_text(item.get("input"), f"{place}.input")}
            talk.call(item.get("call_id"), item.get("name"), arguments, place, "call_id")
        case "function_call_output" | "custom_tool_call_output":
            _add_output(talk, item, place)
        case "item_reference":
            raise UnsupportedFeatureError(
                f"{place} refers to an item by its id: answers are not kept here, send the item itself.", param=place
            )
        case str() as kind if kind in PROVIDER_ITEMS:
            pass
        case kind:
            raise UnsupportedFeatureError(
                f"{place}.type is {short(kind)}: send messages, reasoning, function calls and their outputs.",
                param=f"{place}.type",
            )


def _add_message(talk: Conversation, item: Mapping[str, Any], place: str) -> None:
    role, content = is_role(item.get("role"), ROLES, f"{place}.role"), item.get("content")
    if role != "assistant":
        talk.say(role, content, place)
        return
    if not isinstance(content, list):
        talk.answer({"type": "text", "text": is_text(content, f"{place}.content")}, f"{place}.content", apart=True)
        return
    for index, raw in enumerate(content):
        at = f"{place}.content[{index}]"
        part = is_object(raw, at)
        if part.get("type") == "refusal":
            part = {"type": "text", "text": part.get("refusal")}
        talk.answer(part, at, apart=index == 0)


def _add_thought(talk: Conversation, item: Mapping[str, Any], place: str) -> None:
    """The thought itself; without it, its summary; one that another provider has encrypted says nothing here."""
    for name in ("content", "summary"):
        pieces = item.get(name) or []
        if not isinstance(pieces, list):
            raise InvalidRequestError(
                f"{place}.{name} is {short(pieces)}: it must be a list of parts.", param=f"{place}.{name}"
            )
        texts = []
        for index, piece in enumerate(pieces):
            at = f"{place}.{name}[{index}]"
            texts.append(is_text(is_object(piece, at).get("text"), f"{at}.text"))
        if texts:
            talk.think("\n".join(texts), place)
            return


def _add_output(talk: Conversation, item: Mapping[str, Any], place: str) -> None:
    talk.result(item.get("call_id"), item.get("output"), place, "call_id")
    talk.names[f"messages[{len(talk.messages) - 1}].content"] = f"{place}.output"


def _tools(request: ResponsesRequest) -> tuple[Toolbox, Any]:
    """The function tools, and whether and what the model must call; tools of other kinds are not shown to it."""
    choice, allowed = request.tool_choice, None
    if isinstance(choice, dict) and choice.get("type") == "allowed_tools":
        allowed = _allowed(choice)
    tools = Toolbox()
    for index, raw in enumerate(request.tools or ()):
        tool = is_object(raw, f"tools[{index}]")
        if tool.get("type") == "function" and (allowed is None or tool.get("name") in allowed):
            tools.offer(tool, f"tools[{index}]", "parameters")
    if not isinstance(choice, dict):
        return tools, choice
    if allowed is not None:
        return tools, choice.get("mode", "auto")
    if choice.get("type") != "function":
        raise UnsupportedFeatureError(
            f"tool_choice is of type {short(choice.get('type'))}: only function tools can be called here, "
            "name one of them or send 'auto'.",
            param="tool_choice",
        )
    return tools, tools.choice(choice.get("name"))


def _allowed(choice: Mapping[str, Any]) -> list[Any]:
    listed = choice.get("tools")
    if not isinstance(listed, list):
        raise InvalidRequestError(
            f"tool_choice.tools is {short(listed)}: it must be a list of tools.", param="tool_choice.tools"
        )
    return [is_object(tool, f"tool_choice.tools[{index}]").get("name") for index, tool in enumerate(listed)]


def _format(given: Mapping[str, Any] | None) -> JsonObject | None:
    """`text.format` as a chat's `response_format`, which has the parts of a schema one level deeper."""
    if given is None or given.get("type") != "json_schema":
        return None if given is None else dict(given)
    return {"type": "json_schema", "json_schema": {key: value for key, value in given.items() if key != "type"}}
