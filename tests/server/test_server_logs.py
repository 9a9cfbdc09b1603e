"""Request ids and log lines: every answer has its id, no line can be forged, and no text is logged unless asked for."""

from __future__ import annotations

import contextvars
import json
import logging
import re
import sys
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from server_fakes import USER, Live, ScriptedEngine, serve

from tern.chat import ChatProtocol
from tern.errors import OptionError
from tern.server.logs import JsonLines, TextLines, configure_logging, one_line
from tern.server.prompt_log import shown_values
from tern.server.request_record import MAX_ID_LENGTH, RequestRecord, accepted_id, enter

CHAT = "/v1/chat/completions"
SECRET = "Zanzibar"


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.DEBUG)
    return caplog


def access_of(lines: pytest.LogCaptureFixture, request_id: str) -> logging.LogRecord:
    """The access line of a request; the answer may be there a moment before it."""
    for _ in range(2000):
        found = [r for r in lines.records if r.name == "tern.access" and getattr(r, "request_id", "") == request_id]
        if found:
            return found[0]
        time.sleep(0.005)
    raise AssertionError(f"no access line for {request_id}")


@pytest.mark.parametrize("given", ["abc-123", "a" * MAX_ID_LENGTH, "550e8400-e29b-41d4-a716-446655440000", "x/y:z=@+."])
def test_a_client_may_name_its_request(server: Live, given: str) -> None:
    answer = server.client.post(CHAT, json={"messages": USER}, headers={"X-Request-Id": given})
    assert answer.headers["x-request-id"] == given
    assert server.engine.seen[0].request_id.startswith(f"{given}:{answer.json()['id']}")


@pytest.mark.parametrize("given", ["", "a b", "a" * (MAX_ID_LENGTH + 1), "x\tforged", "é", '"quoted"', "a;b", "a\\nb"])
def test_an_id_that_no_log_should_hold_is_replaced(server: Live, given: str) -> None:
    headers = {"X-Request-Id": given.encode("latin-1")}
    answer = server.client.get("/version", headers=headers)  # type: ignore[arg-type]
    assert re.fullmatch("[0-9a-f]{32}", answer.headers["x-request-id"])
    assert accepted_id("a\nb") != "a\nb"


def test_every_answer_has_an_id_of_its_own(server: Live) -> None:
    answers = [
        server.client.get("/health"),
        server.client.get("/nothing"),
        server.client.delete("/v1/models"),
        server.client.post(CHAT, json={"messages": []}),
        server.client.post(CHAT, content=b"{"),
        server.client.post(CHAT, json={"messages": USER, "stream": True}),
        server.client.get("/health", headers={f"x-{i}": "1" for i in range(200)}),
    ]
    ids = [answer.headers["x-request-id"] for answer in answers]
    assert len(set(ids)) == len(ids)


def test_two_requests_of_one_id_are_both_served(server: Live) -> None:
    server.engine.gate.clear()
    headers = {"X-Request-Id": "same"}
    with httpx.stream("POST", server.url + CHAT, json={"messages": USER, "stream": True}, headers=headers) as first:
        server.engine.gate.set()
        assert server.client.post(CHAT, json={"messages": USER}, headers=headers).status_code == 200
        assert b"[DONE]" in first.read()


def test_the_access_line_says_how_it_went(server: Live, lines: pytest.LogCaptureFixture) -> None:
    answer = server.client.post(f"{CHAT}?key={SECRET}", json={"messages": USER}, headers={"X-Request-Id": "whole"})
    usage = answer.json()["usage"]
    record = access_of(lines, "whole")
    fields: dict[str, Any] = record.fields  # type: ignore[attr-defined]
    assert (fields["method"], fields["path"], fields["status"], fields["outcome"]) == ("POST", CHAT, 200, "stop")
    assert fields["prompt_tokens"] == usage["prompt_tokens"]
    assert fields["generated_tokens"] == usage["completion_tokens"]
    assert 0 < fields["first_token_seconds"] <= fields["duration_seconds"]
    assert fields["answer_id"] == answer.json()["id"]
    assert record.getMessage().startswith(f"POST {CHAT} 200, ")
    assert f"stop: {usage['prompt_tokens']} prompt and {usage['completion_tokens']} generated" in record.getMessage()


