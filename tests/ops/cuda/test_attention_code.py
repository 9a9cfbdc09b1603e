"""What the attention kernels are compiled to for a Hopper GPU, which no machine need have: see decision 19.

In a process of its own, where the kernels are made for a GPU and not for the interpreter.
"""

from __future__ import annotations

import os
import subprocess
import sys

VARIANTS = {"decode": (16, 1, "bfloat16"), "drafts": (64, 8, "bfloat16"), "chunk": (64, 0, "float8_e4m3fn")}
"""Rows of a program, queries of a sequence where its context is split (0: it is not), and the type of the cache."""

COMPILE = f"""
import re
import torch
torch.cuda.is_available = lambda: True
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from tern.ops.cuda import attention

def compiled(rows, few, cache):
    queries = torch.empty(8, 20, 128, dtype=torch.bfloat16, device="meta")
    keys = torch.empty(4, 9, 1, 16, 128, dtype=getattr(torch, cache), device="meta")
    sizes = attention._sizes(queries, keys, rows)
    options = {{name: sizes.pop(name) for name in ("num_warps", "num_stages", "enable_fp_fusion")}}
    sizes |= {{"FEW": max(few, 1), "TOKENS": few or rows // 5, "SPLIT": few > 0, "INTERPRETED": False}}
    cached = "*bf16" if cache == "bfloat16" else "*fp8e4nv"
    signature = {{"queries": "*bf16", "key_cache": cached, "value_cache": cached}}
    signature |= dict.fromkeys(("query_starts", "context_lens", "block_tables"), "*i64")
    signature |= dict.fromkeys(("output", "highest_output", "total_output"), "*fp32" if few else "*bf16")
    signature |= dict.fromkeys(("key_head_stride", "value_head_stride"), "i64")
    signature |= dict.fromkeys(("sequences", "table_stride", "max_pieces"), "i32") | {{"factor": "fp32"}}
    signature |= dict.fromkeys(sizes, "constexpr")
    aligned = {{
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(attention._attend.arg_names)
        if signature[name].startswith("*") or "head_stride" in name
    }}
    source = ASTSource(attention._attend, signature, sizes, aligned)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm

for name, variant in {VARIANTS}.items():
    made = compiled(*variant)
    warps = re.findall(r"nvidia_mma<.*warpsPerCTA = (\\[.*?\\])", made["ttgir"])
    print(name, "mma.sync" in made["ptx"], "wgmma" in made["ptx"], *warps)
"""


def test_all_variants_multiply_alike() -> None:
    """By mma.sync alone, with a row's keys in one warp: of 32 rows, or all."""
    settings = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILE]
    done = subprocess.run(command, env=settings, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "decode True False [1, 1]",
        "drafts True False [2, 1]",
        "chunk True False [2, 1]",
    ]
