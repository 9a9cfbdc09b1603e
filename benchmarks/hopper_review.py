"""What a GPU would be asked to do in a step, launch by launch, on a machine without one.

    python -m benchmarks.hopper_review --json review.json     # compiles each kernel for sm_90: two minutes or so
    python -m benchmarks.hopper_review --count                # only counts launches: seconds

Nothing is computed and nothing is timed. The engine takes steps of the network at its full size over tensors without
memory (`benchmarks.hopper_steps`), each kernel is compiled as those launches would compile it, and its machine code is
read (`benchmarks.hopper_code`). What comes of counts, LAUNCH_SECONDS a launch and the bytes or products of the step at
what an H200 was measured to reach, is an estimate that no run should pass, and not a figure. At the end stand kernels
whose code says that they waste time:

    DOES NOT COMPILE    what the interpreter took and the compiler refuses
    SPILLS              registers do not hold what a thread works on
    NARROW LOADS        innermost loops load from memory by less than 16 bytes a thread
    FEW PROGRAMS        more than 1 MB is read by fewer programs than there are multiprocessors
    LITTLE IN FLIGHT    more than 1 MB is read, and less than 24 KB at once can be on its way to a multiprocessor
    MANY INSTRUCTIONS   more than 1 MB is read, by a loop of so many instructions that it cannot keep up with memory
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from benchmarks.gpu_plan import Row
from benchmarks.hopper_code import PROCESSORS, Code, read_code
from benchmarks.hopper_steps import Launch, pretend_hopper, step_launches
from tern.bench.gpu import GpuLimits, weight_sizes
from tern.checkpoint import resolve_model
from tern.errors import TernError
from tern.model import ErnieConfig

LAUNCH_SECONDS = 1.3e-6
"""From the end of a kernel to the beginning of the next in a CUDA graph, about."""
H200 = GpuLimits("an H200 as measured", 141.0, 4300.0, 790.0, 1580.0)
"""What copies and products of large matrices reach there; fp8 products taken as twice as fast as bf16."""
CLOCK = 1.98e9
"""Cycles a second of an H200 at most."""
READS_MUCH = 1e6
IN_FLIGHT = 24 * 1024
"""Bytes on their way to a Hopper multiprocessor without which it does not get its share of the memory's rate."""

DEPTH, PROMPT = 1024, 8192
TARGETS: dict[tuple[int, str | None], float] = {
    (1, None): 500.0,
    (1, "block_wise_fp8"): 900.0,
    (1, "wint4"): 1200.0,
    (32, None): 2600.0,
    (32, "block_wise_fp8"): 4800.0,
    (256, None): 14000.0,
    (256, "block_wise_fp8"): 25000.0,
}
PREFILL_TARGET = 60000.0


def review_rows() -> list[Row]:
    """The steps that are reviewed."""
    formats = (None, "block_wise_fp8", "wint4")
    rows = [
        Row(
            "decode",
            form,
            "fp8" if sequences == 256 and form == "block_wise_fp8" else "auto",
            sequences,
            depth=0 if sequences == 1 else DEPTH,
            target=TARGETS.get((sequences, form)),
        )
        for sequences in (1, 32, 256)
        for form in formats
    ]
    return rows + [Row("prefill", form, tokens=PROMPT, target=PREFILL_TARGET) for form in formats]


@dataclass(frozen=True)
class Flag:
    """What is wrong with a kernel, in numbers, and how bad that is among its like."""

    badness: float
    words: str