def test_outcomes(server: Live, lines: pytest.LogCaptureFixture) -> None:
    def outcome(name: str, **fields: Any) -> str:
        server.client.post(CHAT, json={"messages": USER, **fields}, headers={"X-Request-Id": name})
        said: str = access_of(lines, name).fields["outcome"]  # type: ignore[attr-defined]
        return said

    assert outcome("cut", max_tokens=1) == "length"
    server.engine.fail_with = "It broke."
    assert outcome("broken") == "error"
    assert outcome("broken-stream", stream=True) == "error"
    server.engine.fail_with = None
    server.engine.gate.clear()
    headers = {"X-Request-Id": "left"}
    with httpx.stream("POST", server.url + CHAT, json={"messages": USER, "stream": True}, headers=headers) as answer:
        next(answer.iter_bytes())
    assert access_of(lines, "left").fields["outcome"] == "abort"  # type: ignore[attr-defined]


def test_what_machines_ask_by_the_second_is_not_logged(server: Live, lines: pytest.LogCaptureFixture) -> None:
    for path in ("/health", "/ready", "/metrics", "/version"):
        server.client.get(path, headers={"X-Request-Id": path})
    levels = [access_of(lines, path).levelname for path in ("/health", "/ready", "/metrics", "/version")]
    assert levels == ["DEBUG", "DEBUG", "DEBUG", "INFO"]


def test_the_access_log_can_be_off(protocol: ChatProtocol, lines: pytest.LogCaptureFixture) -> None:
    with serve(ScriptedEngine(protocol), protocol, access_log=False) as live:
        live.chat()
    assert [record for record in lines.records if record.name == "tern.access"] == []


