"""Two engines timed on the same work, by turns: A B A B. Knows work and ratios; starts programs, knows no engine's own.

Each engine runs in processes that end before the other's begin: two models of this size share no machine, and neither
is timed while the other's threads wait. A ratio is made within a round, whose two halves saw the same neighbours.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

from rich.console import Console
from rich.table import Table

from tern.bench import Setting


@dataclass(frozen=True, order=True)
class Work:
    """What is timed.

    "prefill": a prompt of `tokens`; "decode": a token for each of `sequences` that hold `depth` tokens each; "start":
    from the command to the first token.
    """

    kind: str
    sequences: int = 1
    tokens: int = 1
    depth: int = 0

    @property
    def label(self) -> str:
        """The work in words."""
        if self.kind == "start":
            return "start to first token, s"
        if self.kind == "prefill":
            return f"prefill {self.tokens}, tokens/s"
        together = "1 sequence" if self.sequences == 1 else f"{self.sequences} sequences"
        return f"decode {together} at depth {self.depth}, tokens/s"


Figures = dict[Work, float]
"""Tokens a second, or for "start" seconds."""


class Engine(Protocol):
    """An engine that can be timed once on all the work it is compared on."""

    name: str

    def measure(self) -> Figures: ...


@dataclass(frozen=True)
class Wanted:
    """What both engines are timed on: prompt lengths, depths of one sequence, and numbers of sequences together."""

    prefill: Sequence[int]
    depths: Sequence[int]
    sequences: Sequence[int]
    batch_depth: int
    start: bool


@dataclass(frozen=True)
class Row:
    """One work: medians over the rounds, and the median over the rounds of how many times as fast the first is."""

    work: str
    first: float
    second: float
    ratio: float


@dataclass(frozen=True)
class Comparison:
    """What a comparison prints as JSON; `rounds` holds every figure, by engine and work."""

    first: str
    second: str
    setting: Setting
    rows: list[Row]
    rounds: list[dict[str, dict[str, float]]]


class ProgramError(Exception):
    """A program failed or said what cannot be read; the message says which, and what it said last."""


def run(command: Sequence[str], environment: Mapping[str, str] | None = None) -> str:
    """The standard output of a program that succeeds. Raises `ProgramError` otherwise."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", env=environment, check=False)
    except OSError as error:
        raise ProgramError(
            f"{command[0]} cannot be started ({error.strerror}): give the path of the program."
        ) from None
    if done.returncode != 0:
        last = (done.stderr.strip() or done.stdout.strip() or "nothing").splitlines()[-1][-300:]
        raise ProgramError(f"{shlex.join(command)[:300]} ended with {done.returncode} and said last: {last}")
    return done.stdout


def seconds_of(command: Sequence[str], environment: Mapping[str, str] | None = None) -> float:
    """How long a program that succeeds takes, from its start to its end."""
    started = time.perf_counter()
    run(command, environment)
    return time.perf_counter() - started


class Tern:
    """Tern's own side of every comparison: `tern bench` and `tern generate` of the Tern that runs this."""

    name = "Tern"

    def __init__(self, model: str, options: Sequence[str], wanted: Wanted) -> None:
        self.model, self.options, self.wanted = model, options, wanted

    def measure(self) -> Figures:
        """One run of each kind of work."""
        wanted, figures = self.wanted, Figures()
        if wanted.prefill:
            figures |= self._bench(prefill=wanted.prefill, decode=[], depths=[0])
        if wanted.depths:
            figures |= self._bench(prefill=[], decode=[1], depths=wanted.depths)
        if wanted.sequences:
            figures |= self._bench(prefill=[], decode=wanted.sequences, depths=[wanted.batch_depth])
        if wanted.start:
            tern = [sys.executable, "-m", "tern", "generate", "hello", "--raw", "--max-tokens", "1"]
            figures[Work("start")] = seconds_of([*tern, "--model", self.model, *self.options])
        return figures

    def _bench(self, *, prefill: Sequence[int], decode: Sequence[int], depths: Sequence[int]) -> Figures:
        sizes = {"--prefill": prefill, "--decode": decode, "--depth": depths}
        flags = [part for flag, numbers in sizes.items() for part in (flag, ",".join(map(str, numbers)))]
        said = run([sys.executable, "-m", "tern", "bench", "--model", self.model, *self.options, *flags, "--json"])
        return {
            Work(result["kind"], result["sequences"], result["tokens"], result["depth"]): result["tokens_per_s"]
            for result in json.loads(said)["results"]
        }


