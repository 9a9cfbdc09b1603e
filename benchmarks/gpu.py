"""What Tern does on a GPU beside what that could do, the whole table in one call.

    python -m benchmarks.gpu --json gpu.json          # needs one NVIDIA GPU with 80 GB or more; about eight minutes
    python -m benchmarks.gpu --limits H200            # the limits by a data sheet; needs no GPU

The limits are measured first; each row is then timed over a cache of random keys and values and printed at once, and
the file is written anew after each, so that a call that is cut short has told what it knew. Rows of one precision are
timed together, since loading takes longer than timing. A row that fails says why, and the others go on. In the end
stands where the time of each row's step went, kernel by kernel. Any network can be timed on any device of the engine:
`--model dummy:tiny --device cpu --batches 2 --batch-depth 32 --prefill 64 --context 256` takes seconds.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from benchmarks.comparison import numbers
from benchmarks.gpu_plan import TERN, Row, plan, row_limits
from benchmarks.gpu_steps import Profile, Timed, time_row
from benchmarks.gpu_transformers import seconds_per_token
from tern import ops
from tern.bench import GpuLimits, Limits, MachineLimits, Setting, measure_device
from tern.bench.gpu import DATA_SHEETS, take_device, weight_sizes
from tern.bench.overhead import ROOM
from tern.checkpoint import ModelSource, load_tensors, resolve_model
from tern.engine import EngineOptions
from tern.errors import OptionError, TernError

LOADING_SECONDS = 75.0
"""What loading one precision takes, about, until one was loaded."""
LONGEST_NOTE = 200


@dataclass(frozen=True)
class Measured:
    """A row as it was measured: `figure` and `limit` in `unit`, the `share` of the limit that was reached, and the
    `target`; `note` says why there is no figure.
    """

    label: str
    unit: str
    target: float | None
    figure: float | None = None
    limit: float | None = None
    share: float | None = None
    note: str | None = None

    @classmethod
    def of(cls, row: Row, figure: float, limit: float) -> Measured:
        """A row that has a figure."""
        share = limit / figure if row.unit == "s" else figure / limit
        return cls(row.label, row.unit, row.target, figure, limit, share)

    @property
    def words(self) -> str:
        """The row as a line of the table."""
        if self.figure is None or self.limit is None or self.share is None:
            return f"{self.label:52} {self.note}"
        target = "" if self.target is None else f"  target {self.target:g}"
        return f"{self.label:52} {self.figure:10.2f} of {self.limit:10.2f} {self.unit:8} {self.share:4.0%}{target}"


@dataclass
class Budget:
    """Seconds that a call may take, from its making on; `loading`: what loading took last."""

    seconds: float
    started: float = field(default_factory=time.monotonic)
    loading: float = LOADING_SECONDS

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return self.seconds - (time.monotonic() - self.started)

    def refusal(self, needed: float) -> str | None:
        """Why something that takes about `needed` seconds is not begun; None if it is."""
        if needed <= self.left:
            return None
        return f"skipped: takes about {needed:.0f} s, {max(0.0, self.left):.0f} of --budget-seconds are left"


class Table:
    """The rows as they are measured, with profiles if `profiled`: `report` is called after each."""

    def __init__(self, rows: Sequence[Row], report: Callable[[Measured], None], *, profiled: bool = True) -> None:
        self.rows, self.report, self.profiled = rows, report, profiled
        self.measured: dict[Row, Measured] = {}
        self.profiles: dict[Row, Profile] = {}

    def note(self, row: Row, note: str) -> None:
        """A row without a figure."""
        text = " ".join(note.split())
        self._add(row, Measured(row.label, row.unit, row.target, note=text[:LONGEST_NOTE]))

    def figure(self, row: Row, timed: Timed) -> None:
        """A row with one."""
        if timed.profile is not None:
            self.profiles[row] = timed.profile
        self._add(row, Measured.of(row, timed.figure, timed.limit))
        if timed.no_profile is not None:
            print(f"  no profile: {timed.no_profile[:LONGEST_NOTE]}", flush=True)

    def _add(self, row: Row, measured: Measured) -> None:
        self.measured[row] = measured
        self.report(measured)

    def as_json(self) -> dict[str, object]:
        """Rows and profiles in order of importance, as far as there are any yet."""
        return {
            "rows": [asdict(self.measured[row]) for row in self.rows if row in self.measured],
            "profiles": [asdict(self.profiles[row]) for row in self.rows if row in self.profiles],
        }


def measure(source: ModelSource, device: torch.device, limits: Limits, table: Table, budget: Budget) -> None:
    """Fill the table, one precision after the other, in order of their most important rows."""
    groups: dict[tuple[str, str | None], list[Row]] = {}
    for row in table.rows:
        groups.setdefault((row.engine, row.quantization), []).append(row)
    for (engine, _), rows in groups.items():
        fill = _fill_tern if engine == TERN else _fill_transformers
        fill(source, device, limits, rows, table, budget)
        _free(device)


def _fill_tern(
    source: ModelSource, device: torch.device, limits: Limits, rows: Sequence[Row], table: Table, budget: Budget
) -> None:
    """The rows of one precision, whose weights are loaded once."""
    known = []
    for row in rows:
        try:
            EngineOptions(quantization=row.quantization, kv_cache_dtype=row.kv_cache_dtype)
        except OptionError as error:
            table.note(row, f"skipped: {error}")
        else:
            known.append(row)
    if not known:
        return
    refusal = budget.refusal(budget.loading + known[0].seconds)
    if refusal is not None:
        for row in known:
            table.note(row, refusal)
        return
    started = time.monotonic()
    try:
        tensors = load_tensors(source, device=device, quantization=known[0].quantization)
    except Exception as error:
        for row in known:
            table.note(row, _failure(error))
        return
    budget.loading = time.monotonic() - started
    for row in known:
        _fill_row(row, source, tensors, device, limits, table, budget)


def _fill_row(
    row: Row,
    source: ModelSource,
    tensors: Mapping[str, ops.Weight],
    device: torch.device,
    limits: Limits,
    table: Table,
    budget: Budget,
) -> None:
    refusal = budget.refusal(row.seconds)
    if refusal is not None:
        table.note(row, refusal)
        return
    try:
        table.figure(row, time_row(row, source.config, tensors, limits, profiled=table.profiled))
    except Exception as error:  # of whatever kind: the other rows may still work
        table.note(row, _failure(error))
    _free(device)


def _fill_transformers(
    source: ModelSource, device: torch.device, limits: Limits, rows: Sequence[Row], table: Table, budget: Budget
) -> None:
    """The rows of transformers' generate."""
    for row in rows:
        refusal = budget.refusal(row.seconds)
        if refusal is not None:
            table.note(row, refusal)
            continue
        least = sum(step.seconds(limits) for step in row.work(source.config, weight_sizes(source.config, None)))
        try:
            seconds = seconds_per_token(source.raw_config, device)
        except ImportError as error:
            table.note(row, f"skipped: {error}: pip install transformers")
        except Exception as error:
            table.note(row, _failure(error))
        else:
            table.figure(row, Timed(row.figure(seconds), row.figure(least)))


