"""Web pages and other strangers: CORS, the Host and Origin of requests, limits on headers and connections."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import uvicorn
from server_fakes import USER, Live, ScriptedEngine, serve
from starlette.datastructures import Headers

from tern.chat import ChatProtocol
from tern.errors import OptionError
from tern.server import ServerOptions
from tern.server.connections import guarded_protocol
from tern.server.errors import ForbiddenError
from tern.server.guard import MAX_HEADERS, check_browser
from tern.server.run import server_config

CHAT = "/v1/chat/completions"
APP = "https://app.example"


def may(method: str = "POST", *, options: dict[str, Any] | None = None, **headers: str) -> str:
    """The code of the refusal, or "" if there is none."""
    given = {"host": "localhost:8000", **headers}
    try:
        check_browser(method, Headers(given), ServerOptions(**(options or {})))
    except ForbiddenError as error:
        return error.code
    return ""


@pytest.mark.parametrize(
    "host", ["localhost", "localhost:8000", "127.0.0.1:8000", "[::1]:8000", "box", "my.localhost", "10.0.0.7", ""]
)
def test_names_that_no_stranger_can_point_here_are_served(host: str) -> None:
    assert may(host=host) == ""


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "evil.example.", "127.0.0.1.evil.example", "["])
def test_a_rebound_name_is_refused(host: str) -> None:
    assert may("GET", host=host) == "host_not_allowed"
    assert may("GET", host=host, options={"api_keys": ("k",)}) == ""
    assert may("GET", host=host, options={"host": "0.0.0.0", "allow_public": True}) == ""


def test_hosts_may_be_allowed() -> None:
    options = {"allowed_hosts": ("tern.example",)}
    assert may(host="Tern.Example:443", options=options) == ""
    assert may(host="www.tern.example", options=options) == "host_not_allowed"


@pytest.mark.parametrize(
    ("origin", "code"),
    [
        ("http://localhost:8000", ""),
        ("https://localhost:8000", ""),
        ("http://localhost:3000", "origin_not_allowed"),
        ("http://localhost", "origin_not_allowed"),
        ("https://evil.example", "origin_not_allowed"),
        ("null", "origin_not_allowed"),
        ("http://localhost:8000:1", "origin_not_allowed"),
        ("", "origin_not_allowed"),
    ],
)
def test_a_page_from_elsewhere_may_ask_for_no_work(origin: str, code: str) -> None:
    assert may(origin=origin) == code
    assert may("GET", origin=origin) == "", "the page cannot read the answer"
    assert may(origin=origin, options={"api_keys": ("k",)}) == "", "a page has no key"
    assert may(origin=origin, options={"allowed_origins": ("*",)}) == ""


def test_a_form_on_a_strange_page_reaches_no_engine(protocol: ChatProtocol) -> None:
    with serve(ScriptedEngine(protocol), protocol) as live:
        headers = {"Origin": "https://evil.example", "Content-Type": "text/plain"}
        answer = live.client.post(CHAT, content=b'{"messages": [{"role": "user", "content": "x"}]}', headers=headers)
        assert answer.status_code == 403
        assert answer.json()["error"]["code"] == "origin_not_allowed"
        assert "--allowed-origins" in answer.json()["error"]["message"]
        assert live.engine.seen == []
        assert live.client.get("/health", headers={"Host": "evil.example"}).status_code == 403
        live.still_serves()


def test_without_origins_there_is_no_cors(protocol: ChatProtocol) -> None:
    with serve(ScriptedEngine(protocol), protocol) as live:
        ask = {"Origin": APP, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}
        answer = live.client.options(CHAT, headers=ask)
        assert answer.status_code == 405
        assert [name for name in answer.headers if name.startswith("access-control")] == []


@pytest.fixture
def web(protocol: ChatProtocol) -> Iterator[Live]:
    with serve(ScriptedEngine(protocol), protocol, allowed_origins=(APP,)) as live:
        yield live


def test_an_allowed_page_may_ask_and_read(web: Live) -> None:
    ask = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
    preflight = web.client.options(CHAT, headers={"Origin": APP, **ask})
    assert preflight.status_code == 200
    assert preflight.headers["access-control-allow-origin"] == APP
    assert "POST" in preflight.headers["access-control-allow-methods"]
    assert preflight.headers["access-control-allow-headers"] == "authorization,content-type"
    assert "access-control-allow-credentials" not in preflight.headers
    for body, status in (({"messages": USER}, 200), ({"messages": []}, 400)):
        answer = web.client.post(CHAT, json=body, headers={"Origin": APP})
        assert answer.status_code == status
        assert answer.headers["access-control-allow-origin"] == APP
        assert "X-Request-Id" in answer.headers["access-control-expose-headers"]


def test_another_page_may_not(web: Live) -> None:
    foreign = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
    assert "access-control-allow-origin" not in web.client.options(CHAT, headers=foreign).headers
    assert web.client.post(CHAT, json={"messages": USER}, headers=foreign).status_code == 403
    assert web.engine.seen == []


def test_credentials_are_for_named_origins_only(protocol: ChatProtocol) -> None:
    with pytest.raises(OptionError, match="without \\*"):
        ServerOptions(allowed_origins=("*",), allow_credentials=True)
    with serve(ScriptedEngine(protocol), protocol, allowed_origins=(APP,), allow_credentials=True) as live:
        answer = live.client.post(CHAT, json={"messages": USER}, headers={"Origin": APP})
        assert answer.headers["access-control-allow-credentials"] == "true"


def raw(url: str, sent: bytes, more: bytes = b"") -> bytes:
    """All that comes back on a connection that sent this."""
    host, port = url.removeprefix("http://").split(":")
    seen = b""
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        try:
            connection.sendall(sent)
            connection.sendall(more)
            while piece := connection.recv(65536):
                seen += piece
        except ConnectionError:
            pass
    return seen


def test_too_many_headers(server: Live) -> None:
    many = {f"x-{index}": "1" for index in range(MAX_HEADERS + 1)}
    answer = server.client.get("/health", headers=many)
    assert answer.status_code == 431
    assert answer.json()["error"]["code"] == "headers_too_large"
    server.still_serves()


def test_a_megabyte_of_headers(server: Live) -> None:
    answer = raw(server.url, b"GET /health HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 2**20)
    assert answer == b"" or b" 431 " in answer, "the answer, unless the connection was reset while still sending"
    just_over = raw(
        server.url, b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\nX: " + b"a" * 70_000 + b"\r\n\r\n"
    )
    assert b" 431 " in just_over
    server.still_serves()


@pytest.mark.parametrize("sent", [b"\x16\x03\x01 TLS\r\n\r\n", b"GET / HTTP/9\r\n\r\n", b"GET /\x00 HTTP/1.1\r\n\r\n"])
def test_what_is_no_http(server: Live, sent: bytes) -> None:
    answer = raw(server.url, sent)
    assert b" 400 " in answer
    assert b'"code": "invalid_http"' in answer
    assert b"x-request-id" in answer.lower()
    server.still_serves()


def test_rubbish_behind_a_request_ends_the_connection_only(server: Live) -> None:
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    answer = raw(server.url, head + b"2\r\n{}\r\nrubbish\r\n\r\n")
    assert b" 200 " not in answer
    server.still_serves()


@pytest.mark.parametrize(
    "sent",
    [b"", b"GET /health HTTP/1.1\r\nHost: x\r\n", b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{"],
)
def test_a_client_that_does_not_finish_its_request_is_let_go(
    protocol: ChatProtocol, monkeypatch: pytest.MonkeyPatch, sent: bytes
) -> None:
    monkeypatch.setattr("server_fakes.server_config", lambda app: server_config(app, request_seconds=0.05))
    with serve(ScriptedEngine(protocol), protocol) as live:
        assert raw(live.url, sent) == b""
        live.still_serves()


def test_a_slow_answer_is_not_a_slow_request(protocol: ChatProtocol, monkeypatch: pytest.MonkeyPatch) -> None:
    """The deadline is for what the client sends: once its request is there it may wait for ever."""
    monkeypatch.setattr("server_fakes.server_config", lambda app: server_config(app, request_seconds=0.05))
    with serve(ScriptedEngine(protocol), protocol) as live:
        live.engine.gate.clear()
        with httpx.stream("POST", live.url + CHAT, json={"messages": USER, "stream": True}, timeout=30) as answer:
            assert not answer.is_error
            assert raw(live.url, b"") == b"", "by the time an idle connection is closed, so would this be"
            live.engine.gate.set()
            assert b"[DONE]" in answer.read()


def test_more_connections_than_there_may_be(protocol: ChatProtocol, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server_fakes.server_config", lambda app: server_config(app, max_connections=2))
    with serve(ScriptedEngine(protocol), protocol) as live:
        host, port = live.url.removeprefix("http://").split(":")
        live.still_serves()  # the first connection, which is kept
        with socket.create_connection((host, int(port)), timeout=30):
            answer = raw(live.url, b"")
            assert b" 503 " in answer
            assert b"2 connections are open" in answer
            live.still_serves()


def test_limits_are_those_of_the_options() -> None:
    protocol_class = guarded_protocol(7, 3.0)
    assert (protocol_class.MAX_CONNECTIONS, protocol_class.REQUEST_SECONDS) == (7, 3.0)  # type: ignore[attr-defined]
    assert isinstance(server_config(lambda *_: None), uvicorn.Config)  # type: ignore[arg-type, return-value]
