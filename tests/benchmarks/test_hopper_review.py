"""The review of a GPU's launches: no launch comes to a step unseen, and machine code is read for what it is.

The review runs in a process of its own, where kernels are made for a GPU and not for the interpreter.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from benchmarks.hopper_code import Code, Loop, parse
from benchmarks.hopper_review import Flag, Reviewed
from benchmarks.hopper_steps import Launch

if find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

# The most launches of a decode step of one sequence: in a layer of experts, in the graph beside the layers, and by the
# host. Whoever saves one lowers its number; each costs more than a microsecond a token.
A_LAYER = {"bf16": 8, "block_wise_fp8": 9, "wint4": 8}
LAYER_0 = {"bf16": 7, "block_wise_fp8": 8, "wint4": 7}
BESIDE_IN_GRAPH = 3
BY_HOST = {"bf16": 5, "block_wise_fp8": 6, "wint4": 5}
HOST_TO_DEVICE, DEVICE_TO_HOST = 1, 1

LISTING = """
.text._kernel:
        /*0000*/                   LDG.E.U8 R1, desc[UR4][R2.64] ;
        /*0010*/                   STL [R1+0x8], R4 ;
.L_x_0:
        /*0020*/                   LDG.E.64 R1, desc[UR4][R2.64] ;
.L_x_1:
        /*0030*/              @!P2 LDG.E.128 R4, desc[UR6][R2.64] ;
        /*0040*/               @P0 LDGSTS.E.BYPASS.128 [R5], desc[UR6][R2.64] ;
        /*0050*/                   LDG.E R4, desc[UR6][R2.64] ;
        /*0060*/              @!P3 LDL.64 R8, [R1+0x8] ;
        /*0070*/                   HGMMA.64x16x16.F32.BF16 R24, gdesc[UR8], R24, gsb0 ;
        /*0080*/               @P1 BRA `(.L_x_1) ;
        /*0090*/               @P2 BRA `(.L_x_0) ;
        /*00a0*/                   EXIT ;
