"""POST /v1/messages and count_tokens over a scripted engine: blocks, events, fields, and Anthropic's errors."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from server_fakes import GREETING, USER, WEATHER_CALL, WEATHER_TOOL, Live, ScriptedEngine, serve

from tern.chat import ChatProtocol

PATH = "/v1/messages"
COUNT = "/v1/messages/count_tokens"
FUNCTION = WEATHER_TOOL["function"]
TOOL = {"name": "get_weather", "description": FUNCTION["description"], "input_schema": FUNCTION["parameters"]}
SHOWN = {"thinking": {"type": "adaptive"}}
BLOCK = WEATHER_CALL.split("</think>\n\n")[1]
TWO_CALLS = WEATHER_CALL + BLOCK.replace("Beijing", "Paris")
EVERYTHING = "First.\n</think>\n\n<response>\nLook.\n</response>\n" + BLOCK
TEXT = "Hello, 你好!\n\nHow are you?"


def ask(server: Live, **fields: Any) -> dict[str, Any]:
    """The message that answers an ordinary request."""
    answer = server.client.post(PATH, json={"messages": USER, "max_tokens": 300, **fields})
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def stream(server: Live, **fields: Any) -> list[dict[str, Any]]:
    """Every event of a streamed message; checks that each is named by its type."""
    answer = server.client.post(PATH, json={"messages": USER, "max_tokens": 300, "stream": True, **fields})
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = []
    for block in answer.text.split("\n\n")[:-1]:
        name, data = block.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    return events


def rebuild(events: list[dict[str, Any]]) -> dict[str, Any]:
    """The message that the events add up to, their order checked."""
    first, *blocks, end, stop = events
    assert [first["type"], end["type"], stop["type"]] == ["message_start", "message_delta", "message_stop"]
    message: dict[str, Any] = first["message"]
    assert (message["content"], message["stop_reason"]) == ([], None)
    pieces: list[str] = []
    is_open = False
    for event in blocks:
        if event["type"] == "content_block_start":
            assert (is_open, event["index"]) == (False, len(message["content"]))
            message["content"].append(event["content_block"])
            is_open, pieces = True, []
            continue
        block = message["content"][event["index"]]
        assert is_open
        assert event["index"] == len(message["content"]) - 1
        if event["type"] == "content_block_stop":
            is_open = False
            if block["type"] == "tool_use" and pieces:
                block["input"] = json.loads("".join(pieces))
            continue
        match event["delta"]:
            case {"type": "text_delta", "text": text}:
                block["text"] += text
            case {"type": "thinking_delta", "thinking": text}:
                block["thinking"] += text
            case {"type": "signature_delta", "signature": text}:
                block["signature"] += text
            case {"type": "input_json_delta", "partial_json": text}:
                pieces.append(text)
            case other:
                raise AssertionError(other)
    assert not is_open
    message["usage"] = {**message["usage"], **end["usage"]}
    return {**message, **end["delta"]}


def without_ids(message: dict[str, Any]) -> dict[str, Any]:
    blocks = [{key: value for key, value in block.items() if key != "id"} for block in message["content"]]
    return {**message, "id": None, "content": blocks}


def prompt(server: Live, request: int = -1) -> str:
    """What the engine was given to read."""
    ids = server.engine.seen[request].prompt_token_ids
    return server.state.protocol.tokenizer.decode(ids, skip_special_tokens=False)


def refused(answer: httpx.Response, status: int = 400, kind: str = "invalid_request_error") -> str:
    """The message of an error, its envelope checked."""
    assert answer.status_code == status, answer.text
    body = answer.json()
    assert set(body) == {"type", "error"}
    assert set(body["error"]) == {"type", "message"}
    assert (body["type"], body["error"]["type"]) == ("error", kind)
    message: str = body["error"]["message"]
    return message


def test_a_whole_message(server: Live) -> None:
    message = ask(server, model="tern-test", **SHOWN)
    assert message["id"].startswith("msg_")
    assert (message["type"], message["role"], message["model"]) == ("message", "assistant", "tern-test")
    thought, text = message["content"]
    assert (thought["type"], thought["thinking"]) == ("thinking", "They greet me.")
    assert thought["signature"]
    assert text == {"type": "text", "text": TEXT}
    assert (message["stop_reason"], message["stop_sequence"]) == ("end_turn", None)


def test_the_usage_of_a_message(server: Live) -> None:
    usage = ask(server)["usage"]
    assert usage["cache_read_input_tokens"] == 4
    assert usage["input_tokens"] + 4 == len(server.engine.seen[0].prompt_token_ids)
    assert usage["cache_creation_input_tokens"] == 0
    assert usage["output_tokens"] == len(server.state.protocol.tokenizer.encode(GREETING)) + 1
    assert 0 < usage["output_tokens_details"]["thinking_tokens"] < usage["output_tokens"]


@pytest.mark.parametrize(
    ("thinking", "blocks", "limit"),
    [
        (None, ["text"], 150),
        ({"type": "enabled", "budget_tokens": 200}, ["They greet me.", "text"], 200),
        ({"type": "adaptive"}, ["They greet me.", "text"], None),
        ({"type": "adaptive", "display": "summarized"}, ["They greet me.", "text"], None),
        ({"type": "adaptive", "display": "omitted"}, ["", "text"], None),
        ({"type": "enabled", "budget_tokens": 200, "display": "omitted"}, ["", "text"], 200),
    ],
)
def test_who_asks_for_a_thought_is_shown_one(
    server: Live, thinking: dict[str, Any] | None, blocks: list[str], limit: int | None
) -> None:
    whole = ask(server, thinking=thinking)
    assert [block.get("thinking", block["type"]) for block in whole["content"]] == blocks
    assert rebuild(stream(server, thinking=thinking))["content"] == whole["content"]
    assert {request.params.reasoning_max_tokens for request in server.engine.seen} == {limit}
    assert prompt(server).endswith("<think>\n")


@pytest.mark.parametrize("kind", ["disabled", "between_tools"])
def test_a_message_without_thinking(server: Live, kind: str) -> None:
    server.engine.answers.append("Hi\n</response>\n")
    message = ask(server, thinking={"type": kind}, output_config={"effort": "high"})
    assert message["content"] == [{"type": "text", "text": "Hi"}]
    assert prompt(server).endswith("<think>\n\n</think>\n\n<response>\n")


@pytest.mark.parametrize(
    ("effort", "limit"), [("low", 1024), ("medium", 8192), ("high", None), ("xhigh", None), ("max", None)]
)
def test_efforts_of_a_message(server: Live, effort: str, limit: int | None) -> None:
    ask(server, output_config={"effort": effort}, **SHOWN)
    assert server.engine.seen[0].params.reasoning_max_tokens == limit


def test_tool_use_blocks(server: Live) -> None:
    server.engine.answers.append(TWO_CALLS)
    message = ask(server, tools=[TOOL], **SHOWN)
    thought, first, second = message["content"]
    assert thought["thinking"] == "I should look it up."
    assert (first["type"], first["name"]) == ("tool_use", "get_weather")
    assert first["input"] == {"location": "Beijing", "unit": "c"}
    assert second["input"]["location"] == "Paris"
    assert first["id"] != second["id"]
    assert message["stop_reason"] == "tool_use"


@pytest.mark.parametrize(
    ("answer", "fields"),
    [
        (GREETING, {}),
        (GREETING, SHOWN),
        (GREETING, {"stop_sequences": ["are"], **SHOWN}),
        (GREETING, {"max_tokens": 7, **SHOWN}),
        (GREETING, {"max_tokens": 40}),
        (WEATHER_CALL, {"tools": [TOOL]}),
        (TWO_CALLS, {"tools": [TOOL], **SHOWN}),
        (TWO_CALLS, {"tools": [TOOL], "tool_choice": {"type": "auto", "disable_parallel_tool_use": True}}),
        (EVERYTHING, {"tools": [TOOL], **SHOWN}),
        (TWO_CALLS, {}),
        ("a\n</think>\n\n<response>\nb\n</response>\n<think>\nc\n</think>\n<response>\nd\n</response>\n", {}),
        ("a\n</think>\n\n<response>\nb\n</response>\n<think>\nc\n</think>\n<response>\nd\n</response>\n", SHOWN),
        ("</think>", SHOWN),
        ("", {}),
    ],
)
def test_the_events_add_up_to_the_whole_message(server: Live, answer: str, fields: dict[str, Any]) -> None:
    server.engine.answers.extend([answer, answer])
    whole, streamed = ask(server, **fields), rebuild(stream(server, **fields))
    assert without_ids(streamed) == without_ids(whole)
    assert whole["stop_reason"] in ("end_turn", "max_tokens", "stop_sequence", "tool_use")


def test_why_a_message_ended(server: Live) -> None:
    assert ask(server, max_tokens=40)["stop_reason"] == "max_tokens"
    stopped = ask(server, stop_sequences=["are"])
    assert (stopped["stop_reason"], stopped["stop_sequence"]) == ("stop_sequence", "are")
    assert stopped["content"][0]["text"].endswith("How ")
    for _ in range(2):
        server.engine.answers.append(WEATHER_CALL)
    stopped = ask(server, tools=[TOOL], stop_sequences=["Beijing"])
    assert (stopped["stop_reason"], stopped["stop_sequence"]) == ("stop_sequence", "Beijing")
    cut = len(server.state.protocol.tokenizer.encode(WEATHER_CALL.split('"unit"')[0]))
    stopped = ask(server, tools=[TOOL], max_tokens=cut, **SHOWN)
    assert stopped["stop_reason"] == "max_tokens"
    assert stopped["content"][1]["input"] == {"location": "Beijing"}


def test_single_tool_use(server: Live) -> None:
    server.engine.answers.append(TWO_CALLS)
    message = ask(server, tools=[TOOL], tool_choice={"type": "auto", "disable_parallel_tool_use": True})
    assert [block["type"] for block in message["content"]] == ["tool_use"]
    assert message["stop_reason"] == "tool_use"


def test_tool_choice_none_of_a_message(server: Live) -> None:
    ask(server, tools=[TOOL], tool_choice={"type": "none"})
    assert "get_weather" not in prompt(server)


def test_tools_of_the_provider_are_not_shown(server: Live) -> None:
    others = [
        {"type": "web_search_20250305", "name": "web_search", "max_uses": 5},
        {"type": "bash_20250124", "name": "bash"},
        {**TOOL, "type": "custom", "cache_control": {"type": "ephemeral"}, "strict": True, "defer_loading": False},
    ]
    ask(server, tools=others)
    server.chat(tools=[WEATHER_TOOL])
    assert server.engine.seen[0].prompt_token_ids == server.engine.seen[1].prompt_token_ids


def test_system_and_content_as_text_or_blocks(server: Live) -> None:
    cached = {"cache_control": {"type": "ephemeral"}}
    system = [{"type": "text", "text": "Be brief."}, {"type": "text", "text": "Be kind.", **cached}]
    parts = [{"type": "text", "text": "How is "}, {"type": "text", "text": "the weather?", **cached}]
    ask(server, system=system, messages=[{"role": "user", "content": parts}])
    ask(server, system="Be brief.\n\nBe kind.")
    late = [*USER, {"role": "system", "content": "Be quick."}, *USER]
    ask(server, messages=late)
    assert "<system_setting>\nBe brief.\n\nBe kind.\n</system_setting>" in prompt(server, 0)
    assert server.engine.seen[0].prompt_token_ids == server.engine.seen[1].prompt_token_ids
    assert "Be quick." in prompt(server)


def test_a_history_of_blocks_is_rendered_as_the_chat_s(server: Live) -> None:
    arguments = {"location": "Beijing", "unit": "c"}
    use = {"type": "tool_use", "id": "t1", "name": "get_weather", "input": arguments}
    result = {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "26 degrees"}]}
    blocks = [
        {"type": "thinking", "thinking": "Look it up.", "signature": "of another model"},
        {"type": "redacted_thinking", "data": "gAAAA"},
        {"type": "server_tool_use", "id": "s1", "name": "web_search", "input": {}},
        {"type": "web_search_tool_result", "tool_use_id": "s1", "content": []},
        {"type": "text", "text": "One moment."},
        use,
    ]
    history = [
        *USER,
        {"role": "assistant", "content": blocks},
        {"role": "user", "content": [result, {"type": "text", "text": "And?"}]},
    ]
    ask(server, messages=history, tools=[{**TOOL, "strict": True}])
    call = {"id": "t1", "type": "function", "function": {"name": "get_weather", "arguments": arguments}}
    messages = [
        *USER,
        {"role": "assistant", "content": "One moment.", "reasoning_content": "Look it up.", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "t1", "content": "26 degrees"},
        {"role": "user", "content": "And?"},
    ]
    server.chat(messages=messages, tools=[WEATHER_TOOL])
    assert server.engine.seen[0].prompt_token_ids == server.engine.seen[1].prompt_token_ids


def test_a_tool_s_failure_is_told(server: Live) -> None:
    uses = [{"type": "tool_use", "id": name, "name": "f", "input": {}} for name in ("a", "b", "c")]
    results = [
        {"type": "tool_result", "tool_use_id": "b", "content": "no such place", "is_error": True},
        {"type": "tool_result", "tool_use_id": "a", "content": "fine", "is_error": False},
        {"type": "tool_result", "tool_use_id": "c"},
    ]
    history = [*USER, {"role": "assistant", "content": uses}, {"role": "user", "content": results}]
    ask(server, messages=history)
    assert "<tool_response>\nError: no such place\n</tool_response>" in prompt(server)
    assert "<tool_response>\nfine\n</tool_response>" in prompt(server)
    assert "<tool_response>\n\n</tool_response>" in prompt(server)


def test_sampling_fields_of_a_message_reach_the_engine(server: Live) -> None:
    ask(server, max_tokens=50, temperature=0.5, top_p=0.9, top_k=7, stop_sequences=["x", "y"])
    params = server.engine.seen[0].params
    assert (params.max_tokens, params.temperature, params.top_p, params.top_k) == (50, 0.5, 0.9, 7)
    assert params.stop == ("x", "y")


def test_what_a_message_ignores(server: Live) -> None:
    ignored = {
        "metadata": {"user_id": "u"},
        "service_tier": "auto",
        "cache_control": {"type": "ephemeral"},
        "context_management": {"edits": []},
        "inference_geo": "eu",
        "speed": "standard",
        "diagnostics": {},
        "user_profile_id": "p",
        "workspace_id": "w",
        "mcp_servers": [],
        "container": None,
    }
    headers = {"anthropic-version": "2023-06-01", "anthropic-beta": "context-1m-2025-08-07,something-new"}
    body = {"messages": USER, "max_tokens": 300, **ignored}
    answer = server.client.post(f"{PATH}?beta=true", json=body, headers=headers)
    assert answer.status_code == 200, answer.text
    assert answer.json()["content"][0]["text"] == TEXT
    counted = server.client.post(COUNT, json={"messages": USER, **ignored}, headers=headers)
    assert counted.status_code == 200, counted.text


BILLING = "x-anthropic-billing-header: cc_version=2.1.37.0d9; cc_entrypoint=cli; cch={};"


def systems(nonce: str) -> list[Any]:
    """Claude Code's system prompt in the forms in which it comes."""
    line = BILLING.format(nonce)
    return [
        [{"type": "text", "text": line}, {"type": "text", "text": "Be brief."}],
        [{"type": "text", "text": f"{line}\nBe brief."}],
        f"{line}\n\nBe brief.",
        "Be brief.",
    ]


