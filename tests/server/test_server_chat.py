"""POST /v1/chat/completions over a scripted engine: answers, streams, tools, log-probabilities, usage."""

from __future__ import annotations

import json
from typing import Any

import pytest
from server_fakes import GREETING, USER, WEATHER_CALL, WEATHER_TOOL, Live, rebuild, without_ids

from tern.server.schemas.fields import IGNORED


def test_a_whole_answer(server: Live) -> None:
    answer = server.chat(model="tern-test")
    assert answer["object"] == "chat.completion"
    assert answer["id"].startswith("chatcmpl-")
    assert answer["model"] == "tern-test"
    choice = answer["choices"][0]
    assert choice["message"] == {
        "role": "assistant",
        "content": "Hello, 你好!\n\nHow are you?",
        "reasoning_content": "They greet me.",
        "reasoning": "They greet me.",
    }
    assert (choice["finish_reason"], choice["stop_reason"], choice["logprobs"]) == ("stop", None, None)


def test_usage_counts_prompt_thought_and_cache(server: Live) -> None:
    usage = server.chat()["usage"]
    prompt = server.engine.seen[0].prompt_token_ids
    thought = server.state.protocol.tokenizer.encode("They greet me.\n</think>")
    assert usage["prompt_tokens"] == len(prompt)
    assert usage["completion_tokens"] == len(server.state.protocol.tokenizer.encode(GREETING)) + 1
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["prompt_tokens_details"] == {"cached_tokens": 4}
    assert abs(usage["completion_tokens_details"]["reasoning_tokens"] - len(thought)) <= 1


def test_the_prompt_is_the_rendered_chat(server: Live) -> None:
    server.chat(tools=[WEATHER_TOOL])
    text = server.state.protocol.tokenizer.decode(server.engine.seen[0].prompt_token_ids, skip_special_tokens=False)
    assert "How is the weather?" in text
    assert '"name": "get_weather"' in text
    assert text.endswith("<think>\n")


def test_a_tool_call(server: Live) -> None:
    server.engine.answers.append(WEATHER_CALL)
    choice = server.chat(tools=[WEATHER_TOOL])["choices"][0]
    (call,) = choice["message"]["tool_calls"]
    assert call["type"] == "function"
    assert call["function"]["name"] == "get_weather"
    assert json.loads(call["function"]["arguments"]) == {"location": "Beijing", "unit": "c"}
    assert choice["message"]["content"] is None
    assert choice["message"]["reasoning_content"] == "I should look it up."
    assert choice["finish_reason"] == "tool_calls"


def test_a_tool_call_cut_by_max_tokens_is_length(server: Live) -> None:
    cut = len(server.state.protocol.tokenizer.encode(WEATHER_CALL.split(', "unit"')[0]))
    for stream in (False, True):
        server.engine.answers.append(WEATHER_CALL)
        fields = {"tools": [WEATHER_TOOL], "max_tokens": cut}
        choice = rebuild(server.stream(**fields)) if stream else server.chat(**fields)["choices"][0]
        assert choice["finish_reason"] == "length"
        arguments = choice["message"]["tool_calls"][0]["function"]["arguments"]
        assert arguments.startswith('{"location": "Beijing"')
        assert not arguments.endswith("}")


def test_a_tool_call_cut_by_a_stop_string_is_stop(server: Live) -> None:
    server.engine.answers.append(WEATHER_CALL)
    choice = server.chat(tools=[WEATHER_TOOL], stop="Beijing")["choices"][0]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", "Beijing")
    assert choice["message"]["tool_calls"][0]["function"]["arguments"] == '{"location": "'


def test_tool_choice_none_hides_the_tools(server: Live) -> None:
    server.engine.answers.append(WEATHER_CALL)
    choice = server.chat(tools=[WEATHER_TOOL], tool_choice="none")["choices"][0]
    text = server.state.protocol.tokenizer.decode(server.engine.seen[0].prompt_token_ids)
    assert "get_weather" not in text
    assert "tool_calls" not in choice["message"]
    assert choice["finish_reason"] == "stop"


