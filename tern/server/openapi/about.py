"""What can be said of one field, and short ways to write JSON Schema. Knows no field and no request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

MAX_WHOLE = 2**31 - 1

Form = Mapping[str, Any]
"""A JSON Schema."""

TEXT: Form = {"type": "string"}
FLAG: Form = {"type": "boolean"}
NULL: Form = {"type": "null"}


@dataclass(frozen=True)
class About:
    """The meaning of a field, and JSON Schema keywords that narrow its type."""

    meaning: str
    narrowed: Form = field(default_factory=dict)


def between(low: float, high: float) -> dict[str, Any]:
    """A number's range, both ends within."""
    return {"minimum": low, "maximum": high}


def list_of(items: Form, most: int, least: int = 0) -> dict[str, Any]:
    """A list of `least` to `most` items."""
    return {"type": "array", "items": items, "maxItems": most, **({"minItems": least} if least else {})}


def any_list(items: Form) -> dict[str, Any]:
    """A list of any length."""
    return {"type": "array", "items": items}


def one_of(*forms: Form) -> dict[str, Any]:
    """Any of these."""
    return {"anyOf": list(forms)}


def or_null(form: Form) -> dict[str, Any]:
    """That, or null for leaving it out."""
    return one_of(form, NULL)


def record(properties: Mapping[str, Form], required: Sequence[str] = (), *, closed: bool = False) -> dict[str, Any]:
    """An object. Into a `closed` one nothing else may be written, unless it is null."""
    form: dict[str, Any] = {"type": "object", "properties": dict(properties)}
    if required:
        form["required"] = list(required)
    if closed:
        form["additionalProperties"] = NULL
    return form


def typed(kind: str, properties: Mapping[str, Form], *required: str) -> dict[str, Any]:
    """An object whose `type` says what it is."""
    return record({"type": {"const": kind}, **properties}, ["type", *required])
