"""The official `openai` client against the running server: chat, stream, the loop of a tool, completions, errors."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from server_fakes import WEATHER_CALL, WEATHER_TOOL, Live

QUESTION: Any = {"role": "user", "content": "How is the weather in Beijing, in celsius?"}
TOOLS: Any = [WEATHER_TOOL]
RESULT_ANSWER = "26 it says.\n</think>\n\n<response>\nIt is 26 °C in Beijing.\n</response>\n"


@pytest.fixture
def client(server: Live) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as client:
        yield client


def test_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="tern-test", messages=[QUESTION], max_tokens=300, seed=1)
    message: Any = answer.choices[0].message
    assert message.content == "Hello, 你好!\n\nHow are you?"
    assert message.reasoning_content == message.reasoning == "They greet me."
    assert message.tool_calls is None
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.completion_tokens_details is not None
    assert answer.usage.completion_tokens_details.reasoning_tokens


def test_stream(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="tern-test", messages=[QUESTION], stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    deltas: list[Any] = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    assert "".join(delta.content or "" for delta in deltas) == "Hello, 你好!\n\nHow are you?"
    assert "".join(getattr(delta, "reasoning_content", "") for delta in deltas) == "They greet me."
    assert chunks[-1].usage is not None


def test_the_loop_of_a_tool(server: Live, client: openai.OpenAI) -> None:
    server.engine.answers.extend([WEATHER_CALL, RESULT_ANSWER])
    asked = client.chat.completions.create(model="tern-test", messages=[QUESTION], tools=TOOLS)
    message: Any = asked.choices[0].message
    assert asked.choices[0].finish_reason == "tool_calls"
    (call,) = message.tool_calls
    assert json.loads(call.function.arguments) == {"location": "Beijing", "unit": "c"}
    result: Any = {"role": "tool", "tool_call_id": call.id, "content": '{"temperature": 26, "unit": "c"}'}
    answered = client.chat.completions.create(model="tern-test", messages=[QUESTION, message, result], tools=TOOLS)
    assert answered.choices[0].message.content == "It is 26 °C in Beijing."
    prompt = server.state.protocol.tokenizer.decode(server.engine.seen[1].prompt_token_ids)
    assert "I should look it up." in prompt, "the thought goes back with the call"
    assert '{"temperature": 26, "unit": "c"}' in prompt


def test_the_loop_of_a_tool_streamed(server: Live, client: openai.OpenAI) -> None:
    server.engine.answers.append(WEATHER_CALL)
    with client.chat.completions.stream(model="tern-test", messages=[QUESTION], tools=TOOLS) as stream:
        for _ in stream:
            pass
        final: Any = stream.get_final_completion()
    (call,) = final.choices[0].message.tool_calls
    assert call.function.name == "get_weather"
    assert json.loads(call.function.arguments) == {"location": "Beijing", "unit": "c"}
    assert final.choices[0].finish_reason == "tool_calls"


def test_logprobs(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tern-test", messages=[QUESTION], logprobs=True, top_logprobs=2, n=2, stop=["zzz"]
    )
    assert [choice.index for choice in answer.choices] == [0, 1]
    logprobs = answer.choices[1].logprobs
    assert logprobs is not None
    assert logprobs.content
    assert len(logprobs.content[0].top_logprobs) == 2


def test_completions(server: Live, client: openai.OpenAI) -> None:
    server.engine.answers.extend(["two", "two"])
    answer = client.completions.create(model="tern-test", prompt="one", logprobs=1, extra_body={"top_k": 5})
    assert answer.choices[0].text == "two"
    assert answer.choices[0].logprobs is not None
    assert answer.choices[0].logprobs.text_offset
    stream = client.completions.create(model="tern-test", prompt="one", stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == "two"


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tern-test"]
    assert client.models.retrieve("tern-test").owned_by == "tern"


def test_errors_become_the_client_s_exceptions(server: Live, client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="messages is empty"):
        client.chat.completions.create(model="tern-test", messages=[])
    with pytest.raises(openai.NotFoundError, match="gpt-4"):
        client.chat.completions.create(model="gpt-4", messages=[QUESTION])
    server.engine.queue_limit = 0
    with pytest.raises(openai.RateLimitError):
        client.chat.completions.create(model="tern-test", messages=[QUESTION])
    server.engine.queue_limit = 64
    server.engine.fail_with = "It broke."
    with pytest.raises(openai.APIError, match=r"It broke\."):
        list(client.chat.completions.create(model="tern-test", messages=[QUESTION], stream=True))
