"""`tern bench --url`: a running server under load, as a progress bar, a table and pictures. Knows terminals."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import typer

from tern.errors import OptionError

if TYPE_CHECKING:
    from tern.bench.draw import Destination
    from tern.bench.load import LoadEvents, LoadPlan
    from tern.bench.load_report import LoadReport, RateResult, Spread

INTERRUPTED = 130
_COLUMNS = ("rate", "answered", "failed", "req/s", "tok/s")
_SPREAD_WIDTH = 32  # three numbers such as 0.000123 and what stands between them
_SPREADS = ("first token", "inter-token", "per token", "end to end")


def check_rates(text: str) -> tuple[float, ...]:
    """A list such as `0.5,2,inf`. Raises `OptionError` for anything that is no number above 0."""
    rates = []
    for part in map(str.strip, text.split(",")):
        try:
            rate = float(part)
        except ValueError:
            rate = math.nan
        if not rate > 0:
            raise OptionError(f"--rates is {text[:80]!r}: give numbers above 0 or inf, as in 0.5,1,2,inf.")
        rates.append(rate)
    return tuple(rates)


def bench_server(plan: LoadPlan, destination: Destination | None, command: Sequence[str], *, as_json: bool) -> None:
    """Carry the plan out and show what came of it.

    Exits with 130 if it was interrupted, with 1 if no request was answered.
    """
    from tern.bench.load import run_load

    with _shown(plan, table=not as_json) as events:
        report = run_load(plan, command=command, events=events)
    if as_json:
        typer.echo(json.dumps(report.as_json()))
    else:
        _print_end(report)
    if destination is not None and report.results:
        from tern.bench.draw_load import load_figure

        written = destination.write(lambda: load_figure(report), report.as_json())
        typer.echo(f"Wrote {', '.join(map(str, written))}.", err=True)
    if report.interrupted:
        typer.echo("tern: interrupted; the last rate counts what was answered until then.", err=True)
        raise typer.Exit(INTERRUPTED)
    if not any(result.answered for result in report.results):
        raise typer.Exit(1)


@contextmanager
def _shown(plan: LoadPlan, *, table: bool) -> Iterator[LoadEvents]:
    """A bar on stderr, if that is a terminal, and the table's rows on stdout as they are known."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from tern.bench.load import LoadEvents

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    bar = Progress(
        *columns,
        console=Console(stderr=True),
        transient=True,
        redirect_stdout=False,  # or the table would go where the bar goes
        disable=not sys.stderr.isatty(),
    )
    task = bar.add_task("", total=plan.requests)
    heading = [_heading()] if table else []

    def begin(rate: float) -> None:
        while heading:  # once, and not before the server has answered
            typer.echo(heading.pop())
        bar.reset(task, description=f"{rate:g} requests/s", total=plan.requests)
        bar.start()

    def result(found: RateResult) -> None:
        bar.stop()
        if table:
            _print_row(found)

    try:
        yield LoadEvents(begin=begin, ended=lambda _: bar.advance(task), result=result)
    finally:
        bar.stop()


def _heading() -> str:
    counts = "".join(f"{name:>10}" for name in _COLUMNS)
    spreads = "".join(f"{name:>{_SPREAD_WIDTH}}" for name in _SPREADS)
    units = f"{'p50 / p90 / p99, s':>{_SPREAD_WIDTH}}" * len(_SPREADS)
    return f"{counts}{spreads}\n{'':{len(counts)}}{units}"


def _print_row(result: RateResult) -> None:
    counts = f"{result.label:>10}{result.answered:>10}{result.failed:>10}{result.requests_per_s:>10.3g}"
    spreads = (result.first_token, result.inter_token, result.per_token, result.end_to_end)
    columns = "".join(f"{_spread(each):>{_SPREAD_WIDTH}}" for each in spreads)
    typer.echo(f"{counts}{result.output_tokens_per_s:>10.1f}{columns}")
    for sentence, count in result.failures.items():
        typer.echo(f"{'':10}{count} failed: {sentence}")


def _spread(spread: Spread | None) -> str:
    if spread is None:
        return "-"
    return " / ".join(f"{seconds:.3g}" for seconds in (spread.p50, spread.p90, spread.p99))


def _print_end(report: LoadReport) -> None:
    answered = sum(result.answered for result in report.results)
    prompt = sum(result.prompt_tokens * result.answered for result in report.results) / max(1, answered)
    output = sum(result.output_tokens * result.answered for result in report.results) / max(1, answered)
    ends = "" if report.ignores_eos else " (this server ends answers where the model does)"
    typer.echo(f"{report.model} at {report.url}: on average {prompt:.0f} tokens in, {output:.0f} out{ends}.")
