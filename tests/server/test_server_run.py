"""`run_server` as a process: signals, draining, exit status, ports."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client import CollectorRegistry
from server_fakes import USER, ScriptedEngine, identity, metric, serve, write_tokenizer

from tern.chat import ChatProtocol
from tern.errors import CheckpointError, OptionError
from tern.server import AppState, Loaded, ServerOptions, run_server
from tern.server.options import is_loopback
from tern.server.run import listen, metrics_server

SCRIPT = Path(__file__).parent / "serve_scripted.py"


class Process:
    """A serving process and its URL."""

    def __init__(self, directory: Path, shutdown_timeout: float) -> None:
        write_tokenizer(directory)
        self.directory = directory
        command = [sys.executable, "-W", "error", str(SCRIPT), str(directory), str(shutdown_timeout)]
        environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[2])}
        self.popen = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
        assert self.popen.stdout is not None
        self.url = self.popen.stdout.readline().strip()
        assert self.url, self.popen.communicate()[1]

    def begin_stream(self) -> socket.socket:
        """A streamed request whose headers and first chunk have come."""
        host, port = self.url.removeprefix("http://").split(":")
        connection = socket.create_connection((host, int(port)), timeout=60)
        body = json.dumps({"messages": USER, "stream": True}).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        seen = b""
        while b"assistant" not in seen:
            seen += connection.recv(4096)
        return connection

    def refuses(self) -> None:
        """Wait until new work gets 503."""
        while httpx.get(self.url + "/ready", timeout=60).status_code == 200:
            pass
        response = httpx.post(self.url + "/v1/chat/completions", json={"messages": USER}, timeout=60)
        assert response.status_code == 503
        assert httpx.get(self.url + "/health", timeout=60).status_code == 200

    def ends_well(self) -> None:
        """The process ends by itself, with status 0 and nothing to complain about."""
        out, err = self.popen.communicate(timeout=60)
        assert (self.popen.returncode, out.strip()) == (0, "ended"), err
        assert "Traceback" not in err


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Any]:
    started: list[Process] = []

    def begin(shutdown_timeout: float) -> Process:
        started.append(Process(tmp_path, shutdown_timeout))
        return started[-1]

    yield begin
    for process in started:
        if process.popen.poll() is None:
            process.popen.kill()
        process.popen.communicate()


def answer_while_loading(url: str, headers: dict[str, str] | None = None) -> httpx.Response:
    """The answer of a server that may not listen yet."""
    while True:
        try:
            return httpx.get(url, headers=headers, timeout=60)
        except httpx.ConnectError:
            time.sleep(0.02)


@pytest.fixture
def loading(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], str, Path]]:
    """A process that loads until the file is gone, and its URL."""
    write_tokenizer(tmp_path)
    flag = tmp_path / "loading"
    flag.touch()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    command = [sys.executable, "-W", "error", str(SCRIPT), str(tmp_path), "60", str(port)]
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[2])}
    popen = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    yield popen, f"http://127.0.0.1:{port}", flag
    if popen.poll() is None:
        popen.kill()
    popen.communicate()


def test_while_the_model_loads_everything_is_503(loading: tuple[subprocess.Popen[str], str, Path]) -> None:
    popen, url, flag = loading
    for path in ("/health", "/ready", "/v1/models"):
        answer = answer_while_loading(url + path)
        assert answer.status_code == 503
        assert "loading" in answer.json()["error"]["message"]
        assert int(answer.headers["retry-after"]) > 0
        assert len(answer.headers["x-request-id"]) == 32
    page = answer_while_loading(url + "/", headers={"Accept": "text/html"})
    assert (page.status_code, page.headers["refresh"]) == (503, "2")
    assert page.text == "The model is loading. This page opens by itself.\n"
    flag.unlink()
    assert popen.stdout is not None
    assert popen.stdout.readline().strip() == url
    assert httpx.get(url + "/ready", timeout=60).status_code == 200


def test_a_signal_ends_the_loading(loading: tuple[subprocess.Popen[str], str, Path]) -> None:
    popen, url, _ = loading
    assert answer_while_loading(url).status_code == 503
    popen.send_signal(signal.SIGTERM)
    out, err = popen.communicate(timeout=60)
    assert (popen.returncode, out.strip()) == (0, "ended"), err
    assert "Traceback" not in err


def test_a_model_that_cannot_be_loaded_frees_the_port() -> None:
    def load() -> Loaded:
        raise CheckpointError("It is broken.")

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    for _ in range(2):
        with pytest.raises(CheckpointError, match="broken"):
            run_server(load, ServerOptions(port=port))


def read_all(connection: socket.socket) -> str:
    """What else comes on a connection until the server closes it."""
    seen = b""
    with connection:
        while piece := connection.recv(65536):
            seen += piece
    return seen.decode()


def test_sigterm_lets_what_runs_finish_and_refuses_the_rest(start: Any) -> None:
    process = start(60)
    connection = process.begin_stream()
    process.popen.send_signal(signal.SIGTERM)
    process.refuses()
    (process.directory / "open").touch()
    rest = read_all(connection)
    assert '"finish_reason":"stop"' in rest
    assert "data: [DONE]" in rest
    process.ends_well()


def test_what_is_not_done_in_time_ends_with_an_error(start: Any) -> None:
    process = start(0.1)
    connection = process.begin_stream()
    process.popen.send_signal(signal.SIGTERM)
    rest = read_all(connection)
    assert '"code":"unavailable"' in rest
    assert "data: [DONE]" in rest
    process.ends_well()


def test_a_hundred_streams_end_when_the_server_does(start: Any) -> None:
    process = start(60)
    connections = [process.begin_stream() for _ in range(100)]
    process.popen.send_signal(signal.SIGTERM)
    process.refuses()
    (process.directory / "open").touch()
    rests = [read_all(connection) for connection in connections]
    assert all('"finish_reason":"stop"' in rest and "data: [DONE]" in rest for rest in rests)
    process.ends_well()


def test_a_hundred_streams_that_are_not_done_in_time_are_told(start: Any) -> None:
    process = start(0.1)
    connections = [process.begin_stream() for _ in range(100)]
    process.popen.send_signal(signal.SIGTERM)
    rests = [read_all(connection) for connection in connections]
    assert all('"code":"unavailable"' in rest and "data: [DONE]" in rest for rest in rests)
    process.ends_well()


def test_a_second_signal_does_not_wait(start: Any) -> None:
    process = start(3600)
    connection = process.begin_stream()
    process.popen.send_signal(signal.SIGINT)
    process.refuses()
    process.popen.send_signal(signal.SIGINT)
    assert '"code":"unavailable"' in read_all(connection)
    process.ends_well()


def test_an_idle_server_ends_at_once(start: Any) -> None:
    process = start(3600)
    assert httpx.get(process.url + "/health", timeout=60).status_code == 200
    assert httpx.get(process.url + "/metrics", timeout=60).status_code == 404, "metrics have a port of their own"
    process.popen.send_signal(signal.SIGTERM)
    process.ends_well()


def test_a_signal_that_reaches_another_thread_counts(start: Any, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").touch()
    process = start(3600)
    process.popen.send_signal(signal.SIGTERM)
    process.ends_well()


def test_what_is_loaded_is_out_of_the_collector_s_sight(start: Any, tmp_path: Path) -> None:
    start(0)
    assert int((tmp_path / "frozen").read_text(encoding="utf-8")) > 20_000


def not_reached() -> Loaded:
    raise AssertionError("nothing is loaded for a server that cannot listen")


def test_a_port_that_is_taken_is_found_before_anything_is_loaded() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OptionError, match=f"port {port}"):
            run_server(not_reached, ServerOptions(port=port))
        with pytest.raises(OptionError, match=f"metrics port {port}"):
            run_server(not_reached, ServerOptions(port=0, metrics_port=port))


def test_no_event_waits_for_another() -> None:
    """Nagle's algorithm and delayed acknowledgements would add 40 ms to most answers on a kept connection."""
    with listen("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()):
        connection, _ = listener.accept()
        with connection:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_metrics_on_their_own_port(protocol: ChatProtocol, caplog: pytest.LogCaptureFixture) -> None:
    options, registry = ServerOptions(metrics_port=0), CollectorRegistry()
    with caplog.at_level(logging.INFO, "tern.server"), metrics_server(options, registry):
        AppState.create(ScriptedEngine(protocol), protocol, identity(), options, registry)
        url = caplog.messages[-1].split()[-1]
        assert metric(httpx.get(url, timeout=60).text, "vllm:num_requests_running") == 0


@pytest.mark.parametrize(
    "wrong",
    [
        {"port": -1},
        {"port": 65536},
        {"metrics_port": 65536},
        {"port": 8000, "metrics_port": 8000},
        {"host": "0.0.0.0"},
        {"host": "192.168.1.5"},
        {"host": "::"},
        {"api_keys": ("a", "")},
        {"served_model_name": ""},
        {"max_body_bytes": 0},
        {"request_timeout": 0},
        {"request_timeout": float("nan")},
        {"shutdown_timeout": -1},
        {"shutdown_timeout": float("nan")},
        {"keep_alive_seconds": 0},
        {"heartbeat_timeout": float("inf")},
    ],
)
def test_wrong_options_are_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(OptionError) as error:
        ServerOptions(**wrong)
    words = str(error.value).lower()
    assert any(name in words or name.replace("_", " ").rstrip("s") in words for name in wrong)


def test_a_suggested_command_has_a_place_for_the_key_but_never_the_key(protocol: ChatProtocol) -> None:
    assert ServerOptions().curl_key == ""
    with serve(ScriptedEngine(protocol), protocol, api_keys=("sesame",)) as live:
        page = live.client.get("/").text
    assert "-H 'Authorization: Bearer YOUR_KEY'" in page
    assert "sesame" not in page


def test_a_public_address_needs_a_key_or_insistence() -> None:
    assert ServerOptions(host="0.0.0.0", api_keys=("k",)).host == "0.0.0.0"
    assert ServerOptions(host="::", allow_public=True).host == "::"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "only this machine can reach it, no key asked for"),
        ({"api_keys": ("sesame",)}, "only this machine can reach it, 1 API key asked for"),
        ({"host": "0.0.0.0", "api_keys": ("sesame", "b")}, "other machines can reach it, 2 API keys asked for"),
    ],
)
def test_the_log_says_who_can_reach_the_server(
    options: dict[str, Any], said: str, caplog: pytest.LogCaptureFixture
) -> None:
    def load() -> Loaded:
        raise CheckpointError("It is broken.")

    with caplog.at_level(logging.INFO, "tern.server"), pytest.raises(CheckpointError):
        run_server(load, ServerOptions(port=0, **options))
    (line,) = [message for message in caplog.messages if message.startswith("listening on http://")]
    assert said in line
    assert "sesame" not in caplog.text


@pytest.mark.parametrize(
    ("host", "local"),
    [("127.0.0.1", True), ("127.8.8.8", True), ("::1", True), ("localhost", True), ("example.com", False), ("", False)],
)
def test_loopback(host: str, local: bool) -> None:
    assert is_loopback(host) is local
