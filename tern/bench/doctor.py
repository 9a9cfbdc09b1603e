"""What machine this is and what fits on it, found without loading anything. Starts nothing."""

from __future__ import annotations

import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from tern.checkpoint import QUANTIZATIONS, ModelSource, weight_bytes
from tern.engine.cache_size import free_memory, token_bytes
from tern.ops import cpu

FLOATS = "bfloat16"
RUNNING_BYTES = 1_500_000_000
"""Memory that Python, torch and a step's activations take beside weights and cache, about."""


@dataclass(frozen=True)
class MachineReport:
    """`isa`: the kernels that will run, of the `available` ones. Memory in 10^9 bytes, within the control group."""

    processor: str
    processors: int
    threads: int
    isa: str
    available: list[str]
    memory_gb: float
    free_gb: float
    torch: str
    python: str


@dataclass(frozen=True)
class Fit:
    """One precision of a model: sizes in 10^9 bytes, and the longest context in tokens, 0 if the weights do not fit."""

    precision: str
    weights_gb: float
    kv_gb_per_1000_tokens: float
    longest_context: int
    fits: bool


@dataclass(frozen=True)
class Diagnosis:
    """What `tern doctor --json` prints. `default` is the precision of `fits` in which the model is loaded unasked."""

    machine: MachineReport
    model: str | None
    max_positions: int | None
    fits: list[Fit]
    default: str | None = None

    def as_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return asdict(self)


def diagnose(source: ModelSource | None) -> Diagnosis:
    """Describe this machine, and what of `source` fits on it in each precision."""
    kernels = cpu.machine()
    free = free_memory(torch.device("cpu"))
    machine = MachineReport(
        processor=_processor(),
        processors=cpu.usable_processors(),
        threads=kernels.threads,
        isa=kernels.name,
        available=[found.name for found in cpu.instruction_sets() if found.available],
        memory_gb=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9,
        free_gb=free / 1e9,
        torch=torch.__version__,
        python=platform.python_version(),
    )
    if source is None:
        return Diagnosis(machine, None, None, [])
    stored = None if source.stored_bits is None else f"wint{source.stored_bits}"
    precisions = [stored] if stored else [None, *reversed(QUANTIZATIONS)]
    fits = [_fit(source, precision, free) for precision in precisions]
    default = stored or source.default_quantization or FLOATS
    return Diagnosis(machine, source.name, source.config.max_position_embeddings, fits, default)


def _fit(source: ModelSource, quantization: str | None, free: int) -> Fit:
    weights = weight_bytes(source.config, torch.bfloat16, quantization)
    per_token = token_bytes(source.config, torch.bfloat16)
    room = max(0, free - weights - RUNNING_BYTES)
    longest = min(source.config.max_position_embeddings, room // per_token)
    return Fit(quantization or FLOATS, weights / 1e9, per_token / 1e6, longest, longest > 0)


def _processor() -> str:
    """The processor as the system names it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
