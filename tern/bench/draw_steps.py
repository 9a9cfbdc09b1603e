"""Pictures of timed steps: speed by depth, by sequences and by length of prompt, each beside the machine's limit."""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle
from typing import TYPE_CHECKING

from tern.bench.draw import COLOURS, MARKS, finish, number, page, ticks

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from tern.bench.report import BenchReport, BenchResult

Number = Callable[["BenchResult"], int]


def steps_figure(report: BenchReport) -> Figure:
    """A page with a panel for each of the three, as far as the report has results for it."""
    decode = [result for result in report.results if result.kind == "decode"]
    prefill = [result for result in report.results if result.kind == "prefill"]
    wanted = [results for results in (decode, decode, prefill) if results]
    precision = report.quantization or "weights as stored"
    subtitle = f"{precision}; {report.machine.words}. Dashed, and in brackets as a share: the machine's limit."
    figure, panels = page(f"{report.model}: speed of its steps", subtitle, report.setting, max(1, len(wanted)))
    if decode:
        _panel(panels[0], decode, x=_depth, line=_sequences, line_name=_together)
        finish(panels[0], title="Decode by depth", x="tokens in the cache, each sequence", y="tokens/s, all sequences")
        _panel(panels[1], decode, x=_sequences, line=_depth, line_name=_at_depth)
        finish(panels[1], title="Decode by sequences", x="sequences together", y="tokens/s, all sequences")
    if prefill:
        _panel(panels[-1], prefill, x=_tokens, line=_depth, line_name=_at_depth)
        finish(panels[-1], title="Prefill by length", x="tokens of the prompt", y="tokens/s")
    return figure


def _depth(result: BenchResult) -> int:
    return result.depth


def _sequences(result: BenchResult) -> int:
    return result.sequences


def _tokens(result: BenchResult) -> int:
    return result.tokens


def _together(sequences: int) -> str:
    return "1 sequence" if sequences == 1 else f"{sequences} sequences"


def _at_depth(depth: int) -> str:
    return f"depth {number(depth)}"


def _panel(axes: Axes, results: list[BenchResult], *, x: Number, line: Number, line_name: Callable[[int], str]) -> None:
    """A line for each value of `line` over the values of `x`, and its limit dashed in the same colour."""
    places = {value: place for place, value in enumerate(sorted({x(result) for result in results}))}
    ticks(axes, [number(value) for value in places])
    lines = sorted({line(result) for result in results})
    for value, colour, mark in zip(lines, cycle(COLOURS), cycle(MARKS), strict=False):
        points = sorted((result for result in results if line(result) == value), key=x)
        across = [places[x(result)] for result in points]
        speeds = [result.tokens_per_s for result in points]
        axes.plot(across, speeds, color=colour, marker=mark, label=line_name(value))
        limits = [result.tokens_per_s / result.limit_share for result in points]
        axes.plot(across, limits, color=colour, linestyle=(0, (4, 3)), linewidth=1, marker="_", markersize=10)
        for place, result in zip(across, points, strict=True):
            text = f"{number(result.tokens_per_s)} ({result.limit_share:.0%})"
            axes.annotate(text, (place, result.tokens_per_s), (-4, 5), textcoords="offset points", fontsize=7)
