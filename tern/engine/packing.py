"""Chunks of a step to the flat row of tokens that the model reads. Knows chunks and block tables; computes nothing."""

from __future__ import annotations

from collections.abc import Sequence as Ordered
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from tern import ops
from tern.engine.scheduler import Chunk
from tern.model.batch import Batch
from tern.ops.transfer import send

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class PackedStep:
    """A step's numbers on the host, named and shaped as in `tern.model.batch.Batch`."""

    token_ids: Integers
    positions: Integers
    slots: Integers
    query_starts: Integers
    context_lens: Integers
    block_tables: Integers
    logit_rows: Integers
    max_query_len: int
    max_context_len: int

    @property
    def is_decode(self) -> bool:
        """Whether behind every token one is sampled: decodes, with drafts or without."""
        return len(self.logit_rows) == len(self.token_ids)

    def on(self, device: torch.device, attention: ops.AttentionLibrary | None = None) -> Batch:
        """The step on a device, its chunks for `attention`. All of it goes there by a single copy."""
        heads = (self.token_ids, self.positions, self.slots, self.query_starts, self.context_lens)
        token_ids, positions, slots, query_starts, context_lens, block_tables, logit_rows = send(
            (*heads, self.block_tables, self.logit_rows), device
        )
        return Batch(
            token_ids=token_ids,
            positions=positions,
            slots=slots,
            query_starts=query_starts,
            context_lens=context_lens,
            block_tables=block_tables,
            logit_rows=logit_rows,
            max_query_len=self.max_query_len,
            max_context_len=self.max_context_len,
            chunks=ops.Chunks.of(attention, self.query_starts, self.context_lens),
        )


def pack(chunks: Ordered[Chunk], block_size: int, ahead: int = 0) -> PackedStep:
    """Lay the chunks' tokens out as the model reads them.

    With `ahead`, the chunks follow so many computed tokens that are not noted as such yet, and tokens that the
    sequences do not have yet are packed as 0.
    """
    counts = np.array([chunk.num_tokens + len(chunk.drafts) for chunk in chunks])
    firsts = np.array([chunk.sequence.num_computed_tokens + ahead for chunk in chunks])
    context_lens = firsts + counts
    starts = np.concatenate([[0], np.cumsum(counts)])
    longest = int(context_lens.max())

    token_ids = np.zeros(starts[-1], np.int64)
    tables = np.zeros((len(chunks), -(-longest // block_size)), np.int64)
    for row, chunk in enumerate(chunks):
        tokens = np.frombuffer(chunk.sequence.token_ids, np.int64)[firsts[row] : firsts[row] + chunk.num_tokens]
        first_draft = starts[row] + chunk.num_tokens
        token_ids[starts[row] : starts[row] + len(tokens)] = tokens
        token_ids[first_draft : starts[row + 1]] = chunk.drafts
        table = np.frombuffer(chunk.sequence.block_table, np.int64)[: tables.shape[1]]
        tables[row, : len(table)] = table
    owners = np.repeat(np.arange(len(chunks)), counts)
    positions = np.arange(starts[-1]) - np.repeat(starts[:-1] - firsts, counts)
    slots = tables[owners, positions // block_size] * block_size + positions % block_size
    logit_rows = np.concatenate(
        [np.empty(0, np.int64)]
        + [
            np.arange(end - 1 - len(chunk.drafts), end)
            for chunk, end in zip(chunks, starts[1:], strict=True)
            if chunk.samples
        ]
    )
    return PackedStep(token_ids, positions, slots, starts, context_lens, tables, logit_rows, int(counts.max()), longest)
