"""`langchain-openai` as people use it: a chat model, its stream, structured output and an agent with a tool."""

from __future__ import annotations

from typing import Annotated, Any

import pytest
from pydantic import BaseModel, Field

from recipes.tiny.evaluate import WEATHER_TOOL
from tests.clients.conftest import MODEL, Served

QUESTION = "How's the weather in Beijing today?"


class City(BaseModel):
    """A city and its country."""

    name: Annotated[str, Field(max_length=12)]
    country: Annotated[str, Field(max_length=12)]


@pytest.fixture
def model(served: Served) -> Any:
    chat = pytest.importorskip("langchain_openai")
    return chat.ChatOpenAI(model=MODEL, base_url=served.v1, api_key="none", temperature=0, max_tokens=600)


def test_invoke_and_stream_say_the_same(model: Any) -> None:
    whole = model.invoke("What is 12 + 30?")
    assert "42" in whole.content
    assert whole.response_metadata["finish_reason"] == "stop"
    assert whole.usage_metadata["output_token_details"]["reasoning"] > 0
    assert "".join(chunk.content for chunk in model.stream("What is 12 + 30?")) == whole.content


def test_an_agent_calls_its_tool_and_answers(model: Any) -> None:
    agents = pytest.importorskip("langchain.agents")
    tools = pytest.importorskip("langchain_core.tools")
    asked = []

    def get_weather(location: str, unit: str) -> str:
        asked.append((location, unit))
        return '{"temperature": 26, "unit": "c"}'

    function = WEATHER_TOOL["function"]
    tool = tools.StructuredTool.from_function(
        get_weather, description=function["description"], args_schema=function["parameters"]
    )
    agent = agents.create_agent(model, [tool])
    answer = agent.invoke({"messages": [{"role": "user", "content": QUESTION}]})["messages"]
    assert asked == [("Beijing", "c")]
    assert [message.type for message in answer] == ["human", "ai", "tool", "ai"]
    assert "26" in answer[-1].content


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_structured_output(model: Any, method: str) -> None:
    assert isinstance(model.with_structured_output(City, method=method).invoke("Name a city."), City)
