"""The model card's quickstarts against a real server process on the embedded model, with OpenAI's own client."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import anthropic
import httpx
import openai
import pytest

from recipes.tiny.evaluate import WEATHER_TOOL
from tern.checkpoint import embedded_model_directory

MODEL = str(embedded_model_directory())

FASTDEPLOY_COMMAND = [
    *("-m", "tern.entrypoints.openai.api_server", "--model", MODEL, "--port", "0", "--metrics-port", "0"),
    *("--engine-worker-queue-port", "8182", "--load_choices", "default_v1", "--tensor-parallel-size", "1"),
    *("--max-model-len", "4096", "--reasoning-parser", "ernie_x1", "--tool-call-parser", "ernie_x1"),
    *("--max-num-seqs", "32"),
]
VLLM_COMMAND = ["-m", "tern", "serve", MODEL, "--port", "0", "--max_model_len", "4096"]

WEATHER: dict[str, Any] = {
    "messages": [{"role": "user", "content": "How's the weather in Beijing today?"}],
    "tools": [WEATHER_TOOL],
    "temperature": 0,
}


@dataclass(frozen=True)
class Server:
    """A running server process: where it answers, and where its metrics are."""

    process: subprocess.Popen[str]
    url: str
    metrics_url: str | None


def _start(command: list[str]) -> Server:
    process = subprocess.Popen(
        [sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8"
    )
    seen, metrics = [], None
    assert process.stdout is not None
    for line in process.stdout:
        seen.append(line)
        if found := re.search(r"metrics at (http://\S+)", line):
            metrics = found[1]
        if found := re.search(r"answers at (http://\S+?)\. ", line):
            return Server(process, found[1], metrics)
    raise AssertionError(f"the server ended with {process.wait()}:\n{''.join(seen)}")


@pytest.fixture(scope="module", params=[FASTDEPLOY_COMMAND, VLLM_COMMAND], ids=["fastdeploy", "vllm"])
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    started = _start(request.param)
    yield started
    started.process.send_signal(signal.SIGTERM)
    output, _ = started.process.communicate(timeout=60)
    assert started.process.returncode == 0, output


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=120) as made:
        yield made


def _assert_weather_call(name: str, arguments: str) -> None:
    parsed = json.loads(arguments)
    assert name == "get_weather"
    assert "Beijing" in parsed.pop("location")
    assert parsed.pop("unit") in ("c", "f")
    assert parsed == {}


def test_the_cards_request_gets_thought_and_a_valid_call(server: Server) -> None:
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=WEATHER, timeout=120).json()
    [choice] = answer["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["reasoning_content"]
    [call] = choice["message"]["tool_calls"]
    _assert_weather_call(call["function"]["name"], call["function"]["arguments"])


def test_streamed_it_is_the_same(server: Server) -> None:
    whole = httpx.post(f"{server.url}/v1/chat/completions", json=WEATHER, timeout=120).json()["choices"][0]
    reasoning, arguments, names, finish = "", "", [], None
    with httpx.stream(
        "POST", f"{server.url}/v1/chat/completions", json=WEATHER | {"stream": True}, timeout=120
    ) as lines:
        data = [line.removeprefix("data: ") for line in lines.iter_lines() if line.startswith("data: ")]
    assert data.pop() == "[DONE]"
    for chunk in map(json.loads, data):
        for choice in chunk["choices"]:
            delta = choice["delta"]
            reasoning += delta.get("reasoning_content") or ""
            for call in delta.get("tool_calls") or []:
                names += [call["function"]["name"]] if call["function"].get("name") else []
                arguments += call["function"].get("arguments") or ""
            finish = choice["finish_reason"] or finish
    [call] = whole["message"]["tool_calls"]
    assert reasoning == whole["message"]["reasoning_content"]
    assert (names, arguments) == ([call["function"]["name"]], call["function"]["arguments"])
    assert finish == whole["finish_reason"]


def test_the_openai_client_drives_a_whole_tool_loop(client: openai.OpenAI) -> None:
    model = client.models.list().data[0].id
    messages = list(WEATHER["messages"])
    asked = client.chat.completions.create(model=model, messages=messages, tools=WEATHER["tools"], temperature=0)
    message = asked.choices[0].message
    assert message.tool_calls
    [call] = message.tool_calls
    assert call.type == "function"
    _assert_weather_call(call.function.name, call.function.arguments)
    messages.append(message.model_dump(exclude_none=True))
    result = json.dumps({"temperature": 23, "unit": "c", "condition": "sunny"})
    messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
    answered = client.chat.completions.create(model=model, messages=messages, tools=WEATHER["tools"], temperature=0)
    assert answered.choices[0].finish_reason == "stop"
    assert "23" in (answered.choices[0].message.content or "")


def test_the_openai_client_streams(client: openai.OpenAI) -> None:
    model = client.models.list().data[0].id
    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "Give me a short introduction to large language model."}],
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    text, usage = "", None
    for chunk in stream:
        text += "".join(choice.delta.content or "" for choice in chunk.choices)
        usage = chunk.usage or usage
    assert "language model" in text
    assert usage is not None
    assert usage.completion_tokens_details is not None
    assert 0 < (usage.completion_tokens_details.reasoning_tokens or 0) < usage.completion_tokens


def test_the_openai_client_drives_a_tool_loop_over_responses(client: openai.OpenAI) -> None:
    model, tools = client.models.list().data[0].id, [{"type": "function", **WEATHER_TOOL["function"]}]
    items: list[Any] = list(WEATHER["messages"])
    with client.responses.stream(model=model, input=items, tools=tools, temperature=0) as stream:  # type: ignore[arg-type]
        asked: Any = stream.get_final_response()
    whole: Any = client.responses.create(model=model, input=items, tools=tools, temperature=0)  # type: ignore[arg-type]
    assert (
        [item.type for item in asked.output] == [item.type for item in whole.output] == ["reasoning", "function_call"]
    )
    assert asked.output[0].content[0].text == whole.output[0].content[0].text
    call = asked.output[1]
    _assert_weather_call(call.name, call.arguments)
    result = json.dumps({"temperature": 23, "unit": "c", "condition": "sunny"})
    items += [*asked.output, {"type": "function_call_output", "call_id": call.call_id, "output": result}]
    answered = client.responses.create(model=model, input=items, tools=tools, temperature=0)  # type: ignore[arg-type]
    assert answered.status == "completed"
    assert "23" in answered.output_text


def test_the_anthropic_client_drives_a_tool_loop(server: Server, client: openai.OpenAI) -> None:
    function = WEATHER_TOOL["function"]
    tool = {"name": function["name"], "description": function["description"], "input_schema": function["parameters"]}
    fields: dict[str, Any] = {
        "model": client.models.list().data[0].id,
        "max_tokens": 1000,
        "tools": [tool],
        "thinking": {"type": "adaptive"},
    }
    messages: list[Any] = list(WEATHER["messages"])
    with anthropic.Anthropic(base_url=server.url, api_key="none", timeout=120) as claude:
        with claude.messages.stream(**fields, messages=messages) as stream:
            asked: Any = stream.get_final_message()
        thought, call = asked.content
        assert (thought.type, asked.stop_reason) == ("thinking", "tool_use")
        assert thought.thinking
        _assert_weather_call(call.name, json.dumps(call.input))
        result = json.dumps({"temperature": 23, "unit": "c", "condition": "sunny"})
        block = {"type": "tool_result", "tool_use_id": call.id, "content": result}
        messages += [asked.to_param(), {"role": "user", "content": [block]}]
        answered: Any = claude.messages.create(**fields, messages=messages)
        assert answered.stop_reason == "end_turn"
        assert "23" in answered.content[-1].text
        del fields["max_tokens"]
        counted = claude.messages.count_tokens(**fields, messages=messages)
    assert counted.input_tokens == answered.usage.input_tokens + answered.usage.cache_read_input_tokens


def test_metrics_stand_where_they_were_asked_for(server: Server) -> None:
    address = server.metrics_url or f"{server.url}/metrics"
    assert "tern:" in httpx.get(address).text
    if server.metrics_url is not None:
        assert httpx.get(f"{server.url}/metrics").status_code == 404
