"""A progress bar in bytes for work that takes a while, on terminals only. Knows nothing of what is counted."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

DELAY_SECONDS = 0.5


@contextmanager
def byte_progress(description: str, total: int, *, enabled: bool) -> Iterator[Callable[[int], None]]:
    """Yield `advance(nbytes)`; a bar appears on stderr after `DELAY_SECONDS`, if stderr is a terminal and `enabled`."""
    if not enabled or not sys.stderr.isatty():
        yield lambda _: None
        return
    # Imported here: rich takes its time, and most loads are over before a bar would show.
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    bar = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True)
    task = bar.add_task(description, total=total)
    started = time.monotonic()
    shown = False

    def advance(nbytes: int) -> None:
        nonlocal shown
        bar.advance(task, nbytes)
        if not shown and time.monotonic() - started > DELAY_SECONDS:
            shown = True
            bar.start()

    try:
        yield advance
    finally:
        if shown:
            bar.stop()
