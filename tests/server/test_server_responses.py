"""POST /v1/responses over a scripted engine: items, events, fields, and what is refused by name."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from server_fakes import GREETING, WEATHER_CALL, WEATHER_TOOL, Live

PATH = "/v1/responses"
TOOL = {"type": "function", **WEATHER_TOOL["function"]}
TWO_CALLS = WEATHER_CALL + WEATHER_CALL.split("</think>\n\n")[1].replace("Beijing", "Paris")
EVERYTHING = "First.\n</think>\n\n<response>\nLook.\n</response>\n" + WEATHER_CALL.split("</think>\n\n")[1]


def respond(server: Live, **fields: Any) -> dict[str, Any]:
    """The response to an ordinary request."""
    answer = server.client.post(PATH, json={"input": "How is the weather?", **fields})
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def events_of(text: str) -> list[dict[str, Any]]:
    """The events of a stream; checks that each is named by its type and numbered from 0."""
    blocks = [block for block in text.split("\n\n") if block and not block.startswith(":")]
    events = []
    for block in blocks:
        name, data = block.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    return events


def stream(server: Live, **fields: Any) -> list[dict[str, Any]]:
    """Every event of a streamed response."""
    answer = server.client.post(PATH, json={"input": "How is the weather?", "stream": True, **fields})
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    return events_of(answer.text)


def rebuild(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The items that the events before the last one add up to, every step of each item checked."""
    items: list[dict[str, Any]] = []
    grown: list[str] = []
    done: list[bool] = []
    for event in events[2:-1]:
        kind, index = event["type"].removeprefix("response."), event["output_index"]
        if kind == "output_item.added":
            assert index == len(items), "items are numbered in order"
            assert done == [True] * index, "one item ends before the next begins"
            assert event["item"]["status"] == "in_progress"
            items.append(event["item"])
            grown.append("")
            done.append(False)
            continue
        assert event.get("item_id", items[index]["id"]) == items[index]["id"]
        if kind == "content_part.added":
            assert event["part"]["text"] == ""
        elif kind.endswith(".delta"):
            assert event["delta"]
            grown[index] += event["delta"]
        elif kind == "content_part.done":
            assert event["part"]["text"] == grown[index]
        elif kind == "output_item.done":
            assert event["item"]["id"] == items[index]["id"]
            items[index], done[index] = event["item"], True
        else:
            assert event["text" if "text" in event else "arguments"] == grown[index]
    assert all(done)
    return items


def without_ids(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in item.items() if key not in ("id", "call_id")} for item in items]


def prompt(server: Live, request: int = -1) -> str:
    """What the engine was given to read."""
    ids = server.engine.seen[request].prompt_token_ids
    return server.state.protocol.tokenizer.decode(ids, skip_special_tokens=False)


def refused(answer: httpx.Response, status: int = 400) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    error: dict[str, Any] = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


def test_a_whole_response(server: Live) -> None:
    response = respond(server, model="tern-test")
    assert response["object"] == "response"
    assert response["id"].startswith("resp_")
    assert (response["status"], response["model"], response["error"]) == ("completed", "tern-test", None)
    assert response["completed_at"] >= response["created_at"]
    thought, message = response["output"]
    assert (thought["type"], thought["summary"], thought["status"]) == ("reasoning", [], "completed")
    assert thought["content"] == [{"type": "reasoning_text", "text": "They greet me."}]
    assert (message["type"], message["role"], message["status"]) == ("message", "assistant", "completed")
    text = "Hello, 你好!\n\nHow are you?"
    assert message["content"] == [{"type": "output_text", "text": text, "annotations": [], "logprobs": []}]
    assert (thought["id"][:3], message["id"][:4]) == ("rs_", "msg_")


def test_the_usage_of_a_response(server: Live) -> None:
    usage = respond(server)["usage"]
    read, written = len(server.engine.seen[0].prompt_token_ids), len(server.state.protocol.tokenizer.encode(GREETING))
    assert (usage["input_tokens"], usage["output_tokens"]) == (read, written + 1)
    assert usage["total_tokens"] == read + written + 1
    assert usage["input_tokens_details"]["cached_tokens"] == 4
    assert 0 < usage["output_tokens_details"]["reasoning_tokens"] < written


