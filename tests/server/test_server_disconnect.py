"""A client that leaves, and a client that waits: work stops for the one, comments come for the other."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Iterator

import pytest
from server_fakes import USER, Live, ScriptedEngine, serve

from tern.chat import ChatProtocol
from tern.engine import FinishReason, PromptProgress
from tern.server.errors import ClientGoneError
from tern.server.sink import Mailbox, Update
from tern.server.streaming import keep_alive, while_connected, with_comments

LONG = "I think about it.\n</think>\n\n" + "and on it goes " * 2000


def request_bytes(**fields: object) -> bytes:
    """A raw chat request, for clients that leave without a word."""
    body = json.dumps({"messages": USER, **fields}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def connect(server: Live) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=30)


@pytest.mark.parametrize("fields", [{"stream": False}, {"stream": True}, {"stream": True, "n": 3}, {"n": 3}])
def test_leaving_before_the_first_token(server: Live, fields: dict[str, object]) -> None:
    server.engine.gate.clear()
    with connect(server) as client:
        client.sendall(request_bytes(**fields))
        server.engine.wait_until(lambda: len(server.engine.seen) == fields.get("n", 1))
    server.engine.wait_until(lambda: server.engine.num_open == 0)
    assert len(server.engine.cancelled) == fields.get("n", 1)
    server.engine.gate.set()
    server.still_serves()


@pytest.mark.parametrize("stream", [False, True])
def test_leaving_while_tokens_come(server: Live, stream: bool) -> None:
    server.engine.answers.append(LONG)
    with connect(server) as client:
        client.sendall(request_bytes(stream=stream, n=1))
        if stream:
            assert b" 200 " in client.recv(64)
        else:
            server.engine.wait_until(lambda: server.engine.num_open == 1)
    server.engine.wait_until(lambda: server.engine.num_open == 0)
    assert server.engine.finished[FinishReason.CANCELLED] >= 1
    assert len(server.engine.cancelled) == 1
    server.still_serves()


def test_leaving_while_the_body_is_sent(server: Live, caplog: pytest.LogCaptureFixture) -> None:
    with connect(server) as client:
        client.sendall(request_bytes()[:-5])
    server.still_serves()
    assert len(server.engine.seen) == 1
    assert caplog.text == "", "that is no fault of the server"


@pytest.mark.parametrize("turns", range(4))
def test_leaving_in_the_very_turn_in_which_a_token_comes(turns: int) -> None:
    async def leave() -> None:
        mailbox, gone = Mailbox(), asyncio.get_running_loop().create_future()

        async def read_for_ever() -> None:
            while True:
                await mailbox.take(3600)

        async def receive() -> dict[str, str]:
            await gone
            return {"type": "http.disconnect"}

        request = asyncio.ensure_future(while_connected(receive, read_for_ever()))
        await asyncio.sleep(0.01)
        mailbox.post(Update(0))
        for _ in range(turns):
            await asyncio.sleep(0)
        gone.set_result(None)
        with pytest.raises(ClientGoneError):
            await request

    asyncio.run(asyncio.wait_for(leave(), 30))


@pytest.fixture(scope="module")
def patient(protocol: ChatProtocol) -> Iterator[Live]:
    with serve(ScriptedEngine(protocol), protocol, keep_alive_seconds=0.02) as live:
        yield live


@pytest.mark.parametrize(
    ("path", "body"), [("/v1/chat/completions", {"messages": USER}), ("/v1/completions", {"prompt": "x"})]
)
def test_a_silent_stream_has_headers_at_once_and_comments(patient: Live, path: str, body: dict[str, object]) -> None:
    patient.engine.gate.clear()
    with patient.client.stream("POST", path, json={**body, "stream": True}) as response:
        assert response.status_code == 200
        seen = ""
        for text in response.iter_text():
            seen += text
            if seen.count(": keep-alive\n\n") >= 3:
                patient.engine.gate.set()
    assert seen.endswith("data: [DONE]\n\n")
    assert ('"role":"assistant"' in seen.split(": keep-alive")[0]) == ("chat" in path)


@pytest.mark.parametrize(
    ("reading", "said"),
    [
        (PromptProgress(0, 900, True, None), "900 prompt tokens wait in the queue"),
        (PromptProgress(64, 900, False, None), "64 of 900 prompt tokens read"),
        (PromptProgress(64, 900, False, 41.2), "64 of 900 prompt tokens read, about 42 s left"),
    ],
)
def test_a_silent_stream_says_how_far_the_prompt_is(patient: Live, reading: PromptProgress, said: str) -> None:
    patient.engine.gate.clear()
    patient.engine.reading = reading
    body = {"messages": USER, "stream": True}
    with patient.client.stream("POST", "/v1/chat/completions", json=body) as response:
        seen = ""
        for text in response.iter_text():
            seen += text
            if ": keep-alive" in seen:
                patient.engine.reading = None
                patient.engine.gate.set()
    assert f": keep-alive, {said}\n\n" in seen


@pytest.mark.parametrize(
    ("path", "body", "comment", "first", "last"),
    [
        ("/v1/responses", {"input": "x"}, ": keep-alive\n\n", "response.in_progress", "response.completed"),
        ("/v1/messages", {"messages": USER, "max_tokens": 300}, 'event: ping\ndata: {"type":"ping"}\n\n',
         "message_start", "message_stop"),
    ],
)  # fmt: skip
def test_a_silent_stream_of_the_newer_families(
    patient: Live, path: str, body: dict[str, object], comment: str, first: str, last: str
) -> None:
    patient.engine.gate.clear()
    with patient.client.stream("POST", path, json={**body, "stream": True}) as response:
        seen = ""
        for text in response.iter_text():
            seen += text
            if seen.count(comment) >= 3:
                patient.engine.gate.set()
    assert f'"type":"{first}"' in seen.split(comment)[0]
    assert f'"type":"{last}"' in seen.split("\n\n")[-2]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "body"), [("/v1/responses", {"input": "x"}), ("/v1/messages", {"messages": USER, "max_tokens": 300})]
)
def test_leaving_an_answer_of_the_newer_families(
    server: Live, path: str, body: dict[str, object], stream: bool
) -> None:
    server.engine.gate.clear()
    raw = json.dumps({**body, "stream": stream}).encode()
    with connect(server) as client:
        client.sendall(f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(raw)}\r\n\r\n".encode() + raw)
        server.engine.wait_until(lambda: len(server.engine.seen) == 1)
    server.engine.wait_until(lambda: server.engine.num_open == 0)
    assert len(server.engine.cancelled) == 1
    server.engine.gate.set()
    server.still_serves()


def test_tokens_without_text_are_silence_too() -> None:
    class Tokens:
        async def updates(self, silence: float) -> AsyncIterator[list[Update]]:
            for index in range(3):
                await asyncio.sleep(silence)
                yield [Update(index)]

        def progress(self) -> None:
            """No prompt is being read."""

    async def read() -> list[bytes]:
        speak = iter([[], [b"said"], []])
        return [event async for event in with_comments(Tokens(), lambda _: next(speak), 0.01)]  # type: ignore[arg-type]

    assert asyncio.run(read()) == [keep_alive(None), b"said", keep_alive(None)]


def test_the_server_taking_a_request_back_is_an_error_event(server: Live) -> None:
    server.engine.gate.clear()
    body = {"messages": USER, "stream": True}
    with server.client.stream("POST", "/v1/chat/completions", json=body) as response:
        server.engine.wait_until(lambda: server.engine.num_open == 1)
        server.engine.cancel(server.engine.seen[0].request_id)
        text = "".join(response.iter_text())
    assert '"code":"unavailable"' in text
    assert text.endswith("data: [DONE]\n\n")
    server.engine.gate.set()
    server.still_serves()
