"""What the one who starts an engine may choose, and the range of each choice. Knows no tensors and no model."""

from __future__ import annotations

import difflib
import os
import re
from dataclasses import dataclass, fields
from typing import Any

from tern.engine.speculative_config import options_of
from tern.errors import OptionError

DTYPES = ("auto", "float32", "bfloat16", "float16")
FP8_CACHE_DTYPES = ("fp8", "fp8_e4m3")  # the same, the second as vLLM names it
KV_CACHE_DTYPES = ("auto", "bfloat16", "int8", *FP8_CACHE_DTYPES)
ATTENTION_BACKENDS = ("auto", "tern", "flash-attn", "flashinfer")
QUANTIZATIONS = ("wint4", "wint8", "fp8", "block_wise_fp8", "none")
SPECULATIONS = ("auto", "off", "ngram", "mtp")
DEFAULT_KV_CACHE_DIR_SIZE = 20_000_000_000
MOST_DRAFTS = 64
LONGEST_LOOKUP = 64
_DEVICE = re.compile(r"auto|cpu|(cuda|split)(:\d+)?")


@dataclass(frozen=True)
class EngineOptions:
    """Sizes and limits of one engine.

    `max_model_len`: longest sequence, prompt and answer together, in tokens; None is the model's own length.
    `max_num_seqs`: sequences computed together. `max_num_batched_tokens`: tokens of one step, all sequences together;
    a larger number reads long prompts faster where `target_step_seconds` leaves the time. That is what a step shall
    take while sequences decode: the prompts beside them are read in chunks that fit it, so it bounds the time between
    two tokens; None sets no aim.
    `block_size`: tokens a cache block holds. The cache's size is `num_kv_blocks` blocks or `kv_cache_memory` bytes or,
    with neither, what `tern.engine.cache_size` takes from free memory; `kv_cache_dtype` is what its keys and values are
    kept in: "auto" is the model's own type; "int8" on a CPU and "fp8" (or "fp8_e4m3") on a GPU take about half of
    bfloat16's memory. On a GPU, weights, steps and cache together take `gpu_memory_utilization` of its memory,
    `attention_backend` says who attends the chunks of prompts: "tern", a library ("flash-attn", "flashinfer"), or what
    is installed and can ("auto"),
    `enforce_eager` computes every step without CUDA graphs, and `async_scheduling` begins a step before the tokens of
    the one before are delivered; None does so on a GPU. `enable_prefix_caching` reuses the blocks of prompts that
    begin alike; in the directory `kv_cache_dir` they outlive the engine, in files of at most `kv_cache_dir_size` bytes
    together (None: `DEFAULT_KV_CACHE_DIR_SIZE`). `max_queue`: requests that may wait before new ones are refused;
    `max_queue_tokens`: tokens of their prompts that may, save that a single one always may; None never refuses.
    `dtype` and `device` are those of the loaded model; device "split" or "split:N" keeps the routed experts packed on
    the CPU and the rest on a GPU, and "auto" does so where a GPU is too small for the weights
    (`tern.engine.residence`). `quantization` packs its linear weights and experts in 4 or 8 bits ("wint4", "wint8") or,
    on a GPU, rounds them to fp8 ("fp8", one scale a weight, or "block_wise_fp8"); "none" keeps them floats; None does
    as the files suggest: floats stay floats, weights of few bits are packed. `speculation` says who drafts tokens that
    a step then verifies: "ngram" copies from the text so far, "mtp" is the model's own predictor, "auto" both where
    there is one, "off" nobody; drafts are made only while they pay, and answers are the same with and without.
    `num_speculative_tokens`: most drafts of a sequence in a step; None is what `tern.engine.drafts` finds good.
    `prompt_lookup_min` to `prompt_lookup_max` tokens must agree before "ngram" copies what follows.
    `check_integrity_when_idle` verifies the engine's books each time it runs out of work.

    Raises `OptionError` that names the option, the value and the limit.
    """

    max_model_len: int | None = None
    max_num_seqs: int = 32
    max_num_batched_tokens: int = 2048
    target_step_seconds: float | None = 1.0
    block_size: int = 16
    num_kv_blocks: int | None = None
    kv_cache_memory: int | None = None
    kv_cache_dtype: str = "auto"
    gpu_memory_utilization: float = 0.9
    attention_backend: str = "auto"
    enforce_eager: bool = False
    async_scheduling: bool | None = None
    enable_prefix_caching: bool = True
    kv_cache_dir: str | os.PathLike[str] | None = None
    kv_cache_dir_size: int | None = None
    max_queue: int | None = 1024
    max_queue_tokens: int | None = 2**22
    dtype: str = "auto"
    device: str = "auto"
    quantization: str | None = None
    speculation: str = "auto"
    num_speculative_tokens: int | None = None
    prompt_lookup_min: int = 3
    prompt_lookup_max: int = 8
    check_integrity_when_idle: bool = False

    def __post_init__(self) -> None:
        _optional_integer("max_model_len", self.max_model_len, 2, 2**31 - 1)
        _integer("max_num_seqs", self.max_num_seqs, 1, 4096)
        _integer("max_num_batched_tokens", self.max_num_batched_tokens, 1, 2**20)
        _integer("block_size", self.block_size, 1, 1024)
        _optional_integer("num_kv_blocks", self.num_kv_blocks, 1, 2**31 - 1)
        _optional_integer("kv_cache_memory", self.kv_cache_memory, 1, 2**50)
        _optional_integer("kv_cache_dir_size", self.kv_cache_dir_size, 1, 2**60)
        _optional_integer("max_queue", self.max_queue, 1, 2**20)
        _optional_integer("max_queue_tokens", self.max_queue_tokens, 1, 2**40)
        _check_target_step_seconds(self.target_step_seconds)
        _check_utilization(self.gpu_memory_utilization)
        if self.async_scheduling is not None and not isinstance(self.async_scheduling, bool):
            raise OptionError(f"async_scheduling is {self.async_scheduling!r}: it must be true, false or None.")
        for name in ("enable_prefix_caching", "enforce_eager", "check_integrity_when_idle"):
            if not isinstance(getattr(self, name), bool):
                raise OptionError(f"{name} is {getattr(self, name)!r}: it must be true or false.")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise OptionError(
                f"max_num_batched_tokens is {self.max_num_batched_tokens} but max_num_seqs is {self.max_num_seqs}: "
                "every running sequence needs a token in each step, so raise the one or lower the other."
            )
        if self.num_kv_blocks is not None and self.kv_cache_memory is not None:
            raise OptionError(
                f"num_kv_blocks is {self.num_kv_blocks} and kv_cache_memory is {self.kv_cache_memory}: "
                "both set the size of the cache, so give only one."
            )
        self._check_kv_cache_dir()
        if self.dtype not in DTYPES:
            raise OptionError(f"dtype is {self.dtype!r}: it must be one of {', '.join(DTYPES)}.")
        if self.kv_cache_dtype not in KV_CACHE_DTYPES:
            known = ", ".join(KV_CACHE_DTYPES)
            raise OptionError(f"kv_cache_dtype is {self.kv_cache_dtype!r}: it must be one of {known}.")
        if self.attention_backend not in ATTENTION_BACKENDS:
            known = ", ".join(ATTENTION_BACKENDS)
            raise OptionError(f"attention_backend is {self.attention_backend!r}: it must be one of {known}.")
        if self.kv_cache_dtype == "int8" and self.block_size % 4:
            raise OptionError(
                f"block_size is {self.block_size}: with kv_cache_dtype int8 it must be a multiple of 4, such as 16."
            )
        if self.quantization is not None and self.quantization not in QUANTIZATIONS:
            raise OptionError(f"quantization is {self.quantization!r}: it must be one of {', '.join(QUANTIZATIONS)}.")
        if self.speculation not in SPECULATIONS:
            raise OptionError(f"speculation is {self.speculation!r}: it must be one of {', '.join(SPECULATIONS)}.")
        _optional_integer("num_speculative_tokens", self.num_speculative_tokens, 1, MOST_DRAFTS)
        _integer("prompt_lookup_max", self.prompt_lookup_max, 1, LONGEST_LOOKUP)
        _integer("prompt_lookup_min", self.prompt_lookup_min, 1, self.prompt_lookup_max)
        if not isinstance(self.device, str) or not _DEVICE.fullmatch(self.device):
            raise OptionError(f"device is {self.device!r}: it must be auto, cpu, cuda, cuda:N, split or split:N.")

    @property
    def wants_fp8(self) -> bool:
        """Whether weights or cache are to be kept in fp8, which not every GPU can multiply."""
        return any("fp8" in str(value) for value in (self.quantization, self.kv_cache_dtype))

    def _check_kv_cache_dir(self) -> None:
        directory, size = self.kv_cache_dir, self.kv_cache_dir_size
        if directory is None:
            if size is not None:
                raise OptionError(f"kv_cache_dir_size is {size}, but there is no kv_cache_dir: give one, or neither.")
            return
        if not isinstance(directory, str | os.PathLike) or not os.fspath(directory):
            raise OptionError(f"kv_cache_dir is {directory!r}: it must be the path of a directory.")
        if not self.enable_prefix_caching:
            raise OptionError(
                f"kv_cache_dir is {os.fspath(directory)!r} but enable_prefix_caching is false: "
                "the directory keeps cached prefixes, so leave it out or enable them."
            )

    @classmethod
    def for_one_caller(cls, **values: Any) -> EngineOptions:
        """Options by name, as `from_keywords`, of an engine whose caller sends what it likes and waits for all of it:
        nothing is refused because much waits, and no step is cut short for the sake of others.
        """
        unhurried = {"max_queue": None, "max_queue_tokens": None, "target_step_seconds": None}
        return cls.from_keywords(**{**unhurried, **values})

    @classmethod
    def from_keywords(cls, **values: Any) -> EngineOptions:
        """Build options from names that a user wrote; an unknown name is refused with the nearest known one.

        `speculative_config` is vLLM's way to say what `speculation` and the options beside it say.
        """
        config = values.pop("speculative_config", None)
        if config is not None:
            chosen = options_of(config)
            twice = [name for name in chosen if name in values]
            if twice:
                raise OptionError(f"{twice[0]} and speculative_config are both given and say the same: give only one.")
            values |= chosen
        known = [field.name for field in fields(cls)]
        for name in values:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}."
                raise OptionError(f"There is no engine option {name!r}: {hint}")
        return cls(**values)


def _integer(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise OptionError(f"{name} is {value!r}: it must be a whole number from {low} to {high}.")


def _optional_integer(name: str, value: object, low: int, high: int) -> None:
    if value is not None:
        _integer(name, value, low, high)


def _check_target_step_seconds(value: object) -> None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 3600):
        raise OptionError(f"target_step_seconds is {value!r}: it must be a number of seconds above 0, at most 3600.")


def _check_utilization(value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
        raise OptionError(
            f"gpu_memory_utilization is {value!r}: it must be a share of the GPU's memory above 0, at most 1."
        )
