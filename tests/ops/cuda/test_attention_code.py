"""What the attention kernels are compiled to for a Hopper GPU, which no machine need have: see decision 19.

In a process of its own, where the kernels are made for a GPU and not for the interpreter.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest


def compiled(*arguments: str) -> list[str]:
    """What the program for it prints."""
    settings = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "error", "-m", "tests.ops.cuda.compile_attention", *arguments]
    done = subprocess.run(command, env=settings, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize(("cache", "depths"), [("bfloat16", 2), ("float8_e4m3fn", 4)])
def test_all_variants_multiply_alike(cache: str, depths: int) -> None:
    """By mma.sync alone, its depths laid out in one way, with a row's keys in one warp: of 32 rows, or all.

    And what a decode stores comes before a barrier, and its loads from the cache behind it.
    """
    product = f"mma.sync kWidth = {depths}"
    assert compiled(cache, "1", "8", "64") == [
        f"_attend_few {product} warpsPerCTA = [1, 1] st.global",
        f"_attend_few {product} warpsPerCTA = [2, 1] st.global",
        f"_rotate_and_store _attend_chunks {product} warpsPerCTA = [2, 1] cp.async",
    ]


def test_heads_of_other_sizes_and_types_compile() -> None:
    assert compiled("heads") == []
