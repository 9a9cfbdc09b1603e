"""The tools of a chat request: names, and schemas that are schemas.

Knows OpenAI's form of a function tool and the shape of a JSON Schema, as plain dicts. It does not check values against
a schema and compiles nothing. Every fault is an `InvalidRequestError` that names its place.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from tern.errors import InvalidRequestError

MAX_TOOLS = 128
MAX_SCHEMA_DEPTH = 32
MAX_SCHEMA_NODES = 10_000
MAX_NAME_LENGTH = 64
MAX_DESCRIPTION_LENGTH = 65_536

_NAME = re.compile(r"[\w.\-]{1,64}")  # \w takes letters and digits of every script
_TYPES = ("string", "number", "integer", "boolean", "object", "array", "null")
_SCHEMA_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_SCHEMA_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_SCHEMAS = ("items", "additionalProperties", "not", "if", "then", "else", "contains", "propertyNames",
            "unevaluatedItems", "unevaluatedProperties")  # fmt: skip
_COUNTS = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")
_NUMBERS = ("minimum", "maximum", "multipleOf")
_EXCLUSIVE = ("exclusiveMinimum", "exclusiveMaximum")  # true or false in draft 4, where OpenAPI 3.0 has them from
_TEXTS = ("title", "description", "pattern", "format", "$ref", "$id", "$schema", "$comment")


def validate_tools(tools: object) -> list[dict[str, Any]]:
    """Check the tools of a request; returns them as a list of dicts, empty for None.

    A tool is `{"type": "function", "function": {"name", "description", "parameters"}}`. A name has 1 to 64 letters,
    digits (of any script), `_`, `-` or `.`, and occurs once; `parameters` must be a JSON Schema of an object.
    """
    if tools is None:
        return []
    if not isinstance(tools, Sequence) or isinstance(tools, str):
        raise InvalidRequestError("tools is not a list: send a list of function tools.", param="tools")
    if len(tools) > MAX_TOOLS:
        raise InvalidRequestError(f"tools has {len(tools)} entries: at most {MAX_TOOLS} are allowed.", param="tools")
    seen: set[str] = set()
    budget = _Budget()
    for index, tool in enumerate(tools):
        name = _check_tool(tool, f"tools[{index}]", budget)
        if name in seen:
            raise InvalidRequestError(
                f"tools[{index}].function.name is {name!r}, which an earlier tool has: names must differ.",
                param=f"tools[{index}].function.name",
            )
        seen.add(name)
    return [dict(tool) for tool in tools]


class _Budget:
    """How many schema nodes all tools of a request may have together."""

    def __init__(self) -> None:
        self.left = MAX_SCHEMA_NODES

    def spend(self, path: str) -> None:
        self.left -= 1
        if self.left < 0:
            raise InvalidRequestError(
                f"{path}: the schemas of all tools have over {MAX_SCHEMA_NODES} parts together: send smaller ones.",
                param=path,
            )


def _check_tool(tool: object, path: str, budget: _Budget) -> str:
    if not isinstance(tool, Mapping):
        raise _wrong(path, tool, "it must be an object with a type and a function")
    if tool.get("type") != "function":
        raise _wrong(f"{path}.type", tool.get("type"), "only tools of type 'function' are served")
    function = tool.get("function")
    if not isinstance(function, Mapping):
        raise _wrong(f"{path}.function", function, "it must be an object with a name and parameters")
    name = function.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise _wrong(
            f"{path}.function.name",
            name,
            f"a tool needs a name of 1 to {MAX_NAME_LENGTH} letters, digits, '_', '-' or '.'",
        )
    description = function.get("description")
    if description is not None and (not isinstance(description, str) or len(description) > MAX_DESCRIPTION_LENGTH):
        raise _wrong(
            f"{path}.function.description",
            description,
            f"it must be text of at most {MAX_DESCRIPTION_LENGTH} characters",
        )
    if not isinstance(function.get("strict"), bool | None):
        raise _wrong(f"{path}.function.strict", function.get("strict"), "it must be true or false")
    _check_parameters(function.get("parameters"), f"{path}.function.parameters", budget)
    return name


def _check_parameters(schema: object, path: str, budget: _Budget) -> None:
    if schema is None:
        return
    if not isinstance(schema, Mapping):
        raise _wrong(path, schema, "it must be a JSON Schema, an object")
    if schema.get("type", "object") != "object":
        raise _wrong(f"{path}.type", schema["type"], "the arguments of a tool are an object, so it must be 'object'")
    check_schema(schema, path, budget)


def check_schema(schema: object, path: str, budget: _Budget | None = None, depth: int = 0) -> None:
    """Check that `schema` has the shape of a JSON Schema (draft 2020-12, and what drafts 4 to 7 write otherwise;
    keywords that are unknown may stand in it).

    Raises `InvalidRequestError` that names the place of the first fault, or the limit of depth or size.
    """
    budget = budget or _Budget()
    budget.spend(path)
    if isinstance(schema, bool):
        return
    if not isinstance(schema, Mapping):
        raise _wrong(path, schema, "it must be a JSON Schema: an object, true or false")
    if depth > MAX_SCHEMA_DEPTH:
        raise InvalidRequestError(
            f"{path} is nested more than {MAX_SCHEMA_DEPTH} schemas deep: send a flatter schema.", param=path
        )
    _check_keywords(schema, path)
    for key in _SCHEMA_MAPS:
        for name, each in _map(schema, key, path).items():
            check_schema(each, f"{path}.{key}.{name}", budget, depth + 1)
    # Before draft 2020-12 a list of `items` was what prefixItems is now, and many tools still come so.
    tuples = ("items",) if isinstance(schema.get("items"), list) else ()
    for key in (*_SCHEMA_LISTS, *tuples):
        for index, each in enumerate(_list(schema, key, path)):
            check_schema(each, f"{path}.{key}[{index}]", budget, depth + 1)
    for key in _SCHEMAS:
        if key in schema and key not in tuples:
            check_schema(schema[key], f"{path}.{key}", budget, depth + 1)


def _check_keywords(schema: Mapping[str, Any], path: str) -> None:
    kinds = schema.get("type", [])
    for kind in [kinds] if not isinstance(kinds, list) else kinds:
        if kind not in _TYPES:
            raise _wrong(f"{path}.type", kinds, f"it must be one of {', '.join(_TYPES)}, or a list of them")
    for key in ("enum", "required"):
        value = schema.get(key, [])
        if not isinstance(value, list) or (key in schema and key == "enum" and not value):
            raise _wrong(f"{path}.{key}", value, "it must be a list" + (" of at least one value" * (key == "enum")))
    if not all(isinstance(name, str) for name in schema.get("required", [])):
        raise _wrong(f"{path}.required", schema["required"], "it must list names of properties")
    for key in _COUNTS:
        value = schema.get(key, 0)
        if isinstance(value, bool) or not isinstance(value, int | float) or value < 0 or value % 1:
            raise _wrong(f"{path}.{key}", value, "it must be a whole number of at least 0")
    for key in (*_NUMBERS, *_EXCLUSIVE):
        value = schema.get(key, 0)
        if not isinstance(value, int | float) or (isinstance(value, bool) and key in _NUMBERS):
            raise _wrong(f"{path}.{key}", value, "it must be a number")
    if schema.get("multipleOf", 1) <= 0:
        raise _wrong(f"{path}.multipleOf", schema["multipleOf"], "it must be a number above 0")
    for key in _TEXTS:
        if not isinstance(schema.get(key, ""), str):
            raise _wrong(f"{path}.{key}", schema[key], "it must be text")


def _map(schema: Mapping[str, Any], key: str, path: str) -> Mapping[str, Any]:
    value = schema.get(key, {})
    if not isinstance(value, Mapping):
        raise _wrong(f"{path}.{key}", value, "it must be an object that maps names to schemas")
    return value


def _list(schema: Mapping[str, Any], key: str, path: str) -> Sequence[Any]:
    value = schema.get(key, [])
    if not isinstance(value, list):
        raise _wrong(f"{path}.{key}", value, "it must be a list of schemas")
    return value


def _wrong(path: str, value: object, demand: str) -> InvalidRequestError:
    shown = repr(value)
    return InvalidRequestError(f"{path} is {shown if len(shown) <= 60 else shown[:57] + '...'}: {demand}.", param=path)