TWO_CALLS = WEATHER_CALL + WEATHER_CALL.split("</think>\n\n")[1].replace("Beijing", "Paris")


def test_two_calls_have_their_own_index_and_id(server: Live) -> None:
    server.engine.answers.append(TWO_CALLS)
    calls = server.chat(tools=[WEATHER_TOOL])["choices"][0]["message"]["tool_calls"]
    assert [json.loads(call["function"]["arguments"])["location"] for call in calls] == ["Beijing", "Paris"]
    assert calls[0]["id"] != calls[1]["id"]


def test_parallel_tool_calls_false_ends_at_the_second_call(server: Live) -> None:
    for stream in (False, True):
        server.engine.answers.append(TWO_CALLS)
        fields = {"tools": [WEATHER_TOOL], "parallel_tool_calls": False}
        choice = rebuild(server.stream(**fields)) if stream else server.chat(**fields)["choices"][0]
        (call,) = choice["message"]["tool_calls"]
        assert json.loads(call["function"]["arguments"])["location"] == "Beijing"
        assert choice["finish_reason"] == "tool_calls"
    server.still_serves()


@pytest.mark.parametrize(
    ("answer", "fields"),
    [
        (GREETING, {}),
        (GREETING, {"logprobs": True, "top_logprobs": 2}),
        (GREETING, {"return_token_ids": True}),
        (GREETING, {"stop": ["are"]}),
        (GREETING, {"stop": ["are"], "include_stop_str_in_output": True}),
        (GREETING, {"max_tokens": 7}),
        (GREETING, {"max_tokens": 3}),
        (GREETING, {"reasoning_max_tokens": 2}),
        (WEATHER_CALL, {"tools": [WEATHER_TOOL]}),
        (TWO_CALLS, {"tools": [WEATHER_TOOL], "logprobs": True}),
        (TWO_CALLS, {}),
        ("</think>", {}),
        ("", {}),
        ("a\n</think>\n\n<response>\n```\n\n\n中\n\n```\n</response>\n", {}),
    ],
)
def test_a_stream_says_what_the_whole_answer_says(server: Live, answer: str, fields: dict[str, Any]) -> None:
    server.engine.answers.extend([answer, answer])
    whole = server.chat(**fields)["choices"][0]
    streamed = rebuild(server.stream(**fields))
    assert without_ids(streamed) == without_ids(whole)
    assert whole["finish_reason"] in ("stop", "length", "tool_calls")


def test_the_form_of_a_stream(server: Live) -> None:
    server.engine.answers.append(WEATHER_CALL)
    chunks = server.stream(tools=[WEATHER_TOOL], stream_options={"include_usage": True})
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks}) == 1
    first, *deltas, finish, usage = chunks
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert finish["choices"][0]["delta"] == {}
    assert finish["choices"][0]["finish_reason"] == "tool_calls"
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] > 0
    heads = [call for chunk in deltas for call in chunk["choices"][0]["delta"].get("tool_calls", ())]
    assert heads[0]["type"] == "function"
    assert heads[0]["id"]
    assert all(set(call) == {"index", "function"} for call in heads[1:])


def test_usage_in_every_chunk(server: Live) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = server.stream(stream_options=options)
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts[0] == 0
    assert counts == sorted(counts)
    assert counts[-1] == chunks[-1]["usage"]["total_tokens"] - chunks[-1]["usage"]["prompt_tokens"]


def test_several_choices_keep_apart(server: Live) -> None:
    server.engine.answers.extend(["a\n</think>\n\nfirst", "b\n</think>\n\nsecond", "c\n</think>\n\nthird"] * 2)
    whole = server.chat(n=3)
    assert [choice["message"]["content"] for choice in whole["choices"]] == ["first", "second", "third"]
    assert [choice["index"] for choice in whole["choices"]] == [0, 1, 2]
    assert [request.choice_index for request in server.engine.seen] == [0, 1, 2]
    chunks = server.stream(n=3)
    assert [rebuild(chunks, index) for index in range(3)] == whole["choices"]
    assert whole["usage"]["prompt_tokens"] == len(server.engine.seen[0].prompt_token_ids)


