"""Where an operation is computed: by the kernels of a GPU, or on the CPU. Knows devices; knows no arithmetic."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from tern.ops.gpu_weights import Rows

_interpreted = False


def uses_gpu(device: torch.device) -> bool:
    """Whether what lies on `device` belongs to the GPU's kernels."""
    return device.type == "cuda" or _interpreted


def on_gpu(x: Rows) -> bool:
    """Whether `x` belongs to the GPU's kernels."""
    return uses_gpu(x.device)


@contextmanager
def interpreted() -> Iterator[None]:
    """Let the GPU's kernels compute what lies on the CPU, under Triton's interpreter: slow, and for tests alone."""
    global _interpreted
    before, _interpreted = _interpreted, True
    try:
        yield
    finally:
        _interpreted = before
