"""What one forward pass reads: the tokens of a step, where each stands, and where its keys and values live.

A step packs any mix of prefill chunks and decodes into one flat row of tokens. Sequence s owns the rows
`query_starts[s] : query_starts[s + 1]`; they are its newest tokens, and its keys and values up to and including them
fill the first `context_lens[s]` slots of the blocks that `block_tables[s]` lists:

    block_tables[s] = [7, 2, 9]     block_size 4     context_lens[s] = 10
    cache block 7 | 0 1 2 3 |   block 2 | 4 5 6 7 |   block 9 | 8 9 . . |
    query rows of s:                          [7      8 9]          (positions 7, 8, 9: a chunk of three)
"""

from __future__ import annotations

import math
import mmap
from dataclasses import dataclass

import numpy as np
import torch

from tern import ops
from tern.model.config import ErnieConfig


@dataclass(frozen=True)
class Batch:
    """One step's input, all tensors int64 on the model's device.

    `token_ids`, `positions`, `slots` [tokens]; `slots` is `block * block_size + offset` for each token's own K and V.
    `query_starts` [sequences + 1], `context_lens` [sequences], `block_tables` [sequences, max_blocks] padded with 0.
    `logit_rows` [rows] are the rows whose next-token logits are wanted, in order: the last of each sequence that
    samples, and those before it whose next token is only a draft.
    `max_query_len` and `max_context_len` are the largest chunk and context, known on the host. Of a batch that a CUDA
    graph is captured with, they are the largest that it may be replayed for. `chunks` are the step's chunks of prompts
    where a library attends them.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    query_starts: torch.Tensor
    context_lens: torch.Tensor
    block_tables: torch.Tensor
    logit_rows: torch.Tensor
    max_query_len: int
    max_context_len: int
    chunks: ops.Chunks | None = None


@dataclass(frozen=True)
class KVCache:
    """The paged keys and values of all layers: `keys[layer]` and `values[layer]` as in `tern.ops.kv_cache_shapes`."""

    keys: torch.Tensor
    values: torch.Tensor

    @property
    def block_size(self) -> int:
        """Tokens a block holds."""
        return self.keys.shape[4]

    @property
    def block_bytes(self) -> int:
        """Bytes of one block, keys and values of all layers."""
        return sum(part.numel() for part in self._block(0))

    def copy_block(self, block: int, into: memoryview) -> None:
        """Copy a block's bytes, the keys of all layers and then their values, into `into` [block_bytes].

        Any thread may call it, beside steps that write other blocks.
        """
        rest = np.frombuffer(into, np.uint8)
        for part in self._block(block):
            # numpy copies on the calling thread alone, where torch would wake a team of its own for it.
            np.copyto(rest[: part.numel()].reshape(part.shape), part.cpu().numpy())
            rest = rest[part.numel() :]

    def fill_block(self, block: int, content: memoryview) -> None:
        """Give a block the bytes that `copy_block` took from one of a cache of the same shapes and dtype."""
        rest = torch.frombuffer(content, dtype=torch.uint8)
        for part in self._block(block):
            part.copy_(rest[: part.numel()].view(part.shape))
            rest = rest[part.numel() :]

    def _block(self, block: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The bytes of a block where they lie: keys and values, each [layers, G, bytes of a head's block]."""
        keys, values = self.keys[:, :, block].flatten(2), self.values[:, :, block].flatten(2)
        return keys.view(torch.uint8), values.view(torch.uint8)

    @classmethod
    def allocate(
        cls,
        config: ErnieConfig,
        *,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
        num_layers: int | None = None,
    ) -> KVCache:
        """Reserve `num_blocks` blocks of `block_size` tokens for every layer of the decoder, or for `num_layers`."""
        layers = config.num_hidden_layers if num_layers is None else num_layers
        heads, head_dim = config.num_key_value_heads, config.head_dim
        sizes = (num_blocks, block_size, heads, head_dim, dtype)
        keys, values = ops.kv_cache_shapes(*sizes, gpu=ops.uses_gpu(device))
        return cls(_zeros((layers, *keys), dtype, device), _zeros((layers, *values), dtype, device))


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros; on the CPU in pages that the system maps when first written, so that a cache costs what it has held."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    pages = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=dtype).view(shape)
