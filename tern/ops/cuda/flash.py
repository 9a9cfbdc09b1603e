"""Chunks of prompts attended by FlashAttention-3 or FlashInfer, over the paged cache as it lies in memory.

Knows how each library is called and what it must be told once a step; which one is used, and whether it may be, is
settled in `tern.ops.attention_libraries`. Neither copies the cache: both take a view of it whose heads lie far apart.
docs/decisions/0021-chunks-by-libraries.md says why these two, and what their results are worth.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tern.ops import reference, reference_attention
from tern.ops.attention_libraries import AttentionLibrary, AttentionWork, Chunks

WORKSPACE_BYTES = 128 * 2**20
"""What FlashInfer asks for beside its results."""
TRIAL = ((70, 200), (1, 90), (33, 33), (2, 150))
"""Query and context lengths of a trial: a chunk behind a prefix, a decode between chunks, a whole prompt."""
TRIAL_TOLERANCE = 3e-2
"""Of results of size 1, with weights and values rounded to bfloat16. A wrong key gives more than ten times as much."""


def open_library(name: str, work: AttentionWork) -> AttentionLibrary:
    """Import a library and let it compute a small step.

    Raises whatever the import raises, `TypeError` if it is not called as it is known here, and `ArithmeticError` if its
    results are not the reference's.
    """
    library = _OPENERS[name](work)
    _try(library, work)
    return library


@dataclass(frozen=True)
class _Lengths:
    """A step's numbers on the device, int32: [sequences + 1], [sequences], [sequences, blocks]."""

    query_starts: Tensor
    contexts: Tensor
    block_tables: Tensor


class FlashAttention:
    """FlashAttention-3 by `flash_attn_with_kvcache`, which reads nothing on the host but the longest chunk."""

    name = "flash-attn"

    def __init__(self, work: AttentionWork) -> None:
        self._call: Callable[..., Tensor] = import_module("flash_attn_interface").flash_attn_with_kvcache
        _check_parameters(
            self._call,
            *("q", "k_cache", "v_cache", "cache_seqlens", "page_table", "cu_seqlens_q", "max_seqlen_q"),
            *("softmax_scale", "causal", "num_splits"),
        )
        self._scale = 1 / math.sqrt(work.head_dim)
        self._step: tuple[Chunks, _Lengths] | None = None

    def attend(
        self, queries: Tensor, caches: tuple[Tensor, Tensor], chunks: Chunks, block_tables: Tensor, output: Tensor
    ) -> None:
        """See `AttentionLibrary.attend`."""
        lengths = self._lengths(chunks, block_tables)
        keys, values = _by_block(*caches)
        output[chunks.rows] = self._call(
            q=queries[chunks.rows],
            k_cache=keys,
            v_cache=values,
            cache_seqlens=lengths.contexts,
            page_table=lengths.block_tables,
            cu_seqlens_q=lengths.query_starts,
            max_seqlen_q=int(chunks.lengths.max()),
            softmax_scale=self._scale,
            causal=True,
            num_splits=1,  # else the number depends on what stands beside a row
        )

    def _lengths(self, chunks: Chunks, block_tables: Tensor) -> _Lengths:
        """Brought to the device by the step's first layer."""
        if self._step is None or self._step[0] is not chunks:
            counts = torch.from_numpy(np.concatenate([chunks.starts, chunks.contexts]))
            counts = counts.to(block_tables.device, non_blocking=True)
            starts, contexts = torch.split(counts, [len(chunks.starts), len(chunks.contexts)])
            self._step = chunks, _Lengths(starts, contexts, block_tables[chunks.sequences].to(torch.int32))
        return self._step[1]


