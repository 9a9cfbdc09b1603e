"""The fields that ask for a form of the answer, and what a tool and the choice of one is. Knows chats and completions.

A form that a grammar cannot hold is refused too: docs/structured-output.md has the list.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tern.chat.tools import MAX_DESCRIPTION_LENGTH, MAX_NAME_LENGTH
from tern.server.openapi.about import FLAG, TEXT, About, Form, any_list, one_of, or_null, record

TOOL_NAME: Form = {"type": "string", "minLength": 1, "maxLength": MAX_NAME_LENGTH, "pattern": r"^[\w.\-]{1,64}$"}
TOOL_DESCRIPTION: Form = {"type": ["string", "null"], "maxLength": MAX_DESCRIPTION_LENGTH}
ARGUMENTS: Form = {"type": ["object", "null"], "description": "JSON Schema of an object."}
STRICT: Form = or_null(FLAG)
WRITTEN: Form = {"type": "string", "minLength": 1}
SCHEMA: Form = {"type": "object", "description": "JSON Schema."}
JSON_TEXT: Form = {"type": "string", "description": "The JSON text of a JSON Schema."}

NAMED_SCHEMA: Mapping[str, Form] = {
    "name": or_null(TEXT),
    "description": or_null(TEXT),
    "schema": {"type": ["object", "boolean"], "description": "JSON Schema."},
    "strict": {"type": ["boolean", "null"], "description": "Changes nothing: a schema always binds."},
}
"""The parts of OpenAI's `json_schema`."""

_PLAIN = record({"type": {"enum": ["text", "json_object"]}}, ["type"], closed=True)


def response_format(*, flat: bool) -> dict[str, Any]:
    """OpenAI's format of an answer: the parts of a schema below `json_schema` or, `flat`, beside the type."""
    kind: Form = {"const": "json_schema"}
    named = record(NAMED_SCHEMA, ["schema"], closed=True)
    if flat:
        return one_of(_PLAIN, record({"type": kind, **NAMED_SCHEMA}, ["type", "schema"], closed=True))
    return one_of(_PLAIN, record({"type": kind, "json_schema": named}, ["type", "json_schema"], closed=True))


_STRUCTURED: Mapping[str, Form] = {
    "json": one_of(SCHEMA, JSON_TEXT),
    "regex": WRITTEN,
    "choice": {**any_list(TEXT), "minItems": 1},
    "grammar": WRITTEN,
    "json_object": {"const": True},
}
_SWITCHES = ("json_object", "disable_any_whitespace", "disable_additional_properties")


def _structured(name: str) -> dict[str, Any]:
    """vLLM's object with this form in it and no other."""
    others: dict[str, Form] = {switch: {"enum": [None, False]} for switch in _SWITCHES}
    return record({**others, "disable_fallback": {}, name: _STRUCTURED[name]}, [name], closed=True)


ABOUT: Mapping[str, About] = {
    "response_format": About("The form of the answer, as OpenAI has it.", response_format(flat=False)),
    "structured_outputs": About(
        "The form of the answer, as vLLM has it: one of json (JSON Schema), regex, choice, grammar (Lark or GBNF) and "
        "json_object.",
        one_of(*(_structured(name) for name in _STRUCTURED)),
    ),
    "guided_json": About("structured_outputs.json under its old name.", one_of(SCHEMA, JSON_TEXT)),
    "guided_regex": About("A regular expression that the whole answer matches.", WRITTEN),
    "guided_choice": About("Texts of which the answer is one.", _STRUCTURED["choice"]),
    "guided_grammar": About("The answer's grammar, Lark or GBNF.", WRITTEN),
    "guided_json_object": About("Whether the answer is a JSON object."),
    "tool_choice": About(
        "auto: the model decides; none: it is shown no tools; required: it calls some; a named tool: it calls that.",
        one_of(
            {"enum": ["auto", "none", "required"]},
            record({"type": {"const": "function"}, "function": record({"name": TEXT}, ["name"])}, ["type", "function"]),
        ),
    ),
}
"""What there is to say of them."""
