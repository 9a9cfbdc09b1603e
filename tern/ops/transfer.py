"""Copies between the host and a device: many arrays in one, and results that are read when they have arrived.

Knows arrays and devices; knows no arithmetic. On the CPU nothing is copied.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tern.ops.placement import uses_gpu

_ALIGNMENT = 16  # bytes; a view of the copy begins where any dtype may, and where a kernel reads widest
_DTYPES = {
    "int32": torch.int32,
    "int64": torch.int64,
    "float32": torch.float32,
    "float64": torch.float64,
}


def send(arrays: Sequence[npt.NDArray[Any]], device: torch.device) -> list[Tensor]:
    """Tensors on `device` with what `arrays` hold, in one copy; the host does not wait for it."""
    arrays = [np.ascontiguousarray(array) for array in arrays]
    if not uses_gpu(device):
        return [torch.from_numpy(array) for array in arrays]
    starts = [0]
    for array in arrays:
        starts.append(starts[-1] + -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT)
    parcel = torch.empty(starts[-1], dtype=torch.uint8, pin_memory=device.type == "cuda" and starts[-1] > 0)
    memory = parcel.numpy()
    for array, start in zip(arrays, starts, strict=False):
        memory[start : start + array.nbytes] = array.reshape(-1).view(np.uint8)
    sent = parcel.to(device, non_blocking=True)
    return [
        sent[start : start + array.nbytes].view(_DTYPES[array.dtype.name]).view(array.shape)
        for array, start in zip(arrays, starts, strict=False)
    ]


class Arrival:
    """A copy of `tensor` on its way to the host, behind what its device has been given so far."""

    def __init__(self, tensor: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        self._values = tensor
        if tensor.device.type == "cuda":
            self._values = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._values.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record(torch.cuda.current_stream(tensor.device))

    def tolist(self) -> list[Any]:
        """The values, as soon as they are there."""
        if self._event is not None:
            self._event.synchronize()
        values: list[Any] = self._values.tolist()
        return values
