"""JSON Schemas on their way into a grammar: what is refused beforehand, how they are written, where the fault lies.

Knows JSON Schema as plain dicts, and which promises of a schema a grammar cannot keep. Knows nothing of answers and
tools. What a grammar would silently do otherwise than the schema says is refused: it never binds less than was asked.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import unquote

from tern.chat.tools import check_schema
from tern.errors import InvalidRequestError

MAX_SCHEMA_BYTES = 256 * 1024
MAX_LENGTH_BOUND = 65_536
"""The largest `minLength`, `minItems` and their like: an answer is never longer."""

_JSON_OPTIONS = {
    "whitespace_pattern": r" |\n {0,32}|\n\t{0,8}",  # bounded, or a hot model writes blanks for ever
    "json_allowed_escapes": 'nrbtf\\"',  # with \u a key could be another one in disguise
}
_MAPS = ("properties", "patternProperties", "$defs", "definitions")
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_SINGLES = ("items", "additionalProperties", "additionalItems")
_BOUNDS = ("minLength", "minItems", "minProperties")
_UNWRITABLE = re.compile(r"[\x00-\x07\x0b\x0e-\x1f\x7f]")  # controls that have no short escape
_UNIMPLEMENTED = re.compile(r'Unimplemented keys: \["([^"]+)"')
_FAULT = re.compile(r"failed to compile JSON schema: (.*?)(?:\n\s+\d+ \||$)", re.DOTALL)
_MAX_TRIES = 400

Schema = Mapping[str, Any] | bool


def object_schema(schema: Schema | None) -> Schema:
    """The schema with the promise that its values are objects; no schema is any object."""
    return {"type": "object", **schema} if isinstance(schema, Mapping) else {"type": "object"}


def check_for_grammar(schema: object, path: str) -> Schema:
    """The schema if a grammar may be tried with it. Raises `InvalidRequestError` that names the place at fault."""
    check_schema(schema, path)
    size = len(json.dumps(schema).encode())
    if size > MAX_SCHEMA_BYTES:
        raise InvalidRequestError(
            f"{path} has {size} bytes as JSON: a grammar is made of at most {MAX_SCHEMA_BYTES}.", param=path
        )
    for place, each in _walk(schema, path):
        _check_bounds(each, place)
        _check_texts(each, place)
        _check_reference(schema, each, place)
    assert isinstance(schema, Mapping | bool)
    return schema


def as_rule(schema: Schema) -> str:
    """The schema as the right side of a rule in llguidance's Lark."""
    given = dict(schema) if isinstance(schema, Mapping) else ({} if schema else {"not": {}})
    return "%json " + json.dumps({**given, "x-guidance": _JSON_OPTIONS}, ensure_ascii=False)


def explain(schema: Schema, path: str, fault_of: Callable[[str], str | None]) -> InvalidRequestError | None:
    """What is wrong with a schema that makes no grammar, told of the smallest part that is wrong by itself.

    `fault_of` says what is wrong with a grammar of one rule. None if nothing is wrong with this schema.
    """
    message = fault_of(as_rule(schema))
    if message is None:
        return None
    definitions = {}
    if isinstance(schema, Mapping):
        definitions = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    tries = _MAX_TRIES
    searching = isinstance(schema, Mapping)
    while searching and isinstance(schema, Mapping):
        searching = False
        for place, child in _children(schema, path):
            tries -= 1
            told = fault_of(as_rule({**definitions, **child} if isinstance(child, Mapping) else child))
            if tries < 0:
                break
            if told is not None and isinstance(child, Mapping):
                schema, path, message, searching = child, place, told, True
                break
    return _told(message, path)


def _told(message: str, path: str) -> InvalidRequestError:
    keyword = _UNIMPLEMENTED.search(message)
    if keyword is not None:
        place = f"{path}.{keyword[1]}"
        return InvalidRequestError(f"{place} cannot be held by a grammar: leave it out.", param=place)
    found = _FAULT.search(message)
    reason = " ".join((found[1] if found else message).split())
    return InvalidRequestError(f"{path} cannot be held by a grammar ({reason:.200}): change it.", param=path)


