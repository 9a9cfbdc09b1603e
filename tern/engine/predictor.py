"""The model's multi-token predictor at work: after each step it drafts what follows. Owns its cache's memory.

Knows batches, block tables and the predictor's door; knows not what becomes of its drafts. It reads every step that the
decoder computes, with the decoder's hidden states and every token replaced by the one after it, and keeps its own keys
and values at the same slots of a cache of one layer:

    decoder      position       p      p+1    p+2          drafts d1, d2 after the newest token t
                 token          t      d1     d2
                 sampled        d1     x                   d1 was right, d2 was not
    predictor    token          d1     x      ?            -> at p+1, the last that stands: a draft of what follows x

A further draft follows from the one before and the predictor's own state there. Where it has no slot yet, because the
sequence does not own the block, a spare block stands in for this step.
"""

from __future__ import annotations

from collections.abc import Sequence as Ordered
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tern.engine.sampler import Sampler
from tern.engine.scheduler import Chunk
from tern.engine.sequence import Continuation, Sequence
from tern.model.batch import Batch, KVCache

if TYPE_CHECKING:
    from tern.model import ErnieModel, MultiTokenPredictor


@dataclass(frozen=True)
class Followed:
    """A sequence to draft for: its chunk's place in the step, and the tokens that the step has given it."""

    place: int
    sequence: Sequence
    token_ids: tuple[int, ...]

    def continuation(self, drafts: Ordered[int]) -> Continuation:
        """The sequence with those tokens and `drafts` behind it."""
        return Continuation(self.sequence, (*self.token_ids, *drafts))


class Predictor:
    """Drafts `num_drafts` tokens a step with `model.mtp`; its cache has the decoder's `num_blocks` and spare ones."""

    def __init__(
        self,
        model: ErnieModel,
        *,
        num_blocks: int,
        block_size: int,
        kv_dtype: torch.dtype,
        max_num_seqs: int,
        num_drafts: int,
    ) -> None:
        assert model.mtp is not None
        self.model = model
        self.mtp: MultiTokenPredictor = model.mtp
        self.num_drafts = num_drafts
        self.num_spare = -(-(num_drafts - 1) // block_size)  # blocks a sequence, for drafts that have no slot yet
        self.num_blocks = num_blocks
        self.kv = KVCache.allocate(
            model.config,
            num_blocks=num_blocks + max_num_seqs * self.num_spare,
            block_size=block_size,
            dtype=kv_dtype,
            device=model.device,
            num_layers=1,
        )
        self.sampler = Sampler()

    def draft(
        self, batch: Batch, hidden: Tensor, chunks: Ordered[Chunk], followed: Ordered[Followed]
    ) -> list[tuple[int, ...]]:
        """Follow a step, and draft for `followed`: a tuple for each. `hidden` [tokens, hidden_size] is the decoder's.

        A draft is drawn as the token itself will be, with the same random number: where predictor and decoder agree
        on the distribution, they agree on the token.
        """
        shifted, last_rows = self._shift(batch, chunks, followed)
        states = self.mtp.hidden(shifted, hidden, self.kv)
        if not followed:
            return []
        states = states.index_select(0, last_rows)
        drafts = [self._sample(states, followed, [()] * len(followed))]
        if self.num_drafts > 1:
            rest = _SingleRows(self, batch, followed)
            for ahead in range(1, self.num_drafts):
                states = self.mtp.hidden(rest.batch(drafts[-1], ahead), states, self.kv)
                drafts.append(self._sample(states, followed, list(zip(*drafts, strict=True))))
        return list(zip(*drafts, strict=True))

    def _shift(self, batch: Batch, chunks: Ordered[Chunk], followed: Ordered[Followed]) -> tuple[Batch, Tensor]:
        """The batch with each token's successor in its place, and the rows of the last tokens that stand."""
        ends: list[int] = []
        for chunk in chunks:
            ends.append((ends[-1] if ends else 0) + chunk.num_tokens + len(chunk.drafts))
        successors = {  # of the last row of a chunk that goes on in the prompt
            end - 1: chunk.sequence.token_ids[chunk.sequence.num_computed_tokens + chunk.num_tokens]
            for end, chunk in zip(ends, chunks, strict=True)
            if not chunk.samples
        }
        last_rows = []
        for found in followed:
            surplus = len(chunks[found.place].drafts) + 1 - len(found.token_ids)  # drafts that were wrong
            last_rows.append(ends[found.place] - 1 - surplus)
            successors[last_rows[-1]] = found.token_ids[-1]
        token_ids = batch.token_ids.roll(-1)
        rows_and_tokens = torch.tensor([list(successors), list(successors.values())], dtype=torch.int64)
        rows, tokens = rows_and_tokens.to(token_ids.device)
        token_ids[rows] = tokens
        return replace(batch, token_ids=token_ids), torch.tensor(last_rows, dtype=torch.int64).to(token_ids.device)

    def _sample(self, states: Tensor, followed: Ordered[Followed], drafts: Ordered[tuple[int, ...]]) -> tuple[int, ...]:
        """One more draft for each; the numbers of a damaged predictor draft token 0."""
        rows = [found.continuation(before) for found, before in zip(followed, drafts, strict=True)]
        sampled = self.sampler.sample(self.model.logits(states), rows)
        return tuple(0 if isinstance(token, str) else token.token_id for token in sampled)


class _SingleRows:
    """The batches for further drafts: one row a sequence, behind the tokens of the step."""

    def __init__(self, predictor: Predictor, step: Batch, followed: Ordered[Followed]) -> None:
        size = predictor.kv.block_size
        lengths = [len(found.sequence.token_ids) + len(found.token_ids) for found in followed]
        width = max(lengths) // size + 1 + predictor.num_spare
        tables = torch.zeros(len(followed), width, dtype=torch.int64)
        for row, found in enumerate(followed):
            spare = predictor.num_blocks + row * predictor.num_spare
            blocks = [*found.sequence.block_table, *range(spare, spare + predictor.num_spare)]
            tables[row, : len(blocks)] = torch.tensor(blocks)[:width]
        self._size = size
        self._tables = tables
        self._lengths = torch.tensor(lengths)
        self._device = step.token_ids.device

    def batch(self, token_ids: tuple[int, ...], ahead: int) -> Batch:
        """The rows that carry the drafts `token_ids`, the `ahead`-th of each sequence."""
        positions = self._lengths - 2 + ahead  # a row stands before the token that it carries
        rows = torch.arange(len(token_ids))
        blocks = self._tables[rows, positions // self._size]
        longest = int(positions.max()) + 1
        on = self._device
        return Batch(
            token_ids=torch.tensor(token_ids).to(on),
            positions=positions.to(on),
            slots=(blocks * self._size + positions % self._size).to(on),
            query_starts=torch.arange(len(token_ids) + 1).to(on),
            context_lens=(positions + 1).to(on),
            block_tables=self._tables[:, : -(-longest // self._size)].to(on),
            logit_rows=rows.to(on),
            max_query_len=1,
            max_context_len=longest,
        )
