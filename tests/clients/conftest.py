"""One `tern serve` process on the embedded model, for clients that people use as they are.

Each client is imported inside its test: they come with `make test`, not with an installation of Tern. They run in a
session of their own (`pytest --clients tests/clients -W default`), since some leave sockets to the garbage collector.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

MODEL = "tern-tiny"
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "OPENAI_AGENTS_DISABLE_TRACING": "1",
    "LANGSMITH_TRACING": "false",
}
"""What keeps these clients from asking the network for price lists, data sets and dashboards."""


@dataclass(frozen=True)
class Served:
    """A running server: where it answers."""

    url: str

    @property
    def v1(self) -> str:
        """The base URL of OpenAI's clients."""
        return f"{self.url}/v1"


@pytest.fixture(scope="session")
def served() -> Iterator[Served]:
    command = [sys.executable, "-m", "tern", "serve", "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8")
    assert process.stdout is not None
    seen = []
    for line in process.stdout:
        seen.append(line)
        if found := re.search(r"answers at (http://\S+?)\. ", line):
            break
    else:
        raise AssertionError(f"the server ended with {process.wait()}:\n{''.join(seen)}")
    yield Served(found[1])
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert "Traceback" not in output


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in OFFLINE.items():
        monkeypatch.setenv(name, value)


def program_environment(home: Path) -> dict[str, str]:
    """The environment of a client that is a program; what it keeps goes into `home`."""
    return {**os.environ, **OFFLINE, "HF_HOME": str(home)}
