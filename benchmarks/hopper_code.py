"""What a Triton kernel was compiled to for a Hopper GPU: registers, memory, loads and products of its machine code.

Reads the disassembly that the tools beside Triton print; knows no steps and no network.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

PROCESSORS = 132
"""Streaming multiprocessors of an H100 or H200 (SXM)."""
WIDE = 16
"""Bytes of the widest load of a thread."""

# A multiprocessor of compute capability 9.0, from the table of the CUDA programming guide.
_REGISTERS = 65536
_WARPS = 64
_SCHEDULERS = 4
_PROGRAMS = 32
_SHARED = 228 * 1024
_RESERVED = 1024  # shared memory that each program takes beside its own
_REGISTER_UNIT = 256  # that a warp's registers are given in


@dataclass(frozen=True)
class Loop:
    """Instructions that run again and again, the innermost ones; how many there are.

    `loads`: of global memory, (bytes a thread, whether the data go to shared memory behind the thread's back) -> how
    many. `bulk`: loads of whole tiles by one thread. `local`: of what the registers do not hold, read or written.
    """

    loads: Counter[tuple[int, bool]]
    bulk: int
    local: int
    products: Counter[str]
    instructions: int = 0

    @property
    def bytes_to_registers(self) -> int:
        """That one round of a thread loads and waits for."""
        return sum(width * count for (width, to_shared), count in self.loads.items() if not to_shared)

    @property
    def bytes_an_instruction(self) -> float:
        """That one round loads, over its instructions; endless where one thread loads whole tiles."""
        loaded = sum(width * count for (width, _), count in self.loads.items())
        return float("inf") if self.bulk else loaded / max(1, self.instructions)


@dataclass(frozen=True)
class Code:
    """A compiled kernel. `registers`: a thread; `stack`: bytes a thread of local memory; `shared`: bytes a program.

    `loops` are its innermost loops that load or multiply; where it has none, the whole of it.
    """

    registers: int
    stack: int
    shared: int
    warps: int
    stages: int
    loops: tuple[Loop, ...]
    looping: bool

    @property
    def programs_a_processor(self) -> int:
        """That fit on a multiprocessor side by side."""
        a_warp = -(-self.registers * 32 // _REGISTER_UNIT) * _REGISTER_UNIT
        by_registers = _REGISTERS // a_warp // self.warps
        return min(_PROGRAMS, _WARPS // self.warps, by_registers, _SHARED // (self.shared + _RESERVED))

    @property
    def spills(self) -> int:
        """Reads and writes of local memory in innermost loops."""
        return sum(loop.local for loop in self.loops)

    @property
    def loads(self) -> Counter[int]:
        """Loads of global memory in innermost loops: bytes a thread -> how many."""
        return sum((Counter({width: n}) for loop in self.loops for (width, _), n in loop.loads.items()), Counter())

    @property
    def narrow_share(self) -> float:
        """Of the bytes that innermost loops load, those that come by less than 16 a thread."""
        loaded = sum(width * count for width, count in self.loads.items())
        return sum(width * count for width, count in self.loads.items() if width < WIDE) / max(1, loaded)

    @property
    def products(self) -> str:
        """The instruction by which it multiplies tiles: "wgmma", "mma.sync", or none."""
        kinds: Counter[str] = sum((loop.products for loop in self.loops), Counter())
        return " ".join(sorted(kinds))

    @property
    def is_pipelined(self) -> bool:
        """Whether tiles are loaded to shared memory while others are multiplied."""
        return any(to_shared for loop in self.loops for _, to_shared in loop.loads) or any(
            loop.bulk for loop in self.loops
        )

    def bytes_in_flight(self, programs: int) -> float:
        """Bytes of loads that may be on their way to one multiprocessor at once, of a launch of so many programs.

        Through shared memory all stages but the one that is read; else what a round of the loop loads, at most.
        """
        staged = self.shared * (self.stages - 1) / max(1, self.stages) if self.is_pipelined else 0.0
        in_registers = 32 * self.warps * max((loop.bytes_to_registers for loop in self.loops), default=0)
        return self._resident(programs) * max(staged, in_registers)

    def bytes_a_cycle(self, programs: int) -> float:
        """Bytes that one multiprocessor loads in a cycle if every scheduler issues an instruction of the loop in each,
        which none quite does; those of activations, which come from the cache, count too.
        """
        schedulers = min(_SCHEDULERS, self._resident(programs) * self.warps)
        return 32 * schedulers * max((loop.bytes_an_instruction for loop in self.loops), default=0.0)

    def _resident(self, programs: int) -> float:
        """Programs that a multiprocessor runs side by side, of a launch of so many; at least one."""
        return min(self.programs_a_processor, max(1.0, programs / PROCESSORS))


def read_code(kernel: Any) -> Code:
    """What Triton's compiled `kernel` (`triton.compiler.CompiledKernel`) is."""
    with tempfile.TemporaryDirectory() as directory:
        binary = Path(directory) / "kernel.cubin"
        binary.write_bytes(kernel.asm["cubin"])
        usage = _run(_tool("cuobjdump"), "--dump-resource-usage", str(binary))
        listing = _run(_tool("nvdisasm"), "--print-code", str(binary))
    facts = kernel.metadata
    return parse(usage, listing, shared=facts.shared, warps=facts.num_warps, stages=facts.num_stages)


def parse(usage: str, listing: str, *, shared: int, warps: int, stages: int) -> Code:
    """Read what `cuobjdump` and `nvdisasm` have printed."""
    found = re.search(r"REG:(\d+) STACK:(\d+) ", usage)
    if found is None:
        raise ValueError(f"no use of registers in {usage[:200]!r}")
    lines = [line.strip() for line in listing.splitlines()]
    bodies = [lines[first : last + 1] for first, last in innermost_loops(lines)]
    loops = tuple(loop for loop in map(_loop, bodies) if loop.loads or loop.bulk or loop.products)
    looping = bool(loops)
    return Code(int(found[1]), int(found[2]), shared, warps, stages, loops or (_loop(lines),), looping)


def innermost_loops(lines: Sequence[str]) -> list[tuple[int, int]]:
    """First and last lines of loops that hold no other: from a label to a jump back to it."""
    labels = {line[:-1]: place for place, line in enumerate(lines) if re.fullmatch(r"\.L\w+:", line)}
    loops: dict[int, int] = {}
    for place, line in enumerate(lines):
        target = re.search(r"\bBRA\b.*`\((\.L\w+)\)", line)
        if target is not None and labels.get(target[1], place) < place:
            loops[labels[target[1]]] = place
    return [
        (first, last)
        for first, last in sorted(loops.items())
        if not any(first <= other and end <= last and other != first for other, end in loops.items())
    ]


def _loop(lines: Sequence[str]) -> Loop:
    loads: Counter[tuple[int, bool]] = Counter()
    products: Counter[str] = Counter()
    bulk = local = instructions = 0
    for line in lines:
        instruction = re.search(r"\*/\s+(?:@!?U?P\w+ )?([A-Z]\w*)((?:\.\w+)*)", line)
        if instruction is None:
            continue
        instructions += 1
        name, kinds = instruction[1], instruction[2].split(".")
        if name in ("LDG", "LDGSTS"):
            loads[_width(kinds), name == "LDGSTS"] += 1
        elif name in ("UTMALDG", "UBLKCP"):
            bulk += 1
        elif name in ("LDL", "STL"):
            local += 1
        elif name in ("HGMMA", "QGMMA", "IGMMA"):
            products["wgmma"] += 1
        elif name in ("HMMA", "QMMA", "IMMA"):
            products["mma.sync"] += 1
    return Loop(loads, bulk, local, products, instructions)


def _width(kinds: Sequence[str]) -> int:
    """Bytes that a load with these suffixes brings a thread."""
    for kind, width in (("128", 16), ("64", 8), ("U16", 2), ("S16", 2), ("U8", 1), ("S8", 1)):
        if kind in kinds:
            return width
    return 4


@cache
def _tool(name: str) -> str:
    """A program of NVIDIA's that comes with Triton."""
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
