"""Where kernels run and what that changes in them. Import it before `triton`: the choice is made when kernels are.

Without a GPU they run under Triton's interpreter, on tensors in the processor's memory: slow, and for tests alone.
"""

from __future__ import annotations

import os

import torch

INTERPRETED = not torch.cuda.is_available()
"""Whether kernels are interpreted here."""

# Said so, because Triton 3.9 warns where nothing is said, and 3.10 will take the other side.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
if INTERPRETED:
    os.environ["TRITON_INTERPRET"] = "1"  # too late if something else has imported triton before

import triton  # noqa: E402
import triton.language as tl  # noqa: E402

__all__ = ["INTERPRETED", "dot", "narrow", "tl", "triton"]


@triton.jit
def dot(a, b, total, INTERPRETED: tl.constexpr):
    """`total` + a @ b in float32. The interpreter multiplies bfloat16 by its bits, so there they are widened first."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")
    return tl.dot(a, b, total, input_precision="ieee")  # float32 stays float32


@triton.jit
def narrow(x, dtype: tl.constexpr, INTERPRETED: tl.constexpr):
    """float32 `x` rounded to `dtype`, ties to even; by hand where the interpreter would cut it off.

    That is for bfloat16 and float8_e4m3fn, whose numbers below 2^-6 are multiples of 2^-9: `x` lies within +-448.
    """
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        return (bits & 0xFFFF0000).to(tl.float32, bitcast=True).to(dtype)
    if INTERPRETED and dtype == tl.float8e4nv:
        bits = x.to(tl.uint32, bitcast=True)
        bits += 0x7FFFF + ((bits >> 20) & 1)
        rounded = (bits & 0xFFF00000).to(tl.float32, bitcast=True)
        return tl.where(tl.abs(x) < 2.0**-6, (x + 24576.0) - 24576.0, rounded).to(dtype)
    return x.to(dtype)
