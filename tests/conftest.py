"""What all tests share: one torch thread a process, since the tests themselves run side by side, no hub, and without a
GPU the interpreter for its kernels, which Triton must know of whoever imports it first.

Small networks compute faster on one thread than two cores can agree on anything.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if not Path("/proc/driver/nvidia/version").exists():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--clients", action="store_true", help="collect tests/clients: other people's programs")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    clients = Path(__file__).with_name("clients")
    return True if collection_path == clients and not config.getoption("--clients") else None
