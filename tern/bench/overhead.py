"""What a decode step costs beside the network: scheduling, packing, sampling, delivering. Knows the engine's step.

The engine carries no clock for this. On the CPU its model is one that keeps the time of its own calls; the rest of a
step is the engine's. On a GPU, where those calls only queue work or are replayed from a graph, whole steps are timed.
"""

from __future__ import annotations

import statistics
import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from tern.engine import CONTINUE, Engine, Finish, FinishReason, GeneratedToken, Request, SamplingParams, Steering
from tern.model import Batch, ErnieModel, KVCache

WARM_UP_STEPS, TIMED_STEPS = 3, 15
ROOM = 32
"""Tokens that a sequence may grow by while it is timed."""


class SkippingModel(ErnieModel):
    """The network; while `skips_prompts`, a step with more than one token of a sequence is answered by noise and leaves
    the cache as it is: a cache full of random keys and values need not be filled again.

    Each row's noise is another, so that sequences go on with different tokens, which choose different experts.
    """

    seconds = 0.0
    skips_prompts = False

    def hidden(self, batch: Batch, kv: KVCache) -> Tensor:
        """As `ErnieModel.hidden`."""
        if self.skips_prompts and batch.max_query_len > 1:
            return self._noise(len(batch.token_ids))
        return super().hidden(batch, kv)

    def _noise(self, rows: int) -> Tensor:
        """[rows, hidden_size]: each row is the one before it moved on by one number, so many take little memory."""
        width = self.config.hidden_size
        numbers = torch.randn(rows + width - 1, generator=torch.Generator().manual_seed(3))
        return numbers.to(self.embedding).unfold(0, width, 1)


class TimedModel(SkippingModel):
    """The network on the CPU, with the seconds that its calls have taken since `seconds` was last set to 0."""

    def hidden(self, batch: Batch, kv: KVCache) -> Tensor:
        """As `ErnieModel.hidden`."""
        started = time.perf_counter()
        hidden = super().hidden(batch, kv)
        self.seconds += time.perf_counter() - started
        return hidden

    def logits(self, hidden_rows: Tensor) -> Tensor:
        """As `ErnieModel.logits`."""
        started = time.perf_counter()
        logits = super().logits(hidden_rows)
        self.seconds += time.perf_counter() - started
        return logits


@dataclass(frozen=True)
class EngineStep:
    """The seconds of a step, and of those the model's own, as far as it keeps them."""

    seconds: float
    model_seconds: float


class _Count:
    """Counts the tokens of one sequence, and keeps the sentence of its failure."""

    def __init__(self) -> None:
        self.tokens = 0
        self.failure: str | None = None

    def push(self, token: GeneratedToken) -> Steering:  # noqa: ARG002
        self.tokens += 1
        return CONTINUE

    def finish(self, finish: Finish) -> None:
        if finish.reason is not FinishReason.CANCELLED:
            self.failure = finish.message or f"it ended after {self.tokens} tokens ({finish.reason})"


def overhead_share(engine: Engine, model: TimedModel, sequences: int, depth: int) -> float:
    """The share of the median decode step of `sequences` that hold `depth` tokens each, spent outside of `model`."""
    with decoding(engine, model, sequences, depth) as step:
        shares = [max(0.0, 1.0 - taken.model_seconds / taken.seconds) for taken in (step() for _ in range(TIMED_STEPS))]
        return statistics.median(shares)


def step_seconds(engine: Engine, model: SkippingModel, sequences: int, depth: int) -> float:
    """The median decode step of `sequences` that hold `depth` tokens each, from one return of the engine to the next.

    A step that is queued beside the one before it so counts once. Where the model ends, `ROOM` tokens are left.
    """
    with decoding(engine, model, sequences, depth) as step:
        return statistics.median([step().seconds for _ in range(TIMED_STEPS)])


@contextmanager
def decoding(engine: Engine, model: SkippingModel, sequences: int, depth: int) -> Iterator[Callable[[], EngineStep]]:
    """An engine whose `sequences` hold `depth` tokens each and have decoded a few: what is called takes one step more.

    `model` is the engine's own, and its cache holds every sequence with `ROOM` more tokens. Greedy, into sinks that
    only count: a door's work on text comes on top.
    """
    length = max(1, min(depth, engine.max_model_len - ROOM))
    ids = torch.randint(3, engine.vocab_size, (sequences, length), generator=torch.Generator().manual_seed(2))
    params = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=min(ROOM, engine.max_model_len - length))
    sinks = [_Count() for _ in range(sequences)]
    for number, (row, sink) in enumerate(zip(ids, sinks, strict=True)):
        engine.add(Request(f"bench-{number}", tuple(array("q", row.numpy().tobytes())), params, sink))
    try:
        model.skips_prompts = True
        while not all(sink.tokens for sink in sinks):
            _step(engine, model, sinks)
        model.skips_prompts = False
        for _ in range(WARM_UP_STEPS):
            _step(engine, model, sinks)
        yield lambda: _step(engine, model, sinks)
    finally:
        model.skips_prompts = False
        engine.end_all(FinishReason.CANCELLED)


def _step(engine: Engine, model: SkippingModel, sinks: list[_Count]) -> EngineStep:
    """One step of the engine. Raises `RuntimeError` if a sequence failed in it."""
    model.seconds = 0.0
    started = time.perf_counter()
    engine.step()
    taken = time.perf_counter() - started
    failures = [sink.failure for sink in sinks if sink.failure]
    if failures:
        raise RuntimeError(f"a timed sequence failed: {failures[0]}")
    return EngineStep(taken, model.seconds)
