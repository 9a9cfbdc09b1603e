"""Rows of floats as kernels see them. Knows tensors; knows no operation."""

from __future__ import annotations

import torch
from torch import Tensor

from tern.ops.cpu import _kernels

ROW_TYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
"""What kernels read and write."""


def as_rows(x: Tensor) -> _kernels.Rows:
    """The kernels' view of a contiguous tensor [T, width] on the CPU, which must outlive it."""
    return _kernels.rows(x.data_ptr(), ROW_TYPES[x.dtype], x.shape[0], x.shape[1])