def _failure(error: Exception) -> str:
    """A row's note, by what its measuring raised: what cannot be here, or what went wrong."""
    return f"skipped: {error}" if isinstance(error, TernError) else f"failed: {type(error).__name__}: {error}"


def _free(device: torch.device) -> None:
    """Give back what the row before has held."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def print_profiles(profiles: Sequence[Profile]) -> None:
    """Where the time of each step went."""
    for one in profiles:
        print(f"\n{one.label}: a step of {one.step_ms:.2f} ms, kernels {one.busy_ms:.2f} ms of it")
        for kernel in one.kernels:
            print(f"  {kernel.ms:9.3f} ms  {kernel.ms / one.step_ms:4.0%}  {kernel.calls:6.0f} x  {kernel.name}")


def _arguments() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    made.add_argument("--model", default="dummy:ernie-4.5-21b-a3b", help="a directory, hub id or dummy:PRESET")
    made.add_argument("--device", default="cuda", help="cuda, cuda:N or cpu")
    made.add_argument("--batches", type=numbers, default=[32, 256], help="sequences that decode together")
    made.add_argument("--batch-depth", type=int, default=1024, help="tokens that each of them holds")
    made.add_argument("--prefill", type=int, default=8192, help="tokens of a prompt")
    made.add_argument("--context", type=int, help="tokens of the long sequence; default: the model's positions")
    made.add_argument("--only", default="", metavar="TEXT", help="only rows whose label has this in it")
    made.add_argument("--budget-seconds", type=float, default=540.0, help="begin no row that would end later")
    made.add_argument("--no-profiles", action="store_true", help="only the figures")
    made.add_argument("--limits", choices=DATA_SHEETS, help="print the limits by this card's data sheet, and end")
    made.add_argument("--json", type=Path, metavar="FILE", help="write the figures here as well")
    return made


def print_limits(rows: Sequence[Row], source: ModelSource, limits: GpuLimits) -> None:
    """What no engine passes on such a card."""
    print(limits.words)
    for one in row_limits([row for row in rows if row.engine == TERN], source.config, limits):
        print(f"{one.label:52} {one.figure:10.2f} {one.unit:8} by {one.bound}")


def planned_rows(wanted: argparse.Namespace, source: ModelSource) -> list[Row]:
    """The rows that the arguments describe. Raises `OptionError` for lengths that the model does not have."""
    positions = source.config.max_position_embeddings
    lengths = {"batch_depth": wanted.batch_depth, "prefill": wanted.prefill, "context": wanted.context or positions}
    for name, length in lengths.items():
        most = positions - ROOM if name == "batch_depth" else positions
        if not 1 <= length <= most:
            raise OptionError(
                f"--{name.replace('_', '-')} is {length}, but {source.name} has {positions} positions: "
                f"give a number from 1 to {most}."
            )
    return plan(batches=wanted.batches, **lengths)


def run(wanted: argparse.Namespace, command: Sequence[str]) -> None:
    """Do what the arguments say. Raises `TernError` for what cannot be."""
    budget = Budget(wanted.budget_seconds)
    source = resolve_model(wanted.model)
    rows = [row for row in planned_rows(wanted, source) if wanted.only in row.label]
    if wanted.limits is not None:
        print_limits(rows, source, DATA_SHEETS[wanted.limits])
        return
    device = take_device(wanted.device)
    limits: GpuLimits | MachineLimits = measure_device(device)
    setting = Setting.now(command, limits.name if isinstance(limits, GpuLimits) else None)
    print(f"{setting.machine}, {setting.date}\n{limits.words}", flush=True)

    def report(measured: Measured) -> None:
        print(measured.words, flush=True)
        if wanted.json is not None:
            figures = {"setting": asdict(setting), "limits": asdict(limits), **table.as_json()}
            wanted.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")

    table = Table(rows, report, profiled=not wanted.no_profiles)
    measure(source, device, limits, table, budget)
    print("\nIn order of importance:")
    for row in rows:
        print(table.measured[row].words)
    print_profiles([table.profiles[row] for row in rows if row in table.profiles])


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    made = _arguments()
    typed = sys.argv[1:] if arguments is None else arguments
    try:
        run(made.parse_args(typed), ["python", "-m", "benchmarks.gpu", *typed])
    except TernError as error:
        made.exit(2, f"{error}\n")


if __name__ == "__main__":
    main()
