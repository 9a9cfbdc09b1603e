"""The official `openai` client on /v1/responses: create, stream, parse, the loop of a tool, errors."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from server_fakes import WEATHER_CALL, WEATHER_TOOL, Live

QUESTION: Any = {"role": "user", "content": "How is the weather in Beijing, in celsius?"}
TOOLS: Any = [{"type": "function", **WEATHER_TOOL["function"]}, {"type": "web_search"}]
RESULT_ANSWER = "26 it says.\n</think>\n\n<response>\nIt is 26 °C in Beijing.\n</response>\n"
TEXT = "Hello, 你好!\n\nHow are you?"


@pytest.fixture
def client(server: Live) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as client:
        yield client


def test_create_a_response(client: openai.OpenAI) -> None:
    response = client.responses.create(model="tern-test", input="Hi", instructions="Be brief.", max_output_tokens=300)
    assert response.output_text == TEXT
    thought: Any = response.output[0]
    assert thought.content[0].text == "They greet me."
    assert (response.status, response.instructions) == ("completed", "Be brief.")
    assert response.usage is not None
    assert response.usage.output_tokens_details.reasoning_tokens


def test_stream_a_response(client: openai.OpenAI) -> None:
    with client.responses.stream(model="tern-test", input=[QUESTION]) as stream:
        events = list(stream)
        final = stream.get_final_response()
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == TEXT
    thought = [event.delta for event in events if event.type == "response.reasoning_text.delta"]
    assert "".join(thought) == "They greet me."
    assert final.output_text == TEXT
    assert [event.sequence_number for event in events] == list(range(len(events)))  # type: ignore[union-attr]


@pytest.mark.parametrize("streamed", [False, True])
def test_the_loop_of_a_tool_in_items(server: Live, client: openai.OpenAI, streamed: bool) -> None:
    server.engine.answers.extend([WEATHER_CALL, RESULT_ANSWER])
    items: Any = [QUESTION]
    if streamed:
        with client.responses.stream(model="tern-test", input=items, tools=TOOLS) as stream:
            asked: Any = stream.get_final_response()
    else:
        asked = client.responses.create(model="tern-test", input=items, tools=TOOLS)
    items += asked.output
    (call,) = [item for item in asked.output if item.type == "function_call"]
    assert json.loads(call.arguments) == {"location": "Beijing", "unit": "c"}
    items.append({"type": "function_call_output", "call_id": call.call_id, "output": '{"temperature": 26}'})
    answered = client.responses.create(model="tern-test", input=items, tools=TOOLS, store=False)
    assert answered.output_text == "It is 26 °C in Beijing."
    prompt = server.state.protocol.tokenizer.decode(server.engine.seen[1].prompt_token_ids)
    assert "I should look it up." in prompt, "the thought goes back with the call"
    assert '{"temperature": 26}' in prompt


def test_parse_the_arguments_of_a_call(server: Live, client: openai.OpenAI) -> None:
    server.engine.answers.append(WEATHER_CALL)
    parsed: Any = client.responses.parse(model="tern-test", input=[QUESTION], tools=TOOLS[:1])
    assert parsed.output[1].parsed_arguments == {"location": "Beijing", "unit": "c"}


def test_log_probabilities_of_a_response(client: openai.OpenAI) -> None:
    response = client.responses.create(
        model="tern-test", input="Hi", include=["message.output_text.logprobs"], top_logprobs=2
    )
    message: Any = response.output[1]
    assert len(message.content[0].logprobs[0].top_logprobs) == 2


def test_what_is_cut_off_is_incomplete(client: openai.OpenAI) -> None:
    with client.responses.stream(model="tern-test", input="Hi", max_output_tokens=40) as stream:
        last: Any = list(stream)[-1]
    assert last.type == "response.incomplete"
    assert last.response.incomplete_details.reason == "max_output_tokens"


def test_errors_of_responses_become_exceptions(server: Live, client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="previous_response_id"):
        client.responses.create(model="tern-test", input="Hi", previous_response_id="resp_1")
    with pytest.raises(openai.NotFoundError, match="resp_1"):
        client.responses.retrieve("resp_1")
    server.engine.fail_with = "It broke."
    last: Any = list(client.responses.create(model="tern-test", input="Hi", stream=True))[-1]
    assert (last.type, last.response.error.message) == ("response.failed", "It broke.")
