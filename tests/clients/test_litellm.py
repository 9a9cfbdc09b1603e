"""`litellm`, by which many programs reach any server: as OpenAI's, as vLLM's and, translated, as Anthropic's."""

from __future__ import annotations

import json
from typing import Any

import pytest

from recipes.tiny.evaluate import WEATHER_TOOL
from tests.clients.conftest import MODEL, Served

SUM: list[Any] = [{"role": "user", "content": "What is 12 + 30?"}]
WEATHER: list[Any] = [{"role": "user", "content": "How's the weather in Beijing today?"}]


@pytest.fixture
def litellm() -> Any:
    return pytest.importorskip("litellm")


@pytest.mark.parametrize("provider", ["openai", "hosted_vllm"])
def test_whole_and_streamed(litellm: Any, served: Served, provider: str) -> None:
    ask: dict[str, Any] = {
        "model": f"{provider}/{MODEL}",
        "api_base": served.v1,
        "api_key": "none",
        "messages": SUM,
        "temperature": 0,
    }
    message = litellm.completion(**ask).choices[0].message
    assert "42" in message.content
    assert message.reasoning_content
    deltas = [chunk.choices[0].delta for chunk in litellm.completion(**ask, stream=True)]
    assert "".join(delta.content or "" for delta in deltas) == message.content
    thought = "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas)
    assert thought == message.reasoning_content


def test_a_tool_call(litellm: Any, served: Served) -> None:
    answer = litellm.completion(
        model=f"hosted_vllm/{MODEL}", api_base=served.v1, messages=WEATHER, tools=[WEATHER_TOOL], temperature=0
    )
    (call,) = answer.choices[0].message.tool_calls
    assert answer.choices[0].finish_reason == "tool_calls"
    assert call.function.name == "get_weather"
    assert json.loads(call.function.arguments)["location"] == "Beijing"


def test_errors_keep_their_class(litellm: Any, served: Served) -> None:
    with pytest.raises(litellm.ContextWindowExceededError):
        litellm.completion(
            model=f"hosted_vllm/{MODEL}",
            api_base=served.v1,
            messages=[{"role": "user", "content": "word " * 20_000}],
            num_retries=0,
        )


def test_as_an_anthropic_server(litellm: Any, served: Served) -> None:
    answer = litellm.completion(
        model=f"anthropic/{MODEL}", api_base=served.url, api_key="none", messages=SUM, temperature=0, max_tokens=500
    )
    assert "42" in answer.choices[0].message.content
