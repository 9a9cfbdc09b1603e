"""OpenAI's own client against the running server, for what must be right and not only of the right form."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import openai
import pytest
from pydantic import BaseModel, Field

from tests.clients.conftest import MODEL, Served

WEATHER: list[Any] = [{"role": "user", "content": "How's the weather in Beijing today?"}]

Word = Annotated[str, Field(max_length=12)]
"""Bounded: left to itself the embedded model repeats what it has never seen until the tokens are spent."""


class GetWeather(BaseModel):
    """Get the current weather of a place"""

    location: Word
    unit: Literal["c", "f"]


class Person(BaseModel):
    name: Word
    age: Annotated[int, Field(ge=0, le=150)]
    pets: Annotated[list[Literal["cat", "dog"]], Field(max_length=3)]


@pytest.fixture
def client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=served.v1, api_key="none", max_retries=0) as made:
        yield made


def test_parse_gives_a_pydantic_object(client: openai.OpenAI) -> None:
    answer = client.chat.completions.parse(
        model=MODEL,
        messages=[{"role": "user", "content": "Invent a person."}],
        response_format=Person,
        temperature=0,
        max_tokens=700,
    )
    assert isinstance(answer.choices[0].message.parsed, Person)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "GetWeather"}}])
def test_a_forced_call_is_made_after_thinking(client: openai.OpenAI, choice: Any) -> None:
    answer = client.chat.completions.parse(
        model=MODEL,
        messages=[{"role": "user", "content": "Hello!"}],
        tools=[openai.pydantic_function_tool(GetWeather)],
        tool_choice=choice,
        temperature=0,
        max_tokens=700,
    )
    message: Any = answer.choices[0].message
    assert message.reasoning_content
    assert all(isinstance(call.function.parsed_arguments, GetWeather) for call in message.tool_calls)


def test_responses_call_a_tool_and_answer(client: openai.OpenAI) -> None:
    tool: Any = {"type": "function", "name": "get_weather", "strict": True, "description": GetWeather.__doc__}
    tool["parameters"] = {**GetWeather.model_json_schema(), "additionalProperties": False}
    asked = client.responses.create(model=MODEL, input=WEATHER, tools=[tool], temperature=0)
    (call,) = [item for item in asked.output if item.type == "function_call"]
    assert json.loads(call.arguments) == {"location": "Beijing", "unit": "c"}
    result = {"type": "function_call_output", "call_id": call.call_id, "output": '{"temperature": 26, "unit": "c"}'}
    following: Any = [*WEATHER, *asked.output, result]
    answered = client.responses.create(model=MODEL, input=following, tools=[tool], temperature=0)
    assert "26" in answered.output_text


def test_responses_streamed_and_parsed(client: openai.OpenAI) -> None:
    with client.responses.stream(
        model=MODEL, input="Invent a person.", text_format=Person, temperature=0, max_output_tokens=700
    ) as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        final = stream.get_final_response()
    assert final.output_text == text
    assert isinstance(final.output_parsed, Person)