@dataclass(frozen=True)
class Reviewed:
    """A launch, and what its kernel was compiled to: `kernel` names the compiled one. `problem`: it was not."""

    launch: Launch
    kernel: str | None = None
    code: Code | None = None
    problem: str | None = None

    @property
    def kind(self) -> tuple[object, ...]:
        """Launches of one kind are the same but for their tensors."""
        return (self.launch.name, self.launch.grid, self.launch.shapes, self.kernel)

    @property
    def flags(self) -> dict[str, Flag]:
        """What its code says against it."""
        if self.problem is not None:
            return {"DOES NOT COMPILE": Flag(0.0, self.problem)}
        code, launch = self.code, self.launch
        if code is None:
            return {}
        found, much = {}, launch.read_bytes > READS_MUCH
        if code.stack:
            found["SPILLS"] = Flag(code.stack, f"{code.stack} bytes a thread, {code.spills} times in innermost loops")
        if code.narrow_share > 0 and (code.looping or much):
            found["NARROW LOADS"] = Flag(code.narrow_share, _loads(code))
        if much and launch.programs < PROCESSORS:
            read = f"{launch.programs} read {launch.read_bytes / 1e6:.1f} MB"
            found["FEW PROGRAMS"] = Flag(launch.read_bytes / launch.programs, read)
        in_flight = code.bytes_in_flight(launch.programs)
        if much and in_flight < IN_FLIGHT:
            found["LITTLE IN FLIGHT"] = Flag(-in_flight, f"{in_flight / 1024:.0f} KB a multiprocessor")
        rate = code.bytes_a_cycle(launch.programs) * PROCESSORS * CLOCK / 1e9
        if much and code.looping and rate < H200.copy_gb_s:
            found["MANY INSTRUCTIONS"] = Flag(-rate, f"{rate:.0f} GB/s at most by its instructions")
        return found

    @property
    def words(self) -> str:
        """The launch as a line of the table."""
        read = f"{self.launch.read_bytes / 1e6:9.1f} MB" if self.launch.read_bytes > READS_MUCH / 100 else ""
        if self.code is None:
            shapes = " ".join("x".join(map(str, shape)) or "1" for shape in self.launch.shapes)
            about = shapes if self.launch.grid is None else "x".join(map(str, self.launch.grid))
            return f"{self.launch.name:22} {self.problem or about:70}{read}"
        code = self.code
        waves = self.launch.programs / (PROCESSORS * code.programs_a_processor)
        return (
            f"{self.launch.name:22} {'x'.join(map(str, self.launch.grid or ())):>10} "
            f"{code.programs_a_processor:3} {waves:6.2f} {code.warps:4} {code.registers:4} {code.stack:4} "
            f"{code.shared / 1024:6.1f} {code.bytes_in_flight(self.launch.programs) / 1024:5.0f}  "
            f"{_loads(code):18} {code.products:8}{read}"
        )

    def as_json(self) -> dict[str, Any]:
        """Its facts."""
        launch = self.launch
        facts: dict[str, Any] = {"name": launch.name, "grid": launch.grid, "shapes": launch.shapes}
        facts |= {"read_bytes": launch.read_bytes, "flags": {name: flag.words for name, flag in self.flags.items()}}
        if launch.call is not None:
            facts["constants"] = {name: str(value) for name, value in launch.call.options.items()}
        if self.code is not None:
            code = self.code
            facts |= {"registers": code.registers, "stack": code.stack, "shared": code.shared, "warps": code.warps}
            facts |= {"stages": code.stages, "programs_a_processor": code.programs_a_processor}
            facts |= {"loads": dict(code.loads), "products": code.products}
            facts["loop_instructions"] = [loop.instructions for loop in code.loops]
            facts["bytes_in_flight"] = code.bytes_in_flight(launch.programs)
        return facts


HEAD = (
    f"    {'kernel':22} {'programs':>10} {'/SM':>3} {'waves':>6} {'warps':>4} {'regs':>3} {'stack':>4}"
    f" {'shared':>6} {'fly K':>5}  {'loads':18} products     reads"
)


def _loads(code: Code) -> str:
    """Loads of innermost loops, the widest first."""
    return ", ".join(f"{count} of {width} B" for width, count in sorted(code.loads.items(), reverse=True))


class Compiler:
    """Compiles launches, each specialisation once."""

    def __init__(self) -> None:
        self._codes: dict[str, Code] = {}

    def __call__(self, launch: Launch) -> Reviewed:
        """The launch with its code, if it is one of a Triton kernel."""
        if launch.call is None:
            return Reviewed(launch)
        from triton.runtime.jit import JITFunction

        call = launch.call
        try:
            kernel: Any = JITFunction.run(call.function, *call.arguments, grid=launch.grid, warmup=True, **call.options)
        except Exception as error:  # of whatever kind: the other kernels are reviewed all the same
            return Reviewed(launch, problem=" ".join(f"{type(error).__name__}: {error}".split())[:200])
        if kernel.hash not in self._codes:
            self._codes[kernel.hash] = read_code(kernel)
        return Reviewed(launch, kernel.hash[:12], self._codes[kernel.hash])


@dataclass(frozen=True)
class Section:
    """Launches that follow each other: those of each of some `layers`, or beside them if there are none."""

    layers: tuple[int, ...]
    in_graph: bool
    launches: tuple[Reviewed, ...]

    @property
    def title(self) -> str:
        """What they belong to."""
        by = "in the graph" if self.in_graph else "launched by the host"
        if not self.layers:
            return f"beside the layers, {by}"
        first, last = self.layers[0], self.layers[-1]
        return f"layer {first}, {by}" if first == last else f"each of layers {first} to {last}, {by}"


def sections(launches: Sequence[Reviewed]) -> list[Section]:
    """A step's launches in order; neighbouring layers that are alike are one section."""
    found: list[Section] = []
    places = groupby(launches, key=lambda one: (one.launch.layer, one.launch.in_graph))
    for (layer, in_graph), group in places:
        section = Section(() if layer is None else (layer,), in_graph, tuple(group))
        if section.layers and found and found[-1].layers and _alike(found[-1], section):
            found[-1] = replace(found[-1], layers=(*found[-1].layers, *section.layers))
        else:
            found.append(section)
    return found


def _alike(one: Section, other: Section) -> bool:
    return [launch.kind for launch in one.launches] == [launch.kind for launch in other.launches]


@dataclass(frozen=True)
class Step:
    """A reviewed step. `read_bytes`: what it must read at least; `seconds`: what it takes at least, by an estimate."""

    row: Row
    launches: tuple[Reviewed, ...]
    read_bytes: float
    seconds: float

    @classmethod
    def of(cls, config: ErnieConfig, row: Row, launches: Sequence[Reviewed]) -> Step:
        """Estimate the step: its launches one after the other, and what it must read or multiply."""
        works = row.work(config, weight_sizes(config, row.quantization))
        least = sum(work.seconds(H200) for work in works) + LAUNCH_SECONDS * len(launches)
        return cls(row, tuple(launches), sum(work.read_bytes for work in works), least)

    @property
    def a_layer(self) -> int:
        """Launches of the last layer."""
        layers = [one.launch.layer for one in self.launches if one.launch.layer is not None]
        return layers.count(max(layers))

    @property
    def in_graph(self) -> int:
        """Launches that a graph replays."""
        return sum(one.launch.in_graph for one in self.launches)

    @property
    def beside(self) -> Counter[str]:
        """Launches of no layer and no graph, by name: inputs, logits, sampler."""
        return Counter(one.launch.name for one in self.launches if one.launch.layer is None and not one.launch.in_graph)

    @property
    def launches_allowed(self) -> int | None:
        """The most launches with which the target can be met, where it can; all else at the limit."""
        if self.row.target is None:
            return None
        work = self.seconds - LAUNCH_SECONDS * len(self.launches)
        return int((self.row.figure(1.0) / self.row.target - work) / LAUNCH_SECONDS)

    @property
    def words(self) -> str:
        """The step as a line of the summary."""
        target = "" if self.row.target is None else f"{self.row.target:9.0f} {self.launches_allowed:9}"
        return (
            f"{self.row.label:62} {len(self.launches):5} {self.in_graph:5} {self.a_layer:5} "
            f"{LAUNCH_SECONDS * len(self.launches) * 1e3:7.2f} {self.read_bytes / 1e9:7.2f} {self.seconds * 1e3:8.2f} "
            f"{self.row.figure(self.seconds):9.0f} {target}"
        )

    def as_json(self) -> dict[str, Any]:
        """Its facts and its launches."""
        return {
            "label": self.row.label,
            "launches": len(self.launches),
            "in_graph": self.in_graph,
            "a_layer": self.a_layer,
            "beside": self.beside,
            "read_bytes": self.read_bytes,
            "estimated_seconds_at_least": self.seconds,
            "estimated_tokens_per_s_at_most": self.row.figure(self.seconds),
            "target": self.row.target,
            "launches_allowed": self.launches_allowed,
            "sections": [
                {
                    "title": one.title,
                    "times": max(1, len(one.layers)),
                    "launches": [launch.as_json() for launch in one.launches],
                }
                for one in sections(self.launches)
            ],
        }


