"""What a client may send: the classes of docs/security.md that come in by HTTP, a test for each."""

from __future__ import annotations

import hmac
import json
from typing import Any

import pytest

from tern.chat import ChatProtocol
from tern.server import ServerOptions
from tern.server.auth import keys_from_file, owner_of
from tern.server.errors import AuthenticationError
from tern.server.schemas.chat import ChatRequest
from tern.server.schemas.completion import CompletionRequest
from tests.server.server_fakes import USER, Live, ScriptedEngine, serve

CHAT = "/v1/chat/completions"
NUMBERS = [0, -1, 2**31, -(2**31) - 1, 2**63, 2**64, 10**400, -(10**18), 1e308, -1e308, 5e-324, -0.0]
"""At and beyond the borders of every kind of integer; 10**400 is no float."""


def schema_bomb(depth: int) -> dict[str, Any]:
    """A schema whose references double at each level."""
    definitions: dict[str, Any] = {
        f"a{level}": {"anyOf": [{"$ref": f"#/$defs/a{level + 1}"}] * 2} for level in range(depth)
    }
    return {"$defs": {**definitions, f"a{depth}": {"type": "string"}}, "$ref": "#/$defs/a0"}


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


BOMBS: dict[str, dict[str, Any]] = {
    "many tools": {"tools": [{"type": "function", "function": {"name": f"f{i}"}} for i in range(10_000)]},
    "many choices": {"n": 10**9},
    "many stops": {"stop": ["x"] * 100_000},
    "many messages": {"messages": [{"role": "user", "content": ""}] * 100_000},
    "wide bias": {"logit_bias": {str(i): 1 for i in range(100_000)}},
    "deep schema": {"tools": [{"type": "function", "function": {"name": "f", "parameters": nested(150)}}]},
    "doubling schema": {"response_format": {"type": "json_schema", "json_schema": {"schema": schema_bomb(60)}}},
    "endless schema": {"structured_outputs": {"json": {"$ref": "#"}}},
    "nested repeats": {"structured_outputs": {"regex": "((((a{1,99}){1,99}){1,99}){1,99}){1,99}"}},
    "backtracking": {"structured_outputs": {"regex": "(a|a)*(a+)+$" * 200}},
    "long regex": {"structured_outputs": {"regex": "a?" * 500_000}},
    "endless grammar": {"structured_outputs": {"grammar": 'root ::= root root | "a"'}},
}


def test_every_number_has_a_range(protocol: ChatProtocol) -> None:
    """Unchecked integers from requests: whatever the number, an answer or a named refusal, never a fault."""
    with serve(ScriptedEngine(protocol), protocol) as live:
        for path, schema, body in (
            (CHAT, ChatRequest, {"messages": USER, "max_tokens": 1}),
            ("/v1/completions", CompletionRequest, {"prompt": "x", "max_tokens": 1}),
        ):
            for name in schema.model_fields:
                for number in NUMBERS:
                    answer = live.client.post(path, content=json.dumps({**body, name: number}).encode())
                    assert answer.status_code < 500, (name, number, answer.text)
        ids = [[number] for number in NUMBERS]
        for value in (*ids, [*ids]):
            assert live.client.post("/v1/completions", json={"prompt": value}).status_code < 500
            assert live.client.post("/detokenize", json={"tokens": value}).status_code < 500
        live.still_serves()


@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS)
def test_lists_schemas_and_grammars_are_bounded(server: Live, bomb: dict[str, Any]) -> None:
    """Exhaustion by lists, tools, schemas, regular expressions and grammars: refused or answered, and nothing stays."""
    answer = server.client.post(CHAT, json={"messages": USER, "max_tokens": 4, **bomb})
    assert answer.status_code in (200, 400, 429), answer.text
    assert len(answer.content) < 10_000
    server.still_serves()


@pytest.mark.parametrize(
    "kwargs", [{"chat_template": "x"}, {"tools": []}, {"messages": []}, {"tokenize": False}, {"a": 1}]
)
def test_template_variables_are_an_allow_list(server: Live, kwargs: dict[str, Any]) -> None:
    """Template arguments that change the rendering or block the loop: only `enable_thinking` passes."""
    for path in (CHAT, "/tokenize"):
        assert server.client.post(path, json={"messages": USER, "chat_template_kwargs": kwargs}).status_code == 400
    assert server.engine.seen == []


