"""What all tests share: one torch thread a process, since the tests themselves run side by side, and no hub.

Small networks compute faster on one thread than two cores can agree on anything.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--clients", action="store_true", help="collect tests/clients: other people's programs")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    clients = Path(__file__).with_name("clients")
    return True if collection_path == clients and not config.getoption("--clients") else None
