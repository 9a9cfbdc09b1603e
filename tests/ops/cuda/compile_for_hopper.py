"""Compile the kernels of products, and of the norms between them, for a Hopper GPU: a program that needs no GPU.

They get the arguments of real calls.

The interpreter takes what the compiler refuses: other types on two ways of one function, methods of arguments that are
1. Each kernel that is called is compiled and not run. `code` says what plain products become at the model's shapes.

    python -m tests.ops.cuda.compile_for_hopper KIND|code
"""

from __future__ import annotations

import math
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import torch

torch.cuda.is_available = lambda: True
torch.cuda.get_device_capability = lambda *_: (9, 0)

import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime import driver  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from tern.ops import Router, SwiGLUWeights, reference_packed  # noqa: E402
from tern.ops.cuda import add_rms_norm, linear, mixture, swiglu  # noqa: E402
from tern.ops.cuda.products import multiply  # noqa: E402
from tern.ops.gpu_weights import GpuWeight, RowPackedWeight, round_to_fp8, row_form  # noqa: E402

# By name: columns, depth, whether gated, type, and numbers of rows.
PRODUCTS = {
    "qkv": (3584, 2560, False, torch.bfloat16, (1, 64, 128, 8192)),
    "shared gate_up": (3072, 2560, True, torch.bfloat16, (1, 8192)),
    "dense gate_up": (12288, 2560, True, torch.bfloat16, (8192,)),
    "head": (103424, 2560, False, torch.bfloat16, (1, 128)),
    "float32": (3584, 2560, False, torch.float32, (128, 8192)),
}


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


def compile_only(noted: Callable[[str, Any], None]) -> None:
    """From now on kernels that are called are compiled and not run; `noted` is told the name of each, and its code."""
    driver.set_active(Hopper())
    run = JITFunction.run

    def compiled(function: Any, *args: Any, **options: Any) -> Any:
        kernel = run(function, *args, **(options | {"warmup": True}))
        check_start(kernel.metadata.launch_pdl, kernel.asm["ptx"])
        noted(function.__name__, kernel.asm)
        return kernel

    JITFunction.run = compiled


def check_start(starts_early: bool, ptx: str) -> None:
    """Fail unless a kernel that starts before others have ended, and no other, waits before it writes or returns."""
    before, waits, _ = ptx[ptx.index(".entry") :].partition("griddepcontrol.wait")
    assert bool(waits) == starts_early == ("griddepcontrol.launch_dependents" in ptx)
    assert not waits or not re.search(r"\b(st|red|atom|multimem)\.|\bret;|\bexit;", before)


def print_kernels(kind: str) -> None:
    """Call the layers with weights of this kind, and print the names of the kernels that were compiled."""
    names = set()

    def noted(name: str, code: Any) -> None:
        assert "wgmma" in code["ptx"] or name != "product_tile"
        names.add(name)

    compile_only(noted)
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
    print(*sorted(names))


def print_code() -> None:
    """Print for each of `PRODUCTS` and each number of rows: bytes of stack a thread, how operands are loaded, what the
    tensor cores are told, and how the sums of other programs are loaded. The tensors have no memory.
    """
    codes: list[Any] = []
    compile_only(lambda _, code: codes.append(code))
    for name, (columns, depth, gated, dtype, counts) in PRODUCTS.items():
        weight = torch.empty(columns * (2 if gated else 1), depth, dtype=dtype, device="meta")
        for rows in counts:
            multiply(torch.empty(rows, depth, dtype=dtype, device="meta"), weight, gated=gated)
            code = codes.pop()
            assert not codes, "a product is one launch"
            copies = re.findall(r"cp\.async\.c[ag]\.shared\.global \[.*?\], \[.*?\], (\w+)", code["ptx"])
            widths = sorted({int(width, 0) for width in copies})
            products = sorted({*re.findall(r"wgmma\.mma_async\.sync\.aligned\.(\w+)", code["ptx"])})
            loads = sorted({*re.findall(r"ld\.global\.\S+", code["ptx"])})
            print(f"{name} {rows}:", stack_of(code["cubin"]), *widths, *products, *loads)


def stack_of(cubin: bytes) -> int:
    """Bytes that a thread of the only kernel in this binary spills to."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return sum(int(size) for size in re.findall(r"(?:STACK|LOCAL):(\d+)", usage))


if __name__ == "__main__":
    if sys.argv[1] == "code":
        print_code()
    else:
        print_kernels(sys.argv[1])
