"""How many blocks the KV cache gets. Knows bytes and lengths; allocates nothing.

The pool always holds at least one sequence of full length, so a request within the model's length can always run.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from tern import ops
from tern.engine.options import FP8_CACHE_DTYPES, EngineOptions
from tern.errors import OptionError
from tern.model.config import ErnieConfig

DEFAULT_FULL_SEQUENCES = 4  # what the cache holds by default, where memory allows: many short chats, or four long ones
FREE_MEMORY_SHARE = 0.5
MOST_MEMORY_SHARE = 0.9  # taken by default where one full-length sequence needs more than that
_CGROUP = "/sys/fs/cgroup"


@dataclass(frozen=True)
class GpuMemory:
    """A GPU's memory when its cache is sized, in bytes.

    `free` of `total` with the weights loaded; `step` is what the largest step takes beside them at its peak; `taken`
    was not free before this engine loaded anything, so other processes hold it.
    """

    total: int
    free: int
    step: int
    taken: int = 0

    def room(self, utilization: float) -> int:
        """Bytes that a cache may take so that, in the largest step, `utilization` of the memory is in use."""
        return max(0, int(self.total * utilization) - (self.total - self.free) - self.step)

    @property
    def most(self) -> int:
        """Bytes that a cache may take so that the largest step still fits."""
        return max(0, self.free - self.step)


def cache_dtype(name: str, model_dtype: torch.dtype) -> torch.dtype:
    """What a cache keeps keys and values in, by the option `kv_cache_dtype`."""
    if name in FP8_CACHE_DTYPES:
        return torch.float8_e4m3fn
    return model_dtype if name == "auto" else getattr(torch, name)


def narrow_cache(device: torch.device) -> str:
    """The `kv_cache_dtype` of 8 bits on this kind of device."""
    return FP8_CACHE_DTYPES[0] if ops.uses_gpu(device) else "int8"


def check_cache_dtype(name: str, device: torch.device) -> None:
    """Raise `OptionError` if the option `kv_cache_dtype` asks for 8 bits as another kind of device has them."""
    if name in (("int8",) if ops.uses_gpu(device) else FP8_CACHE_DTYPES):
        others, here = ("CPUs", "a GPU") if ops.uses_gpu(device) else ("GPUs", "a CPU")
        raise OptionError(
            f"kv_cache_dtype is {name!r}, which is for {others}: on {here} choose {narrow_cache(device)}, "
            "which takes as little memory."
        )


def token_bytes(config: ErnieConfig, dtype: torch.dtype) -> int:
    """Bytes of keys and values that one token takes in all layers, in a cache of `dtype`."""
    tokens = 4  # the smallest block that a cache of any type has
    shapes = ops.kv_cache_shapes(1, tokens, config.num_key_value_heads, config.head_dim, dtype)
    return config.num_hidden_layers * sum(math.prod(shape) for shape in shapes) * dtype.itemsize // tokens


def resolve_max_model_len(options: EngineOptions, config: ErnieConfig) -> int:
    """The longest sequence in tokens: the option's value, within the model's length."""
    length = config.max_position_embeddings
    if options.max_model_len is None:
        return length
    if options.max_model_len > length:
        raise OptionError(
            f"max_model_len is {options.max_model_len} but the model was trained for {length} positions: "
            f"choose at most {length}."
        )
    return options.max_model_len


def resolve_num_blocks(
    options: EngineOptions,
    config: ErnieConfig,
    dtype: torch.dtype,
    memory: int | GpuMemory,
    max_model_len: int,
    narrow: str = "int8",
) -> int:
    """The number of cache blocks that the options ask for or, where they do not, that there is memory for.

    `memory` are the free bytes of the processor, of which a cache takes a share by default, or a GPU's, of which it
    takes what `gpu_memory_utilization` leaves. `narrow` is the `kv_cache_dtype` to advise where memory is short
    (`narrow_cache`). Raises `OptionError`, with both sizes, if the options ask for more than is free, or for less than
    one full-length sequence takes.
    """
    block_bytes = token_bytes(config, dtype) * options.block_size
    needed = -(-max_model_len // options.block_size)
    if options.num_kv_blocks is not None:
        blocks, source = options.num_kv_blocks, "num_kv_blocks"
    elif options.kv_cache_memory is not None:
        blocks, source = options.kv_cache_memory // block_bytes, "kv_cache_memory"
    elif isinstance(memory, GpuMemory):
        blocks = memory.room(options.gpu_memory_utilization) // block_bytes
        source = f"gpu_memory_utilization {options.gpu_memory_utilization:g}"
    else:
        affordable = int(memory * FREE_MEMORY_SHARE) // block_bytes
        wanted = needed * min(DEFAULT_FULL_SEQUENCES, options.max_num_seqs)
        most = int(memory * MOST_MEMORY_SHARE) // block_bytes
        blocks, source = min(wanted, max(affordable, min(needed, most))), f"{MOST_MEMORY_SHARE:.0%} of the free memory"
    free_bytes = memory.most if isinstance(memory, GpuMemory) else memory
    if blocks * block_bytes > free_bytes:
        raise OptionError(
            f"{source} asks for a cache of {blocks} blocks ({_megabytes(blocks * block_bytes)}), but only "
            f"{_megabytes(free_bytes)} of memory are free: ask for at most {free_bytes // block_bytes} blocks."
            f"{_where_memory_is(memory)}"
        )
    if blocks < needed:
        fits = blocks * options.block_size
        smaller = "" if dtype.itemsize == 1 else f", or choose kv_cache_dtype {narrow}, which takes about half"
        shorter = f"set max_model_len to at most {fits}, or " if fits > 1 else ""
        raise OptionError(
            f"A sequence of {max_model_len} tokens needs {needed} cache blocks ({_megabytes(needed * block_bytes)}), "
            f"but {source} gives {blocks} ({_megabytes(blocks * block_bytes)}): "
            f"{shorter}give the cache more memory{smaller}.{_where_memory_is(memory)}"
        )
    return blocks


def _where_memory_is(memory: int | GpuMemory) -> str:
    """A sentence that accounts for a GPU's memory."""
    if not isinstance(memory, GpuMemory):
        return ""
    others = f", of which other processes took {_megabytes(memory.taken)} before it started" if memory.taken else ""
    return (
        f" Of the GPU's {_megabytes(memory.total)}, {_megabytes(memory.total - memory.free)} are in use{others}, and "
        f"a step of max_num_batched_tokens takes {_megabytes(memory.step)}."
    )


def free_memory(device: torch.device) -> int:
    """Bytes that may still be used on the device: for the CPU, within the machine's and the control group's limit."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    for line in _lines("/proc/meminfo"):
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) * 1024
            break
    else:
        available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit, used = _lines(f"{_CGROUP}/memory.max"), _lines(f"{_CGROUP}/memory.current")
    if limit and used and limit[0].isdigit():
        cache = sum(
            int(line.split()[1]) for line in _lines(f"{_CGROUP}/memory.stat") if line.startswith("inactive_file ")
        )
        available = min(available, int(limit[0]) - int(used[0]) + cache)
    return max(available, 0)


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.0f} MB"
