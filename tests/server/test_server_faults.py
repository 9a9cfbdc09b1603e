"""`tern serve` as a process when things break under it: its engine, its disk, its clock, itself."""

from __future__ import annotations

import ast
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from server_fakes import Live

PACKAGE = Path(__file__).parents[2] / "tern"
SERVE = "from tern.cli import main; main(['serve', '--port', '0', '--max-model-len', '512', *sys.argv[1:]])"
BROKEN = "import tern.engine.engine as engine; engine.Engine.step = lambda self: 1 / 0"
PROMPT = "Give me a short introduction to large language model. " * 6


class Server:
    """`tern serve` on the embedded model, after `before` was run in its process; standard error goes to `log`."""

    def __init__(self, log: Path, *arguments: str, before: str = "") -> None:
        self.log = log
        code = f"import sys; {before}\n{SERVE}"
        with log.open("ab") as errors:
            self.popen = subprocess.Popen(
                [sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, stderr=errors, text=True
            )
        self.url = ""
        assert self.popen.stdout is not None
        while not self.url:
            line = self.popen.stdout.readline()
            assert line, "the server ended before it served"
            self.url = (re.findall(r"answers at (http://[\d.:]+\d)", line) or [""])[0]

    def complete(self, prompt: str = PROMPT) -> dict[str, Any]:
        body = {"prompt": prompt, "max_tokens": 8, "temperature": 0, "ignore_eos": True}
        response = httpx.post(self.url + "/v1/completions", json=body, timeout=60)
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        return answer

    def end(self, number: int = signal.SIGTERM) -> int:
        """Send a signal and wait -> the exit status."""
        self.popen.send_signal(number)
        self.popen.communicate(timeout=60)
        return self.popen.returncode


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Any]:
    started: list[Server] = []

    def begin(*arguments: str, log: Path = tmp_path / "log", before: str = "") -> Server:
        started.append(Server(log, *arguments, before=before))
        return started[-1]

    yield begin
    for server in started:
        if server.popen.poll() is None:
            server.popen.kill()
        server.popen.communicate()


def test_an_engine_that_fails_ends_the_process_with_an_error(start: Any) -> None:
    server = start(before=BROKEN)
    response = httpx.post(server.url + "/v1/completions", json={"prompt": "x"}, timeout=60)
    assert response.status_code == 500
    assert "has failed" in response.json()["error"]["message"]
    server.popen.communicate(timeout=60)
    assert server.popen.returncode == 1
    log = server.log.read_text()
    assert "ZeroDivisionError" in log
    assert log.splitlines()[-1].startswith("tern: The engine has failed")


def test_a_server_that_was_killed_finds_its_cache_again(start: Any, tmp_path: Path) -> None:
    directory = tmp_path / "kv"
    kept = ["--kv-cache-dir", str(directory), "--kv-cache-dir-size", "0.1"]
    server = start(*kept)
    answers = [server.complete()]
    while not [path for path in directory.rglob("*") if path.is_file() and path.stat().st_size > 4096]:
        time.sleep(0.02)
    assert server.end(signal.SIGKILL) == -signal.SIGKILL
    server = start(*kept)
    answers.append(server.complete())
    assert answers[0]["choices"] == answers[1]["choices"]
    assert answers[0]["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert answers[1]["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
    assert server.end() == 0


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no full disk at hand")
def test_a_log_on_a_full_disk_stops_nothing(start: Any) -> None:
    server = start("--log-level", "debug", log=Path("/dev/full"))
    first = server.complete()
    assert httpx.post(server.url + "/v1/completions", content=b"{", timeout=60).status_code == 400
    assert server.complete()["choices"] == first["choices"]
    assert server.end() == 0


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no full disk at hand")
def test_an_output_on_a_full_disk_stops_nothing() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
    with open("/dev/full", "wb") as full:
        command = [sys.executable, "-c", f"import sys\n{SERVE}", "--port", port]
        popen = subprocess.Popen(command, stdout=full, stderr=subprocess.PIPE, text=True)
    try:
        status = 0
        while status != 200 and popen.poll() is None:
            with suppress(httpx.ConnectError):
                status = httpx.get(f"http://127.0.0.1:{port}/ready", timeout=60).status_code
            time.sleep(0.02)
        popen.send_signal(signal.SIGTERM)
        _, log = popen.communicate(timeout=60)
    finally:
        popen.kill()
    assert (status, popen.returncode) == (200, 0), log
    assert "standard output cannot be written" in log


def test_a_clock_that_jumps_changes_nothing(server: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    moments = iter(range(10**9, 0, -(10**6)))
    monkeypatch.setattr(time, "time", lambda: float(next(moments)))
    chunks = server.stream()
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    assert server.client.get("/health").status_code == 200
    server.still_serves()


DATES = {
    "bench/setting.py": "the date on a report",
    "engine/block_files.py": "files have no other clock",
    "server/request_record.py": "a span begins at a time of day",
}
"""Where the time of day is read as more than a timestamp in whole seconds, and why."""


def reads_the_time_of_day(path: Path) -> bool:
    """Whether a module uses `time.time` or a `now` of datetime other than as `int(time.time())`."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    stamps = {
        id(node.args[0].func)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "int" and node.args
        if isinstance(node.args[0], ast.Call)
    }
    clocks = {("time", "time"), ("time", "time_ns"), ("datetime", "now"), ("datetime", "utcnow"), ("date", "today")}
    return any(
        (node.value.id, node.attr) in clocks and id(node) not in stamps
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
    )


def test_no_duration_is_measured_by_the_time_of_day(tmp_path: Path) -> None:
    found = {str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py") if reads_the_time_of_day(path)}
    assert found == DATES.keys()
    (tmp_path / "wrong.py").write_text("import time\nbegun = time.time()\n")
    assert reads_the_time_of_day(tmp_path / "wrong.py")
