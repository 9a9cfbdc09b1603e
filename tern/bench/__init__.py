"""What this machine can do, and how much of it the engine's steps reach. Knows the network's sizes; serves nobody.

Every figure is given as a share of a limit: a decode step cannot be faster than reading, once, all bytes that it must
read; a prefill step not faster than its multiplications at the machine's peak.
"""

from tern.bench.doctor import Diagnosis, diagnose
from tern.bench.limits import MachineLimits, Work, measure_machine, step_work
from tern.bench.report import BenchReport, BenchResult, run_bench

__all__ = [
    "BenchReport",
    "BenchResult",
    "Diagnosis",
    "MachineLimits",
    "Work",
    "diagnose",
    "measure_machine",
    "run_bench",
    "step_work",
]
