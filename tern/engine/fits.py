"""What of a model fits on a device, from its description alone. Knows sizes; loads and allocates nothing.

A network needs memory for its weights, for a step, and for the cache of at least one sequence of full length: an engine
refuses to start with less. Device "auto", an explicit device and `tern doctor` all ask here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import cast

import torch

from tern.checkpoint import FP8_QUANTIZATIONS, QUANTIZATIONS, ModelSource, split_bytes, weight_bytes
from tern.checkpoint.quantisation import check_quantization
from tern.engine.cache_size import (
    MOST_MEMORY_SHARE,
    GpuMemory,
    cache_dtype,
    free_memory,
    resolve_max_model_len,
    resolve_num_blocks,
    token_bytes,
)
from tern.engine.device import GpuFacts, unfit
from tern.engine.options import FP8_CACHE_DTYPES, EngineOptions
from tern.errors import OptionError
from tern.model import ErnieConfig

FLOATS = "bfloat16"
NO_QUANTIZATION = "none"
HOST_BYTES = 1_250_000_000
"""What Python and torch take of the host's memory beside weights, cache and steps, about."""
GPU_BYTES = 500_000_000
"""What kernels, their workspaces and gaps between pieces of memory take of a GPU's, about. Rather too little: what is
refused for it would not have started, and the engine counts again once it can measure."""
LOGITS_COPIES = 6
"""Rows of float32 logits for each that is sampled: with copies for log-probabilities and what they are sorted by."""
CPU = torch.device("cpu")


@dataclass(frozen=True)
class WeightSizes:
    """Bytes of a network's weights, whole `on_gpu` and whole `on_cpu` (None where they do not run there).

    `precision` is their form. `split`: by packing of the routed experts, the most precise first, the bytes on the GPU
    and on the CPU; empty for a network without routed experts.
    """

    on_gpu: int
    on_cpu: int | None
    split: Mapping[str, tuple[int, int]]
    precision: str = FLOATS

    @classmethod
    def of(cls, source: ModelSource, dtype: torch.dtype, quantization: str | None) -> WeightSizes:
        """The sizes of a model that is loaded in `dtype` with the option `quantization`."""
        config = source.config
        rounded = _stored(source) or quantization or source.default_quantization
        packings: tuple[str, ...] = ("wint8", "wint4")
        if rounded in QUANTIZATIONS:
            packings = (rounded,)
        elif rounded in FP8_QUANTIZATIONS:
            packings = ("wint8",)
        elif rounded == NO_QUANTIZATION:
            packings, rounded = (), None
        has_experts = any(map(config.is_moe_layer, range(config.num_hidden_layers)))
        return cls(
            weight_bytes(config, dtype, rounded, gpu=True),
            None if rounded in FP8_QUANTIZATIONS else weight_bytes(config, dtype, rounded),
            {each: split_bytes(config, dtype, rounded, each) for each in packings} if has_experts else {},
            rounded or name_of(dtype),
        )