def test_a_function_call_item(server: Live) -> None:
    server.engine.answers.append(WEATHER_CALL)
    thought, call = respond(server, tools=[TOOL])["output"]
    assert thought["content"][0]["text"] == "I should look it up."
    assert (call["type"], call["name"], call["status"]) == ("function_call", "get_weather", "completed")
    assert json.loads(call["arguments"]) == {"location": "Beijing", "unit": "c"}
    assert call["call_id"]
    assert call["id"] != call["call_id"]


@pytest.mark.parametrize(
    ("answer", "fields"),
    [
        (GREETING, {}),
        (GREETING, {"include": ["message.output_text.logprobs"], "top_logprobs": 2}),
        (GREETING, {"stop": ["are"]}),
        (GREETING, {"max_output_tokens": 7}),
        (GREETING, {"max_output_tokens": 40}),
        (WEATHER_CALL, {"tools": [TOOL]}),
        (WEATHER_CALL, {"tools": [TOOL], "max_output_tokens": 90}),
        (TWO_CALLS, {"tools": [TOOL], "top_logprobs": 1}),
        (TWO_CALLS, {"tools": [TOOL], "parallel_tool_calls": False}),
        (EVERYTHING, {"tools": [TOOL], "include": ["message.output_text.logprobs"]}),
        (TWO_CALLS, {}),
        ("a\n</think>\n\n<response>\nb\n</response>\n<think>\nc\n</think>\n<response>\nd\n</response>\n", {}),
        ("</think>", {}),
        ("", {}),
    ],
)
def test_the_events_add_up_to_the_whole_response(server: Live, answer: str, fields: dict[str, Any]) -> None:
    server.engine.answers.extend([answer, answer])
    whole, events = respond(server, **fields), stream(server, **fields)
    first, second, last = events[0], events[1], events[-1]
    assert [first["type"], second["type"]] == ["response.created", "response.in_progress"]
    assert last["type"] == f"response.{whole['status']}"
    assert rebuild(events) == last["response"]["output"]
    assert without_ids(last["response"]["output"]) == without_ids(whole["output"])
    volatile = dict.fromkeys(("id", "output", "created_at", "completed_at"))
    assert {**last["response"], **volatile} == {**whole, **volatile}
    assert {event["response"]["id"] for event in (first, second, last)} == {first["response"]["id"]}


def test_parts_come_in_the_order_in_which_they_were_written(server: Live) -> None:
    server.engine.answers.append(EVERYTHING)
    assert [item["type"] for item in respond(server, tools=[TOOL])["output"]] == [
        "reasoning",
        "message",
        "function_call",
    ]


def test_a_response_that_was_cut_off_is_incomplete(server: Live) -> None:
    cut = len(server.state.protocol.tokenizer.encode(WEATHER_CALL.split(', "unit"')[0]))
    server.engine.answers.append(WEATHER_CALL)
    response = respond(server, tools=[TOOL], max_output_tokens=cut)
    assert (response["status"], response["completed_at"]) == ("incomplete", None)
    assert response["incomplete_details"] == {"reason": "max_output_tokens"}
    assert [item["status"] for item in response["output"]] == ["completed", "incomplete"]
    assert response["output"][1]["arguments"].startswith('{"location": "Beijing"')
    assert not response["output"][1]["arguments"].endswith("}")
    assert server.engine.seen[0].params.max_tokens == cut


def test_log_probabilities_are_those_of_the_text_alone(server: Live) -> None:
    for fields in ({"include": ["message.output_text.logprobs"], "top_logprobs": 2}, {"top_logprobs": 2}):
        server.engine.answers.append(EVERYTHING.replace("Look.", "Schau: 好!"))
        message = respond(server, tools=[TOOL], **fields)["output"][1]
        (part,) = message["content"]
        spelt = b"".join(bytes(entry["bytes"]) for entry in part["logprobs"]).decode()
        assert part["text"] == spelt == "Schau: 好!"
        assert all(len(entry["top_logprobs"]) == 2 for entry in part["logprobs"])
    server.engine.answers.append(GREETING)
    entries = respond(server, include=["message.output_text.logprobs"])["output"][1]["content"][0]["logprobs"]
    assert entries
    assert all(entry["top_logprobs"] == [] for entry in entries)
    deltas = [event for event in stream(server, top_logprobs=0) if event["type"] == "response.output_text.delta"]
    streamed = b"".join(bytes(entry["bytes"]) for event in deltas for entry in event["logprobs"])
    assert streamed.decode() == "Hello, 你好!\n\nHow are you?"


