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
from tern.bench.overhead import ROOM, TimedModel, overhead_share
from tern.bench.setting import Setting
from tern.checkpoint import ModelSource, load_tensors
from tern.engine import Engine, EngineOptions
from tern.engine.cache_size import cache_dtype, free_memory, token_bytes
from tern.errors import OptionError
from tern.model import Batch, ErnieConfig, KVCache

BLOCK_SIZE = 16
CHUNK = 2048  # most tokens of one step; a longer prompt is timed as steps of so many
WARM_UP_STEPS, DECODE_STEPS = 3, 15
FILLED_BLOCKS = 64  # whose random content the cache repeats


@dataclass(frozen=True)
class BenchResult:
    """One timed kind of step.

    "prefill": `tokens` of a prompt after `depth` others, in steps of at most `CHUNK`; "decode": one token for each of
    `sequences` that hold `depth` tokens each. `tokens_per_s` counts all sequences, from the median step.
    `limit_share`: the least time that this machine could take, over the time taken. `overhead_share`: of a decode step
    in the engine, the share that is not the network's (scheduling, packing, sampling, delivering); None for prefill.
    """

    kind: str
    tokens: int
    sequences: int
    depth: int
    tokens_per_s: float
    limit_share: float
    overhead_share: float | None = None


@dataclass(frozen=True)
class BenchReport:
    """What `tern bench --json` prints. `load_s`: seconds until the weights were ready; `peak_rss_gb`: 10^9 bytes."""

    model: str
    quantization: str | None
    setting: Setting
    machine: MachineLimits
    results: list[BenchResult]
    load_s: float
    peak_rss_gb: float

    def as_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return asdict(self)


class Bench:
    """A network with a cache that holds random keys and values, so that any depth costs nothing to reach.

    The cache holds `most_tokens`, and `ROOM` more for each of `most_sequences`; it is the cache of an engine, so that
    the engine's own steps can be timed at the same depths.
    """

    def __init__(
        self,
        config: ErnieConfig,
        tensors: Mapping[str, ops.Weight],
        most_tokens: int,
        most_sequences: int = 1,
        kv_cache_dtype: str = "auto",
    ) -> None:
        self.config, self.tensors = config, tensors
        self.model = TimedModel(config, tensors)
        blocks = -(-most_tokens // BLOCK_SIZE) + most_sequences * (ROOM // BLOCK_SIZE + 1)
        options = EngineOptions(
            max_model_len=min(config.max_position_embeddings, blocks * BLOCK_SIZE),
            max_num_seqs=most_sequences,
            max_num_batched_tokens=min(max(most_tokens, most_sequences), 2**20),
            block_size=BLOCK_SIZE,
            num_kv_blocks=blocks,
            kv_cache_dtype=kv_cache_dtype,
            enable_prefix_caching=False,
            target_step_seconds=None,
            speculation="off",
        )
        self.engine = Engine(self.model, (), options)
        self.kv = self.engine.runner.kv
        _fill(self.kv, config)
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
        ops.largest(self.model.logits(hidden.index_select(0, batch.logit_rows)))[1].tolist()
        return time.perf_counter() - started

    def work(self, sequences: int, tokens: int, depth: int) -> Work:
        """The least that such a step must do."""
        sizes = {"sequences": sequences, "tokens": tokens, "depth": depth}
        kv_token_bytes = token_bytes(self.config, self.kv.keys.dtype)
        return step_work(self.config, self.tensors, **sizes, kv_token_bytes=kv_token_bytes)

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
        overhead = overhead_share(self.engine, self.model, sequences, depth)
        return BenchResult("decode", 1, sequences, depth, sequences / taken, least / taken, overhead)


def run_bench(
    source: ModelSource,
    *,
    quantization: str | None,
    kv_cache_dtype: str = "auto",
    prefill: Sequence[int],
    decode: Sequence[int],
    depths: Sequence[int],
    command: Sequence[str] = (),
    on_result: Callable[[BenchResult], None] = lambda _: None,
    progress: bool = True,
) -> BenchReport:
    """Measure the machine, load the network and time every wanted step on it.

    `command` is what the report says it was made with.

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
    most_sequences = max([1, *decode])
    embedding = tensors["embed"]
    assert isinstance(embedding, torch.Tensor)
    dtype = cache_dtype(kv_cache_dtype, embedding.dtype)
    cache_bytes = (needed + most_sequences * (ROOM + BLOCK_SIZE)) * token_bytes(source.config, dtype)
    free = free_memory(embedding.device)
    if cache_bytes > free:
        raise OptionError(
            f"The KV cache of these runs takes {cache_bytes / 1e9:.1f} GB and {free / 1e9:.1f} GB are free: "
            "lower --depth, --decode or --prefill."
        )
    bench = Bench(source.config, tensors, needed, most_sequences, kv_cache_dtype)
    results = []
    for result in _results(bench, limits, prefill, decode, depths):
        on_result(result)
        results.append(result)
    used, setting = quantization or source.default_quantization, Setting.now(command)
    return BenchReport(source.name, used, setting, limits, results, load_seconds, peak_rss() / 1e9)


def _fill(kv: KVCache, config: ErnieConfig) -> None:
    """Random keys and values, the same few blocks over and over."""
    num_blocks = kv.keys.shape[2]
    count = min(FILLED_BLOCKS, num_blocks)
    keys, values = kv.keys[0, :, :count].clone(), kv.values[0, :, :count].clone()
    generator = torch.Generator().manual_seed(0)
    shape = (2, count * kv.block_size, config.num_key_value_heads, config.head_dim)
    noise = torch.randn(shape, generator=generator)
    ops.write_kv(keys, values, noise[0], noise[1], torch.arange(shape[1]))
    for start in range(0, num_blocks, count):
        size = min(count, num_blocks - start)
        kv.keys[:, :, start : start + size] = keys[:, :size]
        kv.values[:, :, start : start + size] = values[:, :size]


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
