"""Structured answers over HTTP: the embedded model behind the real engine, and what is refused before it is asked."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import jsonschema
import openai
import pytest
import torch
from server_fakes import USER, WEATHER_TOOL, Live, rebuild, serve, without_ids

from tern.chat import ChatProtocol
from tern.checkpoint import resolve_model
from tern.engine import Engine, EngineOptions, EngineService
from tern.server.offload import LARGE
from tern.server.schemas.structured import reading_size

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"城市": {"type": "string", "maxLength": 8}, "grad": {"type": "integer", "maximum": 40}},
    "required": ["城市", "grad"],
    "additionalProperties": False,
}
SEARCH: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "search",
        "parameters": {
            "type": "object",
            "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 9}},
            "required": ["n"],
            "additionalProperties": False,
        },
    },
}
JSON_SCHEMA = {"type": "json_schema", "json_schema": {"name": "place", "schema": SCHEMA, "strict": False}}


@pytest.fixture(scope="module")
def real() -> Iterator[Live]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    source = resolve_model(None)
    options = EngineOptions(max_model_len=1024, max_num_seqs=8, num_kv_blocks=400, check_integrity_when_idle=True)
    engine = Engine.open(source, options, progress=False)
    protocol = ChatProtocol.from_directory(source.directory, source.text_files)
    with serve(EngineService(engine), protocol, source) as live:
        yield live
    torch.set_num_threads(threads)


def named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


@pytest.mark.parametrize("heat", [{"temperature": 0}, {"temperature": 1.5, "seed": 4}], ids=["greedy", "hot"])
@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": JSON_SCHEMA},
        {"structured_outputs": {"json": SCHEMA}},
        {"guided_json": json.dumps(SCHEMA)},
        {"response_format": JSON_SCHEMA, "guided_json": SCHEMA, "chat_template_kwargs": {"enable_thinking": False}},
        {"response_format": JSON_SCHEMA, "reasoning_max_tokens": 4},
        {"response_format": JSON_SCHEMA, "ignore_eos": True, "min_tokens": 300},
    ],
    ids=str,
)
def test_json_after_its_schema(real: Live, fields: dict[str, Any], heat: dict[str, Any]) -> None:
    fields = {"max_tokens": 400, **fields, **heat}
    choice = real.chat(**fields)["choices"][0]
    assert choice["finish_reason"] == "stop"
    jsonschema.validate(json.loads(choice["message"]["content"]), SCHEMA)
    thinks = "chat_template_kwargs" not in fields
    assert bool(choice["message"]["reasoning_content"]) == thinks
    assert rebuild(real.stream(**fields)) == choice


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"structured_outputs": {"choice": ["ja </response>", "\n\nnein"]}}, "ja </response>|\n\nnein"),
        ({"guided_choice": ["<tool_call>"]}, "<tool_call>"),
        ({"guided_regex": r"^[a-c]{2}\d$"}, r"[a-c]{2}\d"),
        ({"guided_grammar": 'start: "x" /[0-9]{2}/'}, "x[0-9]{2}"),
    ],
    ids=str,
)
def test_other_forms(real: Live, fields: dict[str, Any], pattern: str) -> None:
    body = {"max_tokens": 200, "temperature": 1.2, "seed": 8, "n": 2, **fields}
    answer = real.chat(**body)
    chunks = real.stream(**body)
    for choice in answer["choices"]:
        assert choice["finish_reason"] == "stop"
        assert re.fullmatch(pattern, choice["message"]["content"])
        assert rebuild(chunks, choice["index"]) == choice


def test_any_json_object(real: Live) -> None:
    answer = real.chat(response_format={"type": "json_object"}, temperature=0, max_tokens=300)["choices"][0]
    if answer["finish_reason"] == "stop":
        assert isinstance(json.loads(answer["message"]["content"]), dict)
    else:
        assert answer["message"]["content"].startswith("{")


@pytest.mark.parametrize("heat", [{"temperature": 0}, {"temperature": 1.5, "seed": 4}], ids=["greedy", "hot"])
@pytest.mark.parametrize("thought", [{}, {"reasoning_max_tokens": 4}, {"reasoning_effort": "none"}], ids=str)
@pytest.mark.parametrize("choice", ["required", named("search")], ids=["required", "named"])
def test_a_demanded_call_is_made(real: Live, choice: Any, thought: dict[str, Any], heat: dict[str, Any]) -> None:
    tools = [SEARCH, {**SEARCH, "function": {**SEARCH["function"], "name": "find"}}]
    fields = {"tools": tools, "tool_choice": choice, "max_tokens": 400, "parallel_tool_calls": False, **thought, **heat}
    answer = without_ids(real.chat(**fields)["choices"][0])
    [call] = answer["message"]["tool_calls"]
    jsonschema.validate(json.loads(call["function"]["arguments"]), SEARCH["function"]["parameters"])
    assert call["function"]["name"] in (["search", "find"] if choice == "required" else ["search"])
    assert answer["message"]["content"] is None
    assert bool(answer["message"]["reasoning_content"]) == ("reasoning_effort" not in thought)
    assert answer["finish_reason"] == ("tool_calls" if choice == "required" else "stop")  # OpenAI's own
    assert without_ids(rebuild(real.stream(**fields))) == answer


def test_strict_tools_hold_their_arguments(real: Live) -> None:
    question = [{"role": "user", "content": "What is the weather in Beijing?"}]
    answer = real.chat(messages=question, tools=[WEATHER_TOOL], temperature=0, max_tokens=300)["choices"][0]
    assert answer["finish_reason"] == "tool_calls"
    for seed in range(6):
        hot = real.chat(messages=question, tools=[WEATHER_TOOL], temperature=1.5, seed=seed, max_tokens=150)
        choice = hot["choices"][0]
        for call in choice["message"].get("tool_calls", []):
            if choice["finish_reason"] == "tool_calls":
                jsonschema.validate(json.loads(call["function"]["arguments"]), WEATHER_TOOL["function"]["parameters"])


def test_completions_are_held_from_the_first_token(real: Live) -> None:
    for fields in ({"response_format": JSON_SCHEMA}, {"guided_json": SCHEMA}, {"structured_outputs": {"json": SCHEMA}}):
        body = {"prompt": ["Beijing: ", "x"], "max_tokens": 120, "temperature": 1.5, "seed": 2, "n": 2, **fields}
        response = real.client.post("/v1/completions", json=body)
        assert response.status_code == 200, response.text
        choices = response.json()["choices"]
        assert len(choices) == 4
        for choice in choices:
            assert choice["finish_reason"] == "stop"
            jsonschema.validate(json.loads(choice["text"]), SCHEMA)


def test_a_cut_is_called_a_cut(real: Live) -> None:
    cut = real.chat(response_format=JSON_SCHEMA, max_tokens=24, temperature=0)["choices"][0]
    assert cut["finish_reason"] == "length"
    stopped = real.chat(response_format=JSON_SCHEMA, stop=['"grad"'], max_tokens=300, temperature=0)["choices"][0]
    assert (stopped["finish_reason"], stopped["stop_reason"]) == ("stop", '"grad"')
    assert '"grad"' not in stopped["message"]["content"]


def test_the_openai_client_parses_a_form(real: Live) -> None:
    client = openai.OpenAI(base_url=f"{real.url}/v1", api_key="none", max_retries=0)
    answer = client.chat.completions.create(
        model="default",
        messages=[{"role": "user", "content": "Weather?"}],
        response_format=JSON_SCHEMA,  # type: ignore[arg-type]
        max_tokens=300,
        temperature=0,
    )
    jsonschema.validate(json.loads(answer.choices[0].message.content or ""), SCHEMA)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {"type": "yaml"}}, "response_format.type"),
        ({"response_format": {"type": "structural_tag"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
         "response_format.json_schema.schema"),
        ({"response_format": {"type": "json_object", "schema": {}}}, "response_format.schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {}, "strict": 1}}},
         "response_format.json_schema.strict"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"properties": {"a": {"not": {}}}}}}},
         "response_format.json_schema.schema.properties.a.not"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"json": {}, "regex": "a"}}, "structured_outputs"),
        ({"structured_outputs": {"regex": 3}}, "structured_outputs.regex"),
        ({"structured_outputs": {"regex": False, "choice": ["a"]}}, "structured_outputs"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs.json"),
        ({"structured_outputs": {"choice": ["a", 1]}}, "structured_outputs.choice"),
        ({"structured_outputs": {"yaml": 1}}, "structured_outputs.yaml"),
        ({"structured_outputs": {"regex": "(a"}}, "structured_outputs.regex"),
        ({"guided_json": {"$ref": "https://example.com/x"}}, "guided_json.$ref"),
        ({"guided_regex": "(?=a)"}, "guided_regex"),
        ({"guided_choice": [1]}, "guided_choice"),
        ({"guided_grammar": "start: none_such"}, "guided_grammar"),
        ({"guided_json": {}, "guided_regex": "a"}, "guided_regex"),
        ({"response_format": {"type": "json_object"}, "guided_json": SCHEMA}, "guided_json"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": "any", "tools": [WEATHER_TOOL]}, "tool_choice"),
        ({"tool_choice": {"type": "function"}, "tools": [WEATHER_TOOL]}, "tool_choice"),
        ({"tool_choice": named("other"), "tools": [WEATHER_TOOL]}, "tool_choice.function.name"),
        ({"tools": [SEARCH, {"type": "function", "function": {"name": "f", "strict": True, "parameters":
            {"properties": {"a": {"uniqueItems": True}}}}}]}, "tools[1].function.parameters.properties.a.uniqueItems"),
    ],
    ids=str,
)  # fmt: skip
def test_what_cannot_be_held_is_a_400_that_says_where(server: Live, fields: dict[str, Any], param: str) -> None:
    response = server.client.post("/v1/chat/completions", json={"messages": USER, **fields})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param
    assert "\n" not in error["message"]
    assert server.engine.seen == []
    server.still_serves()


def test_a_schema_of_a_tool_that_binds_nothing_may_hold_anything(server: Live) -> None:
    odd = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {"$ref": "#/no"}}}}}
    server.chat(tools=[odd])
    server.chat(tools=[odd], tool_choice="none", response_format=JSON_SCHEMA)


def test_grammars_are_never_made_on_the_event_loop() -> None:
    assert reading_size({"messages": []}, 10) == 10
    for fields in ({"response_format": {}}, {"guided_regex": "a"}, {"tools": [{}]}, {"structured_outputs": {"a": 1}}):
        assert (reading_size(fields, 10) >= LARGE) == any(fields.values())
