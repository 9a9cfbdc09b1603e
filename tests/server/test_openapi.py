"""/openapi.json is complete and true: requests are accepted as it says, and answers are what it says."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from fastapi.routing import APIRoute
from jsonschema import Draft202012Validator
from openapi_probes import (
    CHAT,
    COMPANIONS,
    COMPLETION,
    COUNT,
    EVERYTHING,
    KEPT_NOWHERE,
    MESSAGE,
    MESSAGE_TOOL,
    PROBES,
    REQUESTS,
    RESPONSE,
    RESPONSE_TOOL,
    SCHEMAS_OF_REQUESTS,
)
from openapi_spec_validator import OpenAPIV31SpecValidator
from server_fakes import USER, WEATHER_CALL, WEATHER_TOOL, Live

from tern.engine.sampling_params import SamplingParams
from tern.errors import InvalidRequestError
from tern.server import create_app
from tern.server.app import FAMILIES
from tern.server.batch.run import post
from tern.server.openapi.fields import ABOUT, about
from tern.server.openapi.operations import SCHEMAS
from tern.server.schemas.fields import IGNORED, NEUTRAL, Schema


@pytest.fixture
def described(server: Live) -> dict[str, Any]:
    response = server.client.get("/openapi.json")
    assert response.status_code == 200
    document: dict[str, Any] = response.json()
    return document


def validator(document: dict[str, Any], schema: dict[str, Any]) -> Draft202012Validator:
    return Draft202012Validator({**schema, "components": document["components"]})


def body_schema(document: dict[str, Any], path: str) -> dict[str, Any]:
    schema: dict[str, Any] = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    return schema


def unserved_fields(schema: type[Schema]) -> set[str]:
    """Fields that are accepted, some with one value alone, without being served."""
    return {*IGNORED, *schema.ignored, *NEUTRAL, *schema.neutral} - schema.model_fields.keys()


def operations(document: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield path, method, operation


def test_the_document_is_valid_openapi(described: dict[str, Any]) -> None:
    OpenAPIV31SpecValidator(described).validate()
    assert described["openapi"].startswith("3.1")


def test_every_route_says_what_it_does(described: dict[str, Any]) -> None:
    found = list(operations(described))
    assert {path for path, _, _ in found} >= {*REQUESTS, "/", "/health", "/ready", "/version", "/metrics", "/v1/models"}
    for path, method, operation in found:
        assert operation["summary"], path
        assert len(operation["description"]) > 10, path
        assert ("requestBody" in operation) == (method == "post"), path
        assert all(answer["description"] for answer in operation["responses"].values()), path
        assert ("200" in operation["responses"]) == (path != KEPT_NOWHERE), path
        (form,) = operation["responses"]["200"]["content"].values() if "get" in method and path != KEPT_NOWHERE else [0]
        assert form == 0 or form["schema"], f"{path} does not say what it answers"


def test_every_route_is_described(server: Live) -> None:
    for family in FAMILIES:
        for route in family.routes(server.state).routes:
            assert isinstance(route, APIRoute)
            assert SCHEMAS in (route.openapi_extra or {}), f"declare {route.path} with `described`"
            assert route.include_in_schema


@pytest.mark.parametrize("schema", SCHEMAS_OF_REQUESTS)
def test_every_field_says_what_it_means(schema: type[Schema]) -> None:
    missing = [name for name in schema.model_fields if about(schema.__name__, name) is None]
    assert not missing, f"describe {missing} in tern/server/openapi/fields.py"


def test_nothing_is_described_that_no_request_has() -> None:
    fields = {name for schema in SCHEMAS_OF_REQUESTS for name in schema.model_fields}
    fields |= {f"{schema.__name__}.{name}" for schema in SCHEMAS_OF_REQUESTS for name in schema.model_fields}
    assert ABOUT.keys() <= fields


@pytest.mark.parametrize("path", REQUESTS)
def test_the_fields_described_are_those_accepted(described: dict[str, Any], path: str) -> None:
    name = body_schema(described, path)["$ref"].split("/")[-1]
    component = described["components"]["schemas"][name]
    schema, _ = REQUESTS[path]
    assert component["properties"].keys() == schema.model_fields.keys() | unserved_fields(schema)
    assert component["additionalProperties"] is False


BEYOND = {
    "model": "one is served",
    "messages": "what a message must hold depends on its role",
    "max_tokens": "0 is for prompts that are scored or echoed",
    "max_completion_tokens": "the model's length bounds it",
    "min_tokens": "is at most max_tokens",
    "n": "the engine takes so many at once",
    "tokens": "ids may be outside of the vocabulary",
    "prompt": "ids may be outside of the vocabulary",
    "metadata": "FastDeploy's switches are no labels",
    "input": "what an item must hold depends on those before it",
    "system": "the model's length bounds it",
    "instructions": "the model's length bounds it",
    "max_output_tokens": "the model's length bounds it",
    "thinking": "budget_tokens is for enabled alone, and below max_tokens",
    "guided_json": "not all JSON text is a schema",
    "guided_grammar": "not all text is a grammar",
    "guided_regex": "not all text is a regular expression",
    "guided_choice": "at least one text",
    "tool_choice": "what is demanded must be among the tools",
}
"""Fields whose values can be wrong in a way that their description cannot say."""


@pytest.mark.parametrize("path", REQUESTS)
def test_values_are_accepted_as_described(server: Live, described: dict[str, Any], path: str) -> None:
    server.engine.queue_limit = 0  # what is good is refused by a full queue
    app = create_app(server.state)
    schema, base = REQUESTS[path]
    check = validator(described, body_schema(described, path))
    unserved = [*PROBES[:6], *PROBES[18:22], [], {}, ["text"], {"type": "text"}]
    cases = [(field, value) for field in schema.model_fields for value in PROBES]
    cases += [(field, value) for field in sorted(unserved_fields(schema)) for value in unserved]

    async def wrong() -> AsyncIterator[str]:
        for field, value in cases:
            body = {**base, **COMPANIONS.get(field, {}).get(path, {}), field: value}
            if path == "/tokenize" and field in ("messages", "tools"):
                body = {"messages": USER, field: value}
            status, answer = await post(app, path, json.dumps(body).encode())
            assert status in (200, 400, 404, 429), answer
            good, fits = status in (200, 429), check.is_valid(body)
            if fits != good and not (fits and field in BEYOND):
                yield f"{field}={value!r:.60}: described as {fits}, answered with {answer[:200]!r}"

    async def all_wrong() -> list[str]:
        return [complaint async for complaint in wrong()]

    assert asyncio.run(all_wrong()) == []


@pytest.mark.parametrize("path", [CHAT, COMPLETION])
def test_ranges_end_where_they_are_said_to(described: dict[str, Any], path: str) -> None:
    name = body_schema(described, path)["$ref"].split("/")[-1]
    scored = {"prompt_logprobs": 0} if path == COMPLETION else {}  # with it, max_tokens may be 0
    tried = 0
    for field, found in described["components"]["schemas"][name]["properties"].items():
        for form in found.get("anyOf", [found]):
            if field not in SamplingParams.__dataclass_fields__ or "maximum" not in form:
                continue
            others: dict[str, Any] = {"max_tokens": None} if field == "min_tokens" else scored
            step = 1 if form["type"] == "integer" else 0.001
            for end, beyond in (("minimum", -step), ("maximum", step)):
                if end in form:
                    SamplingParams(**{**others, field: form[end]})
                    with pytest.raises(InvalidRequestError, match=field):
                        SamplingParams(**{**others, field: form[end] + beyond})
                    tried += 1
    assert tried > 20


TOOLS_OF = {CHAT: [WEATHER_TOOL], RESPONSE: [RESPONSE_TOOL], MESSAGE: [MESSAGE_TOOL], COUNT: [MESSAGE_TOOL]}
SHOWN = {"thinking": {"type": "enabled", "budget_tokens": 100}}
ANSWERED: list[tuple[str, dict[str, Any]]] = [
    *((path, {}) for path in REQUESTS),
    *((path, {"tools": tools}) for path, tools in TOOLS_OF.items()),
    (CHAT, {"logprobs": True, "top_logprobs": 2, "return_token_ids": True, "prompt_logprobs": 1, "n": 2}),
    (CHAT, {"max_tokens": 3}),
    (CHAT, {"stop": "How"}),
    (COMPLETION, {"echo": True, "logprobs": 2, "n": 2}),
    (COMPLETION, {"return_token_ids": True, "prompt_logprobs": 1, "max_tokens": 0}),
    (COMPLETION, {"stop_token_ids": [5]}),
    (RESPONSE, {"top_logprobs": 2, "instructions": "Be brief.", "metadata": {"run": "7"}}),
    (RESPONSE, {"max_output_tokens": 3, "reasoning": {"effort": "low"}}),
    (RESPONSE, {"max_output_tokens": 12}),
    (RESPONSE, {"text": {"format": {"type": "json_object"}}, "tools": [RESPONSE_TOOL], "tool_choice": "auto"}),
    (MESSAGE, SHOWN),
    (MESSAGE, {**SHOWN, "tools": [MESSAGE_TOOL]}),
    (MESSAGE, {"thinking": {"type": "adaptive", "display": "omitted"}}),
    (MESSAGE, {"max_tokens": 3}),
    (MESSAGE, {"stop_sequences": ["How"]}),
    ("/tokenize", {"return_token_strs": True}),
]


def schema_of(response: dict[str, Any], medium: str = "application/json") -> dict[str, Any]:
    schema: dict[str, Any] = response["content"][medium]["schema"]
    return schema


def events_of(server: Live, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The events of a streamed answer, whichever family's, and usage in all of them where there is a choice."""
    options = (
        {"stream_options": {"include_usage": True, "continuous_usage_stats": True}}
        if path in (CHAT, COMPLETION)
        else {}
    )
    answer = server.client.post(path, json={**body, **options, "stream": True})
    assert answer.status_code == 200, answer.text
    lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


