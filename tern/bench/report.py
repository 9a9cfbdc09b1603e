"""Timed steps of a network, as shares of the machine's limits. Knows batches; needs no prompts and no scheduler."""

from __future__ import annotations

import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from tern import ops
from tern.bench.limits import MachineLimits, Work, measure_machine, step_work
from tern.checkpoint import ModelSource, load_tensors
from tern.engine.cache_size import free_memory, token_bytes
from tern.errors import OptionError
from tern.model import Batch, ErnieConfig, ErnieModel, KVCache

BLOCK_SIZE = 16
CHUNK = 2048  # most tokens of one step; a longer prompt is timed as steps of so many
WARM_UP_STEPS, DECODE_STEPS = 3, 15


@dataclass(frozen=True)
class BenchResult:
    """One timed kind of step.

    "prefill": `tokens` of a prompt after `depth` others, in steps of at most `CHUNK`; "decode": one token for each of
    `sequences` that hold `depth` tokens each. `tokens_per_s` counts all sequences, from the median step.
    `limit_share`: the least time that this machine could take, over the time taken.
    """

    kind: str
    tokens: int
    sequences: int
    depth: int
    tokens_per_s: float
    limit_share: float


@dataclass(frozen=True)
class BenchReport:
    """What `tern bench --json` prints. `load_s`: seconds until the weights were ready; `peak_rss_gb`: 10^9 bytes."""

    model: str
    quantization: str | None
    machine: MachineLimits
    results: list[BenchResult]
    load_s: float
    peak_rss_gb: float

    def as_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return asdict(self)


class Bench:
    """A network with a cache that holds random keys and values, so that any depth costs nothing to reach."""

    def __init__(self, config: ErnieConfig, tensors: Mapping[str, ops.Weight], most_tokens: int) -> None:
        self.config, self.tensors = config, tensors
        self.model = ErnieModel(config, tensors)
        blocks = -(-most_tokens // BLOCK_SIZE) + 1
        size = {"num_blocks": blocks, "block_size": BLOCK_SIZE}
        self.kv = KVCache.allocate(config, **size, dtype=self.model.dtype, device=self.model.device)
        noise = torch.randn(self.kv.values[0].numel(), generator=torch.Generator().manual_seed(0))
        for cache in (self.kv.keys, self.kv.values):
            for layer in cache:
                layer.copy_(noise.view(layer.shape))
        self.random = torch.Generator().manual_seed(1)

    def batch(self, sequences: int, tokens: int, depth: int) -> Batch:
        """The newest `tokens` tokens of sequences that hold `depth` others, each with blocks of its own."""
        length = depth + tokens
        blocks = -(-length // BLOCK_SIZE)
        tables = torch.arange(sequences * blocks).view(sequences, blocks)
        positions = torch.arange(depth, length).repeat(sequences)
        owners = torch.arange(sequences).repeat_interleave(tokens)
        return Batch(
            token_ids=torch.randint(3, self.config.vocab_size, (sequences * tokens,), generator=self.random),
            positions=positions,
            slots=tables[owners, positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE,
            query_starts=torch.arange(sequences + 1) * tokens,
            context_lens=torch.full((sequences,), length),
            block_tables=tables,
            logit_rows=torch.arange(1, sequences + 1) * tokens - 1,
            max_query_len=tokens,
            max_context_len=length,
        )

    @torch.inference_mode()
    def seconds(self, sequences: int, tokens: int, depth: int) -> float:
        """One step, from the batch to greedy tokens."""
        batch = self.batch(sequences, tokens, depth)
        started = time.perf_counter()
        hidden = self.model.hidden(batch, self.kv)
        self.model.logits(hidden.index_select(0, batch.logit_rows)).argmax(-1).tolist()
        return time.perf_counter() - started

    def work(self, sequences: int, tokens: int, depth: int) -> Work:
        """The least that such a step must do."""
        itemsize = self.model.dtype.itemsize
        sizes = {"sequences": sequences, "tokens": tokens, "depth": depth}
        return step_work(self.config, self.tensors, **sizes, kv_itemsize=itemsize)

    def prefill(self, tokens: int, depth: int, limits: MachineLimits) -> BenchResult:
        """A prompt of `tokens` after `depth` others: the median of three runs, or the only one of a long prompt."""
        chunks = [(start, min(CHUNK, tokens - start)) for start in range(0, tokens, CHUNK)]
        self.seconds(1, min(tokens, CHUNK), depth)
        runs = 3 if len(chunks) == 1 else 1
        taken = statistics.median(
            [sum(self.seconds(1, count, depth + start) for start, count in chunks) for _ in range(runs)]
        )
        least = sum(self.work(1, count, depth + start).seconds(limits) for start, count in chunks)
        return BenchResult("prefill", tokens, 1, depth, tokens / taken, least / taken)

    def decode(self, sequences: int, depth: int, limits: MachineLimits) -> BenchResult:
        """One more token for each sequence: the median step."""
        for _ in range(WARM_UP_STEPS):
            self.seconds(sequences, 1, depth)
        taken = statistics.median([self.seconds(sequences, 1, depth) for _ in range(DECODE_STEPS)])
        least = self.work(sequences, 1, depth).seconds(limits)
        return BenchResult("decode", 1, sequences, depth, sequences / taken, least / taken)


def run_bench(
    source: ModelSource,
    *,
    quantization: str | None,
    prefill: Sequence[int],
    decode: Sequence[int],
    depths: Sequence[int],
    on_result: Callable[[BenchResult], None] = lambda _: None,
    progress: bool = True,
) -> BenchReport:
    """Measure the machine, load the network and time every wanted step on it.

    Raises `OptionError` if a depth goes beyond the model's positions or its cache beyond free memory.
    """
    most = max([0, *(tokens + depth for tokens in prefill for depth in depths)])
    longest = max([most, *(depth + 1 for depth in depths)])
    if longest > source.config.max_position_embeddings:
        raise OptionError(
            f"A context of {longest} tokens is asked for, but the model has {source.config.max_position_embeddings} "
            "positions: lower --depth or --prefill."
        )
    limits = measure_machine()
    started = time.perf_counter()
    tensors = load_tensors(source, quantization=quantization, progress=progress)
    load_seconds = time.perf_counter() - started
    needed = max([most, *(sequences * (depth + 1 + BLOCK_SIZE) for sequences in decode for depth in depths)])
    embedding = tensors["embed"]
    assert isinstance(embedding, torch.Tensor)
    cache_bytes, free = needed * token_bytes(source.config, embedding.dtype), free_memory(embedding.device)
    if cache_bytes > free:
        raise OptionError(
            f"The KV cache of these runs takes {cache_bytes / 1e9:.1f} GB and {free / 1e9:.1f} GB are free: "
            "lower --depth, --decode or --prefill."
        )
    bench = Bench(source.config, tensors, needed)
    results = []
    for result in _results(bench, limits, prefill, decode, depths):
        on_result(result)
        results.append(result)
    return BenchReport(
        source.name, quantization or source.default_quantization, limits, results, load_seconds, peak_rss() / 1e9
    )


def _results(
    bench: Bench, limits: MachineLimits, prefill: Sequence[int], decode: Sequence[int], depths: Sequence[int]
) -> Iterator[BenchResult]:
    for depth in depths:
        for tokens in prefill:
            yield bench.prefill(tokens, depth, limits)
        for sequences in decode:
            yield bench.decode(sequences, depth, limits)


def peak_rss() -> int:
    """The most memory that this process has held, bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
