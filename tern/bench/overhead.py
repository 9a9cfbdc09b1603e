"""What a decode step costs beside the network: scheduling, packing, sampling, delivering. Knows the engine's step.

The engine carries no clock for this. Its model is one that keeps the time of its own calls; the rest of a step is the
engine's.
"""

from __future__ import annotations

import statistics
import time
from array import array

import torch
from torch import Tensor

from tern.engine import CONTINUE, Engine, Finish, FinishReason, GeneratedToken, Request, SamplingParams, Steering
from tern.model import Batch, ErnieModel, KVCache

WARM_UP_STEPS, TIMED_STEPS = 3, 15
ROOM = 32
"""Tokens that a sequence may grow by while it is timed."""


class TimedModel(ErnieModel):
    """The network, with the seconds that its calls have taken since `seconds` was last set to 0.

    While `skips_prompts`, a step with more than one token of a sequence is answered by zeros and leaves the cache as it
    is: a cache full of random keys and values need not be filled again.
    """

    seconds = 0.0
    skips_prompts = False

    def hidden(self, batch: Batch, kv: KVCache) -> Tensor:
        """As `ErnieModel.hidden`."""
        if self.skips_prompts and batch.max_query_len > 1:
            return self.embedding.new_zeros(1, self.config.hidden_size).expand(len(batch.token_ids), -1)
        started = time.perf_counter()
        hidden = super().hidden(batch, kv)
        self._stop(started)
        return hidden

    def logits(self, hidden_rows: Tensor) -> Tensor:
        """As `ErnieModel.logits`."""
        started = time.perf_counter()
        logits = super().logits(hidden_rows)
        self._stop(started)
        return logits

    def _stop(self, started: float) -> None:
        if self.device.type == "cuda":  # whose work is only queued when a call returns
            torch.cuda.synchronize(self.device)
        self.seconds += time.perf_counter() - started


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
    """The share of the median decode step of `sequences` that hold `depth` tokens each, spent outside of `model`.

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
        return statistics.median([_step(engine, model, sinks) for _ in range(TIMED_STEPS)])
    finally:
        model.skips_prompts = False
        engine.end_all(FinishReason.CANCELLED)


def _step(engine: Engine, model: TimedModel, sinks: list[_Count]) -> float:
    """One step of the engine; the share of it that is not the model's."""
    model.seconds = 0.0
    started = time.perf_counter()
    engine.step()
    taken = time.perf_counter() - started
    failures = [sink.failure for sink in sinks if sink.failure]
    if failures:
        raise RuntimeError(f"a timed sequence failed: {failures[0]}")
    return max(0.0, 1.0 - model.seconds / taken)