@pytest.mark.parametrize(("path", "fields"), ANSWERED)
def test_answers_are_as_described(server: Live, described: dict[str, Any], path: str, fields: dict[str, Any]) -> None:
    responses = described["paths"][path]["post"]["responses"]
    body = {**REQUESTS[path][1], **fields}
    if "tools" in fields:
        server.engine.answers.extend([WEATHER_CALL] * 2)
    validator(described, body_schema(described, path)).validate(body)
    answer = server.client.post(path, json=body)
    assert answer.status_code == 200
    validator(described, schema_of(responses["200"])).validate(answer.json())
    wrong = server.client.post(path, json={**body, "nonsense": 1})
    validator(described, schema_of(responses["400"])).validate(wrong.json())
    if "text/event-stream" not in responses["200"]["content"] or "prompt_logprobs" in fields:
        return
    check = validator(described, schema_of(responses["200"], "text/event-stream"))
    events = events_of(server, path, body)
    assert len(events) > 1
    for each in events:
        check.validate(each)


@pytest.mark.parametrize("path", [CHAT, COMPLETION, RESPONSE, MESSAGE])
def test_failures_are_as_described(server: Live, described: dict[str, Any], path: str) -> None:
    responses = described["paths"][path]["post"]["responses"]
    body = REQUESTS[path][1]
    server.engine.fail_with = "The engine failed while computing this request."
    failed = server.client.post(path, json=body)
    assert failed.status_code == 500
    validator(described, schema_of(responses["500"])).validate(failed.json())
    events = events_of(server, path, body)
    assert server.engine.fail_with in json.dumps(events[-1])
    check = validator(described, schema_of(responses["200"], "text/event-stream"))
    for each in events:
        check.validate(each)


