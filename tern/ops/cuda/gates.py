"""The gate of SwiGLU between its two products, rounded to fp8 where the second product wants that."""

from __future__ import annotations

from torch import Tensor

from tern.ops.cuda.launch import INTERPRETED, narrow, tl, triton
from tern.ops.cuda.rounding import empty_fp8_rows, store_as_fp8
from tern.ops.gpu_weights import BLOCK as GROUP

_MOST_COLUMNS = 1024
"""That a program takes: 8 a thread, one load of 16 bytes each for gate and up."""


def silu_mul(gate_up: Tensor) -> Tensor:
    """As `tern.ops.reference.silu_mul`."""
    gated = gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)
    _gate(gate_up, gated)
    return gated


def silu_mul_to_fp8(gate_up: Tensor) -> tuple[Tensor, Tensor]:
    """`silu_mul` whose rows `tern.ops.gpu_weights.round_rows_to_fp8` rounds, in one launch.

    `gate_up` [T, 2F] -> float8_e4m3fn [T, F] and float32 [T, ceil(F / 128)].
    """
    values, scales = empty_fp8_rows(gate_up.shape[0], gate_up.shape[1] // 2, gate_up.device)
    _gate(gate_up, values, scales)
    return values, scales


def _gate(gate_up: Tensor, gated: Tensor, scales: Tensor | None = None) -> None:
    """Fill `gated`, and `scales` where its numbers have some."""
    if gate_up.shape[1] % 2:
        raise ValueError(f"gate and up lie side by side and are of one width: {gate_up.shape[1]} columns are not")
    rows, width = gated.shape
    if not gated.numel():
        return
    block = min(_MOST_COLUMNS, max(GROUP, triton.next_power_of_2(width)))
    tensors = (gate_up.contiguous(), gated, gated if scales is None else scales)
    sizes = {"BLOCK": block, "GROUP": GROUP, "num_warps": max(1, block // 256)}
    kinds = {"TO_FP8": scales is not None, "INTERPRETED": INTERPRETED}
    _silu_mul[(rows, triton.cdiv(width, block))](*tensors, width, **kinds, **sizes)


# Bound by memory: three numbers pass for one exponential. Columns are shared out as rows are, so that a single row of
# many columns has more than one program.
@triton.jit
def _silu_mul(
    gate_up,
    gated,
    scales,
    width,
    TO_FP8: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Rows [2 * width] of `gate_up` -> rows [width] of `gated`, with `scales` if TO_FP8."""
    row, first = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK
    columns = first + tl.arange(0, BLOCK)
    inside = columns < width
    dtype: tl.constexpr = gate_up.dtype.element_ty
    gate = tl.load(gate_up + 2 * row * width + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + (2 * row + 1) * width + columns, mask=inside, other=0.0).to(tl.float32)
    silu = narrow(gate / (1.0 + tl.exp(-gate)), dtype, INTERPRETED).to(tl.float32)
    result = narrow(silu * up, dtype, INTERPRETED)
    if TO_FP8:
        of_row = scales + row * tl.cdiv(width, GROUP)
        store_as_fp8(result.to(tl.float32), gated + row * width, of_row, first, width, BLOCK, GROUP, INTERPRETED)
    else:
        tl.store(gated + row * width + columns, result, mask=inside)
