"""`benchmarks.health`: its arithmetic, its requests, and a whole short run."""

from __future__ import annotations

import http.server
import json
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import health
from benchmarks.health import LOADS, SIZE, Waits
from tern.errors import RemoteServerError


@pytest.mark.parametrize(
    ("seconds", "median", "p99", "longest"),
    [
        ([0.004], 0.004, 0.004, 0.004),
        ([0.001, 0.009, 0.002, 0.003], 0.0025, 0.009, 0.009),
        ([0.001] * 99 + [0.5], 0.001, 0.001, 0.5),
        ([0.5, *[0.001] * 97, 0.4], 0.001, 0.5, 0.5),
        ([0.001] * 980 + [0.02] * 11 + [0.5] * 9, 0.001, 0.02, 0.5),
    ],
)
def test_what_is_told_of_waits(seconds: list[float], median: float, p99: float, longest: float) -> None:
    found = Waits.of(seconds, 3)
    assert (found.median, found.p99, found.longest) == (median, p99, longest)
    assert (found.questions, found.requests) == (len(seconds), 3)


class Health(http.server.BaseHTTPRequestHandler):
    """Answers 200, the fifth question after a fifth of a second, and 503 once it is told to."""

    protocol_version = "HTTP/1.1"
    asked: list[tuple[str, int]]
    status: int

    def do_GET(self) -> None:
        self.asked.append(self.client_address)
        if len(self.asked) == 5:
            time.sleep(0.2)
        self.send_response(self.status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Not on the terminal."""


@pytest.fixture
def stalling() -> Iterator[tuple[str, type[Health]]]:
    class Own(Health):
        pass

    Own.asked, Own.status = [], 200
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Own) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", Own
        server.shutdown()
        thread.join()


def test_a_stall_counts_for_every_question_that_it_delays(stalling: tuple[str, type[Health]]) -> None:
    url, handler = stalling
    waits = health.ask(url, 0.1)
    assert len(waits) == len(handler.asked) == 20
    assert len(set(handler.asked)) == 1, "one connection is kept"
    assert max(waits) >= 0.2
    assert waits[5] >= 0.19, "it was due 5 ms into the stall"
    assert all(wait > 0.1 for wait in waits[4:20])


def test_a_server_that_is_not_well_ends_the_measurement(stalling: tuple[str, type[Health]]) -> None:
    url, handler = stalling
    handler.status = 503
    with pytest.raises(RemoteServerError, match="503"):
        health.ask(url, 0.1)


def test_requests_are_as_large_as_they_are_called_and_never_the_same() -> None:
    for name, (make, _) in LOADS.items():
        if make is not None:
            draw = random.Random(1)
            first, second = (json.dumps(make(draw)[1], ensure_ascii=False).encode() for _ in range(2))
            assert first != second, name
            if "1 MB" in name or "messages" in name:
                assert 0.8 * SIZE < len(first) < 1.5 * SIZE, name


def test_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "LIMIT", 1e9)
    out = tmp_path / "out.json"
    names = ["idle", "compile a regular expression"]
    with pytest.raises(SystemExit) as ended:
        health.main(["--seconds", "0.2", "--loads", ",".join(names), "--json", str(out)])
    assert ended.value.code == 0
    waits = json.loads(out.read_text(encoding="utf-8"))["waits"]
    assert list(waits) == names
    assert [one["requests"] > 0 for one in waits.values()] == [False, True]
    assert all(0 < one["median"] <= one["p99"] <= one["longest"] for one in waits.values())
    said = capsys.readouterr().out
    assert all(name in said for name in names)


def test_a_load_that_there_is_not_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        health.main(["--loads", "idle,sleep"])
    assert ended.value.code == 2
    assert "there is no load 'sleep'" in capsys.readouterr().err