def compare(
    first: Engine, second: Engine, rounds: int, on_round: Callable[[Figures, Figures], None] = lambda *_: None
) -> Comparison:
    """Time both by turns, `rounds` times, and compare what both were timed on."""
    pairs = []
    for _ in range(rounds):
        pairs.append((first.measure(), second.measure()))
        on_round(*pairs[-1])
    works = [work for work in pairs[0][0] if work in pairs[0][1]]
    rows = [_row(work, [(mine[work], other[work]) for mine, other in pairs]) for work in works]
    figures = [
        {
            engine.name: {work.label: figure for work, figure in side.items()}
            for engine, side in zip((first, second), pair, strict=True)
        }
        for pair in pairs
    ]
    return Comparison(first.name, second.name, Setting.now(["python", *sys.orig_argv[1:]]), rows, figures)


def _row(work: Work, pairs: Sequence[tuple[float, float]]) -> Row:
    ratios = [other / mine if work.kind == "start" else mine / other for mine, other in pairs]
    return Row(
        work.label,
        statistics.median(mine for mine, _ in pairs),
        statistics.median(other for _, other in pairs),
        statistics.median(ratios),
    )


def numbers(text: str) -> list[int]:
    """An argument such as `128,512`; empty for none."""
    try:
        found = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        found = [-1]
    if any(number < 0 for number in found):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of whole numbers, as in 128,512")
    return found


def parser(description: str) -> argparse.ArgumentParser:
    """The options that every comparison has."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--model", required=True, help="what Tern runs: best a packed directory, which is mapped")
    made.add_argument("--tern-options", type=shlex.split, default=[], help="more for tern bench and tern generate")
    made.add_argument("--rounds", type=int, default=3, help="how often both are timed, by turns")
    made.add_argument("--prefill", type=numbers, default=[128, 512, 2048], help="lengths of prompts")
    made.add_argument("--depths", type=numbers, default=[0, 4096], help="depths at which one sequence decodes")
    made.add_argument("--sequences", type=numbers, default=[8], help="numbers of sequences that decode together")
    made.add_argument("--no-start", dest="start", action="store_false", help="do not time starts")
    made.add_argument("--json", type=Path, metavar="FILE", help="write every figure here as well")
    return made


def carry_out(first: Engine, second: Engine, arguments: argparse.Namespace) -> None:
    """Compare, show a line for each round and then the table, and write the JSON."""

    def show(mine: Figures, other: Figures) -> None:
        for work in mine:
            print(f"{work.label}: {first.name} {mine[work]:.2f}, {second.name} {other.get(work, 0):.2f}")

    try:
        comparison = compare(first, second, max(1, arguments.rounds), show)
    except ProgramError as error:
        sys.exit(str(error))
    setting = comparison.setting
    table = Table(
        title=f"{setting.processor}, {setting.memory_gb:.0f} GB, {setting.date}; medians of {arguments.rounds}"
    )
    for name in ("", first.name, second.name, "times as fast"):
        table.add_column(name, justify="right" if name else "left")
    for row in comparison.rows:
        table.add_row(row.work, f"{row.first:.2f}", f"{row.second:.2f}", f"{row.ratio:.2f}")
    Console().print(table)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(asdict(comparison), indent=1) + "\n", encoding="utf-8")
