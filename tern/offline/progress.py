"""How far a call has come, on a terminal. Knows collectors; knows no engine."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from tern.offline.jobs import Job


class ProgressBar:
    """Finished prompts and generated tokens on a terminal's standard error."""

    def __init__(self, jobs: Iterable[Job]) -> None:
        self._collectors = [collector for job in jobs for collector in job.collectors]
        self._progress = Progress(
            TextColumn("Generating"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[tokens]} tokens"),
            console=Console(stderr=True),
        )
        self._task: TaskID = self._progress.add_task("generate", total=len(self._collectors), tokens=0)

    def __enter__(self) -> ProgressBar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def update(self) -> None:
        """Show how far the sequences are."""
        done = sum(collector.finished is not None for collector in self._collectors)
        tokens = sum(len(collector.tokens) for collector in self._collectors)
        self._progress.update(self._task, completed=done, tokens=tokens)