SUMMARY_HEAD = (
    f"{'an estimate from counts, not a measurement':62} {'all':>5} {'graph':>5} {'layer':>5} {'ms':>7} {'GB':>7} "
    f"{'ms/step':>8} {'tokens/s':>9} {'target':>9} {'launches':>9}"
)


def print_step(step: Step) -> None:
    """The launches of a step, in order."""
    print(f"\n{step.row.label}: {len(step.launches)} launches, {step.a_layer} in the last layer")
    for section in sections(step.launches):
        print(f"  {section.title}: {len(section.launches)} launches")
        if any(one.code is not None for one in section.launches):
            print(HEAD)
        for one, count in _runs(section.launches):
            print(f"    {one.words.rstrip()}{f'  (x {count})' if count > 1 else ''}")


def _runs(launches: Sequence[Reviewed]) -> Iterator[tuple[Reviewed, int]]:
    """Launches that follow each other and are alike, as one."""
    for _, group in groupby(launches, key=lambda one: one.kind):
        same = list(group)
        yield same[0], len(same)


def findings(steps: Sequence[Step]) -> list[str]:
    """A line for each flag of each kernel in each format: how many specialisations have it, and the worst of them."""
    found: dict[tuple[str, str, str], dict[str, tuple[Flag, str]]] = {}
    for step in steps:
        for one in step.launches:
            for name, flag in one.flags.items():
                kinds = found.setdefault((name, one.launch.name, step.row.quantization or "bf16"), {})
                kinds.setdefault(one.kernel or "", (flag, _where(step.row, one.launch)))
    lines = []
    for (name, kernel, form), kinds in sorted(found.items()):
        flag, where = max(kinds.values(), key=lambda kind: kind[0].badness)
        lines.append(f"{name:17} {kernel}, {form}: {len(kinds)} of its kernels; the worst {flag.words} ({where})")
    return lines


def _where(row: Row, launch: Launch) -> str:
    layer = "" if launch.layer is None else f", layer {launch.layer}"
    return f"{row.label}{layer}, {'x'.join(map(str, launch.grid or ()))} programs"


def _arguments() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    made.add_argument("--model", default="dummy:ernie-4.5-21b-a3b", help="dummy:PRESET, or a directory for its config")
    made.add_argument("--only", default="", metavar="TEXT", help="only steps whose label has this in it")
    made.add_argument("--count", action="store_true", help="count launches and compile nothing")
    made.add_argument("--json", type=Path, metavar="FILE", help="write all of it here as well")
    return made


def review(config: ErnieConfig, rows: Sequence[Row], *, count: bool) -> Iterator[Step]:
    """The steps of these rows, one by one. The process must have called `pretend_hopper`."""
    compiled = Reviewed if count else Compiler()
    for row in rows:
        yield Step.of(config, row, [compiled(launch) for launch in step_launches(config, row)])


def main(arguments: Sequence[str] | None = None) -> int:
    """Review and print; 1 if a kernel does not compile."""
    made = _arguments()
    wanted = made.parse_args(arguments)
    os.environ.pop("TRITON_INTERPRET", None)
    try:
        config = resolve_model(wanted.model).config
    except TernError as error:
        made.exit(2, f"{error}\n")
    rows = [_fitting(row, config) for row in review_rows() if wanted.only in row.label]
    pretend_hopper()
    steps = []
    for step in review(config, rows, count=wanted.count):
        steps.append(step)
        print_step(step)
        sys.stdout.flush()
    print(f"\n{SUMMARY_HEAD}")
    for step in steps:
        print(step.words.rstrip())
    flagged = findings(steps)
    print("\nFindings:", *(flagged or ["none"]), sep="\n  ")
    if wanted.json is not None:
        facts: dict[str, Any] = {"limits": asdict(H200), "launch_seconds": LAUNCH_SECONDS, "findings": flagged}
        facts["steps"] = [step.as_json() for step in steps]
        wanted.json.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return int(any(line.startswith("DOES NOT COMPILE") for line in flagged))


def _fitting(row: Row, config: ErnieConfig) -> Row:
    """The row as far as the model has positions for it."""
    room = config.max_position_embeddings - 2
    return replace(row, depth=min(row.depth, room), tokens=min(row.tokens, room))


if __name__ == "__main__":
    sys.exit(main())
