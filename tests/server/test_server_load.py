"""A server with too much to do: time limits, clients that read slowly, long texts beside the event loop, priorities."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from fastapi.responses import JSONResponse
from server_fakes import GREETING, USER, Live, ScriptedEngine, serve

from tern.chat import ChatProtocol
from tern.chat.tokenizer import Tokenizer
from tern.engine import FinishReason, GeneratedToken, TokenLogprob
from tern.server import body as body_module
from tern.server import choices as choices_module
from tern.server import tokenization
from tern.server.generation import TimeLimit
from tern.server.run import DEAF_CLIENT_SECONDS, listen
from tern.server.sink import MOST_UNREAD, Mailbox, MailboxFullError, Update

LONG = "I think about it.\n</think>\n\n" + "and on it goes " * 20_000


# --- time limits -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hasty(protocol: ChatProtocol) -> Iterator[Live]:
    """A server that gives a request no time at all once its engine holds the answer back."""
    with serve(ScriptedEngine(protocol), protocol, request_timeout=0.2) as live:
        yield live


@pytest.mark.parametrize(
    ("path", "fields"), [("/v1/chat/completions", {"messages": USER, "n": 2}), ("/v1/completions", {"prompt": "x"})]
)
def test_a_request_that_takes_too_long_ends_and_so_does_its_work(
    hasty: Live, path: str, fields: dict[str, Any]
) -> None:
    hasty.engine.gate.clear()
    response = hasty.client.post(path, json=fields)
    assert response.status_code == 504
    error = response.json()["error"]
    assert (error["type"], error["code"]) == ("timeout_error", "timeout")
    assert "0.2 s" in error["message"]
    hasty.engine.wait_until(lambda: hasty.engine.num_open == 0)
    hasty.engine.gate.set()


def test_a_stream_that_takes_too_long_ends_with_an_error_event(hasty: Live) -> None:
    hasty.engine.gate.clear()
    before = hasty.engine.finished[FinishReason.CANCELLED]
    response = hasty.client.post("/v1/chat/completions", json={"messages": USER, "stream": True})
    assert response.status_code == 200
    events = [event for event in response.text.split("\n\n") if event.startswith("data: {")]
    assert json.loads(events[-1].removeprefix("data: "))["error"]["code"] == "timeout"
    assert '"finish_reason":"' not in response.text
    assert response.text.endswith("data: [DONE]\n\n")
    hasty.engine.wait_until(lambda: hasty.engine.finished[FinishReason.CANCELLED] == before + 1)
    hasty.engine.gate.set()


def test_a_time_limit_counts_from_the_arrival() -> None:
    limit = TimeLimit(10.0, time.monotonic() - 11.0)
    assert limit.left < -0.9
    assert 9.0 < TimeLimit(10.0, time.monotonic()).left <= 10.0


# --- clients that read slowly ----------------------------------------------------------------------------------------


def updates(count: int, alternatives: int = 0) -> list[Update]:
    tops = tuple(TokenLogprob(7, -1.0, 2) for _ in range(alternatives))
    return [Update(0, (), GeneratedToken(number, top_logprobs=tops)) for number in range(count)]


@pytest.mark.parametrize("alternatives", [0, 4])
def test_a_mailbox_keeps_so_much_and_then_says_so(alternatives: int) -> None:
    async def fill() -> None:
        mailbox, full = Mailbox(most=10), []
        mailbox.on_full = lambda: full.append("full")
        for update in updates(40, alternatives):
            mailbox.post(update)
        assert full == ["full"]
        kept = await mailbox.take(1)
        assert [update.token.token_id for update in kept if update.token] == list(range(10 // (1 + alternatives)))
        for _ in range(2):
            with pytest.raises(MailboxFullError):
                await mailbox.take(1)

    asyncio.run(fill())


def test_a_mailbox_that_is_emptied_in_time_takes_any_number() -> None:
    async def read() -> int:
        mailbox, read = Mailbox(most=10), 0
        for update in updates(100):
            mailbox.post(update)
            if update.token and update.token.token_id % 10 == 9:
                read += len(await mailbox.take(1))
        return read

    assert asyncio.run(read()) == 100


def test_a_client_that_reads_nothing_ends_its_request_and_no_other(
    server: Live, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class SmallMailbox(Mailbox):
        def __init__(self) -> None:
            super().__init__(most=500)

    monkeypatch.setattr(choices_module, "Mailbox", SmallMailbox)
    server.engine.answers.append(LONG)
    host, port = server.url.removeprefix("http://").split(":")
    body = json.dumps({"messages": USER, "stream": True, "logprobs": True, "top_logprobs": 20}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.socket() as deaf, caplog.at_level(logging.WARNING, "tern.server"):
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.settimeout(30)
        deaf.connect((host, int(port)))
        deaf.sendall(head.encode() + body)
        server.engine.wait_until(lambda: server.engine.finished[FinishReason.CANCELLED] > 0)
        server.still_serves()
        assert "reads too slowly" in caplog.text
        heard = b""
        while not heard.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n"):  # it has been cut off, and is told when it listens
            piece = deaf.recv(1 << 20)
            assert piece, "the connection closed without a word"
            heard += piece
    assert b'"code":"client_too_slow"' in heard
    assert b'"finish_reason":"stop"' not in heard


def test_nobody_is_cut_off_for_pausing_a_minute() -> None:
    assert MOST_UNREAD > 60 * 200, "tokens that a fast model writes while its reader looks away"


def test_connections_of_the_deaf_end_one_day() -> None:
    if not hasattr(socket, "TCP_USER_TIMEOUT"):
        pytest.skip("this system has no such option")
    with listen("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()):
        connection, _ = listener.accept()
        with connection:
            found = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)
    assert found == DEAF_CLIENT_SECONDS * 1000


# --- the event loop --------------------------------------------------------------------------------------------------


@pytest.fixture
def threads(server: Live, monkeypatch: pytest.MonkeyPatch) -> dict[str, set[str]]:
    """The names of the threads on which each kind of text work was done."""
    seen: dict[str, set[str]] = {}

    def watch(owner: Any, name: str) -> None:
        function = getattr(owner, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            seen.setdefault(name, set()).add(threading.current_thread().name.rsplit("_", 1)[0])
            return function(*args, **kwargs)

        monkeypatch.setattr(owner, name, watched)

    watch(body_module, "parse_json_object")
    watch(ChatProtocol, "prompt")
    watch(Tokenizer, "encode")
    watch(Tokenizer, "decode")
    watch(JSONResponse, "render")
    watch(tokenization, "_json_in_slices")
    watch(server.engine, "submit")
    monkeypatch.setattr(server.engine, "max_model_len", 2**30)
    return seen


TEXT = "and on it goes " * 10_000
TOOLS = [
    {"type": "function", "function": {"name": f"f{n}", "description": "x" * 900, "parameters": {"type": "object"}}}
    for n in range(100)
]


@pytest.mark.parametrize(
    ("path", "fields", "work"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": TEXT}]}, {"prompt", "encode", "submit"}),
        ("/v1/chat/completions", {"messages": USER * 9000}, {"prompt", "encode", "submit"}),
        ("/v1/chat/completions", {"messages": USER, "tools": TOOLS}, {"prompt", "encode", "submit"}),
        ("/v1/completions", {"prompt": TEXT, "max_tokens": 1}, {"encode", "submit"}),
        ("/v1/completions", {"prompt": [[5] * 500] * 60, "max_tokens": 1, "echo": True}, {"decode", "submit"}),
        ("/tokenize", {"prompt": TEXT}, {"encode", "_json_in_slices"}),
        ("/detokenize", {"tokens": [5] * 200_000}, {"decode", "render"}),
    ],
    ids=["text", "messages", "tools", "prompt", "echo", "tokenize", "detokenize"],
)
def test_long_texts_are_worked_on_beside_the_loop(
    server: Live, threads: dict[str, set[str]], path: str, fields: dict[str, Any], work: set[str]
) -> None:
    response = server.client.post(path, json=fields)
    assert response.status_code == 200
    found = {name: threads[name] for name in work | {"parse_json_object"}}
    assert all(names == {"tern-text"} for names in found.values()), found


def test_a_long_answer_is_written_beside_the_loop(server: Live, threads: dict[str, set[str]]) -> None:
    server.engine.answers.append(GREETING.replace("How are you", "and on " * 1000))
    server.chat()
    assert threads["render"] == {"tern-text"}
    threads.clear()
    server.engine.answers.append(GREETING.replace("How are you", "and on " * 50))
    server.chat(logprobs=True, top_logprobs=20)
    assert threads["render"] == {"tern-text"}


def test_short_texts_do_not_hop(server: Live, threads: dict[str, set[str]]) -> None:
    server.chat()
    assert not any("tern-text" in names for names in threads.values())


@pytest.mark.soak
def test_health_answers_at_once_while_long_texts_are_read(server: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the clock, and generously: what `threads` proves, seen from outside."""
    monkeypatch.setattr(server.engine, "max_model_len", 2**30)
    body = json.dumps({"prompt": TEXT * 7, "max_tokens": 1})  # a megabyte
    readers = [threading.Thread(target=httpx.post, args=[server.url + "/v1/completions"], kwargs={"content": body})
               for _ in range(4)]  # fmt: skip
    for reader in readers:
        reader.start()
    slowest = 0.0
    while any(reader.is_alive() for reader in readers):
        asked = time.perf_counter()
        assert server.client.get("/health").status_code == 200
        slowest = max(slowest, time.perf_counter() - asked)
    for reader in readers:
        reader.join()
    assert slowest < 1.0


# --- the queue -------------------------------------------------------------------------------------------------------


def test_more_prompt_tokens_than_ever_fit_are_no_full_queue(server: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.engine, "token_capacity", 100)
    response = server.client.post("/v1/completions", json={"prompt": [[5] * 60, [6] * 41]})
    assert response.status_code == 400
    assert all(part in response.json()["error"]["message"] for part in ("2 prompts", "101 tokens", "100"))
    for prompts in ([[5] * 60, [6] * 40], [5] * 101):
        assert server.client.post("/v1/completions", json={"prompt": prompts, "n": 3}).status_code == 200


def test_more_prompt_tokens_than_may_wait_are_told_when_to_come_back(server: Live) -> None:
    from tern.errors import QueueFullError

    def refuse(_: Any) -> None:
        raise QueueFullError("9000 prompt tokens are waiting: try again later.", retry_after=7.2)

    submit, server.engine.submit = server.engine.submit, refuse
    try:
        response = server.client.post("/v1/chat/completions", json={"messages": USER})
    finally:
        server.engine.submit = submit
    assert (response.status_code, response.headers["retry-after"]) == (429, "8")
    server.still_serves()
