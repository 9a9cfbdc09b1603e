"""Fields that several families share: sampling and forms of answers reach the engine from each, padding from none."""

from __future__ import annotations

from typing import Any

import pytest
from openapi_probes import CHAT, COMPLETION, MESSAGE, REQUESTS, RESPONSE
from server_fakes import Live

SAMPLING: dict[str, Any] = {
    "temperature": 0.5,
    "top_p": 0.9,
    "top_k": 7,
    "min_p": 0.1,
    "frequency_penalty": 0.2,
    "presence_penalty": -0.3,
    "repetition_penalty": 1.1,
    "bad_words": ["weather"],
    "allowed_token_ids": [5, 6],
    "seed": 42,
    "stop": ["x"],
    "stop_token_ids": [9],
    "include_stop_str_in_output": True,
    "ignore_eos": True,
    "min_tokens": 3,
    "skip_special_tokens": False,
}
"""None of these values is a default."""

SCHEMA: dict[str, Any] = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
FORMS: list[tuple[str, dict[str, Any]]] = [
    *(
        (path, fields)
        for path in (CHAT, COMPLETION, RESPONSE)
        for fields in (
            {"structured_outputs": {"json": SCHEMA}},
            {"guided_json": SCHEMA},
            {"guided_regex": "[ab]{2}"},
            {"guided_choice": ["ja", "nein"]},
            {"guided_grammar": 'start: "x"'},
            {"guided_json_object": True},
        )
    ),
    (CHAT, {"response_format": {"type": "json_object"}}),
    (COMPLETION, {"response_format": {"type": "json_object"}}),
    (RESPONSE, {"text": {"format": {"type": "json_schema", "name": "n", "schema": SCHEMA}}}),
    (MESSAGE, {"output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}}),
]


@pytest.mark.parametrize("path", [CHAT, COMPLETION, RESPONSE])
def test_every_sampling_field_reaches_the_engine(server: Live, path: str) -> None:
    limit = {CHAT: "max_completion_tokens", COMPLETION: "max_tokens", RESPONSE: "max_output_tokens"}[path]
    more = {"logit_bias": {"17": -100, "18": 1.5}, "priority": 3, limit: 50}
    answer = server.client.post(path, json={**REQUESTS[path][1], **SAMPLING, **more})
    assert answer.status_code == 200, answer.text
    (request,) = server.engine.seen
    for name, value in SAMPLING.items():
        assert getattr(request.params, name) == (tuple(value) if isinstance(value, list) else value), name
    assert request.params.logit_bias == {17: -100, 18: 1.5}
    assert request.params.max_tokens == 50
    assert request.priority == 3
    assert tuple(server.state.protocol.tokenizer.encode(" weather")) in request.bad_token_sequences


@pytest.mark.parametrize(("path", "fields"), FORMS, ids=str)
def test_every_form_reaches_the_engine(server: Live, path: str, fields: dict[str, Any]) -> None:
    for more, is_held in (({}, False), (fields, True)):
        answer = server.client.post(path, json={**REQUESTS[path][1], **more})
        assert answer.status_code == 200, answer.text
        assert (server.engine.seen[-1].grammar is not None) == is_held


@pytest.mark.parametrize("path", [CHAT, COMPLETION])
def test_obfuscation_changes_nothing(server: Live, path: str) -> None:
    body = REQUESTS[path][1]
    plain = server.stream(path, **body)
    asked = server.stream(path, **body, stream_options={"include_obfuscation": True})
    for chunk in (*plain, *asked):
        for volatile in ("id", "created"):
            del chunk[volatile]
    assert asked == plain
