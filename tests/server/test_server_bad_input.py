"""Bad input, named: each case gets the right 4xx in OpenAI's envelope, and the next request is served."""

from __future__ import annotations

import json
import socket
from typing import Any

import httpx
import pytest
from openapi_probes import REQUESTS
from server_fakes import USER, Live, ScriptedEngine, serve

from tern.chat import ChatProtocol
from tern.server.schemas.fields import NEUTRAL

CHAT = "/v1/chat/completions"


def refused(response: httpx.Response, status: int = 400) -> dict[str, Any]:
    """The error of a response, its envelope checked."""
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert len(body["error"]["message"]) > 10
    error: dict[str, Any] = body["error"]
    return error


def call(name: str) -> dict[str, Any]:
    return {"id": "c1", "type": "function", "function": {"name": name, "arguments": "{}"}}


NO_NAME = {"type": "function", "function": {"parameters": {}}}
NO_SCHEMA = {"type": "function", "function": {"name": "f", "parameters": {"type": "banana"}}}
TEXT_SCHEMA = {"type": "function", "function": {"name": "f", "parameters": "no schema"}}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role"),
        ({"messages": [*USER, {"role": "tool", "tool_call_id": "c9", "content": "x"}]}, "messages[1].tool_call_id"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]}, None),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -5}, "max_tokens"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens"),
        ({"temperature": "NaN"}, "temperature"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.01}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": 2}, "min_p"),
        ({"n": 0}, "n"),
        ({"n": 1000}, "n"),
        ({"seed": 2**64}, "seed"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a", ""]}, "stop"),
        ({"stop": [1]}, "stop"),
        ({"stop": ["a"] * 100}, "stop"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"stop_token_ids": list(range(2000))}, "stop_token_ids"),
        ({"bad_words": [""]}, "bad_words"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"logit_bias": {"9" * 5000: 1}}, "logit_bias"),
        ({"logit_bias": {"5": "much"}}, "logit_bias"),
        ({"logit_bias": {"5": True}}, "logit_bias"),
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens"),
        ({"priority": 2**40}, "priority"),
        ({"logprobs": 3}, "logprobs"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": -1}, "top_logprobs"),
        ({"metadata": {"enable_thinking": False}}, "metadata.enable_thinking"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        ({"stream": True, "stream_options": {"typo": True}}, "stream_options.typo"),
        ({"reasoning_effort": "extreme"}, "reasoning_effort"),
        ({"reasoning_max_tokens": -1}, "reasoning_max_tokens"),
        ({"thinking_budget": -1}, "thinking_budget"),
        ({"reasoning_max_tokens": 1, "thinking_budget": 2}, "reasoning_max_tokens"),
        ({"reasoning_effort": "none", "chat_template_kwargs": {"enable_thinking": True}}, "reasoning_effort"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs.messages"),
        ({"chat_template_kwargs": {"enable_thinking": "no"}}, "chat_template_kwargs.enable_thinking"),
        ({"tools": [NO_NAME]}, "tools[0].function.name"),
        ({"tools": [NO_SCHEMA]}, "tools[0].function.parameters.type"),
        ({"tools": [TEXT_SCHEMA], "tool_choice": "none"}, "tools[0].function.parameters"),
        ({"tool_choice": "sometimes"}, "tool_choice"),
        ({"temprature": 0.5}, "temprature"),
        ({"prompt": "x"}, "prompt"),
    ],
)
def test_a_wrong_value_is_named(server: Live, fields: dict[str, Any], param: str | None) -> None:
    error = refused(server.client.post(CHAT, json={"messages": USER, **fields}))
    assert error["type"] == "invalid_request_error"
    if param is not None:
        assert error["param"] == param
        assert param.split("[")[0].split(".")[-1] in error["message"]
    assert server.engine.seen == []
    server.still_serves()


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [(CHAT, {"messages": USER, "n": 9}, "n"), ("/v1/completions", {"prompt": ["x"] * 9}, "prompt")],
)
def test_more_choices_than_ever_fit_are_no_full_queue(
    server: Live, path: str, fields: dict[str, Any], param: str
) -> None:
    server.engine.capacity = 8
    error = refused(server.client.post(path, json=fields))
    assert error["param"] == param
    assert "9 choices" in error["message"]
    assert "at most 8" in error["message"]
    server.still_serves()


