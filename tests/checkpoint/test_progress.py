"""The bar of long loads: on terminals, after a moment, and never elsewhere."""

from __future__ import annotations

import io
import sys

import pytest

from tern.checkpoint import load_tensors, resolve_model
from tern.checkpoint import progress as progress_module


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def drawn(monkeypatch: pytest.MonkeyPatch, stream: io.StringIO, *, delay: float, progress: bool) -> str:
    """What a load of random weights writes to `stream` as its stderr."""
    monkeypatch.setattr(progress_module, "DELAY_SECONDS", delay)
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    load_tensors(resolve_model("dummy:tiny"), progress=progress)
    return stream.getvalue()


def test_bar_shows_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    text = drawn(monkeypatch, _Terminal(), delay=-1.0, progress=True)
    assert "Making random weights" in text
    assert "MB" in text


@pytest.mark.parametrize(
    ("stream", "delay", "progress"),
    [(io.StringIO(), -1.0, True), (_Terminal(), -1.0, False), (_Terminal(), 3600.0, True)],
    ids=["no terminal", "not wanted", "over in a moment"],
)
def test_nothing_is_drawn(monkeypatch: pytest.MonkeyPatch, stream: io.StringIO, delay: float, progress: bool) -> None:
    assert drawn(monkeypatch, stream, delay=delay, progress=progress) == ""


def test_loading_files_shows_the_model_s_name(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = _Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(progress_module, "DELAY_SECONDS", -1.0)
    with progress_module.byte_progress("Loading 小燕鸥", 2_000_000, enabled=True) as advance:
        advance(1_000_000)
        advance(1_000_000)
    assert "Loading 小燕鸥" in stream.getvalue()


def test_pieces_of_work_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = _Terminal()
    monkeypatch.setattr(progress_module, "DELAY_SECONDS", -1.0)
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with progress_module.item_progress("CUDA graphs", 7, enabled=True) as advance:
        for _ in range(7):
            advance(1)
    assert "CUDA graphs" in terminal.getvalue()
    assert "7/7" in terminal.getvalue()
