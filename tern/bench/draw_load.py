"""Pictures of a server under load: how long requests wait, how fast answers come, and how much is done in all."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tern.bench.draw import COLOURS, MARKS, finish, page, ticks

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from tern.bench.load_report import LoadReport, RateResult, Spread

RATE = "requests arriving a second"


def load_figure(report: LoadReport) -> Figure:
    """A page of four panels over the rates: time to first token, time for a token, whole answers, throughput."""
    bound = "" if report.concurrency is None else f", at most {report.concurrency} at once"
    subtitle = (
        f"{report.url}, {report.endpoint}: {report.requests} requests a rate{bound}, about {report.prompt_tokens} "
        f"tokens in, {report.output_tokens} out. Failed requests count in none."
    )
    title = f"{report.model} under load" + (" (interrupted)" if report.interrupted else "")
    figure, panels = page(title, subtitle, report.setting, 4, measured="from")
    results = report.results
    _spreads(panels[0], results, [result.first_token for result in results])
    finish(panels[0], title="Time to first token", x=RATE, y="seconds")
    _spreads(panels[1], results, [result.per_token for result in results], scale=1000)
    finish(panels[1], title="Time for each token after it", x=RATE, y="milliseconds")
    _spreads(panels[2], results, [result.end_to_end for result in results])
    finish(panels[2], title="Whole answer", x=RATE, y="seconds")
    _throughput(panels[3], results)
    return figure


def _spreads(axes: Axes, results: list[RateResult], spreads: list[Spread | None], scale: int = 1) -> None:
    """The percentiles over the rates; a rate at which nothing was answered has none."""
    ticks(axes, [result.label for result in results])
    for name, colour, mark in zip(("p50", "p90", "p99"), COLOURS, MARKS, strict=False):
        known = [(place, getattr(spread, name) * scale) for place, spread in enumerate(spreads) if spread is not None]
        axes.plot([place for place, _ in known], [value for _, value in known], color=colour, marker=mark, label=name)


def _throughput(axes: Axes, results: list[RateResult]) -> None:
    """Tokens a second as bars, with the requests a second and the failures written above."""
    ticks(axes, [result.label for result in results])
    axes.bar(range(len(results)), [result.output_tokens_per_s for result in results], color=COLOURS[0], width=0.55)
    for place, result in enumerate(results):
        failed = f"\n{result.failed} failed" if result.failed else ""
        text = f"{result.requests_per_s:.3g} req/s{failed}"
        axes.annotate(
            text, (place, result.output_tokens_per_s), (0, 3), textcoords="offset points", fontsize=7, ha="center"
        )
    axes.margins(y=0.15)
    finish(axes, title="Throughput", x=RATE, y="output tokens/s, answered requests")
