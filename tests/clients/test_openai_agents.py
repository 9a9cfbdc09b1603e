"""`openai-agents`: an agent with a tool, over chat completions and over responses, whole and streamed."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import openai
import pytest

from recipes.tiny.evaluate import WEATHER_TOOL
from tests.clients.conftest import MODEL, Served

QUESTION = "How's the weather in Beijing today?"


@pytest.fixture(params=["OpenAIChatCompletionsModel", "OpenAIResponsesModel"])
def agent(request: pytest.FixtureRequest, served: Served) -> Any:
    agents = pytest.importorskip("agents")
    agents.set_tracing_disabled(True)

    async def get_weather(_: Any, arguments: str) -> str:
        assert json.loads(arguments) == {"location": "Beijing", "unit": "c"}
        return '{"temperature": 26, "unit": "c"}'

    function = WEATHER_TOOL["function"]
    tool = agents.FunctionTool(
        name=function["name"],
        description=function["description"],
        params_json_schema={**function["parameters"], "additionalProperties": False},
        on_invoke_tool=get_weather,
    )
    client = openai.AsyncOpenAI(base_url=served.v1, api_key="none")
    return agents.Agent(
        name="weather",
        tools=[tool],
        model=getattr(agents, request.param)(MODEL, client),
        model_settings=agents.ModelSettings(temperature=0),
    )


def test_a_run_calls_the_tool_and_answers(agent: Any) -> None:
    from agents import Runner

    result = asyncio.run(Runner.run(agent, QUESTION))
    kinds = [type(item).__name__ for item in result.new_items]
    assert kinds == ["ReasoningItem", "ToolCallItem", "ToolCallOutputItem", "ReasoningItem", "MessageOutputItem"]
    assert "26" in result.final_output


def test_a_streamed_run_ends_with_the_same_answer(agent: Any) -> None:
    from agents import Runner

    async def streamed() -> tuple[str, str]:
        result = Runner.run_streamed(agent, QUESTION)
        pieces = [
            event.data.delta
            async for event in result.stream_events()
            if event.type == "raw_response_event" and event.data.type == "response.output_text.delta"
        ]
        return "".join(pieces), result.final_output

    pieces, final = asyncio.run(streamed())
    assert "26" in final
    assert pieces == final
