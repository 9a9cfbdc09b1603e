"""Anything as a request: whatever it is, the answer is an answer or a refusal, in form and in time, never a 500.

Wrong values stand in every field that the schemas know, alone and several together, beside bodies that are no request
at all. The engine is the scripted one: what is tried is everything between the socket and the engine's door.
"""

from __future__ import annotations

import json
import socket
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given
from hypothesis import strategies as st
from server_fakes import USER, WEATHER_TOOL, Live

from tern.server.schemas.chat import ChatRequest
from tern.server.schemas.completion import CompletionRequest
from tern.server.schemas.fields import IGNORED, NEUTRAL
from tern.server.schemas.tokenization import DetokenizeRequest, TokenizeRequest
from tests.fuzzing import fuzz

ROUTES: dict[str, tuple[type, dict[str, Any]]] = {
    "/v1/chat/completions": (ChatRequest, {"messages": USER}),
    "/v1/completions": (CompletionRequest, {"prompt": "x"}),
    "/tokenize": (TokenizeRequest, {"prompt": "x"}),
    "/detokenize": (DetokenizeRequest, {"tokens": [5]}),
}

tried = fuzz(150, HealthCheck.too_slow, HealthCheck.function_scoped_fixture)

numbers = st.one_of(
    st.integers(-3, 30),
    st.sampled_from([2**31, 2**53 + 1, 2**63, -(2**63) - 1, 10**400, -1, 0, 1, 129, 1e-9, 1e308, -0.0, 0.5]),
    st.floats(allow_nan=True, allow_infinity=True),
)
texts = st.one_of(
    st.sampled_from(["", "auto", "none", "required", "user", "assistant", "tool", "</think>", "<tool_call>", "\x00"]),
    st.sampled_from(["{{ 7*7 }}", "{% for a in range(10**9) %}", "<|im_end|>", "\ud800", "[" * 300, "😀" * 50]),
    st.text(max_size=12),
)
names = st.sampled_from(
    [
        *("role", "content", "type", "text", "function", "name", "arguments", "parameters", "tool_calls", "id"),
        *("tool_call_id", "reasoning_content", "properties", "items", "enum", "anyOf", "json_schema", "$ref", "5"),
    ]
)
leaves = st.one_of(st.none(), st.booleans(), numbers, texts)
values = st.recursive(
    leaves,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.one_of(names, texts), inner, max_size=4)),
    max_leaves=8,
)
messages = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "developer", "user", "assistant", "tool", "function", 5])},
        optional={
            "content": values,
            "tool_calls": values,
            "tool_call_id": texts,
            "reasoning_content": values,
            "name": values,
        },
    ),
    max_size=5,
)
tools = st.lists(
    st.one_of(
        values,
        st.fixed_dictionaries(
            {"type": st.just("function"), "function": st.dictionaries(names, values, max_size=4)},
        ),
        st.just(WEATHER_TOOL),
    ),
    max_size=3,
)
SHAPED = {"messages": messages, "tools": tools}


def body_for(path: str) -> st.SearchStrategy[dict[str, Any]]:
    """A good request of which some fields are spoilt."""
    schema, good = ROUTES[path]
    known = [*schema.model_fields, *NEUTRAL, *IGNORED, "unheard_of"]
    field = st.sampled_from(known).flatmap(
        lambda name: st.tuples(st.just(name), st.one_of(values, SHAPED.get(name, values)))
    )
    return st.lists(field, max_size=4).map(lambda fields: {**good, **dict(fields)})


def answered_well(live: Live, path: str, content: bytes) -> None:
    """The request is answered or refused, as it should be in either case."""
    response = live.client.post(path, content=content, headers={"content-type": "application/json"})
    assert response.status_code in (200, 400, 404), f"{response.status_code}: {response.text} for {content!r}"
    if response.headers["content-type"].startswith("text/event-stream"):
        events = [event for event in response.text.split("\n\n") if event.startswith("data: ")]
        assert events[-1] == "data: [DONE]"
        assert all("error" not in json.loads(event.removeprefix("data: ")) for event in events[:-1])
        return
    answer = response.json()
    if response.status_code != 200:
        assert set(answer) == {"error"}
        assert set(answer["error"]) == {"message", "type", "param", "code"}
        assert 10 < len(answer["error"]["message"]) < 2000


@pytest.mark.parametrize("path", ROUTES)
def test_any_value_in_any_field(server: Live, path: str) -> None:
    @tried
    @given(body=body_for(path))
    @example(body={**ROUTES[path][1], "n": 128, "stream": True})
    @example(body={**ROUTES[path][1], "stop": ["a"] * 64, "stream": True})
    def run(body: dict[str, Any]) -> None:
        answered_well(server, path, json.dumps(body).encode("utf-8", "surrogatepass"))

    server.engine.queue_limit = 1024
    run()
    server.engine.wait_until(lambda: server.engine.num_open == 0)
    server.still_serves()


@pytest.mark.parametrize("path", ROUTES)
def test_any_json_and_any_bytes(server: Live, path: str) -> None:
    good = json.dumps(ROUTES[path][1]).encode()

    @tried
    @given(
        content=st.one_of(
            st.binary(max_size=60),
            values.map(lambda value: json.dumps(value).encode("utf-8", "surrogatepass")),
            st.tuples(st.integers(0, len(good)), st.binary(max_size=3)).map(
                lambda spoilt: good[: spoilt[0]] + spoilt[1] + good[spoilt[0] :]
            ),
            st.integers(0, len(good)).map(lambda end: good[:end]),
        )
    )
    def run(content: bytes) -> None:
        answered_well(server, path, content)

    run()
    server.still_serves()


@tried
@given(raw=st.one_of(st.binary(max_size=120), st.text(st.characters(max_codepoint=127), max_size=80).map(str.encode)))
def test_any_bytes_on_the_socket(server: Live, raw: bytes) -> None:
    """What is no HTTP at all ends the connection and nothing else."""
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n" + raw + b"\r\n\r\n")
        connection.shutdown(socket.SHUT_WR)
        heard = b""
        while piece := connection.recv(65536):
            heard += piece
    assert not heard or heard.startswith(b"HTTP/1.1 4"), heard
