"""What is computed before the first request, so that nothing is compiled behind it."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from test_engine_model import network

from tern.engine import EngineOptions
from tern.engine.packing import PackedStep, pack
from tern.engine.runner import Runner
from tern.engine.trial_steps import trial_step
from tern.engine.warm_up import powers_of_two, warm_up, warm_up_steps
from tern.ops.placement import interpreted

MODEL = network("moe")
MOST_KERNELS = 64
"""At a second or more each, what a first start may take to compile."""


def test_steps_are_of_all_powers_of_two_up_to_the_most() -> None:
    assert powers_of_two(1) == [1]
    assert powers_of_two(12) == [1, 2, 4, 8, 12]
    steps = warm_up_steps(max_num_seqs=4, max_num_batched_tokens=100, max_length=60)
    assert steps[:8] == [[1], [2], [4], [8], [16], [32], [60, 4], [60, 40]]
    assert steps[8:] == [[32, 1], [32, 2], [32, 4], [32, 8]]


@pytest.mark.parametrize(("seqs", "budget", "length"), [(1, 100, 60), (2, 20, 19), (8, 8, 4), (3, 1, 5)])
def test_steps_are_such_as_the_scheduler_may_compose(seqs: int, budget: int, length: int) -> None:
    steps = warm_up_steps(seqs, budget, length)
    assert steps[0] == [1]
    for step in steps:
        assert len(step) <= seqs
        assert sum(step) <= budget
        assert max(step) <= length


def test_every_step_is_computed_in_the_first_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = Runner(MODEL, num_blocks=10, block_size=16, kv_dtype=MODEL.dtype, max_num_seqs=4, max_model_len=160)
    computed: list[PackedStep] = []
    begin = runner.begin

    def noted(chunks: list[object]) -> object:
        computed.append(pack(chunks, 16))  # type: ignore[arg-type]
        return begin(chunks)  # type: ignore[arg-type]

    monkeypatch.setattr(runner, "begin", noted)
    options = EngineOptions(max_num_seqs=4, max_num_batched_tokens=64, block_size=16)
    warm_up(runner, options, 41, predicts=False, progress=False)
    lengths = [list(map(int, step.query_starts[1:] - step.query_starts[:-1])) for step in computed]
    assert lengths == warm_up_steps(4, 64, 40)
    assert max(int(step.block_tables.max()) for step in computed) == 2


@pytest.mark.parametrize("tokens", [1, 2, 3, 10, 11])
def test_a_step_lies_on_the_device_where_kernels_read_widest(tokens: int) -> None:
    """Kernels are compiled for tensors that begin at multiples of 16 bytes, and once more for others."""
    chunks, _ = trial_step([tokens, 1], vocab_size=100, block_size=4, max_model_len=20, own_blocks=True)
    step = pack(chunks, 4)
    with interpreted():
        batch = step.on(torch.device("cpu"))
    for name in ("token_ids", "positions", "slots", "query_starts", "context_lens", "block_tables", "logit_rows"):
        sent = getattr(batch, name)
        assert torch.equal(sent, torch.from_numpy(getattr(step, name)))
        assert sent.data_ptr() % 16 == 0, name


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("quantization", ["none", "block_wise_fp8"])
def test_nothing_is_compiled_behind_the_start(quantization: str) -> None:
    """Every kernel that a step of any size asks for, one of those at the start has asked for."""
    counts = {
        name: tuple(map(int, numbers))
        for name, *numbers in map(str.split, told("kernel_variants", quantization).splitlines())
    }
    assert "tern.ops.cuda.product_kernel.product_tile" in counts
    assert {name: late for name, (_, _, late) in counts.items() if late} == {}
    assert sum(found for _, found, _ in counts.values()) <= MOST_KERNELS, counts


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_to_begin_a_step_waits_for_no_tensor() -> None:
    """Tensors without memory refuse to be read. A step's numbers go to the device in one copy, and so do those of the
    tokens before it, the masks of grammars, and which sequences go on if some do not.
    """
    kinds = [
        f"{how} {what}" for how in ("graphs", "eager") for what in ("decode 1", "follow 4", "drafts 1", "prompt 1")
    ]
    assert told("host_waits").splitlines() == kinds


def told(program: str, *arguments: str) -> str:
    """What a program of this folder prints, in a process of its own that does not interpret."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "error", "-m", f"tests.engine.{program}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout
