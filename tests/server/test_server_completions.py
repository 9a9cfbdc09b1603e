"""POST /v1/completions over a scripted engine: prompt forms, echo, log-probabilities, streams."""

from __future__ import annotations

from typing import Any

import pytest
from server_fakes import Live

PATH = "/v1/completions"
STORY = "The bird flew to 北京.\n\nThen it rested."


def complete(server: Live, **fields: Any) -> dict[str, Any]:
    response = server.client.post(PATH, json={"prompt": "Once", "max_tokens": 200, **fields})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def rebuild(chunks: list[dict[str, Any]], index: int) -> dict[str, Any]:
    """What a client makes of the chunks of one choice."""
    parts = [part for chunk in chunks for part in chunk["choices"] if part["index"] == index]
    choice = dict(parts[-1], text="".join(part["text"] for part in parts))
    assert all(part["finish_reason"] is None for part in parts[:-1])
    if parts[0]["logprobs"] is not None:
        lists = [part["logprobs"] for part in parts]
        choice["logprobs"] = {name: [item for each in lists for item in each[name]] for name in lists[0]}
    if "token_ids" in parts[0]:
        choice["token_ids"] = [token for part in parts for token in part["token_ids"]]
        choice["prompt_token_ids"] = parts[0]["prompt_token_ids"]
    return choice


def test_a_text_prompt(server: Live) -> None:
    server.engine.answers.append(STORY)
    answer = complete(server)
    assert answer["object"] == "text_completion"
    assert answer["id"].startswith("cmpl-")
    (choice,) = answer["choices"]
    assert (choice["text"], choice["finish_reason"]) == (STORY, "stop")
    assert server.engine.seen[0].prompt_token_ids == tuple(server.state.protocol.tokenizer.encode("Once"))


def test_tags_are_plain_text_here(server: Live) -> None:
    text = "</think>\n\n<response>\nx\n</response>\n<tool_call>"
    server.engine.answers.append(text)
    assert complete(server)["choices"][0]["text"] == text


def test_every_form_of_prompt(server: Live) -> None:
    forms: list[tuple[Any, list[tuple[int, ...]]]] = [
        ([5, 6, 7], [(5, 6, 7)]),
        ([[5, 6], [7]], [(5, 6), (7,)]),
        (["a", "b"], [tuple(server.state.protocol.tokenizer.encode(text)) for text in "ab"]),
    ]
    for prompt, wanted in forms:
        server.engine.seen.clear()
        answer = complete(server, prompt=prompt)
        assert [request.prompt_token_ids for request in server.engine.seen] == wanted
        assert len(answer["choices"]) == len(wanted)
        assert answer["usage"]["prompt_tokens"] == sum(map(len, wanted))


def test_choices_are_numbered_by_prompt_and_then_by_choice(server: Live) -> None:
    server.engine.answers.extend(["one", "two", "three", "four"] * 2)
    whole = complete(server, prompt=["a", "b"], n=2)
    assert [(choice["index"], choice["text"]) for choice in whole["choices"]] == list(
        enumerate(["one", "two", "three", "four"])
    )
    assert [request.choice_index for request in server.engine.seen] == [0, 1, 0, 1]
    chunks = server.stream(PATH, prompt=["a", "b"], n=2, max_tokens=200)
    assert [rebuild(chunks, index)["text"] for index in range(4)] == ["one", "two", "three", "four"]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"echo": True},
        {"logprobs": 2},
        {"logprobs": 0},
        {"return_token_ids": True},
        {"stop": "rest"},
        {"max_tokens": 6},
        {"max_tokens": 1},
    ],
)
def test_a_stream_says_what_the_whole_answer_says(server: Live, fields: dict[str, Any]) -> None:
    server.engine.answers.extend([STORY, STORY])
    whole = complete(server, **fields)["choices"][0]
    assert rebuild(server.stream(PATH, **{"prompt": "Once", "max_tokens": 200, **fields}), 0) == whole


def test_echo(server: Live) -> None:
    server.engine.answers.extend([" upon", " upon"])
    assert complete(server, prompt="Once", echo=True)["choices"][0]["text"] == "Once upon"
    ids = server.state.protocol.tokenizer.encode("Once")
    assert complete(server, prompt=ids, echo=True)["choices"][0]["text"] == "Once upon"


def test_legacy_logprobs(server: Live) -> None:
    server.engine.answers.append("a bird")
    logprobs = complete(server, logprobs=1)["choices"][0]["logprobs"]
    *tokens, end = logprobs["tokens"]
    assert "".join(tokens) == "a bird"
    assert end == "</s>"
    assert set(logprobs["token_logprobs"]) == {-0.5}
    offsets = logprobs["text_offset"]
    assert all("a bird"[offset:].startswith(token) for offset, token in zip(offsets, tokens, strict=False))
    assert all(top[token] == -0.5 for token, top in zip(tokens, logprobs["top_logprobs"], strict=False))
    assert all(len(top) == 2 for top in logprobs["top_logprobs"])


def test_text_offsets_count_characters_and_not_the_names_of_half_ones(server: Live) -> None:
    server.engine.answers.append("龘 a")
    logprobs = complete(server, logprobs=0)["choices"][0]["logprobs"]
    *halves, space, letter, _ = logprobs["tokens"]
    assert "".join(halves) == r"bytes:\xe9bytes:\xbebytes:\x98"
    assert (space, letter) == (" ", "a")
    assert logprobs["text_offset"] == [0, 0, 0, 1, 2, 3]


def test_the_default_is_sixteen_tokens(server: Live) -> None:
    server.engine.answers.append("word " * 40)
    response = server.client.post(PATH, json={"prompt": "Once"})
    assert response.json()["usage"]["completion_tokens"] == 16
    assert response.json()["choices"][0]["finish_reason"] == "length"


def test_usage_at_the_end_of_a_stream(server: Live) -> None:
    chunks = server.stream(PATH, prompt="Once", stream_options={"include_usage": True})
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 16


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": ["a", ""]}, "prompt"),
        ({"prompt": {"text": "a"}}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": ["a"] * 1025}, "prompt"),
        ({"prompt": ["a"] * 9, "n": 128}, "prompt"),
        ({"echo": True, "logprobs": 1}, "echo"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"suffix": "end"}, "suffix"),
        ({"best_of": 2}, "best_of"),
        ({"messages": []}, "messages"),
    ],
)
def test_wrong_values_are_named(server: Live, fields: dict[str, Any], param: str) -> None:
    response = server.client.post(PATH, json={"prompt": "Once", **fields})
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param
    assert server.engine.seen == []
    server.still_serves()


def test_an_unknown_token_id_in_an_echoed_prompt(server: Live) -> None:
    for token_id in (-1, 10**9):
        response = server.client.post(PATH, json={"prompt": [5, token_id], "echo": True})
        assert response.status_code == 400
        assert str(token_id) in response.json()["error"]["message"]
    server.still_serves()
