"""A progress bar for work that takes a while, on terminals only. Knows nothing of what is counted."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

DELAY_SECONDS = 0.5


@contextmanager
def byte_progress(description: str, total: int, *, enabled: bool) -> Iterator[Callable[[int], None]]:
    """Yield `advance(nbytes)`; a bar appears on stderr after `DELAY_SECONDS`, if stderr is a terminal and `enabled`."""
    with _progress(description, total, in_bytes=True, enabled=enabled) as advance:
        yield advance


@contextmanager
def item_progress(description: str, total: int, *, enabled: bool) -> Iterator[Callable[[int], None]]:
    """As `byte_progress`, for `total` pieces of work."""
    with _progress(description, total, in_bytes=False, enabled=enabled) as advance:
        yield advance


@contextmanager
def _progress(description: str, total: int, *, in_bytes: bool, enabled: bool) -> Iterator[Callable[[int], None]]:
    if not enabled or not sys.stderr.isatty():
        yield lambda _: None
        return
    # Imported here: rich takes its time, and most loads are over before a bar would show.
    from rich import progress
    from rich.console import Console

    counts = (
        (progress.DownloadColumn(), progress.TransferSpeedColumn()) if in_bytes else (progress.MofNCompleteColumn(),)
    )
    columns = (progress.TextColumn("{task.description}"), progress.BarColumn(), *counts, progress.TimeRemainingColumn())
    bar = progress.Progress(*columns, console=Console(stderr=True), transient=True)
    task = bar.add_task(description, total=total)
    started = time.monotonic()
    shown = False

    def advance(count: int) -> None:
        nonlocal shown
        bar.advance(task, count)
        if not shown and time.monotonic() - started > DELAY_SECONDS:
            shown = True
            bar.start()

    try:
        yield advance
    finally:
        if shown:
            bar.stop()
