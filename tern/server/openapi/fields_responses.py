"""The fields of a response's request: its items, tools and options. Knows OpenAI's newer form and no other family."""

from __future__ import annotations

from collections.abc import Mapping

from tern.engine import sampling_params as limits
from tern.server.openapi.about import (
    MAX_WHOLE,
    NULL,
    TEXT,
    About,
    Form,
    any_list,
    between,
    one_of,
    or_null,
    record,
    typed,
)
from tern.server.openapi.fields_forms import ARGUMENTS, STRICT, TOOL_DESCRIPTION, TOOL_NAME, response_format
from tern.server.response_input import PROVIDER_ITEMS, ROLES
from tern.server.schemas.responses import INCLUDABLE

_NAME: Form = {"type": "string", "minLength": 1}
_PART = record({"type": {"enum": ["text", "input_text", "output_text"]}, "text": TEXT}, ["type", "text"])
_REFUSAL = record({"type": {"const": "refusal"}, "refusal": TEXT}, ["type", "refusal"])
_THOUGHT = record({"text": TEXT}, ["text"])
_PARTS = one_of(TEXT, any_list(one_of(TEXT, _PART)))


_MESSAGE = record(
    {
        "type": {"const": "message", "description": "May be missing."},
        "role": {"enum": [role for role in ROLES if role != "assistant"]},
        "content": _PARTS,
    },
    ["role", "content"],
)
_ANSWER = record(
    {
        "type": {"const": "message", "description": "May be missing."},
        "role": {"const": "assistant"},
        "content": one_of(TEXT, any_list(one_of(_PART, _REFUSAL))),
    },
    ["role", "content"],
)
_CALL: Mapping[str, Form] = {"call_id": _NAME, "name": _NAME}
_GIVEN: Mapping[str, Form] = {"call_id": _NAME, "output": _PARTS}
_ITEM = one_of(
    _MESSAGE,
    _ANSWER,
    typed("reasoning", {name: or_null(any_list(_THOUGHT)) for name in ("content", "summary")}),
    typed(
        "function_call",
        {**_CALL, "arguments": {"type": ["string", "object", "null"], "description": "JSON text."}},
        *_CALL,
    ),
    typed("function_call_output", _GIVEN, *_GIVEN),
    typed("custom_tool_call", {**_CALL, "input": TEXT}, *_CALL, "input"),
    typed("custom_tool_call_output", _GIVEN, *_GIVEN),
    record({"type": {"enum": sorted(PROVIDER_ITEMS), "description": "Passed over."}}, ["type"]),
)
_FUNCTION = record(
    {
        "type": {"const": "function"},
        "name": TOOL_NAME,
        "description": TOOL_DESCRIPTION,
        "parameters": ARGUMENTS,
        "strict": STRICT,
    },
    ["type", "name"],
)
_OTHER_TOOL: Form = {**record({"type": {"not": {"const": "function"}}}), "description": "Not shown to the model."}
_CHOICE = one_of(
    {"enum": ["auto", "none", "required"]},
    record({"type": {"const": "function"}, "name": TEXT}, ["type", "name"]),
    record(
        {
            "type": {"const": "allowed_tools"},
            "mode": {"enum": ["auto", "none", "required", None]},
            "tools": any_list(record({"name": {}})),
        },
        ["type", "tools"],
    ),
)


def _elsewhere(instead: str, same: Form = NULL) -> About:
    """A field of other families, in which only leaving it out, or what means the same, is accepted."""
    return About(f"Not a field of a response: {instead}.", {"anyOf": [same]})


_FIELDS: Mapping[str, About] = {
    "input": About("Text, or the items of the conversation.", one_of(TEXT, any_list(_ITEM))),
    "instructions": About("The first system message."),
    "tools": About(
        "The functions that the model may call; tools of other kinds are not shown to it.",
        any_list(one_of(_FUNCTION, _OTHER_TOOL)),
    ),
    "tool_choice": About("Whether and what the model must call; allowed_tools shows it only those.", _CHOICE),
    "text": About("The form of the answer's text."),
    "reasoning": About("How long to think."),
    "include": About(
        "What the answer shall hold; all but log-probabilities is never part of it.",
        any_list({"enum": list(INCLUDABLE)}),
    ),
    "max_output_tokens": About(
        "Most tokens of thought and answer together; by default as many as fit.", between(1, MAX_WHOLE)
    ),
    "top_logprobs": About(
        "Add log-probabilities of the text, with so many likeliest tokens.", between(0, limits.MAX_LOGPROBS)
    ),
    "metadata": About("Comes back with the answer.", {"additionalProperties": TEXT}),
    "previous_response_id": _elsewhere("answers are not kept, send the earlier items in input"),
    "conversation": _elsewhere("answers are not kept, send the earlier items in input"),
    "truncation": About("Prompts are never cut.", {"enum": ["disabled"]}),
    "stream_options": About("Accepted; changes nothing, the last event always has the usage."),
    "max_tokens": _elsewhere("write max_output_tokens"),
    "n": _elsewhere("send the request several times", {"const": 1}),
    "prompt_logprobs": _elsewhere("ask /v1/chat/completions for scores of a prompt"),
    "response_format": _elsewhere("write text.format"),
    **dict.fromkeys(
        ("return_token_ids", "return_tokens_as_token_ids"),
        _elsewhere("ask /v1/chat/completions for token ids", {"const": False}),
    ),
}
_NESTED: Mapping[str, About] = {
    "TextOptions.format": About("text, json_object, or json_schema with the schema.", response_format(flat=True)),
    "TextOptions.verbosity": About("Served with this value alone.", {"enum": ["medium"]}),
    "ReasoningOptions.effort": About(
        "none: no thought; minimal and low bound it to 1024 tokens, medium to 8192; the others do not.",
        {"enum": ["none", "minimal", "low", "medium", "high", "xhigh", "max"]},
    ),
    "ReasoningOptions.summary": About("Changes nothing: the thought itself comes."),
    "ReasoningOptions.generate_summary": About("Changes nothing: the thought itself comes."),
    "ReasoningOptions.context": About("Every thought that is sent is read.", {"enum": ["auto", "all_turns"]}),
}

ABOUT: Mapping[str, About] = {**{f"ResponsesRequest.{name}": told for name, told in _FIELDS.items()}, **_NESTED}
"""What there is to say of them; fields of sampling are those of a chat."""
