"""`tern serve` in a process of its own, for the programs that measure a server: its address, its metrics, its end."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx

from tern.errors import RemoteServerError

END_SECONDS = 60.0
_SAMPLE = re.compile(r"^([\w:]+)(?:\{[^}]*\})? (\S+)$", re.MULTILINE)


@dataclass(frozen=True)
class ServerProcess:
    """A server that takes requests at `url`."""

    url: str
    process: subprocess.Popen[str]

    def metrics(self) -> dict[str, float]:
        """Every sample of /metrics by its name; those with labels are added up."""
        found: dict[str, float] = {}
        text = httpx.get(self.url + "/metrics", timeout=60).text
        for name, value in _SAMPLE.findall(text):
            found[name] = found.get(name, 0.0) + float(value)
        return found

    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        """The answer to a request of /v1/completions. Raises `RemoteServerError` if it is none."""
        response = httpx.post(self.url + "/v1/completions", json=body, timeout=None)
        if response.status_code != 200:
            raise RemoteServerError(f"The server answered {response.status_code}: {response.text[:200]}.")
        answer: dict[str, Any] = response.json()
        return answer


@contextmanager
def tern_serve(arguments: Sequence[str]) -> Iterator[ServerProcess]:
    """A server started with these arguments of `tern serve`, and ended with the block.

    Raises `RemoteServerError`, with what it said last, if it does not come to serve.
    """
    with tempfile.TemporaryFile("w+", encoding="utf-8") as log:
        command = [sys.executable, "-m", "tern", "serve", "--port", "0", *arguments]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        try:
            yield ServerProcess(_address(process, log), process)
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.communicate(timeout=END_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()


def _address(process: subprocess.Popen[str], log: Any) -> str:
    assert process.stdout is not None
    for line in process.stdout:
        if found := re.search(r"answers at (http://\S+\d)", line):
            return found[1]
    process.wait()
    log.seek(0)
    last = (log.read().strip().splitlines() or ["nothing"])[-1]
    raise RemoteServerError(f"tern serve ended before it served; it said: {last}")
