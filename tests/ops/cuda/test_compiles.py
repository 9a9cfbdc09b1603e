"""The kernels of products, and the norms between them, compile for a Hopper GPU, on a machine without one."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

KERNELS = {"_product", "_finish_rows", "_sort", "_add_rms_norm", "_multiply", "_choose", "_multiply_choose_and_sort"}


@pytest.mark.parametrize("kind", ["plain", "int8", "int4", "fp8"])
def test_products_compile(kind: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "error", "-m", "tests.ops.cuda.compile_for_hopper", kind]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 0, result.stderr
    # A linear layer of plain weights is torch's; only there are no chunks to add up.
    assert set(result.stdout.split()) == KERNELS | ({"_round_rows"} if kind == "fp8" else set())
