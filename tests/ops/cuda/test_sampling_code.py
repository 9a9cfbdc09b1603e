"""What the choice of a token is compiled to for a Hopper GPU, which no machine need have: launches and registers.

In a process of its own, where the kernels are made for a GPU and not for the interpreter.
"""

from __future__ import annotations

import os
import subprocess
import sys

COMPILE = """
import os, re, subprocess, tempfile
import torch
torch.cuda.is_available = lambda: True
torch.cuda.get_device_capability = lambda *_: (9, 0)
from triton.backends.nvidia.compiler import get_ptxas
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from tern.ops.cuda import draw, largest
from tern.ops.reference_sampling import Draws
from tests.ops.cuda.compile_for_hopper import Hopper

driver.set_active(Hopper())
run = JITFunction.run
ptxas = get_ptxas(90).path

def compile_only(function, *args, **options):
    kernel = run(function, *args, **(options | {"warmup": True}))
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "kernel.ptx")
        with open(path, "w") as file:
            file.write(kernel.asm["ptx"])
        command = [ptxas, "-v", "-arch=sm_90a", path, "-o", path + ".cubin"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    [spilled] = re.findall(r"(\\d+) bytes spill stores", said)
    [registers] = re.findall(r"Used (\\d+) registers", said)
    print(function.__name__, int(registers) * 32 * kernel.metadata.num_warps, spilled)
    return kernel

JITFunction.run = compile_only
rows, vocab = 8, 103424
zeros = torch.zeros(rows, dtype=torch.float64)
largest(torch.zeros(rows, vocab))
draws = Draws(zeros, torch.ones(rows), zeros, torch.full((rows,), 50), zeros + 1)
draw(torch.zeros(rows, vocab), torch.zeros(rows), draws)
"""
REGISTERS = 65_536  # of a Hopper's multiprocessor


def test_few_launches_and_programs_enough_beside_each_other() -> None:
    """A program loads 8 KB: three on a multiprocessor keep memory busy."""
    settings = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILE]
    done = subprocess.run(command, env=settings, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stderr
    kernels = [line.split() for line in done.stdout.splitlines()]
    assert [name for name, _, _ in kernels] == ["_largest", "_weigh", "_choose"]
    for name, registers, spilled in kernels:
        assert REGISTERS // int(registers) >= 3, name
        assert int(spilled) == 0, name