UNSUPPORTED: dict[str, Any] = {
    "response_format": {"type": "structural_tag"},
    "add_generation_prompt": False,
    "add_special_tokens": True,
    "audio": {"voice": "alloy"},
    "bad_words_token_ids": [5],
    "best_of": 3,
    "cache_salt": "s",
    "chat_template": "{{ x }}",
    "continue_final_message": True,
    "disable_chat_template": True,
    "documents": [{"text": "x"}],
    "echo": True,
    "function_call": "auto",
    "functions": [{}],
    "guided_decoding_backend": "xgrammar",
    "guided_whitespace_pattern": " ",
    "include_reasoning": False,
    "kv_transfer_params": {},
    "length_penalty": 1.5,
    "logits_processors": ["x"],
    "mm_processor_kwargs": {"a": 1},
    "modalities": ["audio"],
    "spaces_between_special_tokens": False,
    "structural_tag": "x",
    "suffix": "end",
    "truncate_prompt_tokens": 5,
    "use_beam_search": True,
    "verbosity": "low",
    "vllm_xargs": {"a": 1},
    "web_search_options": {},
}


@pytest.mark.parametrize("field", UNSUPPORTED)
def test_what_is_not_supported_yet_says_so(server: Live, field: str) -> None:
    error = refused(server.client.post(CHAT, json={"messages": USER, field: UNSUPPORTED[field]}))
    assert (error["param"], error["code"]) == (field, "not_supported")
    assert field in error["message"]
    assert "not supported yet" in error["message"]
    server.still_serves()


def test_values_that_change_nothing(server: Live) -> None:
    assert UNSUPPORTED.keys() - NEUTRAL.keys() == {"response_format"}
    assert UNSUPPORTED.keys() >= NEUTRAL.keys()
    plain = server.chat()["choices"]
    for field, values in NEUTRAL.items():
        for value in (None, *values):
            assert server.chat(**{field: value})["choices"] == plain, field


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b'{"messages": "\xff"}', "invalid_utf8"),
        (b'{"messages": ', "invalid_json"),
        (b"", "invalid_json"),
        (b"[1]", "invalid_json"),
        (b"null", "invalid_json"),
        (b'{"a":' * 100_000, "invalid_json"),
        (b"[" * 500_000, "invalid_json"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "invalid_json"),
    ],
)
def test_a_body_that_is_no_json(server: Live, body: bytes, code: str) -> None:
    assert refused(server.client.post(CHAT, content=body))["code"] == code
    server.still_serves()


@pytest.mark.parametrize(
    ("text", "param"),
    [
        ('{"messages": [], "temperature": NaN}', "temperature"),
        ('{"messages": [], "temperature": -Infinity}', "temperature"),
        ('{"messages": [], "temperature": 1e999}', "temperature"),
        ('{"messages": [{"role": "user", "content": "\\ud800"}]}', "messages[0].content"),
    ],
)
def test_values_that_json_should_not_have(server: Live, text: str, param: str) -> None:
    assert refused(server.client.post(CHAT, content=text.encode()))["param"] == param
    server.still_serves()


def test_a_deep_body_within_the_parser_s_reach_is_no_crash(server: Live) -> None:
    deep: Any = "x"
    for _ in range(199):
        deep = [deep]
    deeper = json.loads(b"[" * 900 + b"]" * 900)
    tool = {"type": "function", "function": {"name": "f", "parameters": {"default": deep}}}
    for value in (deep, deeper):
        assert refused(server.client.post(CHAT, json={"messages": [{"role": value}]}))["param"] in (
            "messages[0].role",
            None,
        )
        refused(server.client.post(CHAT, json={"messages": [{"role": "user", "content": value}]}))
        refused(server.client.post(CHAT, json={"messages": USER, "seed": value}))
        refused(server.client.post(CHAT, json={"messages": USER, "chat_template_kwargs": {"enable_thinking": value}}))
        refused(server.client.post(CHAT, json={"messages": USER, "tools": [tool]}))
    server.still_serves()


def test_a_long_list_of_wrong_things_is_one_short_complaint(server: Live) -> None:
    """Collecting a complaint for each of them would take minutes, which the client's patience ends."""
    for name, value in (
        ("stop", [1] * 500_000),
        ("bad_words", [1] * 500_000),
        ("stop_token_ids", ["x"] * 500_000),
        ("logit_bias", dict.fromkeys(map(str, range(200_000)), "x")),
    ):
        error = refused(server.client.post(CHAT, json={"messages": USER, name: value}))
        assert error["param"] == name
        assert len(error["message"]) < 200
    assert refused(server.client.post("/detokenize", json={"tokens": ["x"] * 500_000}))["param"] == "tokens"
    server.still_serves()


def test_a_megabyte_of_text_is_too_long_and_says_both_numbers(server: Live) -> None:
    text = "weather " * 130_000
    error = refused(server.client.post(CHAT, json={"messages": [{"role": "user", "content": text}]}))
    assert error["code"] == "context_length_exceeded"
    assert "2048" in error["message"]
    server.still_serves()


def test_an_unknown_model(server: Live) -> None:
    error = refused(server.client.post(CHAT, json={"messages": USER, "model": "gpt-4"}), 404)
    assert (error["param"], error["code"]) == ("model", "model_not_found")
    assert "tern-test" in error["message"]
    refused(server.client.get("/v1/models/gpt-4"), 404)
    for path, (_, body) in REQUESTS.items():
        if not path.startswith("/v1/messages"):  # whose errors have another envelope
            refused(server.client.post(path, json={**body, "model": "gpt-4"}), 404)
    server.still_serves()


@pytest.mark.parametrize("name", ["default", "null", None])
def test_names_for_whichever_model_is_served(server: Live, name: str | None) -> None:
    answer = server.client.post(CHAT, json={"messages": USER, "model": name, "max_tokens": 1})
    assert answer.status_code == 200
    assert answer.json()["model"] == "tern-test"


def test_unknown_paths_and_methods(server: Live) -> None:
    assert refused(server.client.get("/v1/nothing"), 404)["code"] == "not_found"
    assert refused(server.client.get(CHAT), 405)["code"] == "method_not_allowed"
    assert refused(server.client.delete("/v1/models"), 405)["code"] == "method_not_allowed"


def test_a_full_queue(server: Live) -> None:
    server.engine.gate.clear()
    server.engine.queue_limit = 2
    response = server.client.post(CHAT, json={"messages": USER, "n": 3})
    assert refused(response, 429)["code"] == "queue_full"
    assert response.headers["retry-after"] == "2"
    assert server.engine.num_open == 0, "the choices before the one that was refused are taken back"
    server.engine.gate.set()
    server.still_serves()


@pytest.mark.parametrize("state", ["starting", "draining", "failed", "stopped"])
def test_an_engine_that_takes_no_work(server: Live, state: str) -> None:
    server.engine.state = state
    try:
        for path, body in ((CHAT, {"messages": USER}), ("/v1/completions", {"prompt": "x"})):
            response = server.client.post(path, json=body)
            assert refused(response, 503)["code"] == "unavailable"
            assert int(response.headers["retry-after"]) > 0
    finally:
        server.engine.state = "ready"
    server.still_serves()


def test_a_bug_of_ours_hides_its_details(server: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ValueError("a secret path")

    monkeypatch.setattr(server.state.protocol, "prompt", broken)
    error = refused(server.client.post(CHAT, json={"messages": USER}), 500)
    assert "secret" not in json.dumps(error)
    monkeypatch.undo()
    server.still_serves()


@pytest.fixture
def small(protocol: ChatProtocol) -> Any:
    with serve(ScriptedEngine(protocol), protocol, max_body_bytes=1000) as live:
        yield live


@pytest.mark.parametrize("size", [1001, 1500, 100_000, 20_000_000])
@pytest.mark.parametrize("announced", [True, False])
def test_a_body_too_large(small: Live, size: int, announced: bool) -> None:
    body = b"x" * size
    pieces = [body[start : start + 65536] for start in range(0, size, 65536)]
    response = small.client.post(CHAT, content=body if announced else iter(pieces))
    error = refused(response, 413)
    assert error["code"] == "request_too_large"
    assert "1000" in error["message"]
    small.still_serves()


def test_an_absurd_content_length(small: Live) -> None:
    host, port = small.url.removeprefix("http://").split(":")
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999999999999\r\n\r\n"
    with socket.create_connection((host, int(port)), timeout=10) as raw:
        raw.sendall(head.encode())
        assert b" 413 " in raw.recv(4096)
    small.still_serves()
