"""Anthropic's own client against the running server: a message, its stream, the loop of a tool, counting."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from recipes.tiny.evaluate import WEATHER_TOOL
from tests.clients.conftest import MODEL, Served

SUM: list[Any] = [{"role": "user", "content": "What is 12 + 30?"}]
TOOL: dict[str, Any] = {
    "name": WEATHER_TOOL["function"]["name"],
    "description": WEATHER_TOOL["function"]["description"],
    "input_schema": WEATHER_TOOL["function"]["parameters"],
}


@pytest.fixture
def client(served: Served) -> Iterator[Any]:
    anthropic = pytest.importorskip("anthropic")
    with anthropic.Anthropic(base_url=served.url, api_key="none", max_retries=0) as made:
        yield made


def test_a_message_and_its_stream(client: Any) -> None:
    ask: dict[str, Any] = {"model": MODEL, "max_tokens": 2000, "messages": SUM}
    thinking = {"type": "enabled", "budget_tokens": 1024}
    whole = client.messages.create(**ask, thinking=thinking, extra_body={"temperature": 0})
    assert [block.type for block in whole.content] == ["thinking", "text"]
    assert "42" in whole.content[-1].text
    assert whole.stop_reason == "end_turn"
    with client.messages.stream(**ask, thinking=thinking, extra_body={"temperature": 0}) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == whole.content[-1].text
    assert final.content[0].thinking == whole.content[0].thinking
    assert final.usage.output_tokens == whole.usage.output_tokens


def test_the_loop_of_a_tool(client: Any) -> None:
    messages: list[Any] = [{"role": "user", "content": "How's the weather in Beijing today?"}]
    ask: dict[str, Any] = {"model": MODEL, "max_tokens": 500, "tools": [TOOL], "extra_body": {"temperature": 0}}
    asked = client.messages.create(**ask, messages=messages)
    assert asked.stop_reason == "tool_use"
    (call,) = [block for block in asked.content if block.type == "tool_use"]
    assert call.input == {"location": "Beijing", "unit": "c"}
    result = {"type": "tool_result", "tool_use_id": call.id, "content": '{"temperature": 26, "unit": "c"}'}
    messages += [{"role": "assistant", "content": asked.content}, {"role": "user", "content": [result]}]
    answered = client.messages.create(**ask, messages=messages)
    assert answered.stop_reason == "end_turn"
    assert "26" in answered.content[-1].text


def test_counting_is_exact(client: Any) -> None:
    counted = client.messages.count_tokens(model=MODEL, messages=SUM, system="Be brief.", tools=[TOOL])
    said = client.messages.create(model=MODEL, messages=SUM, system="Be brief.", tools=[TOOL], max_tokens=300)
    usage = said.usage
    assert counted.input_tokens == usage.input_tokens + (usage.cache_read_input_tokens or 0)


def test_errors_are_the_client_s_own(client: Any) -> None:
    import anthropic

    with pytest.raises(anthropic.NotFoundError):
        client.messages.create(model="claude", max_tokens=5, messages=SUM)
    with pytest.raises(anthropic.BadRequestError, match="prompt is too long"):
        client.messages.create(model=MODEL, max_tokens=5, messages=[{"role": "user", "content": "word " * 20_000}])
