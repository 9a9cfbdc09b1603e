"""Structured outputs and strict tools offline, in vLLM's form, on the embedded model."""

from __future__ import annotations

import json
import random
import re
from typing import Any

import jsonschema
import pytest

from benchmarks.random_schemas import random_schema
from tern import LLM, SamplingParams, StructuredOutputsParams
from tern.errors import InvalidRequestError

QUESTIONS = ["What is the weather in Beijing?", "北京在哪里？", "What is 12 + 34?"]
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "a": {"type": "string", "maxLength": 10},
        "b": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
    },
    "required": ["a", "b"],
    "additionalProperties": False,
}
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"location": {"type": "string"}, "unit": {"enum": ["c", "f"]}},
            "required": ["location", "unit"],
            "additionalProperties": False,
        },
    },
}


def chats(*questions: str) -> list[list[dict[str, str]]]:
    return [[{"role": "user", "content": question}] for question in questions]


def held(max_tokens: int = 300, temperature: float = 0.0, **form: Any) -> SamplingParams:
    return SamplingParams(
        temperature=temperature, seed=3, max_tokens=max_tokens, structured_outputs=StructuredOutputsParams(**form)
    )


def test_twenty_schemas_at_high_temperature(llm: LLM) -> None:
    rng = random.Random(5)
    schemas = [random_schema(rng) for _ in range(20)]
    params = [held(temperature=1.5, json=schema) for schema in schemas]
    for each in params:
        each.reasoning_max_tokens = 0
    outputs = llm.chat(chats(*QUESTIONS * 7)[:20], params)
    finished = [
        (schema, output.outputs[0].message)
        for schema, output in zip(schemas, outputs, strict=True)
        if output.outputs[0].finish_reason == "stop"
    ]
    assert len(finished) >= 18
    for schema, message in finished:
        assert message is not None
        jsonschema.validate(json.loads(message.content or ""), schema)


@pytest.mark.parametrize(
    ("form", "demand"),
    [
        ({"json": SCHEMA}, lambda text: jsonschema.validate(json.loads(text), SCHEMA) is None),
        ({"json": json.dumps(SCHEMA)}, lambda text: jsonschema.validate(json.loads(text), SCHEMA) is None),
        ({"regex": r"\d{3}-[a-f]{2}"}, lambda text: re.fullmatch(r"\d{3}-[a-f]{2}", text)),
        ({"choice": ("yes", "no")}, lambda text: text in ("yes", "no")),
        ({"grammar": 'root ::= "<" [a-c] [a-c] ">"'}, lambda text: re.fullmatch("<[a-c]{2}>", text)),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_every_form_in_generate_and_chat(llm: LLM, form: dict[str, Any], demand: Any) -> None:
    for temperature in (0.0, 1.5):
        params = held(temperature=temperature, **form)
        [plain] = llm.generate("Well: ", params)
        [chat] = llm.chat(chats(QUESTIONS[0])[0], params)
        assert (plain.outputs[0].finish_reason, chat.outputs[0].finish_reason) == ("stop", "stop")
        assert demand(plain.outputs[0].text)
        assert chat.outputs[0].message is not None
        assert demand(chat.outputs[0].message.content)


def test_greedy_answers_are_the_same_alone_and_together(llm: LLM) -> None:
    params = held(json=SCHEMA)
    together = llm.chat(chats(*QUESTIONS), params)
    for question, output in zip(QUESTIONS, together, strict=True):
        [alone] = llm.chat(chats(question)[0], params)
        assert alone.outputs[0].token_ids == output.outputs[0].token_ids


@pytest.mark.parametrize("speculation", ["off", "ngram"])
def test_and_with_drafts(llm: LLM, speculation: str) -> None:
    other = LLM(max_model_len=1024, progress=False, speculation=speculation, enable_prefix_caching=False, block_size=5)
    params = held(json=SCHEMA)
    expected = [output.outputs[0].token_ids for output in llm.chat(chats(*QUESTIONS), params)]
    assert [output.outputs[0].token_ids for output in other.chat(chats(*QUESTIONS), params)] == expected


def test_strict_tools(llm: LLM) -> None:
    params = SamplingParams(temperature=1.5, seed=1, n=4, max_tokens=150)
    [output] = llm.chat(chats(QUESTIONS[0])[0], params, tools=[WEATHER])
    [sure] = llm.chat(chats(QUESTIONS[0])[0], SamplingParams(temperature=0, max_tokens=200), tools=[WEATHER])
    assert sure.outputs[0].message is not None
    assert [call.name for call in sure.outputs[0].message.tool_calls] == ["get_weather"]
    for choice in [*sure.outputs, *output.outputs]:
        assert choice.message is not None
        for call in choice.message.tool_calls:
            if choice.finish_reason == "stop":
                jsonschema.validate(json.loads(call.arguments), WEATHER["function"]["parameters"])


@pytest.mark.parametrize(
    "form",
    [
        {},
        {"json": {}, "regex": "a"},
        {"json": 3},
        {"regex": 3},
        {"choice": "ab"},
        {"json_object": False},
        {"regex": False, "json": {}},
    ],
    ids=str,
)
def test_a_form_is_exactly_one_thing(form: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError, match="structured_outputs"):
        StructuredOutputsParams(**form)


def test_wrong_forms_are_refused_before_anything_runs(llm: LLM) -> None:
    with pytest.raises(InvalidRequestError, match="structured_outputs is"):
        SamplingParams(structured_outputs={"json": {}})  # type: ignore[arg-type]
    for ask in (llm.generate, lambda text, params: llm.chat(chats(text)[0], params)):
        with pytest.raises(InvalidRequestError, match="unclosed group"):
            ask("x", held(regex="(a"))  # type: ignore[operator]
