"""Compile the kernels of products, and of the norms between them, for a Hopper GPU: a program that needs no GPU.

They get the arguments of real calls.

The interpreter takes what the compiler refuses: other types on two ways of one function, methods of arguments that are
1. Each kernel that is called is compiled and not run.

    python -m tests.ops.cuda.compile_for_hopper KIND
"""

from __future__ import annotations

import math
import sys
from typing import Any

import torch

torch.cuda.is_available = lambda: True
torch.cuda.get_device_capability = lambda *_: (9, 0)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime import driver  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from tern.ops import Router, SwiGLUWeights, reference_packed  # noqa: E402
from tern.ops.cuda import add_rms_norm, linear, mixture, swiglu  # noqa: E402
from tern.ops.gpu_weights import GpuWeight, RowPackedWeight, round_to_fp8, row_form  # noqa: E402


class Hopper:
    """As much of a driver as compiling asks for."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return device

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def weight_of(kind: str, *shape: int) -> GpuWeight:
    floats = torch.randn(shape) / math.sqrt(shape[-1])
    if kind.startswith("int"):
        return RowPackedWeight.of(reference_packed.pack(floats, int(kind[3:])))
    return round_to_fp8(floats, block_wise=True) if kind == "fp8" else floats.bfloat16()


def main(kind: str) -> None:
    """Call the layers with weights of this kind, and print the names of the kernels that were compiled."""
    driver.set_active(Hopper())
    run, compiled = JITFunction.run, set()

    def compile_only(function: Any, *args: Any, **options: Any) -> Any:
        kernel = run(function, *args, **(options | {"warmup": True}))
        assert "wgmma" in kernel.asm["ptx"] or function.__name__ != "_product"
        compiled.add(function.__name__)
        return kernel

    JITFunction.run = compile_only
    depth = 1024
    shared = SwiGLUWeights(weight_of(kind, 256, depth), weight_of(kind, depth, 128))
    stacks = weight_of(kind, 4, 128, depth), weight_of(kind, 4, depth, 64)
    router = Router(torch.randn(4, depth), torch.zeros(4), 2, 1e-12)
    norm = torch.ones(depth).bfloat16()
    for tokens in (1, 2000):
        x, stream = add_rms_norm(
            None, torch.randn(tokens, depth).bfloat16(), norm, 1e-5, row_form(router.weight, *stacks)
        )
        outputs = mixture(x, router, *stacks, shared)
        add_rms_norm(outputs, stream, norm, 1e-5, row_form(*stacks))
    swiglu(torch.randn(1, depth).bfloat16(), shared)
    linear(torch.randn(40, 1000).bfloat16(), weight_of(kind, 2, 1000), torch.ones(2).bfloat16())
    print(*sorted(compiled))


if __name__ == "__main__":
    main(sys.argv[1])
