"""Whole numbers as floats: what the assembly makes of words, computed here, and what a product's loop becomes of it.

The interpreter takes the plain way, so that the assembly is read and followed here, instruction by instruction. The
machine code is that for a Hopper GPU, which no machine need have: in a process of its own, where kernels are made for a
GPU and not for the interpreter.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence

import pytest
import torch

from tern.ops import reference_packed
from tern.ops.cuda import integers
from tern.ops.gpu_weights import RowPackedWeight

_WORD = 0xFFFFFFFF


def _halves(word: int) -> torch.Tensor:
    """The two bfloat16 of a word, in float32."""
    return torch.tensor([word << 16 & _WORD, word & 0xFFFF0000]).to(torch.uint32).view(torch.float32)


def _fused(a: int, b: int, c: int) -> int:
    """a * b + c of two bfloat16 each, rounded once: in float64 that is exact for numbers of so few bits."""
    exact = _halves(a).double() * _halves(b).double() + _halves(c).double()
    low, high = (int(bits) & 0xFFFF for bits in exact.bfloat16().view(torch.int16))
    assert exact.bfloat16().double().equal(exact), "nothing is rounded"
    return high << 16 | low


def _permuted(a: int, b: int, selector: int) -> int:
    """`prmt`: four of eight bytes."""
    eight = (b << 32 | a).to_bytes(8, "little")
    return int.from_bytes(bytes(eight[selector >> 4 * place & 7] for place in range(4)), "little")


def follow(assembly: str, outputs: int, inputs: Sequence[int]) -> list[int]:
    """Run PTX of the instructions that `integers` uses: words in, the `outputs` operands out."""
    known = {f"${outputs + place}": word for place, word in enumerate(inputs)}

    def value(operand: str) -> int:
        return known[operand] if operand in known else int(operand, 0)

    steps = {
        "shr.u32": lambda a, count: a >> count,
        "and.b32": lambda a, b: a & b,
        "xor.b32": lambda a, b: a ^ b,
        "prmt.b32": _permuted,
        "fma.rn.bf16x2": _fused,
    }
    for line in assembly.strip("{}\n").split(";\n"):
        name, _, rest = line.strip().rstrip(";").partition(" ")
        target, *operands = [part.strip() for part in re.split(r",(?![^{]*\})", rest)]
        if name == ".reg":
            continue
        if name == "mov.b32" and target.startswith("{"):
            low, high = re.findall(r"\$\d+", target)
            known[low], known[high] = value(operands[0]) & 0xFFFF, value(operands[0]) >> 16
        elif name == "mov.b32":
            known[target] = value(operands[0])
        elif name == "lop3.b32":
            a, b, c, table = map(value, operands)
            assert table == 0xEA, "(a & b) | c"
            known[target] = a & b | c
        else:
            known[target] = steps[name](*map(value, operands))
    return [known[f"${place}"] for place in range(outputs)]


def _numbers(halves: Sequence[int]) -> list[float]:
    return [float(_halves(half)[0]) for half in halves]


def test_nibbles_times_every_factor() -> None:
    factors = [*range(-8, 9)]
    for first in range(len(factors)):
        four = [factors[(first + place) % len(factors)] for place in range(4)]
        packed = int.from_bytes(bytes(factor & 0xFF for factor in four), "little")
        scaled = follow(integers._FACTORS.value, 8, [packed])
        for turn in range(16):
            quotients = [(turn + place) % 16 for place in range(8)]
            word = sum(quotient << 4 * place for place, quotient in enumerate(quotients))
            found = _numbers(follow(integers._NIBBLES.value, 8, [word, *scaled]))
            places = [place for pair in range(4) for place in (pair, pair + 4)]
            assert found == [(quotients[place] - 8) * four[place % 4] for place in places]


def test_every_byte() -> None:
    for first in range(-127, 128):
        four = [first, -first, max(first - 1, -127), 127]
        word = int.from_bytes(bytes(number & 0xFF for number in four), "little")
        assert _numbers(follow(integers._BYTES.value, 4, [word])) == [four[place] for place in (0, 2, 1, 3)]


@pytest.mark.parametrize("bits", [4, 8])
def test_numbers_of_one_word(bits: int) -> None:
    """Their places in a block of 128 depths: see `tern.ops.gpu_weights._words`."""
    rows = RowPackedWeight.of(reference_packed.pack(torch.randn(1, 256), bits))
    whole = rows.integers()[0, 128:].tolist()
    for t, h, u in ((0, 0, 0), (3, 0, 1), (2, 1, 0), (3, 1, 1)):
        word = int(rows.values[0, 4 * bits + bits * t + bits // 2 * h + u])
        for j, i in ((0, 0), (1, 0), (0, 1), (1, 16 // bits - 1)):
            depth = 8 * bits * i + 16 * u + 8 * h + 2 * t + j
            found = word >> (16 * j + bits * i) & (2**bits - 1)
            if bits == 4:
                assert rows.factors is not None
                assert (found - 8) * int(rows.factors[0, 4 + depth // 32]) == whole[depth]
            else:
                assert found == whole[depth] & 0xFF


LOOPS = """
import re, subprocess, tempfile
from collections import Counter
from pathlib import Path
import torch
from benchmarks.hopper_code import _run, _tool, innermost_loops
from benchmarks.hopper_steps import Address, pretend_hopper
pretend_hopper()
from triton.runtime.jit import JITFunction
from tern.ops.cuda import products
from tern.ops.gpu_weights import RowPackedWeight
run = JITFunction.run

def meta(*shape, dtype=torch.int32):
    return torch.empty(shape, dtype=dtype, device="meta")

def compile_only(function, *arguments, grid, warmup, **options):
    if function.__name__ == "product_tile":
        arguments = [Address(x) if isinstance(x, torch.Tensor) else x for x in arguments]
        kernel = run(function, *arguments, grid=grid, warmup=True, **options)
        with tempfile.TemporaryDirectory() as directory:
            binary = Path(directory) / "kernel"
            binary.write_bytes(kernel.asm["cubin"])
            lines = [line.strip() for line in _run(_tool("nvdisasm"), "--print-code", str(binary)).splitlines()]
        first, last = max(innermost_loops(lines), key=lambda loop: loop[1] - loop[0])
        names = [re.search(r"\\*/\\s+(?:@!?U?P\\w+ )?([A-Z]\\w*)([.\\w]*)", line) for line in lines[first:last]]
        found = Counter(name[1] for name in names if name)
        wide = Counter("128" in name[2] for name in names if name and name[1] == "LDGSTS")
        print(found.total(), found["STS"] + found["LDSM"], found["WARPGROUP"], found["HGMMA"], wide[True])

JITFunction.run = compile_only
for bits in (4, 8):
    factors = meta(3584, 80, dtype=torch.int8) if bits == 4 else None
    weight = RowPackedWeight(meta(3584, 80 * bits), factors, meta(3584, dtype=torch.float32), 2560)
    products.multiply(meta(1, 2560, dtype=torch.bfloat16), weight)
"""


def test_a_products_loop_keeps_numbers_in_their_thread() -> None:
    """A thread multiplies 64 weights a round, by less than four instructions each with all that is around them; nothing
    goes through shared memory but what is loaded, by 16 bytes; products wait for each other twice, not eight times.
    """
    settings = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", LOOPS]
    done = subprocess.run(command, env=settings, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stderr
    loops = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    assert [loop[1:] for loop in loops] == [(0, 4, 8, 4), (0, 4, 8, 6)]
    assert all(instructions < 256 for instructions, *_ in loops)