def test_instructions_roles_and_parts_reach_the_model(server: Live) -> None:
    items = [
        {"role": "developer", "content": "Answer in one line."},
        {"type": "message", "role": "system", "content": [{"type": "input_text", "text": "Be polite."}]},
        {"role": "user", "content": [{"type": "input_text", "text": "One, "}, {"type": "input_text", "text": "two."}]},
        {"role": "assistant", "content": [{"type": "output_text", "text": "Three."}]},
        {"role": "assistant", "content": "Four."},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "No five."}]},
        {"role": "user", "content": "And?"},
    ]
    respond(server, instructions="You count.", input=items)
    text = prompt(server)
    assert "You count.\n\nAnswer in one line.\n\nBe polite." in text
    assert "One, two." in text
    assert "<response>\nThree.\n\nFour.\n\nNo five.\n</response>" in text


def test_a_history_of_items_is_rendered_as_the_chat_s(server: Live) -> None:
    arguments = '{"location": "Beijing", "unit": "c"}'
    items: list[dict[str, Any]] = [
        {"role": "user", "content": "Weather?"},
        {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "Look it up."}]},
        {"type": "function_call", "call_id": "c1", "name": "get_weather", "arguments": arguments},
        {"type": "function_call_output", "call_id": "c1", "output": [{"type": "input_text", "text": "26 degrees"}]},
    ]
    respond(server, input=items, tools=[TOOL])
    call = {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": arguments}}
    messages = [
        items[0],
        {"role": "assistant", "reasoning_content": "Look it up.", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "26 degrees"},
    ]
    server.chat(messages=messages, tools=[WEATHER_TOOL])
    assert server.engine.seen[0].prompt_token_ids == server.engine.seen[1].prompt_token_ids


def test_items_go_back_as_they_came_and_without_ids_or_statuses(server: Live) -> None:
    server.engine.answers.append(EVERYTHING)
    question = {"role": "user", "content": "Weather?"}
    output = respond(server, input=[question], tools=[TOOL])["output"]
    result = {"type": "function_call_output", "call_id": output[2]["call_id"], "output": "26 degrees"}
    bare = [{key: value for key, value in item.items() if key not in ("id", "status")} for item in output]
    for history in (output, bare):
        respond(server, input=[question, *history, result], tools=[TOOL])
        text = prompt(server)
        assert "<think>\nFirst.\n</think>" in text
        assert "<response>\nLook.\n</response>" in text
        assert "<tool_response>\n26 degrees\n</tool_response>" in text


def test_items_of_other_providers(server: Live) -> None:
    items = [
        {"role": "user", "content": "Weather?"},
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": "In short."}], "encrypted_content": "x"},
        {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "gAAAA"},
        {"type": "web_search_call", "id": "ws_1", "status": "completed"},
        {"type": "custom_tool_call", "call_id": "c1", "name": "apply_patch", "input": "*** Begin Patch"},
        {"type": "custom_tool_call_output", "call_id": "c1", "output": "Done."},
    ]
    respond(server, input=items)
    text = prompt(server)
    assert "<think>\nIn short.\n</think>" in text
    assert '{"name": "apply_patch", "arguments": {"input": "*** Begin Patch"}}' in text
    assert "gAAAA" not in text


CODEX_TOOLS = [
    TOOL,
    {"type": "local_shell"},
    {"type": "web_search", "external_web_access": False},
    {"type": "custom", "name": "apply_patch", "format": {"type": "grammar", "syntax": "lark", "definition": "x"}},
    {"type": "mcp", "server_label": "docs", "server_url": "https://example.com"},
    {"type": "namespace", "name": "more", "tools": []},
]


def test_tools_that_are_no_functions_are_not_shown(server: Live) -> None:
    response = respond(server, tools=CODEX_TOOLS)
    assert response["tools"] == CODEX_TOOLS
    server.chat(messages=[{"role": "user", "content": "How is the weather?"}], tools=[WEATHER_TOOL])
    assert server.engine.seen[0].prompt_token_ids == server.engine.seen[1].prompt_token_ids


def test_the_choice_of_tools(server: Live) -> None:
    other = {**TOOL, "name": "other_tool"}
    respond(server, tools=[TOOL, other], tool_choice="none")
    assert "get_weather" not in prompt(server)
    allowed = {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "other_tool"}]}
    response = respond(server, tools=[TOOL, other], tool_choice=allowed)
    assert "get_weather" not in prompt(server)
    assert "other_tool" in prompt(server)
    assert response["tool_choice"] == allowed


