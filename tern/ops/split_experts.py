"""Routed experts packed on the CPU beside a network on a GPU. Knows where what is computed; the products are the CPU's.

    GPU   route ─ copy x, weights, experts ─ shared expert ────────────┬─ add ─
    CPU                          └─ routed experts ─ copy their sum ───┘

What a step sends either way is a row of hidden size a token, some kilobytes, where the experts' weights are megabytes:
they are read where they lie. The host waits for the copies and not for the shared expert, which runs meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tern.ops import cpu
from tern.ops.gpu_weights import Rows, plain_rows
from tern.ops.packed import PackedWeight
from tern.ops.swiglu import SwiGLUWeights

SwiGLU = Callable[[Rows, SwiGLUWeights], Tensor]
"""What computes the shared expert, where that lies."""


def are_apart(x: Rows, shared: SwiGLUWeights | None) -> bool:
    """Whether packed experts are elsewhere than the rest: `x` on a GPU, or a shared expert that is not packed too."""
    return x.device.type != "cpu" or (shared is not None and not isinstance(shared.gate_up, PackedWeight))


def mix_experts(
    x: Rows,
    weights: Tensor,
    experts: Tensor,
    gate_up: PackedWeight,
    down: PackedWeight,
    shared: SwiGLUWeights | None,
    swiglu: SwiGLU,
) -> Tensor:
    """As `tern.ops.reference.mix_experts`: the routed sum as the CPU's kernels make it, rounded to the type of `x`.

    `x` [T, H], `weights` and `experts` [T, K] and `shared` lie on one device, the packed stacks on the CPU.
    """
    # Kernels of the CPU read no float16. A copy to the host that does not block goes to pinned memory.
    wide = plain_rows(x).float() if x.dtype == torch.float16 else plain_rows(x)
    rows, factors, chosen = (tensor.to("cpu", non_blocking=True) for tensor in (wide, weights, experts))
    copied = torch.cuda.current_stream(x.device).record_event() if x.device.type == "cuda" else None
    beside = None if shared is None else swiglu(x, shared)
    if copied is not None:
        copied.synchronize()
    mixed = cpu.mix_experts_packed(rows, factors, chosen, gate_up, down)
    if copied is not None:
        mixed = mixed.pin_memory()
    routed = mixed.to(x.device, x.dtype, non_blocking=True)
    return routed if beside is None else routed + beside
