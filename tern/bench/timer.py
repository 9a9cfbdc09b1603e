"""How long work on a device takes. Knows when a device is done; knows nothing of the work."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Timer:
    """A clock beside `device`.

    A GPU only queues its work when a call returns: a time means something once the queue is empty.
    """

    device: torch.device

    def now(self) -> float:
        """Seconds since some moment, read when the device has done all that was asked of it."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def seconds(self, work: Callable[[], object]) -> float:
        """What a caller waits for `work` until the device is done with it."""
        started = self.now()
        work()
        return self.now() - started

    def device_seconds(self, work: Callable[[], object]) -> float:
        """What the device spends on `work`, by its own clock: without the host's time to ask for it, on a GPU."""
        if self.device.type != "cuda":
            return self.seconds(work)
        with torch.cuda.device(self.device):
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            torch.cuda.synchronize()
            first.record()
            work()
            last.record()
            torch.cuda.synchronize()
        return float(first.elapsed_time(last)) / 1e3  # from milliseconds
