"""A composed step to tensors, through the model, to one token a sampling sequence. Owns the KV cache's memory.

Knows chunks, block tables and the model's door; knows no queue and no request's end.
"""

from __future__ import annotations

from collections.abc import Sequence as Ordered
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from tern.engine.request import GeneratedToken
from tern.engine.sampler import Sampler
from tern.engine.scheduler import Chunk
from tern.model.batch import Batch, KVCache

if TYPE_CHECKING:
    from tern.model import ErnieModel


class Runner:
    """Computes steps with `model` and a cache of `num_blocks` blocks of `block_size` tokens in `kv_dtype`."""

    def __init__(self, model: ErnieModel, *, num_blocks: int, block_size: int, kv_dtype: torch.dtype) -> None:
        self.model = model
        self.kv = KVCache.allocate(
            model.config, num_blocks=num_blocks, block_size=block_size, dtype=kv_dtype, device=model.device
        )
        self.sampler = Sampler()

    @torch.inference_mode()
    def run(self, chunks: Ordered[Chunk]) -> list[GeneratedToken | str]:
        """Compute the chunks; one token, or one sentence of failure, for each chunk that samples, in order."""
        batch = pack(chunks, self.kv.block_size, self.model.device)
        hidden = self.model.hidden(batch, self.kv)
        sampling = [chunk.sequence for chunk in chunks if chunk.samples]
        if not sampling:
            return []
        logits = self.model.logits(hidden.index_select(0, batch.logit_rows))
        return self.sampler.sample(logits, sampling)


def pack(chunks: Ordered[Chunk], block_size: int, device: torch.device) -> Batch:
    """Lay the chunks' tokens out as the model reads them (see `tern.model.batch`).

    Everything is written into one int64 buffer, which reaches the device in a single copy.
    """
    counts = np.array([chunk.num_tokens for chunk in chunks])
    firsts = np.array([chunk.sequence.num_computed_tokens for chunk in chunks])
    context_lens = firsts + counts
    starts = np.concatenate([[0], np.cumsum(counts)])
    longest = int(context_lens.max())

    token_ids = np.empty(starts[-1], np.int64)
    tables = np.zeros((len(chunks), -(-longest // block_size)), np.int64)
    for row, chunk in enumerate(chunks):
        tokens = np.frombuffer(chunk.sequence.token_ids, np.int64)
        token_ids[starts[row] : starts[row + 1]] = tokens[firsts[row] : context_lens[row]]
        table = np.frombuffer(chunk.sequence.block_table, np.int64)[: tables.shape[1]]
        tables[row, : len(table)] = table
    owners = np.repeat(np.arange(len(chunks)), counts)
    positions = np.arange(starts[-1]) - np.repeat(starts[:-1] - firsts, counts)
    slots = tables[owners, positions // block_size] * block_size + positions % block_size
    logit_rows = starts[1:][[chunk.samples for chunk in chunks]] - 1

    parts = (token_ids, positions, slots, starts, context_lens, tables.ravel(), logit_rows)
    packed = torch.from_numpy(np.concatenate(parts)).to(device, non_blocking=True)
    views: list[Tensor] = list(torch.split(packed, [len(part) for part in parts]))
    return Batch(
        token_ids=views[0],
        positions=views[1],
        slots=views[2],
        query_starts=views[3],
        context_lens=views[4],
        block_tables=views[5].view(tables.shape),
        logit_rows=views[6],
        max_query_len=int(counts.max()),
        max_context_len=longest,
    )