def test_no_template_comes_with_a_request(server: Live) -> None:
    """Template injection: the template is the checkpoint's, and what a message holds is text to it."""
    probe = "{{ 7 * 191 }}{% include '/etc/passwd' %}"
    refused = server.client.post(CHAT, json={"messages": USER, "chat_template": probe})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "chat_template")
    answer = server.client.post("/tokenize", json={"messages": [{"role": "user", "content": probe}]}).json()
    text = server.client.post("/detokenize", json={"tokens": answer["tokens"]}).json()["prompt"]
    assert probe in text
    assert "1337" not in text


@pytest.mark.parametrize("kind", ["image_url", "video_url", "input_audio", "file"])
def test_no_url_of_a_request_is_fetched(server: Live, kind: str) -> None:
    """Server-side requests: parts that name a URL are refused as they stand."""
    part = {"type": kind, kind: {"url": "http://169.254.169.254/latest/meta-data/"}}
    answer = server.client.post(CHAT, json={"messages": [{"role": "user", "content": [part]}]})
    assert answer.status_code == 400
    server.still_serves()


def test_a_client_cannot_choose_its_corner_of_the_cache(server: Live) -> None:
    """Reading others' prompts by the time a prefix takes: the salt is the server's, made of the key."""
    assert server.client.post(CHAT, json={"messages": USER, "cache_salt": "theirs"}).status_code == 400


class Asking:
    """A request with this key."""

    def __init__(self, key: str) -> None:
        self.headers = {"authorization": f"Bearer {key}"}


def test_every_key_is_compared_whichever_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """API keys by timing: as many comparisons, of as many bytes, whatever is sent."""
    compared: list[tuple[int, int]] = []
    compare = hmac.compare_digest

    def counting(a: bytes, b: bytes) -> bool:
        compared.append((len(a), len(b)))
        return compare(a, b)

    monkeypatch.setattr("tern.server.auth.hmac.compare_digest", counting)
    keys = ("first", "second-which-is-longer", "third")
    for given in (*keys, "f", "x" * 5000):
        compared.clear()
        try:
            assert owner_of(Asking(given), keys) == given  # type: ignore[arg-type]
        except AuthenticationError:
            assert given not in keys
        assert compared == [(32, 32)] * 3


def test_keys_of_a_file(tmp_path: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Keys by the process list or a shared file: they may come from a file that nobody else can write."""
    from tern.errors import OptionError

    file = tmp_path / "keys"
    file.write_text("# for the team\nalpha\n\n  beta  \nalpha\n", encoding="utf-8")
    file.chmod(0o600)
    assert keys_from_file(file) == ("alpha", "beta")
    assert caplog.messages == []
    file.chmod(0o644)
    assert keys_from_file(file) == ("alpha", "beta")
    assert "may be read by others (mode 644)" in caplog.messages[0]
    assert "alpha" not in caplog.text
    for mode, content, said in ((0o622, b"k", "may be written by others"), (0o600, b"# \n\n", "holds no key"),
                                (0o600, b"\xff", "not UTF-8"), (0o600, b"k" * 1_000_001, "more than")):  # fmt: skip
        file.write_bytes(content)
        file.chmod(mode)
        with pytest.raises(OptionError, match=said):
            keys_from_file(file)
    assert "alpha" not in repr(ServerOptions(api_keys=("alpha",)))


@pytest.mark.parametrize("stream", [False, True])
def test_details_stay_in_the_log(
    server: Live, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, stream: bool
) -> None:
    """Details in errors: a fault's text and place are for the log, whether the answer had begun or not."""

    def broken(*_: Any, **__: Any) -> Any:
        raise ValueError("/srv/secret/place")

    monkeypatch.setattr(f"tern.server.chat_answers.{'by_choice' if stream else 'whole_answer'}", broken)
    monkeypatch.setattr("tern.server.chat_completions.whole_answer", broken)
    answer = server.client.post(CHAT, json={"messages": USER, "stream": stream})
    assert (answer.status_code, '"code":"internal"' in answer.text) == (200 if stream else 500, True)
    assert "secret" not in answer.text
    assert "ValueError" not in answer.text
    assert "/srv/secret/place" in caplog.text
    monkeypatch.undo()
    server.still_serves()
