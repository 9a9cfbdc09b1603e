"""Work for the last program of several to arrive: a second launch saved. Knows counters; knows no arithmetic.

Programs that leave parts of a result count themselves in; whoever finds all others there adds the parts, in their own
order and not in that of arrival, so that the result is the same each time.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from tern.ops.cuda.launch import tl, triton

MOST = 1 << 17
"""Counters that a launch may use: half a megabyte of them."""


@cache
def counters(device: torch.device) -> Tensor:
    """Counters at zero, int32 [MOST]: every launch leaves them so, and launches on a device follow each other."""
    return torch.zeros(MOST, dtype=torch.int32, device=device)


@triton.jit
def is_last(counter, programs):
    """Whether all `programs` that share the counter have come here, this one as the last; what they stored before can
    then be loaded, past the processor's own cache (`.cg`). The counter is at zero again after the last.
    """
    tl.debug_barrier()  # what all threads of this program stored comes before its count
    last = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == programs - 1
    if last:
        tl.store(counter, 0)
    return last
