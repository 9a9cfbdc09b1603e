"""Schemathesis makes requests of what /openapi.json says, good and bad ones, always the same.

None is a fault of the server's, and every answer is one that the document has. `TERN_SCHEMATHESIS` asks for so many
requests of each kind, each time others.
"""

from __future__ import annotations

import itertools
import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from jsonschema import Draft202012Validator
from schemathesis import GenerationMode
from schemathesis.checks import CHECKS, load_all_checks
from server_fakes import GREETING, USER, WEATHER_CALL, Live, ScriptedEngine, serve

from tern.chat import ChatProtocol

MANY = os.environ.get("TERN_SCHEMATHESIS")
SECONDS = 100
"""An answer that takes longer is none."""

STREAMING = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages")
POSTS = (*STREAMING, "/v1/messages/count_tokens", "/tokenize", "/detokenize")
GETS = (
    "/",
    "/health",
    "/ready",
    "/version",
    "/metrics",
    "/v1/models",
    "/v1/models/{model_id}",
    "/page/{digest}/{name}",
)
KEPT_NOWHERE = "/v1/responses/{response_id}"
METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE")
ANSWERS = (
    GREETING,
    WEATHER_CALL,
    "Both.\n</think>\n\n<response>\nLook.\n</response>\n" + WEATHER_CALL[-90:],
    "Cut off",
)

BEYOND = {
    "add_special_tokens", "bad_words", "guided_choice", "guided_grammar", "guided_json", "guided_json_object",
    "guided_regex", "input",
    "logit_bias", "max_tokens", "messages", "metadata", "min_tokens", "output_config", "prompt", "response_format",
    "stop", "stream_options", "structured_outputs", "text", "thinking", "tokens", "tool_choice", "tools",
    "top_logprobs",
}  # fmt: skip
"""Fields for which a request that fits the document may be refused: what they may be depends on more than a type."""


@pytest.fixture(scope="module")
def live(protocol: ChatProtocol) -> Iterator[Live]:
    """A server of a model and a queue without an end, so that no request asks for too much."""
    with serve(ScriptedEngine(protocol, max_model_len=2**40, queue_limit=2**20), protocol) as live:
        yield live


@pytest.fixture(scope="module")
def api(live: Live) -> Any:
    load_all_checks()
    return schemathesis.openapi.from_url(f"{live.url}/openapi.json")


def tried(operation: Any, mode: GenerationMode) -> Any:
    """A decorator that calls a test with many requests for an operation."""
    several = settings(
        max_examples=int(MANY or 25),
        derandomize=MANY is None,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    return lambda test: several(given(operation.as_strategy(generation_mode=mode))(test))


def whole(value: Any) -> Any:
    """A value without numbers such as 1.0, which JSON Schema takes for whole and the server does not."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, list):
        return [whole(item) for item in value]
    return {key: whole(item) for key, item in value.items()} if isinstance(value, dict) else value


def likely(path: str, body: dict[str, Any]) -> dict[str, Any]:
    """A request that fits the document as one that is also accepted, mostly."""
    if path.startswith("/v1/messages"):
        return {**body, "messages": [*body["messages"], *USER]}
    if path == "/tokenize" and body.get("prompt") is None and body.get("messages") is None:
        return {**body, "prompt": "Once"}
    for name in ("prompt", "tokens"):
        if isinstance(body.get(name), list):
            body = {**body, name: known(body[name])}
    return body


def known(value: Any) -> Any:
    """Token ids as some that the vocabulary has: the scripted engine does not look, which the real one does."""
    if isinstance(value, list):
        return [known(item) for item in value]
    return value % 320 if isinstance(value, int) else value


def check_answer(response: Any, described: dict[str, Any], components: dict[str, Any]) -> None:
    """An answer, or each event of a stream, is of the form that the document has for it."""
    medium = response.headers["content-type"][0].split(";")[0]
    check = Draft202012Validator({**described[medium]["schema"], "components": components})
    text = response.content.decode()
    values = [text] if medium == "application/json" else re.findall("^data: (.*)$", text, re.MULTILINE)
    assert values
    for value in values:
        if value != "[DONE]":
            check.validate(json.loads(value))


def test_all_operations_are_tried(api: Any) -> None:
    found = {(path, method) for path in api for method in api[path]}
    tried_here = {(path, "post") for path in POSTS} | {(path, "get") for path in (*GETS, KEPT_NOWHERE)}
    assert found == tried_here | {(KEPT_NOWHERE, "delete")}


@pytest.mark.parametrize("path", POSTS)
def test_requests_that_fit_are_answered_as_described(live: Live, api: Any, path: str) -> None:
    described = api.raw_schema["paths"][path]["post"]["responses"]["200"]["content"]
    statuses: Counter[int] = Counter()
    answers, streams = itertools.cycle(ANSWERS), itertools.cycle((False, True))
    refused: dict[str, str] = {}
    # `refused` stands for the one; the other takes the form of what `data` holds, which is what OpenAI's own document
    # gives too, for that of a whole event, so that `check_answer` does its work.
    excluded = [CHECKS.get_one(name) for name in ("positive_data_acceptance", "response_schema_conformance")]

    @tried(api[path]["post"], GenerationMode.POSITIVE)
    def check(case: Any) -> None:
        live.engine.answers.clear()
        live.engine.answers.append(next(answers))
        case.body = likely(path, whole(case.body))
        if path in STREAMING:
            case.body["stream"] = next(streams) and case.body.get("prompt_logprobs") is None
        response = case.call(timeout=SECONDS)
        case.validate_response(response, excluded_checks=excluded)
        statuses[response.status_code] += 1
        if response.status_code == 400:
            error = response.json()["error"]
            field = re.match(r"\w*", error.get("param") or error["message"])
            assert field is not None
            refused[field[0]] = error["message"]
        elif response.status_code == 200:
            check_answer(response, described, api.raw_schema["components"])

    check()
    assert refused.keys() <= BEYOND, refused
    assert statuses.keys() <= {200, 400, 404}
    assert statuses[200] > 3, f"{path} was not tried with what it accepts: {refused}"


@pytest.mark.parametrize("path", POSTS)
def test_requests_that_do_not_fit_are_refused_as_described(api: Any, path: str) -> None:
    statuses: Counter[int] = Counter()

    @tried(api[path]["post"], GenerationMode.NEGATIVE)
    def check(case: Any) -> None:
        response = case.call_and_validate(timeout=SECONDS)
        statuses[response.status_code] += 1

    check()
    assert {400} <= statuses.keys() <= {400, 404}


@pytest.mark.parametrize(
    ("path", "method"), [*((path, "get") for path in (*GETS, KEPT_NOWHERE)), (KEPT_NOWHERE, "delete")]
)
def test_what_takes_no_body_is_answered_as_described(api: Any, path: str, method: str) -> None:
    @tried(api[path][method], GenerationMode.POSITIVE)
    def check(case: Any) -> None:
        case.call_and_validate(timeout=SECONDS)

    check()


def test_other_methods_are_refused(live: Live, api: Any) -> None:
    for path in (*POSTS, *GETS, KEPT_NOWHERE):
        described = {method.upper() for method in api[path]}
        for method in set(METHODS) - described:
            answer = live.client.request(method, re.sub("{[^}]*}", "x", path), json={})
            assert answer.status_code == 405, (method, path)
            assert set(answer.headers["allow"].split(", ")) == described, path
            assert "method" in answer.json()["error"]["message"]
