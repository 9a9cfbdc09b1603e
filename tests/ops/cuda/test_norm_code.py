"""What the norms are compiled to for a Hopper GPU, which no machine need have, at the width of the 21B.

In a process of its own, where the kernels are made for a GPU and not for the interpreter.
"""

from __future__ import annotations

import os
import subprocess
import sys

COMPILE = """
import re, subprocess, tempfile
from pathlib import Path
import torch
from tests.ops.cuda.compile_for_hopper import Hopper
import triton
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from tern.ops.cuda import add_rms_norm
from tern.ops.delta import ExpertOutputs

driver.set_active(Hopper())
run, made = JITFunction.run, []
JITFunction.run = lambda function, *args, **options: made.append(run(function, *args, **(options | {"warmup": True})))
stream, norm = torch.ones(1, 2560).bfloat16(), torch.ones(2560).bfloat16()
outputs = ExpertOutputs(
    torch.ones(6, 2560).bfloat16(), torch.ones(1, 6), torch.zeros(1, 6, dtype=torch.int64), stream
)
tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
for delta in (stream, outputs):
    for form in ("plain", "both"):
        add_rms_norm(delta, stream, norm, 1e-5, form)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(made[-1].asm["cubin"])
            file.flush()
            code, used = (
                subprocess.run([tool, what, file.name], capture_output=True, text=True, check=True).stdout
                for what in ("-sass", "--dump-resource-usage")
            )
        loads = re.findall(r"LDG\\S*", code)
        wide = loads.count("LDG.E.128")
        added = code[: code.rindex("LDG.E.128")].count("FFMA ") // 8  # rows, by threads of 8 numbers
        print(wide, len(loads) - wide, added, re.search(r"STACK:(\\d+)", used)[1])
"""


def test_rows_are_loaded_at_once_and_by_16_bytes() -> None:
    """By 16 bytes: the rows to add, six and a shared one of experts, the stream, the weights; else what was chosen.

    No row is added before the last is on its way, and nothing spills.
    """
    settings = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], env=settings, capture_output=True, text=True, timeout=250, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["3 0 0 0", "3 0 0 0", "9 3 0 0", "9 3 0 0"]
