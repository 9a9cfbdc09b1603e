"""An exception at every stage of a step, in the engine's own thread: who pays for it, and that nobody waits for ever.

What belongs to the computation of a batch costs the requests that cannot be computed, and the engine goes on. What
keeps the books ends the engine, with an ending for everybody: books that may be wrong give wrong answers.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from engine_fakes import HashModel, MemoryStore, Recorder, make_engine, make_request

from tern.engine import EngineService, Finish, FinishReason
from tern.engine import engine as engine_module
from tern.engine import runner as runner_module
from tern.engine.service import FAILED
from tern.engine.step_failures import DEVICE_LOST, GPU_OUT_OF_MEMORY, OUT_OF_MEMORY, STEP_FAILED
from tern.errors import EngineUnavailableError

PATIENCE = 60.0  # seconds; never reached unless something hangs

Breaks = Callable[[EngineService, pytest.MonkeyPatch, Callable[..., Any]], None]

COMPUTING: dict[str, Breaks] = {
    "pack": lambda _, patch, fail: patch.setattr(runner_module, "pack", fail),
    "hidden": lambda service, patch, fail: patch.setattr(service.engine.runner.model, "hidden", fail),
    "logits": lambda service, patch, fail: patch.setattr(service.engine.runner.model, "logits", fail),
    "sampler": lambda service, patch, fail: patch.setattr(service.engine.runner.sampler, "begin", fail),
}
KEEPING_BOOKS: dict[str, Breaks] = {
    "schedule": lambda service, patch, fail: patch.setattr(service.engine.scheduler, "schedule", fail),
    "find prefix": lambda service, patch, fail: patch.setattr(service.engine.pool, "find_prefix", fail),
    "restore": lambda service, patch, fail: patch.setattr(service.engine.pool.store, "restore", fail),
    "offer": lambda service, patch, fail: patch.setattr(service.engine.pool.store, "offer", fail),
    "commit": lambda service, patch, fail: patch.setattr(service.engine.scheduler, "commit", fail),
    "learn": lambda service, patch, fail: patch.setattr(service.engine.drafter, "learn", fail),
    "deliver": lambda service, patch, fail: patch.setattr(service.engine.delivery, "deliver", fail),
    "remove": lambda service, patch, fail: patch.setattr(service.engine.scheduler, "remove", fail),
    "release": lambda service, patch, fail: patch.setattr(service.engine.pool, "release", fail),
    "enqueue": lambda service, patch, fail: patch.setattr(service.engine.scheduler, "add", fail),
}
ERRORS = [RuntimeError("broken as asked"), MemoryError()]


class Waiter(Recorder):
    """A sink that other threads can wait for."""

    def __init__(self) -> None:
        super().__init__()
        self.done = threading.Event()

    def finish(self, finish: Finish) -> None:
        super().finish(finish)
        self.done.set()

    def result(self) -> Finish:
        assert self.done.wait(PATIENCE), "the request never ended"
        return self.end


def submit(service: EngineService, name: str, **fields: Any) -> Waiter:
    sink = Waiter()
    service.submit(make_request(name, fields.pop("prompt", [5, 6, 7, 8, 9]), sink=sink, ignore_eos=True, **fields))
    return sink


class Held:
    """A service whose thread stands before a step while requests are submitted and something is broken."""

    def __init__(self) -> None:
        self.service = EngineService(make_engine(HashModel(), max_num_seqs=2))
        self.service.engine.pool.store = MemoryStore()
        self.gate = threading.Event()
        turn = self.service._turn

        def gated() -> bool:
            assert self.gate.wait(PATIENCE)
            return turn()

        self.service._turn = gated  # type: ignore[method-assign]
        self.service.start()


@pytest.fixture
def held() -> Iterator[Held]:
    made = Held()
    yield made
    made.gate.set()
    made.service.stop()
    assert not made.service._thread.is_alive()
    assert not made.service.engine.has_work


def failing(error: BaseException) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    return fail


@pytest.mark.parametrize("error", ERRORS, ids=["error", "memory"])
@pytest.mark.parametrize("stage", COMPUTING)
def test_what_cannot_be_computed_ends_and_the_engine_goes_on(
    held: Held, stage: str, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    sinks = [submit(held.service, name) for name in ("a", "b")]
    with monkeypatch.context() as patch:
        COMPUTING[stage](held.service, patch, failing(error))
        held.gate.set()
        for sink in sinks:
            said = OUT_OF_MEMORY if isinstance(error, MemoryError) else STEP_FAILED
            assert (sink.result().reason, sink.end.message) == (FinishReason.ERROR, said)
    assert submit(held.service, "next").result().reason is FinishReason.LENGTH
    assert held.service.state == "ready"
    assert held.service.drain(PATIENCE)
    held.service.engine.check_integrity()


@pytest.mark.parametrize(
    ("stage", "error"),
    [*((stage, error) for stage in KEEPING_BOOKS for error in ERRORS), ("schedule", SystemExit("no Exception"))],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_broken_books_end_the_engine_and_every_request(
    held: Held, stage: str, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    sinks = [submit(held.service, name, prompt=[5 + n] * 9) for n, name in enumerate(("a", "b", "queued"))]
    KEEPING_BOOKS[stage](held.service, monkeypatch, failing(error))
    held.gate.set()
    for sink in sinks:
        assert (sink.result().reason, sink.end.message) == (FinishReason.ERROR, FAILED)
    held.service._thread.join(PATIENCE)
    assert held.service.state == "failed"
    with pytest.raises(EngineUnavailableError, match="failed"):
        submit(held.service, "late")
    assert held.service.drain(PATIENCE), "nobody is left to wait for"


def test_what_is_submitted_while_the_engine_fails_is_answered(held: Held, monkeypatch: pytest.MonkeyPatch) -> None:
    first = submit(held.service, "first")

    def fail() -> Any:
        late.append(submit(held.service, "between two steps"))
        raise RuntimeError("broken as asked")

    late: list[Waiter] = []
    monkeypatch.setattr(held.service.engine.scheduler, "schedule", fail)
    held.gate.set()
    assert first.result().message == FAILED
    assert late[0].result().message == FAILED


class OnGpu(Held):
    """A service whose engine believes that it runs on a GPU, and computes steps ahead as there."""

    def __init__(self) -> None:
        super().__init__()
        self.service.engine.device = torch.device("cuda")
        self.service.engine.pipeline._ahead = True


@pytest.fixture
def on_gpu() -> Iterator[OnGpu]:
    made = OnGpu()
    yield made
    made.gate.set()
    made.service.stop()


def test_a_gpu_out_of_memory_is_freed_of_what_is_unused_and_goes_on(
    on_gpu: OnGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What does not fit beside others is computed alone; what does not fit alone is told which options make room."""
    model: Any = on_gpu.service.engine.runner.model
    compute, held, freed = model.hidden, [], []

    def hidden(batch: Any, kv: Any) -> Any:
        if len(batch.token_ids) > 8:
            held.append(len(batch.context_lens))
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB.")
        return compute(batch, kv)

    monkeypatch.setattr(model, "hidden", hidden)
    monkeypatch.setattr(engine_module, "free_unused_memory", freed.append)
    small, other = submit(on_gpu.service, "small"), submit(on_gpu.service, "other")
    large = submit(on_gpu.service, "large", prompt=[5] * 20)
    on_gpu.gate.set()
    assert (small.result().reason, other.result().reason) == (FinishReason.LENGTH, FinishReason.LENGTH)
    assert (large.result().reason, large.end.message) == (FinishReason.ERROR, GPU_OUT_OF_MEMORY)
    assert "--gpu-memory-utilization" in GPU_OUT_OF_MEMORY
    assert "--max-num-batched-tokens" in GPU_OUT_OF_MEMORY
    assert 2 in held, "the two that were too large together"
    assert freed == [torch.device("cuda")] * len(held)
    assert on_gpu.service.state == "ready"
    assert submit(on_gpu.service, "next").result().reason is FinishReason.LENGTH


@pytest.mark.parametrize("stage", ["hidden", "finish"])
@pytest.mark.parametrize("after", [0, 4])
def test_a_lost_gpu_ends_every_request_and_the_engine(
    on_gpu: OnGpu, stage: str, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner: Any = on_gpu.service.engine.runner.model if stage == "hidden" else on_gpu.service.engine.runner
    works, calls = getattr(owner, stage), 0

    def lose(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > after:
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
        return works(*args)

    monkeypatch.setattr(owner, stage, lose)
    sinks = [submit(on_gpu.service, name, max_tokens=30) for name in ("a", "b", "queued")]
    on_gpu.gate.set()
    for sink in sinks:
        assert (sink.result().reason, sink.end.message) == (FinishReason.ERROR, DEVICE_LOST)
    on_gpu.service._thread.join(PATIENCE)
    assert on_gpu.service.state == "failed", "for which /health answers 503 and the server ends with an error"
    with pytest.raises(EngineUnavailableError, match="failed"):
        submit(on_gpu.service, "late")
