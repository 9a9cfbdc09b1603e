"""Where kernels run and what that changes in them. Import it before `triton`: the choice is made when kernels are.

Without a GPU they run under Triton's interpreter, on tensors in the processor's memory: slow, and for tests alone.
"""

from __future__ import annotations

import os

import torch

INTERPRETED = not torch.cuda.is_available()
"""Whether kernels are interpreted here."""

if INTERPRETED:
    os.environ["TRITON_INTERPRET"] = "1"  # too late if something else has imported triton before

# Products and sums may be fused: Triton 3.9 warns where nobody says so, and 3.10 will take the other side.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait  # noqa: E402

__all__ = ["EARLY", "INTERPRETED", "announce", "ask_for", "dot", "narrow", "tl", "triton", "wait"]

_OVERLAPS = tl.constexpr(not INTERPRETED and torch.cuda.get_device_capability()[0] >= 9)
EARLY: dict[str, bool] = {"launch_pdl": True} if _OVERLAPS.value else {}
"""What lets a kernel start while the one before it ends, from Hopper on (CUDA's programmatic dependent launch): its
programs take the places that have become free, and what a launch costs is over when they are needed.

Such a kernel calls `announce` and `wait` on every way, before it reads what another kernel wrote, writes anything or
returns. Others begin when all that was launched before them has ended.
"""


@triton.jit
def announce():
    """Let the next kernel start: once all programs have said so, or ended."""
    if _OVERLAPS:
        gdc_launch_dependents()


@triton.jit
def wait():
    """Until all kernels before this one have ended, and what they wrote can be read."""
    if _OVERLAPS:
        gdc_wait()


@triton.jit
def ask_for(pointers):
    """Have the 128 bytes at each pointer brought to the second cache, and do not wait for them."""
    if _OVERLAPS:
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [pointers], dtype=tl.int32, is_pure=False, pack=1
        )


@triton.jit
def dot(a, b, total, INTERPRETED: tl.constexpr):
    """`total` + a @ b in float32, and float32 operands are not cut to fewer bits.

    The interpreter multiplies bfloat16 by its bits, so there they are widened first.
    """
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def narrow(x, dtype: tl.constexpr, INTERPRETED: tl.constexpr):
    """float32 `x` rounded to `dtype`, ties to even; what lies beyond float8_e4m3fn's range becomes its end.

    By hand for bfloat16 and float8_e4m3fn under the interpreter, which would cut off.
    """
    if dtype == tl.float8e4nv:
        x = tl.clamp(x, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)
        if INTERPRETED:
            return _narrow_to_fp8(x)
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        return (bits & 0xFFFF0000).to(tl.float32, bitcast=True).to(dtype)
    return x.to(dtype)


@triton.jit
def _narrow_to_fp8(x):
    """float32 `x` within +-448, or NaN, to float8_e4m3fn: 3 bits of mantissa, steps of 2^-9 below 2^-6."""
    bits = x.to(tl.uint32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & 0xFFF00000).to(tl.float32, bitcast=True)
    # 1.5 * 2^14: a float32 that large has steps of 2^-9.
    rounded = tl.where(tl.abs(x) < 0.015625, (x + 24576.0) - 24576.0, normal)
    code = rounded.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    code = tl.where(x != x, 0x7F, code & 0x7F) | (bits >> 24 & 0x80)
    return code.to(tl.uint8).to(tl.float8e4nv, bitcast=True)