def test_a_billing_line_that_changes_leaves_the_prompt_the_same(server: Live) -> None:
    for system in [*systems("fa690"), *systems("0aaa9")]:
        ask(server, system=system)
    assert len({request.prompt_token_ids for request in server.engine.seen}) == 1
    quoted = f"Be brief.\n{BILLING.format('fa690')}"
    ask(server, system=quoted, messages=[{"role": "user", "content": BILLING.format("0aaa9")}])
    assert "cch=fa690" in prompt(server)
    assert "cch=0aaa9" in prompt(server)


def test_volatile_lines_can_be_kept(protocol: ChatProtocol) -> None:
    with serve(ScriptedEngine(protocol), protocol, drop_volatile_lines=False) as live:
        ask(live, system=systems("fa690")[0])
        assert f"{BILLING.format('fa690')}\n\nBe brief." in prompt(live)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"system": systems("fa690")[0], "tools": [TOOL]},
        {"thinking": {"type": "disabled"}},
        {"thinking": {"type": "enabled", "budget_tokens": 100}},
        {"tools": [TOOL], "tool_choice": {"type": "none"}},
        {"output_config": {"effort": "low"}},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "你好" * 5000}]}]},
    ],
)
def test_counted_are_the_tokens_that_the_engine_would_read(server: Live, fields: dict[str, Any]) -> None:
    answer = server.client.post(COUNT, json={"messages": USER, "model": "tern-test", **fields})
    assert answer.status_code == 200, answer.text
    count = answer.json()
    assert set(count) == {"input_tokens"}
    made = server.client.post(PATH, json={"messages": USER, "max_tokens": 300, **fields})
    if made.status_code == 200:
        assert count["input_tokens"] == len(server.engine.seen[0].prompt_token_ids)
    else:
        assert refused(made) == f"prompt is too long: {count['input_tokens']} tokens > 2047 maximum"
    server.still_serves()


