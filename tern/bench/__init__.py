"""What this machine can do, and how much of it the engine's steps reach; how a server behaves under load.

Every figure of a step is given as a share of a limit: a decode step cannot be faster than reading, once, all bytes that
it must read; a prefill step not faster than its multiplications at the machine's peak. Knows the network's sizes and,
from outside, a server's API; serves nobody.

The names are imported when first used: loading a server and drawing a report need no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tern.bench.doctor import Diagnosis, diagnose
    from tern.bench.gpu import GpuLimits, measure_device
    from tern.bench.limits import Limits, MachineLimits, Work, measure_machine, step_work
    from tern.bench.report import BenchReport, BenchResult, run_bench
    from tern.bench.setting import Setting

__all__ = [
    "BenchReport",
    "BenchResult",
    "Diagnosis",
    "GpuLimits",
    "Limits",
    "MachineLimits",
    "Setting",
    "Work",
    "diagnose",
    "measure_device",
    "measure_machine",
    "run_bench",
    "step_work",
]

_HOMES = {
    "BenchReport": "report",
    "BenchResult": "report",
    "Diagnosis": "doctor",
    "GpuLimits": "gpu",
    "Limits": "limits",
    "MachineLimits": "limits",
    "Setting": "setting",
    "Work": "limits",
    "diagnose": "doctor",
    "measure_device": "gpu",
    "measure_machine": "limits",
    "run_bench": "report",
    "step_work": "limits",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