def test_logprobs(server: Live) -> None:
    server.engine.answers.append("好\n</think>\n\nok")
    content = server.chat(logprobs=True, top_logprobs=2)["choices"][0]["logprobs"]["content"]
    assert b"".join(bytes(entry["bytes"]) for entry in content).decode().startswith("好\n</think>\n\nok")
    assert all(entry["logprob"] == -0.5 and len(entry["top_logprobs"]) == 2 for entry in content)
    assert any(entry["token"].startswith("bytes:\\x") for entry in content)
    server.engine.answers.append("好\n</think>\n\nok")
    content = server.chat(logprobs=True)["choices"][0]["logprobs"]["content"]
    assert all(entry["top_logprobs"] == [] for entry in content)


def test_token_ids(server: Live) -> None:
    answer = server.chat(return_token_ids=True)
    assert answer["prompt_token_ids"] == list(server.engine.seen[0].prompt_token_ids)
    ids = answer["choices"][0]["token_ids"]
    assert server.state.protocol.tokenizer.decode(ids) == GREETING
    chunks = server.stream(return_token_ids=True)
    assert chunks[0]["prompt_token_ids"] == answer["prompt_token_ids"]


def test_a_stop_string_counts_only_after_the_thought(server: Live) -> None:
    server.engine.answers.append("greet the STOP sign\n</think>\n\nAnswer STOP here")
    choice = server.chat(stop="STOP")["choices"][0]
    assert choice["message"]["reasoning_content"] == "greet the STOP sign"
    assert choice["message"]["content"] == "Answer "
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", "STOP")


def test_a_stop_token_is_named_and_not_shown(server: Live) -> None:
    (token,) = server.state.protocol.tokenizer.encode("!")
    choice = server.chat(stop_token_ids=[token])["choices"][0]
    assert choice["message"]["content"] == "Hello, 你好"
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", token)
    choice = server.chat(stop_token_ids=[token], include_stop_str_in_output=True)["choices"][0]
    assert choice["message"]["content"] == "Hello, 你好!"


def test_the_end_token_is_never_shown(server: Live) -> None:
    for more in ({}, {"include_stop_str_in_output": True, "stop": ["never"], "stop_token_ids": [7]}):
        server.engine.answers.append(GREETING.replace("Hello", "Hello<|im_start|>"))
        choice = server.chat(skip_special_tokens=False, **more)["choices"][0]
        assert choice["message"]["content"] == "Hello<|im_start|>, 你好!\n\nHow are you?", "others are"


def test_no_top_logprobs_need_no_logprobs(server: Live) -> None:
    assert server.chat(top_logprobs=0)["choices"][0]["logprobs"] is None


def test_a_thought_out_of_budget_is_closed_and_answered(server: Live) -> None:
    for field in ("reasoning_max_tokens", "thinking_budget"):
        server.engine.answers.append("I think and think and think and never end")
        choice = server.chat(**{field: 6})["choices"][0]
        assert choice["message"]["content"] == "forced answer"
        assert choice["message"]["reasoning_content"].startswith("I think")


@pytest.mark.parametrize("fields", [{"reasoning_effort": "none"}, {"chat_template_kwargs": {"enable_thinking": False}}])
def test_thinking_off(server: Live, fields: dict[str, Any]) -> None:
    server.engine.answers.append("Hi\n</response>\n")
    message = server.chat(**fields)["choices"][0]["message"]
    assert (message["content"], message["reasoning_content"]) == ("Hi", None)
    text = server.state.protocol.tokenizer.decode(server.engine.seen[0].prompt_token_ids)
    assert text.endswith("<think>\n\n</think>\n\n<response>\n")