def test_more_than_fits_is_said_in_anthropic_s_words(server: Live) -> None:
    count = server.client.post(COUNT, json={"messages": USER}).json()["input_tokens"]
    for streamed in (False, True):
        body = {"messages": USER, "max_tokens": 2000, "stream": streamed}
        message = refused(server.client.post(PATH, json=body))
        assert message.startswith(f"input length and `max_tokens` exceed context limit: {count} + 2000 > 2048, ")


IMAGE = {"type": "image", "source": {"type": "url", "url": "http://x"}}
BAD_SCHEMA = {"name": "f", "input_schema": {"type": "banana"}}


def one(block: Any, role: str = "user") -> list[Any]:
    return [{"role": role, "content": [block]}, {"role": "user", "content": "x"}]


@pytest.mark.parametrize(
    ("fields", "place"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -5}, "max_tokens"),
        ({"messages": None}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": ["x"]}, "messages[0]"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": one("x")}, "messages[0].content[0]"),
        ({"messages": one(IMAGE)}, "messages[0].content[0].type"),
        ({"messages": one({"type": "document", "source": {}})}, "messages[0].content[0].type"),
        ({"messages": one({"type": "text", "text": 5})}, "messages[0].content[0].text"),
        ({"messages": one(IMAGE, "assistant")}, "messages[0].content[0].type"),
        ({"messages": one({"type": "thinking", "thinking": 5}, "assistant")}, "messages[0].content[0].thinking"),
        ({"messages": one({"type": "tool_use", "name": "f", "input": {}}, "assistant")}, "messages[0].content[0].id"),
        ({"messages": one({"type": "tool_use", "id": "a", "input": {}}, "assistant")}, "messages[0].content[0].name"),
        ({"messages": one({"type": "tool_result", "tool_use_id": "a"})}, "messages[0].content[0].tool_use_id"),
        (
            {"messages": one({"type": "tool_result", "tool_use_id": "a", "content": [IMAGE]})},
            "messages[0].content[0].content[0].type",
        ),
        ({"messages": [*USER, {"role": "assistant", "content": "It is"}]}, "messages[1]"),
        ({"system": 5}, "system"),
        ({"system": [IMAGE]}, "system[0].type"),
        (
            {"system": "Hi.", "messages": one({"type": "tool_result", "content": "x"})},
            "messages[0].content[0].tool_use",
        ),
        ({"tools": ["x"]}, "tools[0]"),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}, {"name": "a b"}]}, "tools[1].name"),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}, BAD_SCHEMA]}, "tools[1].input_schema.type"),
        ({"tool_choice": {"type": "tool", "name": "bash"}}, "tool_choice"),
        ({"tool_choice": {"type": "sometimes"}}, "tool_choice.type"),
        ({"tool_choice": {"type": {}}}, "tool_choice.type"),
        ({"tool_choice": {"type": "auto", "disable_parallel_tool_use": 1.5}}, "tool_choice.disable_parallel_tool_use"),
        ({"tool_choice": {"type": "auto", "disable_parallel_tool_use": 0}}, "tool_choice.disable_parallel_tool_use"),
        ({"tool_choice": "auto"}, "tool_choice"),
        ({"thinking": {"type": "sometimes"}}, "thinking.type"),
        ({"thinking": {"type": "enabled"}}, "thinking.type"),
        ({"thinking": {"type": "adaptive", "budget_tokens": 5}}, "thinking.type"),
        ({"thinking": {"type": "adaptive", "display": "some"}}, "thinking.display"),
        ({"thinking": {"type": "enabled", "budget_tokens": 300}}, "thinking.budget_tokens"),
        ({"thinking": {"type": "enabled", "budget_tokens": -1}}, "thinking.budget_tokens"),
        ({"output_config": {"effort": "extreme"}}, "output_config.effort"),
        ({"output_config": {"format": {"type": "xml"}}}, "output_config.format.type"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 2}, "top_p"),
        ({"top_k": -5}, "top_k"),
        ({"stop_sequences": [""]}, "stop_sequences"),
        ({"stop_sequences": "x"}, "stop_sequences"),
        ({"stream": "yes"}, "stream"),
        ({"container": "c"}, "container"),
        ({"mcp_servers": [{"url": "http://x"}]}, "mcp_servers"),
        ({"seed": 5}, "seed"),
        ({"temprature": 0.5}, "temprature"),
    ],
)
def test_a_wrong_value_of_a_message_is_named(server: Live, fields: dict[str, Any], place: str) -> None:
    message = refused(server.client.post(PATH, json={"messages": USER, "max_tokens": 300, **fields}))
    assert message.startswith(place)
    assert server.engine.seen == []
    server.still_serves()