def test_parallel_tool_calls_false_ends_at_the_second_call_item(server: Live) -> None:
    server.engine.answers.append(TWO_CALLS)
    response = respond(server, tools=[TOOL], parallel_tool_calls=False)
    assert [item["type"] for item in response["output"]] == ["reasoning", "function_call"]
    assert response["parallel_tool_calls"] is False


@pytest.mark.parametrize(
    ("effort", "limit"),
    [("minimal", 1024), ("low", 1024), ("medium", 8192), ("high", None), ("xhigh", None), ("max", None), (None, None)],
)
def test_efforts_of_a_response(server: Live, effort: str | None, limit: int | None) -> None:
    response = respond(server, reasoning={"effort": effort, "summary": "auto", "generate_summary": "auto"})
    assert server.engine.seen[0].params.reasoning_max_tokens == limit
    assert response["reasoning"] == {"effort": effort, "summary": None}
    assert response["output"][0]["summary"] == []


def test_effort_none_is_no_thought(server: Live) -> None:
    server.engine.answers.append("Hi\n</response>\n")
    (message,) = respond(server, reasoning={"effort": "none"})["output"]
    assert message["content"][0]["text"] == "Hi"
    assert prompt(server).endswith("<think>\n\n</think>\n\n<response>\n")


def test_options_of_a_stream_change_no_response(server: Live) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True, "include_obfuscation": True}
    plain, optional = stream(server), stream(server, stream_options=options)
    assert [set(event) for event in optional] == [set(event) for event in plain]
    assert optional[-1]["response"]["usage"] == plain[-1]["response"]["usage"]


def test_what_a_response_repeats_of_its_request_and_what_it_ignores(server: Live) -> None:
    ignored = {
        "user": "u",
        "store": True,
        "service_tier": "auto",
        "prompt_cache_key": "k",
        "prompt_cache_retention": "24h",
        "safety_identifier": "s",
        "client_metadata": {"a": "b"},
        "max_tool_calls": 3,
        "prompt_cache_options": {"mode": "explicit"},
        "include": ["reasoning.encrypted_content"],
        "truncation": "disabled",
        "background": False,
        "previous_response_id": None,
        "conversation": None,
        "stream_options": None,
        "text": {"format": {"type": "text"}, "verbosity": "medium"},
        "reasoning": {"context": "auto"},
    }
    repeated = {"temperature": 0.5, "top_p": 0.9, "max_output_tokens": 50}
    response = respond(server, metadata={"run": "7"}, instructions="Be brief.", **repeated, **ignored)
    assert {name: response[name] for name in repeated} == repeated
    assert (response["metadata"], response["instructions"]) == ({"run": "7"}, "Be brief.")
    assert (response["store"], response["background"], response["truncation"]) == (False, False, "disabled")
    assert response["text"]["format"] == {"type": "text"}