.L_x_2:
        /*00b0*/                   BRA `(.L_x_2);
"""
USAGE = " Function _kernel:\n  REG:200 STACK:16 SHARED:1024 LOCAL:0 CONSTANT[0]:600\n"


@cache
def review(*arguments: str) -> dict[str, Any]:
    """What the program writes for these arguments."""
    settings = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    with TemporaryDirectory() as directory:
        file = Path(directory) / "review.json"
        command = [sys.executable, "-m", "benchmarks.hopper_review", *arguments, "--json", str(file)]
        done = subprocess.run(command, env=settings, capture_output=True, text=True, timeout=250, check=False)
        assert done.returncode == 0, done.stderr
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def counted(form: str) -> dict[str, Any]:
    """The decode step of one sequence at the full size of the 21B model."""
    steps = review("--count", "--only", "decode 1 sequence")["steps"]
    return next(step for step in steps if step["label"].endswith(form))


@pytest.mark.parametrize("form", A_LAYER)
def test_a_decode_step_launches_no_more_than_it_did(form: str) -> None:
    step = counted(form)
    layers = {
        section["title"]: len(section["launches"]) for section in step["sections"] if "layer " in section["title"]
    }
    assert layers["layer 0, in the graph"] <= LAYER_0[form]
    of_experts = [section for section in step["sections"] if section["title"].startswith("each of layers")]
    assert [section["times"] for section in of_experts] == [26], "layers of experts behind such ones are alike"
    assert layers["layer 1, in the graph"] == step["a_layer"], "and so is the first, but for what its first norm adds"
    assert len(of_experts[0]["launches"]) == step["a_layer"] <= A_LAYER[form]
    assert step["in_graph"] <= LAYER_0[form] + 27 * A_LAYER[form] + BESIDE_IN_GRAPH
    assert sum(step["beside"].values()) <= BY_HOST[form]
    assert step["launches"] == step["in_graph"] + sum(step["beside"].values())


@pytest.mark.parametrize("form", A_LAYER)
def test_the_host_copies_once_each_way(form: str) -> None:
    beside = counted(form)["beside"]
    assert beside["copy from the host"] <= HOST_TO_DEVICE
    assert beside["copy to the host"] <= DEVICE_TO_HOST


@pytest.mark.parametrize("form", A_LAYER)
def test_launches_read_what_the_step_must_read(form: str) -> None:
    """A launch that is not seen, or takes another tensor for a weight, would show here."""
    step = counted(form)
    read = sum(one["read_bytes"] * section["times"] for section in step["sections"] for one in section["launches"])
    assert read == pytest.approx(step["read_bytes"], rel=0.02)


def test_kernels_are_compiled_and_read() -> None:
    """Those of one step of a small network."""
    found = review("--model", "dummy:tiny", "--only", "decode 1 sequence at depth 0, wint4")
    (step,) = found["steps"]
    kernels = [one for section in step["sections"] for one in section["launches"] if one["grid"] is not None]
    assert kernels
    for kernel in kernels:
        assert 0 < kernel["registers"] <= 255, kernel["name"]
        assert kernel["programs_a_processor"] >= 1, kernel["name"]
        assert sum(kernel["loads"].values()) > 0, kernel["name"]


def test_a_listing_is_read() -> None:
    code = parse(USAGE, LISTING, shared=96 * 1024, warps=4, stages=4)
    assert (code.registers, code.stack, code.looping) == (200, 16, True)
    assert code.loads == {16: 2, 4: 1}, "of the innermost loop alone"
    assert code.spills == 1
    assert code.products == "wgmma"
    assert code.is_pipelined
    assert code.loops[0].instructions == 6
    assert code.bytes_a_cycle(1) == 4 * 32 * 36 / 6, "by all four schedulers"
    assert code.narrow_share == pytest.approx(4 / 36)
    assert code.programs_a_processor == 2, "as many as the registers and the shared memory hold"
    assert code.bytes_in_flight(1000) == 2 * 96 * 1024 * 3 / 4
    assert code.bytes_in_flight(66) == 96 * 1024 * 3 / 4, "at least one program, where there is one"
    straight = parse(USAGE, LISTING.replace("BRA", "NOP"), shared=0, warps=1, stages=3)
    assert not straight.looping
    assert straight.loads == {16: 2, 8: 1, 4: 1, 1: 1}
    with pytest.raises(ValueError, match="no use of registers"):
        parse("", LISTING, shared=0, warps=1, stages=1)


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "fit"),
    [(32, 0, 1, 32), (32, 0, 4, 16), (255, 0, 8, 1), (168, 0, 4, 3), (40, 200 * 1024, 4, 1), (64, 72 * 1024, 4, 3)],
)
def test_programs_of_a_processor(registers: int, shared: int, warps: int, fit: int) -> None:
    assert Code(registers, 0, shared, warps, 1, (), looping=False).programs_a_processor == fit


def test_what_is_flagged() -> None:
    loop = parse(USAGE, LISTING, shared=0, warps=4, stages=4).loops[0]
    launch = Launch("_kernel", (), 2e6, 3, in_graph=True, grid=(8, 2))
    spilling = Code(200, 16, 8 * 1024, 4, 4, (loop,), looping=True)
    assert Reviewed(launch, "k", spilling).flags == {
        "SPILLS": Flag(16, "16 bytes a thread, 1 times in innermost loops"),
        "NARROW LOADS": Flag(pytest.approx(4 / 36), "2 of 16 B, 1 of 4 B"),
        "FEW PROGRAMS": Flag(125000.0, "16 read 2.0 MB"),
        "LITTLE IN FLIGHT": Flag(-6144.0, "6 KB a multiprocessor"),
    }
    laden = replace(spilling, loops=(replace(loop, instructions=1000),))
    flag = Reviewed(launch, "k", laden).flags["MANY INSTRUCTIONS"]
    assert flag.words == f"{4 * 32 * 36 / 1000 * 132 * 1.98:.0f} GB/s at most by its instructions"
    sound = Code(
        64, 0, 60 * 1024, 4, 4, (Loop(loop.loads.__class__({(16, True): 4}), 0, 0, loop.products),), looping=True
    )
    assert Reviewed(Launch("_kernel", (), 2e6, 3, in_graph=True, grid=(264,)), "k", sound).flags == {}
    assert Reviewed(launch, problem="no").flags == {"DOES NOT COMPILE": Flag(0.0, "no")}
    assert Reviewed(launch).flags == {}
