"""Which kernels run here, on how many threads. Knows processors; knows no arithmetic.

`TERN_FORCE_ISA` names the instruction set instead of the best that the processor has; `TERN_NUM_THREADS` the number of
threads instead of one for every processor that this process may use.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tern.errors import OptionError
from tern.ops.cpu import _kernels

FORCE_ISA, NUM_THREADS = "TERN_FORCE_ISA", "TERN_NUM_THREADS"
_QUOTA = Path("/sys/fs/cgroup/cpu.max")


@dataclass(frozen=True)
class InstructionSet:
    """Kernels of one kind: how `TERN_FORCE_ISA` calls them, what they are, and whether this processor runs them."""

    name: str
    description: str
    available: bool


def instruction_sets() -> list[InstructionSet]:
    """All that were built, the best first."""
    return [InstructionSet(*found) for found in _kernels.instruction_sets()]


def choose_instruction_set(forced: str | None) -> str:
    """The name of the best available instruction set, or the `forced` one.

    Raises `OptionError` if there is none of that name, or if this processor would die of it.
    """
    available = [found.name for found in instruction_sets() if found.available]
    if not forced:
        return available[0]
    if forced not in available:
        built = any(found.name == forced for found in instruction_sets())
        reason = "this processor lacks it" if built else "there are no such kernels"
        raise OptionError(f"{FORCE_ISA} is {forced[:40]!r}, but {reason}: choose from {', '.join(available)}.")
    return forced


def usable_processors() -> int:
    """Processors that this process may use: its affinity, within its control group's quota."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = _QUOTA.read_text().split()
    except (OSError, ValueError):
        return allowed
    return allowed if quota == "max" else max(1, min(allowed, math.ceil(int(quota) / int(period))))


def choose_threads(wanted: str | None) -> int:
    """The `wanted` number of threads, or one for each usable processor.

    Raises `OptionError` if `wanted` is no whole number above 0, or more than there are processors: such threads would
    wait for each other at every layer.
    """
    usable = usable_processors()
    if not wanted:
        return usable
    if not (wanted.isascii() and wanted.isdigit()) or not wanted.strip("0"):
        raise OptionError(
            f"{NUM_THREADS} is {wanted[:40]!r}: it must be a whole number from 1 (here at most {usable})."
        )
    if len(wanted.lstrip("0")) > 9 or int(wanted) > usable:
        raise OptionError(
            f"{NUM_THREADS} is {wanted[:40]}, but this process may use {usable} processors, and more threads would "
            f"wait for each other at every layer: choose at most {usable}, or leave it unset."
        )
    return int(wanted)


@cache
def _default_machine() -> _kernels.Machine:
    return _kernels.Machine(
        choose_instruction_set(os.environ.get(FORCE_ISA)), choose_threads(os.environ.get(NUM_THREADS))
    )


_chosen: list[_kernels.Machine] = []


def machine() -> _kernels.Machine:
    """The kernels and threads that operations run on."""
    return _chosen[-1] if _chosen else _default_machine()


@contextmanager
def use_machine(name: str, threads: int) -> Iterator[_kernels.Machine]:
    """Run operations on another instruction set or number of threads, to compare them."""
    _chosen.append(_kernels.Machine(choose_instruction_set(name), threads))
    try:
        yield _chosen[-1]
    finally:
        _chosen.pop()