IMAGE = {"role": "user", "content": [{"type": "input_text", "text": "x"}, {"type": "input_image", "image_url": "x"}]}
BAD_SCHEMA = {"type": "function", "name": "f", "parameters": {"type": "banana"}}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": None}, "input"),
        ({"input": 5}, "input"),
        ({"input": []}, "input"),
        ({"input": ["x"]}, "input[0]"),
        ({"input": [{"role": "wizard", "content": "x"}]}, "input[0].role"),
        ({"input": [{"role": "tool", "content": "x"}]}, "input[0].role"),
        ({"input": [{"role": "user"}]}, "input[0].content"),
        ({"instructions": "Hi.", "input": [IMAGE]}, "input[0].content[1].type"),
        ({"input": [{"role": "assistant", "content": 5}]}, "input[0].content"),
        ({"input": [{"role": "assistant", "content": [{"type": "output_audio"}]}]}, "input[0].content[0].type"),
        ({"input": [{"type": "computer_call"}]}, "input[0].type"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0]"),
        ({"input": [{"type": "reasoning", "content": "x"}]}, "input[0].content"),
        ({"input": [{"type": "reasoning", "content": [{"text": 5}]}]}, "input[0].content[0].text"),
        ({"input": [IMAGE, {"type": "function_call", "name": "f", "arguments": "{}"}]}, "input[0].content[1].type"),
        ({"input": [{"type": "function_call", "name": "f", "arguments": "{}"}]}, "input[0].call_id"),
        ({"input": [{"type": "function_call", "call_id": "c", "arguments": "{}"}]}, "input[0].name"),
        ({"input": [{"type": "function_call", "call_id": "c", "name": "f", "arguments": 5}]}, "input[0].arguments"),
        ({"input": [{"type": "function_call_output", "call_id": "c", "output": "x"}]}, "input[0].call_id"),
        ({"input": [{"type": "custom_tool_call", "call_id": "c", "name": "f"}]}, "input[0].input"),
        ({"tools": ["x"]}, "tools[0]"),
        ({"tools": [{"type": "web_search"}, {"type": "function", "name": "a b"}]}, "tools[1].name"),
        ({"tools": [{"type": "web_search"}, BAD_SCHEMA]}, "tools[1].parameters.type"),
        ({"tools": [{**TOOL, "strict": 0.0}]}, "tools[0]"),
        ({"tools": [TOOL], "tool_choice": {"type": "web_search"}}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "name": "other"}}, "tool_choice"),
        ({"tool_choice": {"type": "allowed_tools", "mode": "auto"}}, "tool_choice.tools"),
        ({"tool_choice": "sometimes"}, "tool_choice"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"max_output_tokens": 5000}, "input"),
        ({"max_tokens": 5}, "max_tokens"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"n": 2}, "n"),
        ({"return_token_ids": True}, "return_token_ids"),
        ({"return_tokens_as_token_ids": True}, "return_tokens_as_token_ids"),
        ({"prompt_logprobs": 0}, "prompt_logprobs"),
        ({"temperature": -1}, "temperature"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"include": ["thoughts"]}, "include"),
        ({"reasoning": {"effort": "extreme"}}, "reasoning.effort"),
        ({"reasoning": {"context": "current_turn"}}, "reasoning.context"),
        ({"reasoning": {"typo": 1}}, "reasoning.typo"),
        ({"text": {"verbosity": "low"}}, "text.verbosity"),
        ({"text": {"format": {"type": "xml"}}}, "text.format"),
        ({"metadata": {"a": 5}}, "metadata.a"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"conversation": {"id": "conv_1"}}, "conversation"),
        ({"truncation": "auto"}, "truncation"),
        ({"background": True}, "background"),
        ({"prompt": {"id": "p"}}, "prompt"),
        ({"context_management": [{"type": "compaction"}]}, "context_management"),
        ({"moderation": {"model": "m"}}, "moderation"),
        ({"messages": []}, "messages"),
        ({"temprature": 0.5}, "temprature"),
    ],
)
def test_a_wrong_value_of_a_response_is_named(server: Live, fields: dict[str, Any], param: str) -> None:
    error = refused(server.client.post(PATH, json={"input": "x", **fields}))
    assert str(error["param"]).startswith(param)
    if param != "input":
        assert param.split(".")[-1].split("[")[0] in error["message"]
    for name in ("messages[", "response_format", "reasoning_effort", "max_tokens", "function."):
        assert name not in error["message"].replace("max_output_tokens", "") or name == param
    assert server.engine.seen == []
    server.still_serves()


def test_nothing_is_kept(server: Live) -> None:
    response = respond(server, store=True)
    for method in ("GET", "DELETE"):
        error = refused(server.client.request(method, f"{PATH}/{response['id']}"), 404)
        assert response["id"] in error["message"]
        assert "not kept" in error["message"]


def test_other_errors_of_a_response(server: Live) -> None:
    assert refused(server.client.post(PATH, json={"input": "x", "model": "gpt-5"}), 404)["code"] == "model_not_found"
    server.engine.queue_limit = 0
    assert refused(server.client.post(PATH, json={"input": "x"}), 429)["code"] == "queue_full"
    server.engine.queue_limit = 64
    server.still_serves()


def test_a_response_that_fails(server: Live) -> None:
    server.engine.fail_with = "The engine failed while computing this request."
    refused(server.client.post(PATH, json={"input": "x"}), 500)
    *_, problem, last = stream(server)
    assert (problem["type"], problem["message"]) == ("error", server.engine.fail_with)
    assert last["type"] == "response.failed"
    assert (last["response"]["status"], last["response"]["usage"]) == ("failed", None)
    assert last["response"]["error"] == {"code": "server_error", "message": server.engine.fail_with}
    server.engine.fail_with = None
    server.still_serves()
