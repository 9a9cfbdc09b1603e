"""Timed steps of a network, as shares of the machine's limits. Knows batches; needs no prompts and no scheduler."""

from __future__ import annotations

import resource
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch

from tern import ops
from tern.bench.gpu import GpuLimits, measure_device, take_device
from tern.bench.limits import Limits, MachineLimits, Work, step_work
from tern.bench.overhead import ROOM, SkippingModel, TimedModel, overhead_share, step_seconds
from tern.bench.setting import Setting
from tern.bench.timer import Timer
from tern.checkpoint import ModelSource, load_tensors
from tern.engine import Engine, EngineOptions
from tern.engine.cache_size import cache_dtype, free_memory, token_bytes
from tern.errors import OptionError
from tern.model import Batch, ErnieConfig, KVCache

BLOCK_SIZE = 16
CHUNK, GPU_CHUNK = 2048, 8192  # most tokens of one step; a longer prompt is timed as steps of so many
WARM_UP_STEPS, DECODE_STEPS = 3, 15
FILLED_BLOCKS = 64  # whose random content the cache repeats


@dataclass(frozen=True)
class BenchResult:
    """One timed kind of step.

    "prefill": `tokens` of a prompt after `depth` others, in steps of at most `CHUNK`, on a GPU `GPU_CHUNK`; "decode":
    one token for each of `sequences` that hold `depth` tokens each, on a GPU in the engine's own steps. `tokens_per_s`
    counts all sequences, from the median step. `limit_share`: the least time that this machine could take, over the
    time taken. `overhead_share`: of a decode step in the engine, the share that is not the network's (scheduling,
    packing, sampling, delivering); None for prefill, and on a GPU, whose figure contains it.
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
    """What `tern bench --json` prints.

    `machine`: the limits of the processor or the GPU that was measured. `load_s`: seconds until the weights were ready;
    `peak_rss_gb`, and of a GPU's memory `peak_gpu_gb`: the most that the process has held, 10^9 bytes.
    """

    model: str
    quantization: str | None
    setting: Setting
    machine: MachineLimits | GpuLimits
    results: list[BenchResult]
    load_s: float
    peak_rss_gb: float
    peak_gpu_gb: float | None = None

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
        self.model, self.timed = _network(config, tensors)
        self.device = self.model.device
        self.timer = Timer(self.device)
        self.chunk = GPU_CHUNK if self.device.type == "cuda" else CHUNK
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
        self.model.skips_prompts = True  # nor is a step of so many tokens tried before the first
        self.engine = Engine(self.model, (), options)
        self.model.skips_prompts = False
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
        starts, lengths = torch.arange(sequences + 1) * tokens, torch.full((sequences,), length)
        batch = Batch(
            token_ids=torch.randint(3, self.config.vocab_size, (sequences * tokens,), generator=self.random),
            positions=positions,
            slots=tables[owners, positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE,
            query_starts=starts,
            context_lens=lengths,
            block_tables=tables,
            logit_rows=torch.arange(1, sequences + 1) * tokens - 1,
            max_query_len=tokens,
            max_context_len=length,
            chunks=ops.Chunks.of(self.engine.runner.attention, starts.numpy(), lengths.numpy()),
        )
        return _on_device(batch, self.device)

    @torch.inference_mode()
    def seconds(self, sequences: int, tokens: int, depth: int) -> float:
        """One step, from the batch to greedy tokens."""
        batch = self.batch(sequences, tokens, depth)

        def step() -> None:
            hidden = self.model.hidden(batch, self.kv)
            ops.largest(self.model.logits(hidden.index_select(0, batch.logit_rows)))[1].tolist()

        return self.timer.seconds(step)

    def work(self, sequences: int, tokens: int, depth: int) -> Work:
        """The least that such a step must do."""
        sizes = {"sequences": sequences, "tokens": tokens, "depth": depth}
        kv_token_bytes = token_bytes(self.config, self.kv.keys.dtype)
        return step_work(self.config, self.tensors, **sizes, kv_token_bytes=kv_token_bytes)

    def prefill(self, tokens: int, depth: int, limits: Limits) -> BenchResult:
        """A prompt of `tokens` after `depth` others: the median of three runs, or the only one of a long prompt."""
        chunks = prompt_chunks(tokens, self.chunk)
        for count in {count for _, count in chunks}:  # kernels for a size may be compiled when it is first met
            self.seconds(1, count, depth)
        runs = 3 if len(chunks) == 1 else 1
        taken = statistics.median(
            [sum(self.seconds(1, count, depth + start) for start, count in chunks) for _ in range(runs)]
        )
        least = sum(self.work(1, count, depth + start).seconds(limits) for start, count in chunks)
        return BenchResult("prefill", tokens, 1, depth, tokens / taken, least / taken)

    def decode(self, sequences: int, depth: int, limits: Limits) -> BenchResult:
        """One more token for each sequence: the median step."""
        least = self.work(sequences, 1, depth).seconds(limits)
        if self.timed is None:
            taken = step_seconds(self.engine, self.model, sequences, depth)
            return BenchResult("decode", 1, sequences, depth, sequences / taken, least / taken)
        for _ in range(WARM_UP_STEPS):
            self.seconds(sequences, 1, depth)
        taken = statistics.median([self.seconds(sequences, 1, depth) for _ in range(DECODE_STEPS)])
        overhead = overhead_share(self.engine, self.timed, sequences, depth)
        return BenchResult("decode", 1, sequences, depth, sequences / taken, least / taken, overhead)


def prompt_chunks(tokens: int, most: int) -> list[tuple[int, int]]:
    """The steps of at most `most` tokens that read a prompt of `tokens`: where each begins, and how many it reads."""
    return [(start, min(most, tokens - start)) for start in range(0, tokens, most)]


def run_bench(
    source: ModelSource,
    *,
    quantization: str | None,
    kv_cache_dtype: str = "auto",
    prefill: Sequence[int],
    decode: Sequence[int],
    depths: Sequence[int],
    device: str = "auto",
    command: Sequence[str] = (),
    on_result: Callable[[BenchResult], None] = lambda _: None,
    progress: bool = True,
) -> BenchReport:
    """Measure the device's limits, load the network on it and time every wanted step.

    `device`: as the engine's option of that name. `command` is what the report says it was made with.

    Raises `OptionError` if a depth goes beyond the model's positions or its cache beyond free memory.
    """
    most = max([0, *(tokens + depth for tokens in prefill for depth in depths)])
    longest = max([most, *(depth + 1 for depth in depths)])
    if longest > source.config.max_position_embeddings:
        raise OptionError(
            f"A context of {longest} tokens is asked for, but the model has {source.config.max_position_embeddings} "
            "positions: lower --depth or --prefill."
        )
    place = take_device(device)
    limits, timer = measure_device(place), Timer(place)
    started = timer.now()
    tensors = load_tensors(source, device=place, quantization=quantization, progress=progress)
    load_seconds = timer.now() - started
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
    used = quantization or source.default_quantization
    setting = Setting.now(command, limits.name if isinstance(limits, GpuLimits) else None)
    peak_gpu = torch.cuda.max_memory_allocated(place) / 1e9 if place.type == "cuda" else None
    return BenchReport(source.name, used, setting, limits, results, load_seconds, peak_rss() / 1e9, peak_gpu)


def _network(config: ErnieConfig, tensors: Mapping[str, ops.Weight]) -> tuple[SkippingModel, TimedModel | None]:
    """The network to time, and on the CPU, where its calls end when their work does, the same one with a clock."""
    embedding = tensors["embed"]
    assert isinstance(embedding, torch.Tensor)
    if embedding.device.type == "cuda":
        return SkippingModel(config, tensors), None
    timed = TimedModel(config, tensors)
    return timed, timed


def _on_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on the network's device."""
    values = {field.name: getattr(batch, field.name) for field in fields(batch)}
    moved: dict[str, Any] = {name: value.to(device) for name, value in values.items() if torch.is_tensor(value)}
    return replace(batch, **moved)


def _fill(kv: KVCache, config: ErnieConfig) -> None:
    """Random keys and values, the same few blocks over and over."""
    num_blocks = kv.keys.shape[2]
    count = min(FILLED_BLOCKS, num_blocks)
    keys, values = kv.keys[0, :, :count].clone(), kv.values[0, :, :count].clone()
    generator = torch.Generator().manual_seed(0)
    shape = (2, count * kv.block_size, config.num_key_value_heads, config.head_dim)
    noise = torch.randn(shape, generator=generator).to(keys.device)
    ops.write_kv(keys, values, noise[0], noise[1], torch.arange(shape[1], device=keys.device))
    for start in range(0, num_blocks, count):
        size = min(count, num_blocks - start)
        kv.keys[:, :, start : start + size] = keys[:, :size]
        kv.values[:, :, start : start + size] = values[:, :size]


def _results(
    bench: Bench, limits: Limits, prefill: Sequence[int], decode: Sequence[int], depths: Sequence[int]
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
