"""The choice of tokens through the kernels. Checks tensors, passes addresses; what numpy does as fast stays with it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tern.ops.cpu import _kernels
from tern.ops.cpu.machine import machine
from tern.ops.cpu.rows import as_rows
from tern.ops.reference_sampling import Draws, told


def can_choose(logits: Tensor) -> bool:
    """Whether the kernels choose from logits like these."""
    return logits.device.type == "cpu" and logits.dtype == torch.float32 and logits.is_contiguous()


def largest(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As `tern.ops.reference_sampling.largest`."""
    peaks = torch.empty(len(logits))
    ids = torch.empty(len(logits), dtype=torch.int64)
    machine().largest(as_rows(logits), peaks.data_ptr(), ids.data_ptr())
    return peaks, ids, told(peaks, ids)


def keep_allowed(logits: Tensor, rows: Sequence[int], masks: npt.NDArray[np.uint32]) -> None:
    """As `tern.ops.reference_sampling.keep_allowed`."""
    bits = np.unpackbits(masks.view(np.uint8), axis=1, count=logits.shape[1], bitorder="little")
    forbidden = torch.from_numpy(bits == 0)
    for row, cells in zip(rows, forbidden, strict=True):
        logits[row].masked_fill_(cells, -math.inf)


def draw(logits: Tensor, peaks: Tensor, draws: Draws) -> Tensor:
    """As `tern.ops.reference_sampling.draw`, but for the last bits of sums, which a uniform number may fall between.

    A row without a finite peak gets token 0: the kernel, which sorts candidates, must not see it.
    """
    sound = peaks.isfinite()
    if not bool(sound.all()):
        ids = torch.zeros(len(logits), dtype=torch.int64)
        ids[sound] = draw(logits[sound], peaks[sound], draws.rows(sound))
        return ids
    peaks = peaks.contiguous()
    ids = torch.empty(len(logits), dtype=torch.int64)
    columns = (draws.uniforms, draws.temperatures, draws.min_p.log(), draws.top_k, draws.top_p)
    rows = zip(*(column.tolist() for column in columns), strict=True)
    machine().draw(as_rows(logits), peaks.data_ptr(), [_kernels.Draw(*row) for row in rows], ids.data_ptr())
    return ids