class FlashInfer:
    """FlashInfer by `BatchPrefillWithPagedKVCacheWrapper`, which plans a step on the host before its first layer."""

    name = "flashinfer"

    def __init__(self, work: AttentionWork) -> None:
        wrapper = import_module("flashinfer").BatchPrefillWithPagedKVCacheWrapper
        _check_parameters(wrapper.__init__, "float_workspace_buffer", "kv_layout")
        _check_parameters(
            wrapper.plan,
            *("qo_indptr", "paged_kv_indptr", "paged_kv_indices", "paged_kv_last_page_len", "num_qo_heads"),
            *("num_kv_heads", "head_dim_qk", "page_size", "causal", "sm_scale", "q_data_type", "kv_data_type"),
            "disable_split_kv",
        )
        _check_parameters(wrapper.run, "q", "paged_kv_cache", "out")
        workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=work.device)
        self._wrapper: Any = wrapper(float_workspace_buffer=workspace, kv_layout="NHD")
        self._work = work
        self._planned: Chunks | None = None
        self._copied: torch.cuda.Event | None = None

    def attend(
        self, queries: Tensor, caches: tuple[Tensor, Tensor], chunks: Chunks, block_tables: Tensor, output: Tensor
    ) -> None:
        """See `AttentionLibrary.attend`."""
        if self._planned is not chunks:
            self._plan(chunks, block_tables)
            self._planned = chunks
        self._wrapper.run(q=queries[chunks.rows], paged_kv_cache=_by_block(*caches), out=output[chunks.rows])

    def _plan(self, chunks: Chunks, block_tables: Tensor) -> None:
        """The lengths are handed over on the host, where they are read; only the blocks' numbers lie on the device."""
        if self._copied is not None:
            self._copied.synchronize()  # the plan before lies in pinned memory, from which it may still be copied
        size = self._work.block_size
        counts = -(-chunks.contexts // size)
        tables = block_tables[chunks.sequences]
        blocks = torch.cat([table[:count] for table, count in zip(tables, counts.tolist(), strict=True)])
        self._wrapper.plan(
            qo_indptr=torch.from_numpy(chunks.starts),
            paged_kv_indptr=torch.from_numpy(np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)),
            paged_kv_indices=blocks.to(torch.int32),
            paged_kv_last_page_len=torch.from_numpy(chunks.contexts - (np.maximum(counts, 1) - 1) * size),
            num_qo_heads=self._work.heads,
            num_kv_heads=self._work.kv_heads,
            head_dim_qk=self._work.head_dim,
            page_size=size,
            causal=True,
            sm_scale=1 / math.sqrt(self._work.head_dim),
            q_data_type=self._work.dtype,
            kv_data_type=self._work.cache_dtype,
            disable_split_kv=True,  # else the cut of a context depends on what stands beside a row
        )
        if block_tables.is_cuda:
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied.record()


_OPENERS: dict[str, Callable[[AttentionWork], AttentionLibrary]] = {
    FlashAttention.name: FlashAttention,
    FlashInfer.name: FlashInfer,
}


def _by_block(key_cache: Tensor, value_cache: Tensor) -> tuple[Tensor, Tensor]:
    """Views [blocks, block_size, G, D] of caches as a GPU keeps them, [G, blocks, 1, block_size, D] and [..., D, 1]."""
    return key_cache.squeeze(2).permute(1, 2, 0, 3), value_cache.squeeze(4).permute(1, 2, 0, 3)


def _check_parameters(function: Callable[..., Any], *names: str) -> None:
    """Raise `TypeError` unless the function takes arguments of these names."""
    missing = [name for name in names if name not in inspect.signature(function).parameters]
    if missing:
        raise TypeError(f"{function.__qualname__} of this version takes no {', '.join(missing)}")


@torch.inference_mode()
def _try(library: AttentionLibrary, work: AttentionWork) -> None:
    """Compute a step of random numbers over shuffled blocks; its results must be close to the reference's."""
    generator = torch.Generator().manual_seed(0)
    lengths, contexts = zip(*TRIAL, strict=True)
    counts = [-(-context // work.block_size) for context in contexts]
    sizes = (sum(counts) + 1, work.block_size, work.kv_heads, work.head_dim)
    keys, values = (
        torch.randn(shape, generator=generator).to(work.device, work.cache_dtype)
        for shape in reference.kv_cache_shapes(*sizes, work.cache_dtype, gpu=True)
    )
    queries = torch.randn(sum(lengths), work.heads, work.head_dim, generator=generator).to(work.device, work.dtype)
    blocks = torch.split(torch.randperm(sizes[0], generator=generator)[1:], counts)
    tables = torch.nn.utils.rnn.pad_sequence(list(blocks), batch_first=True).to(work.device)
    starts, context_lens = torch.tensor([0, *lengths]).cumsum(0), torch.tensor(contexts)
    chunks = Chunks.of(library, starts.numpy(), context_lens.numpy())
    assert chunks is not None
    found = torch.zeros_like(queries)
    chunks.attend(queries, (keys, values), tables, found)
    plan = reference_attention.plan_attention(starts, context_lens, tables, work.block_size)
    expected = reference_attention.paged_attention(queries.float(), keys, values, plan)
    of_chunks = torch.repeat_interleave(torch.tensor(lengths) > 1, torch.tensor(lengths)).to(work.device)
    worst = float((found.float() - expected)[of_chunks].abs().max())
    if not worst <= TRIAL_TOLERANCE:  # nor is a NaN
        raise ArithmeticError(f"its results are off by {worst:.2g}")