def _walk(schema: object, path: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every schema in a schema, with its place."""
    pending = [(path, schema)]
    while pending:
        place, each = pending.pop()
        if isinstance(each, Mapping):
            yield place, each
            pending += _children(each, place)


def _children(schema: Mapping[str, Any], path: str) -> Iterator[tuple[str, Any]]:
    for key in _MAPS:
        for name, each in schema.get(key, {}).items():
            yield f"{path}.{key}.{name}", each
    for key in (*_LISTS, *_SINGLES):
        value = schema.get(key)
        if isinstance(value, list):
            yield from ((f"{path}.{key}[{index}]", each) for index, each in enumerate(value))
        elif value is not None:
            yield f"{path}.{key}", value


def _check_bounds(schema: Mapping[str, Any], path: str) -> None:
    for key in _BOUNDS:
        if schema.get(key, 0) > MAX_LENGTH_BOUND:
            raise InvalidRequestError(
                f"{path}.{key} is {schema[key]}: a grammar holds at most {MAX_LENGTH_BOUND}.", param=f"{path}.{key}"
            )
    # Keys beyond the named ones may repeat in a grammar, and then count once where the JSON is read.
    least = schema.get("minProperties", 0)
    if least > max(1, len(set(schema.get("required", ())))):
        place = f"{path}.minProperties"
        raise InvalidRequestError(
            f"{place} is {least}, more than the properties that are required: a grammar cannot hold it, "
            "so name them in required.",
            param=place,
        )


def _check_texts(schema: Mapping[str, Any], path: str) -> None:
    """Refuse control characters that a grammar's JSON could only spell by their number."""
    texts: list[tuple[str, Any]] = [(f"{path}.{key}", schema[key]) for key in ("enum", "const") if key in schema]
    texts += [(f"{path}.properties", list(schema.get("properties", ()))), (f"{path}.required", schema.get("required"))]
    while texts:
        place, value = texts.pop()
        if isinstance(value, str) and (found := _UNWRITABLE.search(value)):
            raise InvalidRequestError(
                f"{place} holds the control character U+{ord(found[0]):04X}, which a grammar cannot write: "
                "leave it out.",
                param=place,
            )
        if isinstance(value, list):
            texts += [(place, each) for each in value]
        elif isinstance(value, Mapping):
            texts += [(place, each) for pair in value.items() for each in pair]


def _check_reference(root: object, schema: Mapping[str, Any], path: str) -> None:
    """Refuse references that lead nowhere, elsewhere, or back to themselves before any value is written."""
    if "$ref" not in schema:
        return
    place, pointer = f"{path}.$ref", schema["$ref"]
    if not pointer.startswith("#"):
        raise InvalidRequestError(
            f"{place} is {pointer!r:.80}: only references into the schema itself (#/...) are followed.", param=place
        )
    pending, seen = [schema], [schema]
    while pending:
        for target in _means(root, pending.pop(), place):
            if target is schema:
                raise InvalidRequestError(f"{place} is {pointer!r:.80}, which leads back to itself.", param=place)
            if not any(target is each for each in seen):
                pending.append(target)
                seen.append(target)


def _means(root: object, schema: Mapping[str, Any], place: str) -> Iterator[Mapping[str, Any]]:
    """The schemas that must hold of the very value for which `schema` must."""
    found = [each for each in schema.get("allOf", ()) if isinstance(each, Mapping)]
    if isinstance(schema.get("$ref"), str) and schema["$ref"].startswith("#"):
        found.append(_resolve(root, schema["$ref"], place))
    yield from (each for each in found if isinstance(each, Mapping))


def _resolve(root: object, pointer: str, place: str) -> Any:
    if pointer != "#" and not pointer.startswith("#/"):
        return {}  # an anchor: the grammar's compiler knows those
    value = root
    for part in pointer.split("/")[1:]:
        name = unquote(part).replace("~1", "/").replace("~0", "~")
        if isinstance(value, Mapping) and name in value:
            value = value[name]
        elif isinstance(value, Sequence) and not isinstance(value, str) and name.isdecimal() and int(name) < len(value):
            value = value[int(name)]
        else:
            raise InvalidRequestError(f"{place} is {pointer!r:.80}, which is not there: define it.", param=place)
    return value
