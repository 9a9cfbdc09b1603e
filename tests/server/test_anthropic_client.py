"""The official `anthropic` client against the running server: messages, streams, tools, thoughts, counts, errors."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import pytest
from server_fakes import WEATHER_CALL, WEATHER_TOOL, Live, ScriptedEngine, serve

from tern.chat import ChatProtocol

QUESTION: Any = {"role": "user", "content": "How is the weather in Beijing, in celsius?"}
FUNCTION = WEATHER_TOOL["function"]
TOOLS: Any = [
    {"name": "get_weather", "description": FUNCTION["description"], "input_schema": FUNCTION["parameters"]},
    {"type": "web_search_20250305", "name": "web_search"},
]
RESULT_ANSWER = "26 it says.\n</think>\n\n<response>\nIt is 26 °C in Beijing.\n</response>\n"
TEXT = "Hello, 你好!\n\nHow are you?"
ASKED: Any = {"model": "tern-test", "max_tokens": 300, "messages": [QUESTION]}
THINKING: Any = {"type": "enabled", "budget_tokens": 250}


@pytest.fixture
def client(server: Live) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=server.url, api_key="unused", max_retries=0) as client:
        yield client


def test_create_a_message(client: anthropic.Anthropic) -> None:
    message = client.messages.create(**ASKED, system="Be brief.")
    assert [(block.type, getattr(block, "text", "")) for block in message.content] == [("text", TEXT)]
    assert message.stop_reason == "end_turn"
    assert message.usage.cache_read_input_tokens == 4
    assert message.usage.output_tokens_details is not None


def test_thoughts(client: anthropic.Anthropic) -> None:
    message = client.messages.create(**ASKED, thinking=THINKING)
    thought: Any = message.content[0]
    assert (thought.type, thought.thinking) == ("thinking", "They greet me.")
    assert thought.signature


@pytest.mark.parametrize("thinking", [THINKING, {"type": "disabled"}])
def test_stream_a_message(server: Live, client: anthropic.Anthropic, thinking: Any) -> None:
    server.engine.answers.append("They greet me.\n</think>\n\nHi" if thinking is THINKING else "Hi\n</response>\n")
    with client.messages.stream(**ASKED, thinking=thinking) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == "Hi"
    assert [block.type for block in final.content] == (["thinking", "text"] if thinking is THINKING else ["text"])
    assert final.stop_reason == "end_turn"
    assert final.usage.input_tokens + 4 == len(server.engine.seen[0].prompt_token_ids)


@pytest.mark.parametrize("streamed", [False, True])
def test_the_loop_of_a_tool_in_blocks(server: Live, client: anthropic.Anthropic, streamed: bool) -> None:
    server.engine.answers.extend([WEATHER_CALL, RESULT_ANSWER])
    if streamed:
        with client.messages.stream(**ASKED, tools=TOOLS, thinking=THINKING) as stream:
            asked: Any = stream.get_final_message()
    else:
        asked = client.messages.create(**ASKED, tools=TOOLS, thinking=THINKING)
    assert asked.stop_reason == "tool_use"
    (use,) = [block for block in asked.content if block.type == "tool_use"]
    assert use.input == {"location": "Beijing", "unit": "c"}
    result: Any = {"type": "tool_result", "tool_use_id": use.id, "content": '{"temperature": 26}'}
    history: Any = [QUESTION, asked.to_param(), {"role": "user", "content": [result]}]
    answered: Any = client.messages.create(**{**ASKED, "messages": history}, tools=TOOLS)
    assert answered.content[0].text == "It is 26 °C in Beijing."
    prompt = server.state.protocol.tokenizer.decode(server.engine.seen[1].prompt_token_ids)
    assert "I should look it up." in prompt, "the thought goes back with the call"
    assert '{"temperature": 26}' in prompt


def test_arguments_that_were_cut_off_are_the_same_whole_and_streamed(server: Live, client: anthropic.Anthropic) -> None:
    tokens = server.state.protocol.tokenizer.encode(WEATHER_CALL)
    inputs = set()
    for limit in range(len(tokens) - 40, len(tokens)):
        server.engine.answers.extend([WEATHER_CALL, WEATHER_CALL])
        asked = {**ASKED, "max_tokens": limit, "tools": TOOLS}
        whole: Any = client.messages.create(**asked)
        with client.messages.stream(**asked) as stream:
            streamed: Any = stream.get_final_message()
        assert [block.input for block in streamed.content] == [block.input for block in whole.content]
        assert whole.stop_reason == streamed.stop_reason == "max_tokens"
        inputs |= {json.dumps(block.input) for block in whole.content}
    assert inputs == {"{}", '{"location": "Beijing"}', '{"location": "Beijing", "unit": "c"}'}


def test_count_tokens(server: Live, client: anthropic.Anthropic) -> None:
    counted = client.messages.count_tokens(model="tern-test", messages=[QUESTION], tools=TOOLS, system="Be brief.")
    client.messages.create(**ASKED, tools=TOOLS, system="Be brief.")
    assert counted.input_tokens == len(server.engine.seen[0].prompt_token_ids)


def test_errors_of_messages_become_exceptions(server: Live, client: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.BadRequestError, match="messages is empty"):
        client.messages.create(**{**ASKED, "messages": []})
    with pytest.raises(anthropic.NotFoundError, match="claude"):
        client.messages.create(**{**ASKED, "model": "claude"})
    with pytest.raises(anthropic.BadRequestError, match=r"prompt is too long: [0-9]+ tokens > 2047 maximum"):
        client.messages.create(**{**ASKED, "messages": [{"role": "user", "content": "weather " * 3000}]})
    server.engine.queue_limit = 0
    with pytest.raises(anthropic.RateLimitError):
        client.messages.create(**ASKED)
    server.engine.queue_limit = 64
    server.engine.fail_with = "It broke."
    with pytest.raises(anthropic.InternalServerError, match=r"It broke\."):
        client.messages.create(**ASKED)
    with pytest.raises(anthropic.APIStatusError, match=r"It broke\."):
        list(client.messages.create(**ASKED, stream=True))


@pytest.mark.parametrize("way", ["api_key", "auth_token"])
def test_keys(protocol: ChatProtocol, way: Any) -> None:
    with serve(ScriptedEngine(protocol), protocol, api_keys=("right",)) as live:
        with anthropic.Anthropic(base_url=live.url, **{way: "right"}) as client:
            assert client.messages.create(**ASKED).stop_reason == "end_turn"
        with (
            anthropic.Anthropic(base_url=live.url, max_retries=0, **{way: "wrong"}) as client,
            pytest.raises(anthropic.AuthenticationError, match="API key is wrong"),
        ):
            client.messages.create(**ASKED)
