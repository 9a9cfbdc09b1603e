"""What one route declares of itself, as keywords for its decorator. Knows JSON Schema; knows no route.

    @router.post("/v1/completions", **described("Continue prompts", Completion, request=CompletionRequest, ...))

Schemas are referred to by name and travel beside the route (`SCHEMAS`), where nobody reads them before `document` does:
FastAPI's own model of a schema would make a float of each limit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from tern.server.openapi.about import About
from tern.server.openapi.answers import ErrorAnswer
from tern.server.openapi.fields import about
from tern.server.schemas.fields import IGNORED, INSTEAD, NEUTRAL, Schema

COMPONENT = "#/components/schemas/{model}"
SCHEMAS = "x-schemas"

ERRORS: Mapping[int, str] = {
    400: "A field is wrong, unknown or not served; the error names it.",
    401: "No API key, or a wrong one, where the server asks for one.",
    404: "There is no such model, or no such answer.",
    413: "The body is longer than the server reads.",
    429: "The queue is full; Retry-After says when to come back, in seconds.",
    500: "A fault of the server; its log has the details.",
    503: "The model is loading, or the server takes no more requests.",
}
READING = (400, 401, 404, 413, 500, 503)
"""The errors of a route that reads a body."""
GENERATING = (*READING, 429)
"""The errors of a route that generates."""


def described(
    summary: str,
    answer: type[BaseModel] | None = None,
    *,
    meaning: str,
    request: type[Schema] | None = None,
    chunk: type[BaseModel] | None = None,
    errors: Sequence[int] = (),
    failure: type[BaseModel] = ErrorAnswer,
    also: Sequence[int] = (),
    only: int | None = None,
) -> dict[str, Any]:
    """Keywords for a route's decorator.

    `answer` is the form of its JSON, None where it answers text; `chunk` that of an event if it streams. `request` is
    the schema of its body. `errors` are the statuses of error answers, which have the form `failure`, `also` those that
    answer like 200; with `only` no request is answered like 200, and that one of the errors is the usual answer.
    """
    schemas: dict[str, Any] = {}
    content: dict[str, Any] = {}
    if answer is not None:
        content["application/json"] = _used(answer_schemas(answer), answer.__name__, schemas)
    if chunk is not None:
        content["text/event-stream"] = _used(answer_schemas(chunk), chunk.__name__, schemas)
    good: dict[str, Any] = {"description": (answer.__doc__ or "").strip() if answer else "Text."}
    if content:
        good["content"] = content
    failed = {"application/json": _used(answer_schemas(failure), failure.__name__, schemas)}
    failures = {status: {"description": ERRORS[status], "content": failed} for status in sorted(errors)}
    same = {status: {**good, "description": "The same, when it is not so."} for status in also}
    extra: dict[str, Any] = {SCHEMAS: schemas}
    if 401 in errors:
        extra["security"] = [{"key": []}, {}]
    if request is not None:
        body = {"application/json": _used(request_schemas(request), request.__name__, schemas)}
        extra["requestBody"] = {"required": True, "content": body}
    return {
        "summary": summary,
        "description": meaning,
        "responses": {**({200: good} if only is None else {}), **same, **failures},
        "status_code": only,
        "openapi_extra": extra,
    }


def _used(found: Mapping[str, Any], name: str, schemas: dict[str, Any]) -> dict[str, Any]:
    """A medium whose schema is the one of this `name`; all that were found join `schemas`."""
    schemas.update(found)
    return {"schema": {"$ref": COMPONENT.format(model=name)}}


def answer_schemas(form: type[BaseModel]) -> dict[str, Any]:
    """The form of an answer and those that it refers to, by name."""
    return _by_name(form.__name__, _without_titles(form.model_json_schema(ref_template=COMPONENT)))


def request_schemas(schema: type[Schema]) -> dict[str, Any]:
    """A request and what it refers to, by name: its fields, and those that are accepted without being served."""
    made = _without_titles(schema.model_json_schema(ref_template=COMPONENT))
    defs = made.pop("$defs", {})
    for name, nested in [(schema.__name__, made), *defs.items()]:
        required = nested.get("required", ())
        for field, found in nested["properties"].items():
            told = about(name, field) or About(found["description"])
            # Further in, null is a value like any other.
            nullable = field not in required if nested is made else {"type": "null"} in found.get("anyOf", ())
            nested["properties"][field] = _field(found, told, nullable=nullable)
    for name, why in {**IGNORED, **schema.ignored}.items():
        made["properties"].setdefault(name, {"description": f"Ignored: {why}."})
    for name, values in {**NEUTRAL, **schema.neutral}.items():
        hint = f": {INSTEAD[name]}" if name in INSTEAD else ""
        only = {"enum": [*values, None], "description": f"Served with this value alone{hint}."}
        made["properties"].setdefault(name, only)
    return {**defs, schema.__name__: made}


def _field(found: Mapping[str, Any], told: About, *, nullable: bool) -> dict[str, Any]:
    """One field: pydantic's schema of its type, narrowed; null, where it may be, is the same as leaving it out."""
    branches = [branch for branch in found.get("anyOf", [found]) if branch.get("type") != "null"]
    (value, *others) = [{k: v for k, v in branch.items() if k in ("$ref", "type", "items")} for branch in branches]
    choices = list(told.narrowed.get("anyOf", [{**value, **told.narrowed}, *others]))
    default = {"default": found["default"]} if found.get("default") is not None else {}
    forms = [*choices, {"type": "null"}] if nullable else choices
    shape = forms[0] if len(forms) == 1 else {"anyOf": forms}
    return {**shape, **default, "description": told.meaning}


def _by_name(name: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {**schema.pop("$defs", {}), name: schema}


def _without_titles(schema: Any) -> Any:
    """Without the titles that pydantic makes of names, and without defaults of null, which mean absence."""
    if isinstance(schema, list):
        return [_without_titles(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    noise = {"title"} if isinstance(schema.get("title"), str) else set()
    if "default" in schema and schema["default"] is None:
        noise.add("default")
    return {key: _without_titles(value) for key, value in schema.items() if key not in noise}