def test_reasoning_effort_sets_a_budget(server: Live) -> None:
    for effort in ("low", "medium", "high"):
        server.chat(reasoning_effort=effort)
    server.chat(reasoning_effort="low", reasoning_max_tokens=5)
    limits = [request.params.reasoning_max_tokens for request in server.engine.seen]
    assert limits == [1024, 8192, None, 5]


def test_either_name_of_the_limit(server: Live) -> None:
    for field in ("max_tokens", "max_completion_tokens"):
        assert server.chat(**{field: 5})["usage"]["completion_tokens"] == 5


def test_a_history_with_thought_and_tool_result_is_accepted(server: Live) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": '{"location": "Beijing"}'}}
    history = [
        {"role": "developer", "content": "Be brief."},
        *USER,
        {"role": "assistant", "content": None, "reasoning_content": "Look.", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": '{"temperature": 26}'},
    ]
    assert server.chat(messages=history, tools=[WEATHER_TOOL])["choices"][0]["finish_reason"] == "stop"
    text = server.state.protocol.tokenizer.decode(server.engine.seen[0].prompt_token_ids)
    assert '<tool_response>\n{"temperature": 26}\n</tool_response>' in text


def test_null_fields_are_absent_and_harmless_fields_ignored(server: Live) -> None:
    nulls = dict.fromkeys(("temperature", "stop", "tools", "tool_choice", "n", "seed", "logit_bias", "response_format"))
    ignored = {
        "user": "u",
        "metadata": {"a": "b"},
        "store": True,
        "service_tier": "auto",
        "safety_identifier": "s",
        "prompt_cache_key": "k",
        "prompt_cache_retention": "24h",
        "prediction": {"type": "content", "content": "x"},
        "request_id": "r",
        "max_streaming_response_tokens": 4,
    }
    assert ignored.keys() == IGNORED.keys()
    neutral = {"response_format": {"type": "text"}, "tool_choice": "auto"}
    assert server.chat(**{**nulls, **ignored, **neutral})["choices"][0]["finish_reason"] == "stop"


def test_a_failing_engine_is_an_error_and_not_an_answer(server: Live) -> None:
    server.engine.fail_with = "The engine failed while computing this request."
    response = server.client.post("/v1/chat/completions", json={"messages": USER})
    assert response.status_code == 500
    assert response.json()["error"]["message"] == server.engine.fail_with
    chunks = server.stream()
    assert chunks[-1]["error"]["message"] == server.engine.fail_with
    assert all(choice["finish_reason"] is None for chunk in chunks[:-1] for choice in chunk["choices"])
    server.engine.fail_with = None
    server.still_serves()


def test_prompt_logprobs_and_tokens_called_by_their_ids(server: Live) -> None:
    answer = server.chat(prompt_logprobs=1, logprobs=True, top_logprobs=1, return_tokens_as_token_ids=True, n=2)
    ids = server.engine.seen[0].prompt_token_ids
    assert answer["prompt_logprobs"][0] is None
    assert [
        each[str(token)]["logprob"] for token, each in zip(ids[1:], answer["prompt_logprobs"][1:], strict=True)
    ] == [float(-place) for place in range(1, len(ids))]
    for choice in answer["choices"]:
        first = choice["logprobs"]["content"][0]
        assert first["token"] == f"token_id:{server.state.protocol.tokenizer.encode(bytes(first['bytes']).decode())[0]}"
        assert first["top_logprobs"][0]["token"] == "token_id:6"
    streamed = rebuild(server.stream(logprobs=True, return_tokens_as_token_ids=True))
    assert all(entry["token"].startswith("token_id:") for entry in streamed["logprobs"]["content"])


@pytest.mark.parametrize("fields", [{"max_tokens": 0}, {"prompt_logprobs": 1, "stream": True}])
def test_scores_that_a_chat_cannot_have(server: Live, fields: dict[str, Any]) -> None:
    response = server.client.post("/v1/chat/completions", json={"messages": USER, **fields})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == next(iter(fields))
    server.still_serves()