def test_lines_of_a_request_have_its_id_on_any_thread(
    server: Live, lines: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def talkative(*_: Any, **__: Any) -> Any:
        logging.getLogger("tern.test").warning("rendering %s", TextLines().format(logging.makeLogRecord({"msg": "x"})))
        raise ValueError

    monkeypatch.setattr(server.state.protocol, "prompt", talkative)
    for size in (1, 100_000):  # on the loop, and on a thread for text
        body = {"messages": [{"role": "user", "content": "x" * size}]}
        assert server.client.post(CHAT, json=body, headers={"X-Request-Id": f"r{size}"}).status_code == 500
        assert f"[r{size}]" in next(r.getMessage() for r in lines.records[::-1] if r.name == "tern.test")


def logged(form: logging.Formatter, message: str, **fields: Any) -> str:
    return form.format(logging.makeLogRecord({"msg": message, "name": "n", "levelname": "INFO", **fields}))


@pytest.fixture
def evil() -> str:
    return "a\nINFO forged\r\x1b[31m\x00\u2028\x85\u202e北京 \x7f\ud800"


def test_a_line_cannot_be_forged(evil: str) -> None:
    text = logged(TextLines(), evil)
    assert text.endswith("a\\nINFO forged\\r\\x1b[31m\\x00\\u2028\\x85\\u202e北京 \\x7f\\ud800")
    assert len(text.splitlines()) == 1
    entry = logged(JsonLines(), evil, fields={"path": evil}, request_id=evil)
    assert entry.isascii()
    assert entry.isprintable()
    assert json.loads(entry)["message"] == json.loads(entry)["path"] == evil


def test_the_lines_of_a_traceback_are_marked(evil: str) -> None:
    try:
        raise ValueError(f"{evil}\n00:00:00 INFO tern.server: forged")
    except ValueError:
        fields = {"exc_info": sys.exc_info()}
    first, *rest = logged(TextLines(), "it broke", **fields).split("\n")
    assert first.endswith("it broke")
    assert rest
    assert all(line.startswith("    | ") and line.isprintable() for line in rest)
    assert "forged" in json.loads(logged(JsonLines(), "it broke", **fields))["exception"]


def test_json_lines_have_these_fields() -> None:
    entry = json.loads(logged(JsonLines(), "x %d", args=(5,), request_id="r", created=0.5, msecs=500.0))
    assert entry == {
        "time": "1970-01-01T00:00:00.500Z",
        "level": "info",
        "logger": "n",
        "message": "x 5",
        "request_id": "r",
    }


def test_paths_and_methods_are_spelt_out(server: Live, lines: pytest.LogCaptureFixture) -> None:
    server.client.get("/v1/%0aforged%1b[2J" + "x" * 500, headers={"X-Request-Id": "path"})
    record = access_of(lines, "path")
    text = TextLines().format(record)
    assert "/v1/\\nforged\\x1b[2J" in text
    assert len(text.splitlines()) == 1
    assert len(text) < 400


def test_no_prompt_no_answer_and_no_key_is_logged(protocol: ChatProtocol, lines: pytest.LogCaptureFixture) -> None:
    with serve(ScriptedEngine(protocol), protocol, api_keys=(f"key-{SECRET}",)) as live:
        live.engine.answers.extend([f"{SECRET}\n</think>\n\n<response>\n{SECRET}\n</response>\n"] * 9)
        tool = {"type": "function", "function": {"name": SECRET}}
        ask = {"messages": [{"role": "user", "content": SECRET}], "user": SECRET, "tools": [tool], "stop": [SECRET]}
        for key in (f"key-{SECRET}", f"wrong-{SECRET}"):
            headers = {"Authorization": f"Bearer {key}"}
            for body in (ask, {**ask, "stream": True}, {**ask, "messages": [{"role": SECRET}]}):
                live.client.post(CHAT, json=body, headers=headers)
            live.client.post("/v1/completions", json={"prompt": SECRET}, headers=headers)
            live.client.post(CHAT, content=f'{{"{SECRET}": '.encode(), headers=headers)
        assert SECRET not in repr(live.state.options)
    ours = [TextLines().format(record) for record in lines.records if record.name.split(".")[0] in ("tern", "uvicorn")]
    assert len(ours) >= 10
    assert [line for line in ours if SECRET in line] == []


def test_requests_are_logged_when_asked_and_prompts_up_to_a_length(
    protocol: ChatProtocol, lines: pytest.LogCaptureFixture
) -> None:
    ask = {"prompt": f"{SECRET}\nis an island", "temperature": 0.5, "stop": [SECRET], "max_tokens": 3}
    for length, shown in ((None, False), (0, False), (4, False), (10, True)):
        lines.clear()
        with serve(ScriptedEngine(protocol), protocol, log_requests=True, max_log_len=length) as live:
            assert live.client.post("/v1/completions", json=ask).status_code == 200
        (record,) = [record for record in lines.records if record.name == "tern.requests"]
        text = TextLines().format(record)
        assert "'temperature': 0.5" in text
        assert "'stop': '<1>'" in text
        assert (SECRET in text) is shown
        assert ("Zanz" in text) is (shown or length == 4)
        assert "island" not in text
        assert len(text.splitlines()) == 1


def test_values_are_shown_and_texts_are_counted() -> None:
    from tern.engine import SamplingParams

    params = SamplingParams(temperature=0.5, bad_words=["x", "y"], logit_bias={5: 1.0})
    assert shown_values(params) == {"temperature": 0.5, "bad_words": "<2>", "logit_bias": "<1>"}


@pytest.fixture
def root_logging() -> Iterator[None]:
    root, uvicorn = logging.getLogger(), logging.getLogger("uvicorn")
    before = root.handlers[:], root.level, uvicorn.level
    yield
    root.handlers[:], level, uvicorn_level = before
    root.setLevel(level)
    uvicorn.setLevel(uvicorn_level)


def test_configured_lines_go_to_standard_error(root_logging: None, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: ARG001
    def speak() -> None:
        enter(RequestRecord("r1", "GET", "/"))
        logging.getLogger("tern.x").info("hello")
        logging.getLogger("tern.x").debug("not this")
        logging.getLogger("uvicorn.error").info("nor this")

    logging.getLogger().handlers.clear()  # those of pytest
    configure_logging("INFO", "json", "warning")
    contextvars.copy_context().run(speak)
    (line,) = capsys.readouterr().err.splitlines()
    assert (json.loads(line)["message"], json.loads(line)["request_id"]) == ("hello", "r1")


@pytest.mark.parametrize("wrong", [("loud",), ("info", "xml"), ("info", "text", "loud"), ("critical",), ("NOTSET",)])
def test_wrong_levels_and_formats(wrong: tuple[str, ...]) -> None:
    with pytest.raises(OptionError, match="it must be"):
        configure_logging(*wrong)


def test_printable_text_stays_as_it_is() -> None:
    assert one_line("GET /北京 200 – ok") == "GET /北京 200 – ok"
