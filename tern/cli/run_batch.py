"""`tern run-batch`: a file of requests answered in this process. Knows terminals and exit statuses."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, BinaryIO

import typer

from tern.cli.engine_flags import EngineFlags, with_engine_flags
from tern.errors import OptionError

if TYPE_CHECKING:
    from tern.server import AppState
    from tern.server.batch import AnswerFile, Tally

INTERRUPTED = 130
SOME_FAILED = 1


@with_engine_flags
def run_batch(
    input_file: Annotated[str, typer.Option("--input-file", "-i", help="Requests, one JSON object a line.")],
    output_file: Annotated[str, typer.Option("--output-file", "-o", help="Where the answers go, a line each.")],
    model: Annotated[str | None, typer.Option(help="Directory, .gguf file, hub id or dummy:PRESET.")] = None,
    served_model_name: Annotated[str | None, typer.Option(help="Name that bodies may give; default: MODEL.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object when done.")] = False,
    *,
    engine: EngineFlags,
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "warning",
) -> None:
    """Answer a file of requests in OpenAI's batch format, without a server.

    Each line has custom_id, url (such as /v1/chat/completions) and body. Answers come in the order in which they are
    done. Interrupted, the same command goes on where it stopped: lines that the output answers are left out.
    Exit status: 0 if every line was answered without an error, 1 if some were not, 130 if interrupted.
    """
    from tern.server.logs import configure_logging

    configure_logging(log_level)
    source, target = Path(input_file), Path(output_file)
    with _input(source, target) as lines:
        from tern.server.batch import AnswerFile, Tally

        options = engine.options(max_queue=None, max_queue_tokens=None, target_step_seconds=None)
        total = sum(1 for line in lines if line.strip())
        lines.seek(0)
        tally = Tally()
        with AnswerFile(target) as answers:
            loaded = engine.load(model, options)
            from tern.server import AppState, ServerOptions

            state = AppState.create(
                loaded.engine, loaded.protocol, loaded.model, ServerOptions(served_model_name=served_model_name)
            )
            started = time.perf_counter()
            interrupted = _answer(state, lines, answers, tally, total, concurrency=2 * options.max_num_seqs)
            _report(answers, tally, total, time.perf_counter() - started, interrupted=interrupted, as_json=as_json)
    if interrupted:
        raise typer.Exit(INTERRUPTED)
    if answers.num_failed:
        raise typer.Exit(SOME_FAILED)


@contextmanager
def _input(source: Path, target: Path) -> Iterator[BinaryIO]:
    """The requests, which the answers must not overwrite."""
    if target.exists() and source.exists() and target.samefile(source):
        raise OptionError(f"{source} is both input and output: name another output.")
    try:
        file = source.open("rb")
    except OSError as error:
        raise OptionError(f"{source} cannot be read: {error.strerror}.") from None
    with file:
        yield file


def _answer(
    state: AppState, lines: BinaryIO, answers: AnswerFile, tally: Tally, total: int, *, concurrency: int
) -> bool:
    """Answer the lines; true if that was interrupted."""
    from tern.server import create_app, running
    from tern.server.batch import batch_urls, read_lines, run_batch

    app = create_app(state)
    requests = read_lines(lines, batch_urls(app))
    with running(state), _shown(total, lambda: state.engine.stats().generated_tokens) as on_line:
        try:
            asyncio.run(run_batch(app, requests, answers, tally, concurrency=concurrency, on_line=on_line))
        except KeyboardInterrupt:
            return True
    return False


@contextmanager
def _shown(total: int, generated: Callable[[], int]) -> Iterator[Callable[[], None]]:
    """A bar on standard error, if that is a terminal; what is yielded moves it by a line."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        Task,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.text import Text

    class Speed(ProgressColumn):
        """Generated tokens a second since the start."""

        def render(self, task: Task) -> Text:
            return Text(f"{generated() / max(task.elapsed or 0.0, 1e-3):.0f} tokens/s")

    bar = Progress(
        TextColumn("Answering"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        Speed(),
        console=Console(stderr=True),
        disable=not sys.stderr.isatty(),
    )
    task = bar.add_task("", total=total)
    with bar:
        yield lambda: bar.advance(task)


def _report(answers: AnswerFile, tally: Tally, total: int, seconds: float, *, interrupted: bool, as_json: bool) -> None:
    speed = tally.completion_tokens / max(seconds, 1e-9)
    if as_json:
        summary = {
            "output_file": str(answers.path),
            "lines": total,
            "answered": tally.answered,
            "answered_earlier": tally.earlier,
            "failed": answers.num_failed,
            "interrupted": interrupted,
            "prompt_tokens": tally.prompt_tokens,
            "completion_tokens": tally.completion_tokens,
            "seconds": round(seconds, 3),
            "completion_tokens_per_s": round(speed, 1),
        }
        typer.echo(json.dumps(summary))
        return
    earlier = f", {tally.earlier} had been before" if tally.earlier else ""
    failed = f"; {answers.num_failed} lines of {answers.path} say what went wrong" if answers.num_failed else ""
    typer.echo(
        f"{tally.answered} of {total} lines answered{earlier}{failed}: {tally.completion_tokens} tokens in "
        f"{seconds:.1f} s, {speed:.1f} tokens/s.",
        err=True,
    )
    if interrupted:
        typer.echo("tern: interrupted; the same command goes on from here.", err=True)
