"""The machine's limits, measured, and the least that a step must read and multiply. Runs no network."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from tern.model import ErnieConfig
from tern.ops import Fp8Weight, cpu

BUFFER_BYTES = 2**30
REPEATS = 7


@dataclass(frozen=True)
class Work:
    """What a step must do at least: bytes read once, and operations (a multiplication and an addition are two).

    `fp8_operations` are those of weights kept in fp8, apart from the other `operations`: some devices do them faster.
    """

    read_bytes: float
    operations: float
    fp8_operations: float = 0.0

    def seconds(self, limits: Limits) -> float:
        """The least time for it on a device of these limits."""
        return max(limits.reading_seconds(self), limits.multiplying_seconds(self))


class Limits(Protocol):
    """What a device can do at most."""

    @property
    def words(self) -> str:
        """The device and its limits, for people."""

    def reading_seconds(self, work: Work) -> float:
        """The least time to read the work's bytes."""

    def multiplying_seconds(self, work: Work) -> float:
        """The least time to do its operations."""


@dataclass(frozen=True)
class MachineLimits:
    """`read_gb_s`: 10^9 bytes a second that all threads read together; `int8_tops`: 10^12 int8 operations a second."""

    isa: str
    threads: int
    read_gb_s: float
    int8_tops: float

    @property
    def words(self) -> str:
        """The kernels and what they reach."""
        return f"{self.isa}, {self.threads} threads, reads {self.read_gb_s:.1f} GB/s, {self.int8_tops:.2f} int8 TOPS"

    def reading_seconds(self, work: Work) -> float:
        """The least time to read the work's bytes."""
        return work.read_bytes / (self.read_gb_s * 1e9)

    def multiplying_seconds(self, work: Work) -> float:
        """The least time for its operations, all of them as fast as int8 ones."""
        return (work.operations + work.fp8_operations) / (self.int8_tops * 1e12)


def measure_machine(buffer_bytes: int = BUFFER_BYTES) -> MachineLimits:
    """Read a buffer larger than the caches, and multiply bytes in registers: the best of `REPEATS` runs of each."""
    machine = cpu.machine()
    buffer = torch.ones(buffer_bytes, dtype=torch.uint8)
    read = max(machine.read_rate(buffer.data_ptr(), buffer_bytes) for _ in range(REPEATS))
    peak = max(machine.peak_rate() for _ in range(REPEATS))
    return MachineLimits(machine.name, machine.threads, read / 1e9, peak / 1e12)


class Sized(Protocol):
    """A weight as far as work is concerned: its shape, and the bytes that it takes."""

    @property
    def shape(self) -> Sequence[int]: ...

    @property
    def nbytes(self) -> int: ...


def step_work(
    config: ErnieConfig,
    tensors: Mapping[str, Sized],
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
    read, operations = 0.0, {True: 0.0, False: 0.0}  # by whether the weight is kept in fp8
    for name, weight in tensors.items():
        if name.startswith("layers.") and len(weight.shape) >= 2:
            stacked = len(weight.shape) == 3
            read += weight.nbytes * (1.0 - (1.0 - chosen) ** rows if stacked else 1.0)
            multiplied = math.prod(weight.shape) * rows * (chosen if stacked else 1.0)
            operations[isinstance(weight, Fp8Weight)] += 2.0 * multiplied
    head = tensors.get("head", tensors["embed"])
    read += head.nbytes
    operations[isinstance(head, Fp8Weight)] += 2.0 * math.prod(head.shape) * sequences
    read += float(kv_token_bytes) * sequences * (depth + tokens)
    seen = depth + (tokens + 1) / 2
    attention = 4.0 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * rows * seen
    return Work(read, operations[False] + attention, operations[True])