@dataclass(frozen=True)
class CacheNeed:
    """The cache that an engine must have at least: `size` bytes, which is one sequence of `tokens` unless it is given.

    `token_size`: bytes that a token takes in it, in the predictor's too; they come in blocks of `block_size` tokens.
    """

    tokens: int
    token_size: float
    block_size: int
    size: int

    @classmethod
    def of(cls, source: ModelSource, options: EngineOptions, dtype: torch.dtype) -> CacheNeed:
        """What the options ask of a model of this `dtype`. Raises `OptionError` if they give less than one sequence."""
        config, tokens = source.config, resolve_max_model_len(options, source.config)
        kv_dtype = cache_dtype(options.kv_cache_dtype, dtype)
        blocks = -(-tokens // options.block_size)
        if is_given(options):
            boundless = 2**62  # whether so much is free is asked later, where it is known
            blocks = resolve_num_blocks(options, config, kv_dtype, boundless, tokens, FP8_CACHE_DTYPES[0])
        token_size: float = token_bytes(config, kv_dtype)
        if config.num_nextn_predict_layers and options.speculation in ("auto", "mtp"):
            token_size *= (config.num_hidden_layers + 1) / config.num_hidden_layers
        return cls(tokens, token_size, options.block_size, int(blocks * options.block_size * token_size))

    def longest(self, size: int) -> int:
        """The longest sequence, in tokens, that a cache of `size` bytes holds."""
        return int(size / self.token_size) // self.block_size * self.block_size


@dataclass(frozen=True)
class Room:
    """What a device has for a network: a GPU's `memory`, or the processor's free bytes.

    `running`: bytes that the largest step and what it runs in take. A GPU's cache gets what `utilization` of the memory
    leaves, or all that is free (None) where its size is given.
    """

    memory: int | GpuMemory
    running: int
    utilization: float | None = None

    @classmethod
    def of(cls, device: torch.device, options: EngineOptions, config: ErnieConfig) -> Room:
        """That of a device before anything is loaded."""
        running = step_bytes(config, options)
        if device.type != "cuda":
            return cls(free_memory(device), HOST_BYTES + running)
        running += GPU_BYTES
        free, total = torch.cuda.mem_get_info(device)
        share = None if is_given(options) else options.gpu_memory_utilization
        return cls(GpuMemory(int(total), int(free), running), running, share)

    def for_cache(self, weights: int) -> int:
        """Bytes that a cache may take beside `weights`, as the engine will find once these are loaded."""
        if isinstance(self.memory, GpuMemory):
            loaded = replace(self.memory, free=self.memory.free - weights)
            return loaded.most if self.utilization is None else loaded.room(self.utilization)
        left = self.memory - weights
        return max(0, min(left - self.running, int(left * MOST_MEMORY_SHARE)))

    @property
    def for_weights(self) -> int:
        """Bytes that weights and cache may take together."""
        if isinstance(self.memory, GpuMemory):
            return self.for_cache(0)
        return max(0, self.memory - self.running)

    def longest_context(self, config: ErnieConfig, need: CacheNeed, weights: int) -> int:
        """The longest sequence, in tokens, whose cache fits beside `weights`; 0: none."""
        return min(config.max_position_embeddings, need.longest(self.for_cache(weights)))

    def __str__(self) -> str:
        """In words: how much there is for weights, cache and steps."""
        if not isinstance(self.memory, GpuMemory):
            return f"{gigabytes(self.memory)} of the host's memory"
        all_of_it = gigabytes(self.for_weights + self.running)
        share = "" if self.utilization is None else f", gpu_memory_utilization {self.utilization:g}"
        free, total = gigabytes(self.memory.free), gigabytes(self.memory.total)
        return f"{all_of_it} of the GPU's memory ({free} of {total} are free{share})"


def step_bytes(config: ErnieConfig, options: EngineOptions) -> int:
    """Bytes that the largest step takes beside weights and cache, about: a GPU's is measured once they are loaded.

    The rows of the widest layer, in two bytes a number, and the logits of all sequences.
    """
    pairs = config.moe_k * (config.moe_intermediate_size + config.hidden_size) if config.moe_num_experts else 0
    row = max(pairs, config.intermediate_size) + 6 * config.hidden_size
    return 2 * row * options.max_num_batched_tokens + 4 * LOGITS_COPIES * config.vocab_size * options.max_num_seqs


def runs_on(quantization: str | None, device: torch.device) -> bool:
    """Whether weights of this precision run on the device; None is floats."""
    if quantization is None:
        return True
    try:
        check_quantization(quantization, device)
    except OptionError:
        return False
    return device.type != "cuda" or unfit(GpuFacts.of(device), fp8="fp8" in quantization) is None


def precisions(source: ModelSource) -> list[str | None]:
    """The forms in which a model can be loaded, the most precise first; None is floats."""
    stored = _stored(source)
    return [stored] if stored else [None, "fp8", *reversed(QUANTIZATIONS)]


def does_not_fit(
    source: ModelSource, options: EngineOptions, dtype: torch.dtype, device: torch.device, split: str | None = None
) -> OptionError:
    """The error for a model that is too large for a GPU: it says what it takes, and what would fit, there or elsewhere.

    `split`: how the routed experts are packed if they stay on the CPU.
    """
    sizes, need = WeightSizes.of(source, dtype, options.quantization), CacheNeed.of(source, options, dtype)
    room = Room.of(device, options, source.config)
    weights, kept = (sizes.on_gpu, "") if split is None else (sizes.split[split][0], "without routed experts ")
    fitting = list(_alternatives(source, options, device, dtype))
    advice = f"What fits: {'; '.join(fitting)}." if fitting else "Nothing here has memory enough: use a smaller model."
    cache = "the cache that the options ask for" if is_given(options) else f"the cache of {need.tokens} tokens"
    return OptionError(
        f"{source.name} does not fit on {device}: its weights {kept}are {gigabytes(weights)} in {sizes.precision}, "
        f"{cache} is {gigabytes(need.size)}, steps of {options.max_num_batched_tokens} tokens take about "
        f"{gigabytes(room.running)}, and there are {room}. {advice}"
    )


def _alternatives(source: ModelSource, options: EngineOptions, gpu: torch.device, dtype: torch.dtype) -> Iterator[str]:
    """What fits on the GPU, and of what fits split and on the processor the most precise, in words."""
    config, options = source.config, replace(options, num_kv_blocks=None, kv_cache_memory=None)
    need, host = CacheNeed.of(source, options, dtype), Room.of(CPU, options, config)
    room = Room.of(gpu, options, config)
    for precision in precisions(source):
        weights = weight_bytes(config, dtype, precision, gpu=True)
        longest = room.longest_context(config, need, weights)
        if longest and runs_on(precision, gpu):
            place = f"{_named(precision, dtype)} on {gpu} ({gigabytes(weights)}){_up_to(longest, need)}"
            narrow = replace(options, kv_cache_dtype=FP8_CACHE_DTYPES[0])
            wider = room.longest_context(config, CacheNeed.of(source, narrow, dtype), weights)
            shorter = longest < min(wider, need.tokens) and runs_on("fp8", gpu)
            yield f"{place}, or {wider} with kv_cache_dtype fp8" if shorter else place
    for packing, (beside, experts) in WeightSizes.of(source, dtype, options.quantization).split.items():
        longest = room.longest_context(config, need, beside)
        if longest and experts <= host.for_weights:
            where = f"{gigabytes(beside)}, and {gigabytes(experts)} of experts as {packing} in the host's memory"
            yield f"device split ({where}){_up_to(longest, need)}"
            break
    asked = options.quantization if options.quantization in QUANTIZATIONS else None
    for precision in [asked] if asked else precisions(source):
        weights = weight_bytes(config, dtype, precision)
        longest = host.longest_context(config, need, weights)
        if longest and runs_on(precision, CPU):
            yield f"{_named(precision, dtype)} on device cpu ({gigabytes(weights)}){_up_to(longest, need)}"
            break


def _named(precision: str | None, dtype: torch.dtype) -> str:
    return name_of(dtype) if precision is None else f"quantization {precision}"


def _up_to(longest: int, need: CacheNeed) -> str:
    return "" if longest >= need.tokens else f" with max_model_len up to {longest}"


def dtype_of(source: ModelSource, options: EngineOptions) -> torch.dtype:
    """The type in which a model's floats are loaded, as far as its description says."""
    name = (source.config.dtype or FLOATS) if options.dtype == "auto" else options.dtype
    return cast(torch.dtype, getattr(torch, name))


def name_of(dtype: torch.dtype) -> str:
    """As an option names it."""
    return str(dtype).removeprefix("torch.")


def gigabytes(size: float) -> str:
    """In words."""
    return f"{size / 1e9:.1f} GB"


def is_given(options: EngineOptions) -> bool:
    """Whether the options say how large the cache is."""
    return options.num_kv_blocks is not None or options.kv_cache_memory is not None


def _stored(source: ModelSource) -> str | None:
    return None if source.stored_bits is None else f"wint{source.stored_bits}"
