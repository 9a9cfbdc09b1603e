"""The fields of a message's request: its blocks, tools and options. Knows Anthropic's form; knows no other family."""

from __future__ import annotations

from collections.abc import Mapping

from tern.engine import sampling_params as limits
from tern.server.message_input import CHOICES, PROVIDER_BLOCKS
from tern.server.openapi.about import (
    FLAG,
    MAX_WHOLE,
    TEXT,
    About,
    Form,
    any_list,
    between,
    list_of,
    one_of,
    or_null,
    record,
    typed,
)
from tern.server.openapi.fields_forms import ARGUMENTS, NAMED_SCHEMA, STRICT, TOOL_DESCRIPTION, TOOL_NAME
from tern.server.schemas.messages import EFFORTS, THINKING

_NAME: Form = {"type": "string", "minLength": 1}
_TEXT_BLOCK = typed("text", {"text": TEXT}, "text")
_RESULT = typed(
    "tool_result",
    {
        "tool_use_id": _NAME,
        "content": or_null(one_of(TEXT, any_list(_TEXT_BLOCK))),
        "is_error": {"description": 'Puts "Error: " before the content.'},
    },
    "tool_use_id",
)
_ANSWERED = one_of(
    _TEXT_BLOCK,
    typed("thinking", {"thinking": TEXT, "signature": {}}, "thinking"),
    typed("tool_use", {"id": _NAME, "name": _NAME, "input": {"type": ["object", "string", "null"]}}, "id", "name"),
    record(
        {"type": {"anyOf": [{"enum": list(PROVIDER_BLOCKS)}, {"type": "string", "pattern": "_tool_result$"}]}}, ["type"]
    ),
)
_MESSAGE = one_of(
    record(
        {"role": {"enum": ["user", "system"]}, "content": one_of(TEXT, any_list(one_of(_TEXT_BLOCK, _RESULT)))},
        ["role", "content"],
    ),
    record({"role": {"const": "assistant"}, "content": one_of(TEXT, any_list(_ANSWERED))}, ["role", "content"]),
)
_FUNCTION = record(
    {
        "type": {"enum": [None, "custom"]},
        "name": TOOL_NAME,
        "description": TOOL_DESCRIPTION,
        "input_schema": ARGUMENTS,
        "strict": STRICT,
    },
    ["name"],
)
_OTHER_TOOL: Form = {
    **record({"type": {"not": {"enum": [None, "custom"]}}}, ["type"]),
    "description": "Not shown to the model.",
}
_SINGLE: Mapping[str, Form] = {"disable_parallel_tool_use": or_null(FLAG)}
_CHOICE = one_of(
    record({"type": {"enum": list(CHOICES)}, **_SINGLE}, ["type"]),
    record({"type": {"const": "tool"}, "name": TEXT, **_SINGLE}, ["type", "name"]),
)
_STOP: Form = {"type": "string", "minLength": 1, "maxLength": limits.MAX_STOP_LENGTH}

_READ: Mapping[str, About] = {
    "messages": About("The conversation; the last turn is not the assistant's.", {**any_list(_MESSAGE), "minItems": 1}),
    "system": About("Text, or text blocks, which become one.", one_of(TEXT, any_list(_TEXT_BLOCK))),
    "tools": About(
        "The functions that the model may call; tools of other types are not shown to it.",
        any_list(one_of(_FUNCTION, _OTHER_TOOL)),
    ),
    "tool_choice": About(
        "auto: the model decides; none: it is shown no tools; any: it calls some; tool: it calls the one named.",
        _CHOICE,
    ),
    "thinking": About(
        "Whether the answer has a thought; without it the model thinks, at most half of max_tokens, and does not show."
    ),
    "output_config": About("How long to think, and the form of the answer."),
}
_ANSWER: Mapping[str, About] = {
    "max_tokens": About("Most tokens of thought and answer together.", between(1, MAX_WHOLE)),
    "stop_sequences": About("Texts that end the answer, behind the thought.", list_of(_STOP, limits.MAX_STOP_STRINGS)),
}
_NESTED: Mapping[str, About] = {
    "ThinkingOptions.type": About(
        "enabled, with budget_tokens, and adaptive: a thought is shown; the others: the model writes none.",
        {"enum": list(THINKING)},
    ),
    "ThinkingOptions.budget_tokens": About(
        "The longest thought, below max_tokens; for enabled alone.", between(0, MAX_WHOLE)
    ),
    "ThinkingOptions.display": About("omitted: a block without text.", {"enum": ["summarized", "omitted"]}),
    "OutputOptions.effort": About(
        "low and medium bound the thought to 1024 and 8192 tokens; the others do not.", {"enum": list(EFFORTS)}
    ),
    "OutputOptions.format": About(
        "A JSON Schema that the answer holds.",
        record({"type": {"const": "json_schema"}, **NAMED_SCHEMA}, ["type", "schema"], closed=True),
    ),
}

ABOUT: Mapping[str, About] = {
    **{
        f"{request}.{name}": told
        for request in ("CountTokensRequest", "MessagesRequest")
        for name, told in _READ.items()
    },
    **{f"MessagesRequest.{name}": told for name, told in _ANSWER.items()},
    **_NESTED,
}
"""What there is to say of them; fields of sampling are those of a chat."""
