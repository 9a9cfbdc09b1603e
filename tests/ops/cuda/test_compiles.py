"""The kernels of products, and the norms between them, compile for a Hopper GPU, on a machine without one."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

KERNELS = {"product_tile", "_sort", "_add_rms_norm", "_multiply", "_choose", "_multiply_choose_and_sort"}
CODE = """\
qkv 1: 0 16 m64n16k16 ld.global.cg.v4.b32
qkv 64: 0 16 m64n64k16 ld.global.cg.v4.b32
qkv 128: 0 16 m64n128k16 ld.global.cg.v4.b32
qkv 8192: 0 16 m64n128k16
shared gate_up 1: 0 16 m64n16k16 ld.global.cg.v4.b32
shared gate_up 8192: 0 16 m64n64k16
dense gate_up 8192: 0 16 m64n128k16
head 1: 0 16 m64n16k16
head 128: 0 16 m64n128k16
float32 128: 0 16 ld.global.cg.v4.b32
float32 8192: 0 16
"""


def compiled(argument: str) -> str:
    """What `compile_for_hopper` prints, in a process of its own that does not interpret."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "error", "-m", "tests.ops.cuda.compile_for_hopper", argument]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("kind", ["plain", "int8", "int4", "fp8"])
def test_products_compile(kind: str) -> None:
    assert set(compiled(kind).split()) == KERNELS | ({"_round_rows"} if kind == "fp8" else set())


def test_plain_products_of_the_model() -> None:
    """One launch each: nothing spills, operands come 16 bytes at a time by copies that nobody waits for, sums that
    other programs left come from the second cache, and floats of two bytes are given to Hopper's own instruction.
    """
    assert compiled("code") == CODE
