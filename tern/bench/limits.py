"""The machine's limits, measured, and the least that a step must read and multiply. Runs no network."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from tern import ops
from tern.model import ErnieConfig
from tern.ops import cpu

BUFFER_BYTES = 2**30
REPEATS = 7


@dataclass(frozen=True)
class MachineLimits:
    """`read_gb_s`: 10^9 bytes a second that all threads read together; `int8_tops`: 10^12 int8 operations a second."""

    isa: str
    threads: int
    read_gb_s: float
    int8_tops: float


def measure_machine(buffer_bytes: int = BUFFER_BYTES) -> MachineLimits:
    """Read a buffer larger than the caches, and multiply bytes in registers: the best of `REPEATS` runs of each."""
    machine = cpu.machine()
    buffer = torch.ones(buffer_bytes, dtype=torch.uint8)
    read = max(machine.read_rate(buffer.data_ptr(), buffer_bytes) for _ in range(REPEATS))
    peak = max(machine.peak_rate() for _ in range(REPEATS))
    return MachineLimits(machine.name, machine.threads, read / 1e9, peak / 1e12)


@dataclass(frozen=True)
class Work:
    """What a step must do at least: bytes read once, and operations (a multiplication and an addition are two)."""

    read_bytes: float
    operations: float

    def seconds(self, limits: MachineLimits) -> float:
        """The least time for it on this machine."""
        return max(self.read_bytes / (limits.read_gb_s * 1e9), self.operations / (limits.int8_tops * 1e12))


def step_work(
    config: ErnieConfig,
    tensors: Mapping[str, ops.Weight],
    *,
    sequences: int,
    tokens: int,
    depth: int,
    kv_token_bytes: int,
) -> Work:
    """The work of a step of `tokens` new tokens for each of `sequences` sequences with `depth` tokens before them.

    Of the experts as many are read as tokens that choose evenly would choose; a sequence gets one row of logits, and a
    token takes `kv_token_bytes` in the cache.
    """
    rows = sequences * tokens
    chosen = config.moe_k / config.moe_num_experts if config.moe_num_experts else 0.0
    read = operations = 0.0
    for name, weight in tensors.items():
        if name.startswith("layers.") and len(weight.shape) >= 2:
            stacked = len(weight.shape) == 3
            read += weight.nbytes * (1.0 - (1.0 - chosen) ** rows if stacked else 1.0)
            operations += 2.0 * math.prod(weight.shape) * rows * (chosen if stacked else 1.0)
    head = tensors.get("head", tensors["embed"])
    read += head.nbytes
    operations += 2.0 * math.prod(head.shape) * sequences
    read += float(kv_token_bytes) * sequences * (depth + tokens)
    seen = depth + (tokens + 1) / 2
    operations += 4.0 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * rows * seen
    return Work(read, operations)
