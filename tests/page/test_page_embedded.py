"""The page on the model that ships with Tern, as `make serve` shows it: a sum with its thought, and the clock."""

from __future__ import annotations

import datetime
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from playwright.sync_api import expect

from tests.page.conftest import Opened

NOW = datetime.datetime(2026, 11, 24, 19, 21, tzinfo=datetime.UTC)
"""A time that the embedded model copies without a mistake, which it does not with every one."""


@pytest.fixture(scope="module")
def embedded() -> Iterator[Any]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tern", "serve", "--port", str(port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        said = []
        for line in process.stdout:
            said.append(line)
            if f"answers at http://127.0.0.1:{port}" in line:
                break
        else:
            pytest.fail("the server ended: " + "".join(said))
        yield SimpleNamespace(url=f"http://127.0.0.1:{port}")
        process.terminate()
        process.communicate(timeout=60)


def test_a_sum_and_the_time(embedded: Any, opened: Opened) -> None:
    chat = opened(embedded)
    chat.page.locator("#open-settings").click()
    chat.page.locator("#set-temperature").fill("0")
    chat.page.get_by_role("button", name="What is 1958 + 4783?").click()
    expect(chat.answer.locator(".answer-body")).to_contain_text("6741")
    chat.wait()
    expect(chat.answer.locator(".thought-body")).to_contain_text("= 6741")
    expect(chat.answer.locator(".counts")).to_have_text(re.compile(r"^\d+ tokens · \S+ tokens/s · first token "))
    chat.page.clock.set_fixed_time(NOW)
    chat.page.locator("#new").click()
    chat.page.get_by_role("button", name="What is the time in Tokyo?").click()
    expect(chat.page.locator(".call-result")).to_contain_text('"minute": ')
    expect(chat.answer.locator(".answer-body")).to_have_text(
        re.compile(r"^The time.*: date 2026-11-25, hour 4, minute 21\.\s*$")
    )
