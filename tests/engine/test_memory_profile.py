"""How large a cache on a GPU gets: from numbers, and from the step that is run to find one of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from engine_fakes import HashModel, add, run
from test_engine_model import SMALL, network

from tern.checkpoint import resolve_model
from tern.engine import Engine, EngineOptions, FinishReason, runner
from tern.engine.cache_size import GpuMemory, resolve_num_blocks, token_bytes
from tern.engine.memory_profile import largest_step, memory_for_cache
from tern.errors import OptionError

GB = 10**9
LENGTH = int(SMALL["max_position_embeddings"])  # type: ignore[call-overload]
MODEL = network("moe")
BLOCK = token_bytes(MODEL.config, torch.float32) * 16


def blocks(memory: GpuMemory, length: int = LENGTH, **options: object) -> int:
    return resolve_num_blocks(EngineOptions.from_keywords(**options), MODEL.config, torch.float32, memory, length)


def test_the_cache_takes_what_weights_and_steps_leave_below_the_share() -> None:
    memory = GpuMemory(total=80 * GB, free=36 * GB, step=3 * GB)  # 44 are in use
    assert memory.room(0.9) == 72 * GB - 44 * GB - 3 * GB
    assert memory.room(0.5) == 0
    assert memory.most == 33 * GB
    assert blocks(memory) == 25 * GB // BLOCK
    assert blocks(memory, gpu_memory_utilization=0.75) == 13 * GB // BLOCK
    assert blocks(memory, gpu_memory_utilization=1) == 33 * GB // BLOCK


def test_a_size_that_is_asked_for_may_pass_the_share_but_not_what_is_free() -> None:
    memory = GpuMemory(total=80 * GB, free=36 * GB, step=3 * GB, taken=20 * GB)
    assert blocks(memory, kv_cache_memory=30 * GB) == 30 * GB // BLOCK
    assert blocks(memory, num_kv_blocks=500) == 500
    wanted = (
        r"kv_cache_memory asks for .* but only 33,000 MB of memory are free.* Of the GPU's 80,000 MB, 44,000 MB are in "
        r"use, of which other processes took 20,000 MB before it started, and a step .* takes 3,000 MB"
    )
    with pytest.raises(OptionError, match=wanted):
        blocks(memory, kv_cache_memory=34 * GB)


def test_a_share_that_holds_no_sequence_says_what_would() -> None:
    memory = GpuMemory(total=80 * GB, free=9 * GB, step=GB - 4 * BLOCK)
    assert memory.room(0.9) == 4 * BLOCK
    wanted = (
        r"needs 10 cache blocks .* but gpu_memory_utilization 0.9 gives 4 .*max_model_len to at most 64.*kv_cache_dtype"
    )
    with pytest.raises(OptionError, match=wanted):
        blocks(memory)
    assert blocks(memory, length=64) == 4
    with pytest.raises(OptionError, match=r"gpu_memory_utilization 0.5 gives 0 .*: give the cache more memory"):
        blocks(memory, gpu_memory_utilization=0.5)


@pytest.mark.parametrize("value", [0, -0.1, 1.01, "0.9", True, float("nan")])
def test_a_share_is_a_share(value: object) -> None:
    with pytest.raises(OptionError, match=r"gpu_memory_utilization is .* above 0, at most 1"):
        EngineOptions(gpu_memory_utilization=value)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("seqs", "budget", "length", "tokens"), [(4, 64, 160, 64), (3, 64, 160, 64), (1, 64, 20, 19), (8, 8, 160, 8)]
)
@pytest.mark.parametrize("drafts", [0, 3])
def test_the_largest_step_is_as_large_as_a_step_may_be(
    seqs: int, budget: int, length: int, tokens: int, drafts: int
) -> None:
    options = EngineOptions(max_num_seqs=seqs, max_num_batched_tokens=budget, block_size=16)
    chunks, num_blocks = largest_step(options, MODEL.config.vocab_size, length, drafts)
    assert len(chunks) == seqs
    assert sum(chunk.num_tokens + len(chunk.drafts) for chunk in chunks) == tokens
    assert all(len(chunk.drafts) == min(drafts, tokens // seqs - 1) for chunk in chunks[-1:])
    assert all(chunk.samples for chunk in chunks)
    owned = [block for chunk in chunks for block in chunk.sequence.block_table]
    assert owned == list(range(num_blocks))
    computed = runner.Runner(
        MODEL, num_blocks=num_blocks, block_size=16, kv_dtype=MODEL.dtype, max_num_seqs=seqs, max_model_len=length
    ).run(chunks)
    assert len(computed.sampled) == seqs


def test_the_processor_has_what_is_free() -> None:
    plain = memory_for_cache(MODEL, EngineOptions(), torch.float32, LENGTH, 0)
    assert isinstance(plain, int)
    assert plain > 2**20


def test_a_card_is_measured_with_the_weights_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[int] = []

    class FakeRunner:
        def __init__(self, *_: object, capture: Any, **__: object) -> None:
            capture(lambda: ran.append(0))

        def run(self, chunks: list[object], _: object) -> None:
            ran.append(len(chunks))

    model = HashModel()
    model.device = torch.device("cuda:0")
    model.config.num_hidden_layers = 9
    for name, value in {
        "mem_get_info": (30 * GB, 80 * GB),
        "memory_reserved": 40 * GB,
        "memory_allocated": 39 * GB,
        "max_memory_allocated": 41 * GB,
        "empty_cache": None,
        "reset_peak_memory_stats": None,
        "synchronize": None,
        "get_device_properties": _Card(),
    }.items():
        monkeypatch.setattr(f"torch.cuda.{name}", lambda *_, found=value: found)
    monkeypatch.setattr("tern.engine.memory_profile.Runner", FakeRunner)
    monkeypatch.setattr("tern.engine.memory_profile.current", lambda _: torch.inference_mode())
    options = EngineOptions(max_num_seqs=4)
    memory = memory_for_cache(model, options, torch.float32, 96, 0)  # type: ignore[arg-type]
    assert memory == GpuMemory(total=80 * GB, free=30 * GB, step=4 * GB, taken=9 * GB)
    assert ran == [0, 4]
    drafting = memory_for_cache(model, options, torch.float32, 96, 1)  # type: ignore[arg-type]
    assert isinstance(drafting, GpuMemory)
    assert drafting.room(0.9) == 18 * GB - int(1.8 * GB), "one layer in ten is the predictor's"


class _Card:
    name, major, minor = "NVIDIA H100", 9, 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_gpu_is_used_up_to_the_share_and_no_further() -> None:
    options = EngineOptions(device="cuda", dtype="bfloat16", gpu_memory_utilization=0.5, max_num_batched_tokens=4096)
    engine = Engine.open(resolve_model(None), options, progress=False)
    sink = add(engine, "long", [5] * 4000, max_tokens=8, ignore_eos=True)
    run(engine)
    assert sink.end.reason is FinishReason.LENGTH
    free, total = torch.cuda.mem_get_info()
    assert 0.4 < 1 - free / total < 0.52