@pytest.mark.parametrize(
    ("fields", "place"),
    [
        ({"thinking": {"type": "adaptive", "display": "some"}}, "thinking.display"),
        ({"output_config": {"effort": "extreme"}}, "output_config.effort"),
        ({"output_config": {"format": {"type": "xml"}}}, "output_config.format.type"),
        ({"container": "c"}, "container"),
        ({"mcp_servers": [{"url": "http://x"}]}, "mcp_servers"),
        ({"model": "claude"}, "There is no model 'claude'"),
        ({"max_tokens": 5}, "max_tokens"),
    ],
)
def test_what_a_count_refuses(server: Live, fields: dict[str, Any], place: str) -> None:
    answer = server.client.post(COUNT, json={"messages": USER, **fields})
    assert answer.status_code == (404 if "model" in fields else 400)
    assert answer.json()["error"]["message"].startswith(place)


def test_every_error_of_a_message_comes_in_the_envelope(server: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    body = {"messages": USER, "max_tokens": 300}
    for path in (PATH, COUNT):
        unknown = {**(body if path == PATH else {"messages": USER}), "model": "claude"}
        assert "claude" in refused(server.client.post(path, json=unknown), 404, "not_found_error")
        refused(server.client.post(path, content=b"{"))
        refused(server.client.get(path), 405)
    refused(server.client.post(f"{PATH}/batches", json={}), 404, "not_found_error")
    server.engine.queue_limit = 0
    full = server.client.post(PATH, json=body)
    refused(full, 429, "rate_limit_error")
    assert full.headers["retry-after"] == "2"
    server.engine.queue_limit, server.engine.state = 64, "draining"
    refused(server.client.post(PATH, json=body), 503, "overloaded_error")
    server.engine.state = "ready"
    with monkeypatch.context() as patch:
        patch.setattr(server.state.protocol, "prompt", lambda *_, **__: 1 / 0)
        refused(server.client.post(PATH, json=body), 500, "api_error")
    server.still_serves()


def test_a_message_that_fails(server: Live) -> None:
    server.engine.fail_with = "The engine failed while computing this request."
    assert refused(server.client.post(PATH, json={"messages": USER, "max_tokens": 9}), 500, "api_error")
    events = stream(server)
    assert events[-1] == {"type": "error", "error": {"type": "api_error", "message": server.engine.fail_with}}
    assert all(event["type"] != "message_stop" for event in events)
    server.engine.fail_with = None
    server.still_serves()


@pytest.fixture(scope="module")
def locked(protocol: ChatProtocol) -> Iterator[Live]:
    with serve(ScriptedEngine(protocol), protocol, api_keys=("first", "second"), max_body_bytes=1000) as live:
        yield live


@pytest.mark.parametrize(
    "headers",
    [
        {"x-api-key": "first"},
        {"x-api-key": "second"},
        {"Authorization": "Bearer first"},
        {"Authorization": "Bearer wrong", "x-api-key": "first"},
        {"Authorization": "Bearer first", "x-api-key": "wrong"},
    ],
)
def test_either_header_carries_the_key(locked: Live, headers: dict[str, str]) -> None:
    for path in (PATH, COUNT, "/v1/responses"):
        body = {"input": "x"} if "responses" in path else {"messages": USER}
        body |= {"max_tokens": 9} if path == PATH else {}
        assert locked.client.post(path, json=body, headers=headers).status_code == 200
    assert locked.client.get("/v1/models", headers=headers).status_code == 200


@pytest.mark.parametrize("headers", [{}, {"x-api-key": ""}, {"x-api-key": "firs"}, {"x-api-key": b"\xff"}])
def test_without_a_key_there_is_no_message(locked: Live, headers: dict[str, Any]) -> None:
    for path in (PATH, COUNT):
        message = refused(locked.client.post(path, json={}, headers=headers), 401, "authentication_error")
        assert "key" in message


def test_a_message_too_large(locked: Live) -> None:
    answer = locked.client.post(PATH, content=b"x" * 1500, headers={"x-api-key": "first"})
    assert "1000" in refused(answer, 413, "request_too_large")


def test_x_api_key_owners_are_kept_apart(locked: Live) -> None:
    locked.engine.seen.clear()
    for key in ("first", "second", "first"):
        ask_headers = {"x-api-key": key}
        assert locked.client.post(PATH, json={"messages": USER, "max_tokens": 9}, headers=ask_headers).is_success
    salts = [request.cache_salt for request in locked.engine.seen]
    assert salts[0] == salts[2] != salts[1]
