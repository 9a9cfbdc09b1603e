"""Times the rows of `benchmarks.gpu` in Tern, and names the kernels that a step's time went to. Knows no budget."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu_plan import Row
from tern import ops
from tern.bench import Limits
from tern.bench.overhead import decoding
from tern.bench.report import BLOCK_SIZE, Bench
from tern.model import ErnieConfig

PROFILED_STEPS = 5
SHOWN_KERNELS = 8
SHOWN_NAME = 70  # characters of a kernel's name, which may be a template's


@dataclass(frozen=True)
class Kernel:
    """One kernel's part of a step: how often it ran in it, and the milliseconds of all its runs together."""

    name: str
    calls: float
    ms: float


@dataclass(frozen=True)
class Profile:
    """Where the time of a row's step goes.

    `step_ms`: the step without a profiler; `busy_ms`: all its kernels, one after the other; `kernels`: the longest. On
    a CPU operations of torch stand for kernels.
    """

    label: str
    step_ms: float
    busy_ms: float
    kernels: list[Kernel]


@dataclass(frozen=True)
class Timed:
    """A row's figure, the limit for it that was measured on the same device, and its profile, None if it has none.

    `no_profile` says why there is none where one was wanted.
    """

    figure: float
    limit: float
    profile: Profile | None = None
    no_profile: str | None = None


def time_row(
    row: Row, config: ErnieConfig, tensors: Mapping[str, ops.Weight], limits: Limits, *, profiled: bool = True
) -> Timed:
    """Time one row over a cache of its own, and then, if it is to be `profiled`, some of its steps by kernels.

    Whatever an engine, a kernel or an allocator raises goes through; a profiler that fails loses only the profile.
    """
    most = row.sequences * (row.depth + row.tokens + BLOCK_SIZE)
    bench = Bench(config, tensors, most, row.sequences, row.kv_cache_dtype)
    if row.kind == "decode":
        result = bench.decode(row.sequences, row.depth, limits)
    else:
        result = bench.prefill(row.tokens, row.depth, limits)
    seconds = result.sequences * result.tokens / result.tokens_per_s
    figure, limit = row.figure(seconds), row.figure(seconds * result.limit_share)
    if row.kind == "first token" or not profiled:
        return Timed(figure, limit)
    try:
        return Timed(figure, limit, _profile(row, bench, seconds))
    except Exception as error:
        return Timed(figure, limit, no_profile=f"{type(error).__name__}: {error}")


def _profile(row: Row, bench: Bench, seconds: float) -> Profile:
    """Where the time of a step goes that takes so many seconds without a profiler."""
    # CUPTI that is taken down and started again beside CUDA graphs crashes with CUDA before 12.6.
    os.environ.update(TEARDOWN_CUPTI="0", DISABLE_CUPTI_LAZY_REINIT="1")
    with _steps(row, bench) as step:
        step()
        on_gpu = bench.device.type == "cuda"
        with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
            for _ in range(PROFILED_STEPS):
                step()
            bench.timer.now()
    kernels = []
    for event in profiler.key_averages():
        if on_gpu and event.device_type.name != "CUDA":  # the calls that launched them
            continue
        spent = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        kernels.append(Kernel(event.key[:SHOWN_NAME], event.count / PROFILED_STEPS, spent / 1e3 / PROFILED_STEPS))
    kernels.sort(key=lambda kernel: -kernel.ms)
    busy = sum(kernel.ms for kernel in kernels)
    return Profile(row.label, seconds * 1e3, busy, kernels[:SHOWN_KERNELS])


@contextmanager
def _steps(row: Row, bench: Bench) -> Iterator[Callable[[], object]]:
    """What takes one step of the row when it is called."""
    if row.kind == "decode":
        with decoding(bench.engine, bench.model, row.sequences, row.depth) as step:
            yield step
    else:
        yield lambda: bench.seconds(row.sequences, row.tokens, row.depth)