def test_parts_of_every_kind_are_described(server: Live, described: dict[str, Any]) -> None:
    seen: set[str] = set()
    for path, key in ((RESPONSE, "output"), (MESSAGE, "content")):
        server.engine.answers.extend([EVERYTHING, EVERYTHING])
        good = described["paths"][path]["post"]["responses"]["200"]
        body = {**REQUESTS[path][1], **(SHOWN if path == MESSAGE else {}), "tools": TOOLS_OF[path]}
        answer = server.client.post(path, json=body).json()
        events = events_of(server, path, body)
        validator(described, schema_of(good)).validate(answer)
        for event in events:
            validator(described, schema_of(good, "text/event-stream")).validate(event)
        seen |= {part["type"] for part in answer[key]} | {event["type"] for event in events}
    assert seen >= {"reasoning", "message", "function_call", "thinking", "text", "tool_use"}
    assert len(seen) == 6 + 13 + 6  # and all events but pings and those of failures and of what was cut off


@pytest.mark.parametrize("method", ["GET", "DELETE"])
def test_that_nothing_is_kept_is_as_described(server: Live, described: dict[str, Any], method: str) -> None:
    responses = described["paths"][KEPT_NOWHERE][method.lower()]["responses"]
    assert set(responses) == {"401", "404"}
    answer = server.client.request(method, "/v1/responses/resp_1")
    assert answer.status_code == 404
    validator(described, schema_of(responses["404"])).validate(answer.json())


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/tern-test", "/health", "/ready", "/version"])
def test_what_is_asked_by_get_is_as_described(server: Live, described: dict[str, Any], path: str) -> None:
    known = path.replace("tern-test", "{model_id}")
    schema = described["paths"][known]["get"]["responses"]["200"]["content"]["application/json"]["schema"]
    answer = server.client.get(path)
    assert answer.status_code == 200
    validator(described, schema).validate(answer.json())


def test_the_comparison_would_notice_a_field_too_many(described: dict[str, Any]) -> None:
    schema = described["paths"]["/version"]["get"]["responses"]["200"]["content"]["application/json"]["schema"]
    assert not validator(described, schema).is_valid({"version": "1", "more": 2})
    assert not validator(described, schema).is_valid({})
