"""Compile attention's kernels for a Hopper GPU, as a step's calls ask for them: a program that needs no GPU.

    python -m tests.ops.cuda.compile_attention CACHE QUERIES...
    python -m tests.ops.cuda.compile_attention heads

Prints a line for each number of new tokens of a sequence over a cache of this type: the kernels, the instruction that
multiplies, how its depths are laid out, how rows are shared among warps, and what comes before the first barrier;
or compiles for heads of other sizes and types and prints nothing.
"""

from __future__ import annotations

import re
import sys
from typing import Any

import torch

from tests.ops.cuda.compile_for_hopper import Hopper  # before the kernels: it has them made for a GPU

# isort: split
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from tern.ops import kv_cache_shapes
from tern.ops.cuda import GpuPlan, attend


def compiled(
    queries: int, cache: torch.dtype, dtype: torch.dtype = torch.bfloat16, head_dim: int = 128
) -> list[tuple[str, dict[str, str]]]:
    """The kernels that attention with as many heads as ERNIE's calls, and their code."""
    run, kernels = JITFunction.run, []

    def compile_only(function: Any, *args: Any, **options: Any) -> Any:
        kernel = run(function, *args, **(options | {"warmup": True}))
        kernels.append((function.__name__, kernel.asm))
        return kernel

    JITFunction.run = compile_only
    caches = (torch.zeros(shape).to(cache) for shape in kv_cache_shapes(9, 16, 4, head_dim, cache, gpu=True))
    numbers = torch.tensor([0, queries]), torch.tensor([queries]), torch.zeros(1, 9, dtype=torch.int64)
    tables = torch.zeros(queries, head_dim), torch.zeros(queries, head_dim), torch.zeros(queries, dtype=torch.int64)
    qkv = torch.zeros(queries, 28 * head_dim, dtype=dtype)
    attend(qkv, *tables, *caches, GpuPlan(*numbers, queries, 131_072), "fp8" if queries == 1 else "plain")
    JITFunction.run = run
    return kernels


def compile_heads() -> None:
    """Other heads than ERNIE's, where all columns are one slab, and types without tensor cores."""
    driver.set_active(Hopper())
    for dtype, head_dim in ((torch.bfloat16, 64), (torch.float32, 32)):
        for queries in (1, 40):
            compiled(queries, dtype, dtype, head_dim)


def main(cache: torch.dtype, *numbers: int) -> None:
    """Compile for each number of queries, and print."""
    driver.set_active(Hopper())
    for queries in numbers:
        kernels = compiled(queries, cache)
        code = kernels[-1][1]
        first = code["ptx"].split("bar.sync", 1)[0]
        print(
            *(name for name, _ in kernels),
            *(kind for kind in ("wgmma", "mma.sync") if kind in code["ptx"]),
            *sorted(set(re.findall(r"kWidth = \d", code["ttgir"]))),
            *re.findall(r"nvidia_mma<.*(warpsPerCTA = \[.*?\])", code["ttgir"]),
            *(kind for kind in ("st.global", "cp.async") if kind in first),
        )


if __name__ == "__main__":
    if sys.argv[1] == "heads":
        compile_heads()
    else:
        main(getattr(torch, sys.argv[1]), *map(int, sys.argv[2:]))
