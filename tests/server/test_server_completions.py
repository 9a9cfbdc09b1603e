"""POST /v1/completions over a scripted engine: prompt forms, echo, log-probabilities, streams."""

from __future__ import annotations

from typing import Any

import pytest
from server_fakes import EOS, Live

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
        {"echo": True, "logprobs": 2},
        {"echo": True, "logprobs": 0, "return_token_ids": True, "return_tokens_as_token_ids": True},
        {"echo": True, "logprobs": 1, "max_tokens": 0},
        {"echo": True, "max_tokens": 0},
        {"prompt": "龘 a", "echo": True, "logprobs": 1},
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


def test_echo_with_logprobs_begins_with_those_of_the_prompt(server: Live) -> None:
    server.engine.answers.append(" upon")
    choice = complete(server, prompt="Once 龘 is", echo=True, logprobs=2)["choices"][0]
    assert choice["text"] == "Once 龘 is upon"
    ids = server.state.protocol.tokenizer.encode("Once 龘 is")
    assert server.engine.seen[0].params.prompt_logprobs == 2
    lists = choice["logprobs"]
    assert lists["token_logprobs"][: len(ids) + 1] == [None, *(float(-place) for place in range(1, len(ids))), -0.5]
    assert lists["top_logprobs"][0] is None
    assert all(len(top) == 3 for top in lists["top_logprobs"][1 : len(ids)])
    assert len({len(values) for values in lists.values()}) == 1
    for name, offset in zip(lists["tokens"][:-1], lists["text_offset"], strict=False):
        assert name.startswith("bytes:") or choice["text"][offset:].startswith(name)
    assert lists["text_offset"][len(ids)] == len("Once 龘 is")


def test_a_prompt_is_scored_and_nothing_generated(server: Live) -> None:
    """lm-eval's way to a log-likelihood: context and continuation as the prompt, echoed with log-probabilities."""
    tokenizer = server.state.protocol.tokenizer
    context, continuation = tokenizer.encode("The weather in"), tokenizer.encode(" Beijing")
    for most in (0, 1):
        choice = complete(server, prompt=[context + continuation], echo=True, logprobs=1, max_tokens=most)["choices"][0]
        scores = choice["logprobs"]["token_logprobs"]
        assert len(scores) == len(context + continuation) + most
        assert scores[len(context) :][: len(continuation)] == [
            float(-place) for place in range(len(context), len(context + continuation))
        ]
        assert choice["finish_reason"] == "length"
    assert complete(server, prompt="Once", echo=True, max_tokens=0)["choices"][0]["text"] == "Once"
    assert complete(server, echo=True, max_tokens=0)["usage"]["completion_tokens"] == 0


def test_every_choice_of_every_prompt_is_echoed_with_its_own_scores(server: Live) -> None:
    answer = complete(server, prompt=["ab", "xyz"], n=2, echo=True, logprobs=0, max_tokens=0)
    assert [choice["text"] for choice in answer["choices"]] == ["ab", "ab", "xyz", "xyz"]
    assert [len(choice["logprobs"]["tokens"]) for choice in answer["choices"]] == [2, 2, 3, 3]


def test_prompt_logprobs_in_vllms_form(server: Live) -> None:
    choice = complete(server, prompt="xyz", prompt_logprobs=1)["choices"][0]
    first, second, third = server.state.protocol.tokenizer.encode("xyz")
    assert choice["logprobs"] is None
    assert choice["prompt_logprobs"] == [
        None,
        {
            str(second): {"logprob": -1.0, "rank": 30, "decoded_token": "y"},
            "6": {"logprob": -0.25, "rank": 1, "decoded_token": server.state.protocol.tokenizer.token_text(6)},
        },
        {
            str(third): {"logprob": -2.0, "rank": 30, "decoded_token": "z"},
            "6": {"logprob": -0.25, "rank": 1, "decoded_token": server.state.protocol.tokenizer.token_text(6)},
        },
    ]
    assert complete(server, prompt=[first], prompt_logprobs=0)["choices"][0]["prompt_logprobs"] == [None]
    assert "prompt_logprobs" not in complete(server, echo=True, logprobs=2)["choices"][0]


def test_tokens_called_by_their_ids(server: Live) -> None:
    server.engine.answers.append("bird")
    lists = complete(server, prompt="ab", echo=True, logprobs=1, return_tokens_as_token_ids=True)
    ids = server.state.protocol.tokenizer.encode("abbird")
    logprobs = lists["choices"][0]["logprobs"]
    assert logprobs["tokens"] == [f"token_id:{token}" for token in [*ids, 2]]
    assert set(logprobs["top_logprobs"][1]) == {f"token_id:{ids[1]}", "token_id:6"}
    assert logprobs["text_offset"][:3] == [0, 1, 2]


def test_special_tokens_are_added_when_asked_for(server: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = server.state.protocol.tokenizer
    plain = tokenizer.encode

    def with_begin(text: str, *, add_special_tokens: bool = False) -> list[int]:
        return [1] * add_special_tokens + plain(text)

    monkeypatch.setattr(tokenizer, "encode", with_begin)
    for added in (False, True):
        server.engine.seen.clear()
        answer = complete(server, prompt="Once", add_special_tokens=added, echo=True, max_tokens=0)
        assert server.engine.seen[0].prompt_token_ids == tuple([1] * added + plain("Once"))
        assert answer["choices"][0]["text"] == "<s>" * added + "Once"
    for path, body in (("/v1/completions", {"prompt": [5, 6], "max_tokens": 1}), ("/tokenize", {"prompt": "Once"})):
        response = server.client.post(path, json={**body, "add_special_tokens": True})
        assert response.status_code == 200
    assert server.engine.seen[-1].prompt_token_ids == (5, 6)
    assert response.json()["tokens"] == [1, *plain("Once")]


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


def test_usage_of_a_streamed_completion(server: Live) -> None:
    for always in (False, True):
        options = {"include_usage": True, "continuous_usage_stats": always}
        *chunks, last = server.stream(PATH, prompt="Once", stream_options=options)
        assert last["choices"] == []
        assert last["usage"]["completion_tokens"] == 16
        assert all((chunk["usage"] is not None) == always for chunk in chunks)


def test_token_ids_of_a_completion(server: Live) -> None:
    encode = server.state.protocol.tokenizer.encode
    server.engine.answers.extend(["a bird"] * 2)
    whole = complete(server, prompt=["Once", "x"], return_token_ids=True)["choices"]
    assert [choice["prompt_token_ids"] for choice in whole] == [encode("Once"), encode("x")]
    assert {tuple(choice["token_ids"]) for choice in whole} == {(*encode("a bird"), EOS)}


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
        ({"max_tokens": 0}, "max_tokens"),
        ({"prompt_logprobs": 21}, "prompt_logprobs"),
        ({"prompt_logprobs": 0, "stream": True}, "prompt_logprobs"),
        ({"allowed_token_ids": [0.5]}, "allowed_token_ids"),
        ({"truncate_prompt_tokens": 5}, "truncate_prompt_tokens"),
        ({"use_beam_search": True}, "use_beam_search"),
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
