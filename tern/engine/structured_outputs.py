"""The form that a caller wants an answer to have, in vLLM's names. Knows no grammar: the front door makes one of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from tern.errors import InvalidRequestError


@dataclass(frozen=True)
class StructuredOutputsParams:
    """One of: `json` (a JSON Schema, as an object or as JSON text), `regex` (for the whole answer), `choice` (texts),
    `grammar` (Lark, or GBNF) and `json_object` (true: any JSON object).

    Raises `InvalidRequestError` if not exactly one is given, or it is of another type.
    """

    json: Mapping[str, Any] | str | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None

    def __post_init__(self) -> None:
        names = [each.name for each in fields(self)]
        given = [name for name in names if getattr(self, name) is not None]
        if self.json_object is False:
            given.remove("json_object")
        if len(given) != 1:
            raise InvalidRequestError(
                f"structured_outputs has {' and '.join(given) or 'nothing'}: give exactly one of {', '.join(names)}.",
                param="structured_outputs",
            )
        demand = _demand(given[0], getattr(self, given[0]))
        if demand:
            param = f"structured_outputs.{given[0]}"
            raise InvalidRequestError(f"{param} is {getattr(self, given[0])!r:.60}: it must be {demand}.", param=param)


def _demand(name: str, value: Any) -> str:
    """What a value must be and is not; "" if it is."""
    if name == "json":
        return "" if isinstance(value, Mapping | str) else "a JSON Schema, an object"
    if name == "json_object":
        return "" if value is True else "true"
    if name == "choice":
        listed = isinstance(value, Sequence) and not isinstance(value, str)
        return "" if listed and all(isinstance(each, str) for each in value) else "a list of texts"
    return "" if isinstance(value, str) else "text"
