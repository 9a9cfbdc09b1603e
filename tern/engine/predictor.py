"""The model's multi-token predictor at work: after each step it drafts what follows. Owns its cache's memory.

Knows packed steps, block tables and the predictor's door; knows not what becomes of its drafts. It reads every step
that the decoder computes, with the decoder's hidden states and every token replaced by the one after it, and keeps its
own keys and values at the same slots of a cache of one layer:

    decoder      position       p      p+1    p+2          drafts d1, d2 after the newest token t
                 token          t      d1     d2
                 sampled        d1     x                   d1 was right, d2 was not
    predictor    token          d1     x      ?            -> at p+1, the last that stands: a draft of what follows x

A further draft follows from the one before and the predictor's own state there. Where it has no slot yet, because the
sequence does not own the block, a spare block stands in for this step. A pass is some twenty kernels and its head's
product; where the decoder's steps are replayed from graphs, so are these.
"""

from __future__ import annotations

from collections.abc import Sequence as Ordered
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from tern import ops
from tern.engine.graphs import Capture, GraphLimits, StepGraphs
from tern.engine.packing import PackedStep
from tern.engine.sampler import Sampler
from tern.engine.scheduler import Chunk
from tern.engine.sequence import Continuation, Sequence
from tern.model.batch import Batch, KVCache
from tern.ops.transfer import send

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
    """Drafts `num_drafts` tokens a step with `model.mtp`; its cache has the decoder's `num_blocks` and spare ones.

    `attention` attends chunks of prompts, as the decoder's do.
    """

    def __init__(
        self,
        model: ErnieModel,
        *,
        num_blocks: int,
        block_size: int,
        kv_dtype: torch.dtype,
        max_num_seqs: int,
        num_drafts: int,
        attention: ops.AttentionLibrary | None = None,
    ) -> None:
        assert model.mtp is not None
        self.model = model
        self.attention = attention
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
        self.graphs: StepGraphs | None = None

    def capture(self, limits: GraphLimits, capture: Capture, title: str | None) -> None:
        """From now on replay what can be; `limits` are those of the decoder's graphs. Raises as those do."""
        model, mtp, kv = self.model, self.mtp, self.kv
        shape = (limits.max_rows, model.config.hidden_size)
        self._previous = previous = torch.zeros(shape, dtype=model.dtype, device=model.device)
        limits = replace(limits, max_context_len=limits.max_context_len + self.num_drafts)

        def compute(batch: Batch) -> Tensor:
            return mtp.hidden(batch, previous[: len(batch.token_ids)], kv)

        self.graphs = StepGraphs(compute, model.device, limits, capture=capture, title=title)

    def draft(
        self, step: PackedStep, hidden: Tensor, chunks: Ordered[Chunk], followed: Ordered[Followed]
    ) -> list[tuple[int, ...]]:
        """Follow a step, and draft for `followed`: a tuple for each. `hidden` [tokens, hidden_size] is the decoder's.

        A draft is drawn as the token itself will be, with the same random number: where predictor and decoder agree
        on the distribution, they agree on the token.
        """
        shifted, last_rows = _shift(step, chunks, followed)
        states = self._hidden(shifted, hidden)
        if not followed:
            return []
        [rows] = send([np.array(last_rows)], states.device)
        states = states.index_select(0, rows)
        drafts = [self._sample(states, followed, [()] * len(followed))]
        if self.num_drafts > 1:
            rest = _SingleRows(self, followed)
            for ahead in range(1, self.num_drafts):
                states = self._hidden(rest.step(drafts[-1], ahead), states)
                drafts.append(self._sample(states, followed, list(zip(*drafts, strict=True))))
        return list(zip(*drafts, strict=True))

    def _hidden(self, step: PackedStep, previous: Tensor) -> Tensor:
        """Draft hidden states, as `MultiTokenPredictor.hidden`; the next ones may overwrite them."""
        if self.graphs is not None and self.graphs.takes(step):
            self._previous[: len(previous)].copy_(previous)
            return self.graphs.run(step)
        return self.mtp.hidden(step.on(self.model.device, self.attention), previous, self.kv)

    def _sample(self, states: Tensor, followed: Ordered[Followed], drafts: Ordered[tuple[int, ...]]) -> tuple[int, ...]:
        """One more draft for each; the numbers of a damaged predictor draft token 0."""
        rows = [found.continuation(before) for found, before in zip(followed, drafts, strict=True)]
        sampled = self.sampler.sample(self.model.logits(states), rows)
        return tuple(0 if isinstance(token, str) else token.token_id for token in sampled)


def _shift(step: PackedStep, chunks: Ordered[Chunk], followed: Ordered[Followed]) -> tuple[PackedStep, list[int]]:
    """The step with each token's successor in its place, and the rows of the last tokens that stand."""
    ends: list[int] = step.query_starts[1:].tolist()
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
    token_ids = np.roll(step.token_ids, -1)
    token_ids[list(successors)] = list(successors.values())
    return replace(step, token_ids=token_ids), last_rows


class _SingleRows:
    """The steps of further drafts: one row a sequence, behind the tokens of the step."""

    def __init__(self, predictor: Predictor, followed: Ordered[Followed]) -> None:
        size = predictor.kv.block_size
        lengths = [len(found.sequence.token_ids) + len(found.token_ids) for found in followed]
        width = max(lengths) // size + 1 + predictor.num_spare
        tables = np.zeros((len(followed), width), np.int64)
        for row, found in enumerate(followed):
            spare = predictor.num_blocks + row * predictor.num_spare
            blocks = [*found.sequence.block_table, *range(spare, spare + predictor.num_spare)][:width]
            tables[row, : len(blocks)] = blocks
        self._size = size
        self._tables = tables
        self._lengths = np.array(lengths)

    def step(self, token_ids: tuple[int, ...], ahead: int) -> PackedStep:
        """The rows that carry the drafts `token_ids`, the `ahead`-th of each sequence."""
        positions = self._lengths - 2 + ahead  # a row stands before the token that it carries
        rows = np.arange(len(token_ids))
        longest = int(positions.max()) + 1
        return PackedStep(
            token_ids=np.array(token_ids),
            positions=positions,
            slots=self._tables[rows, positions // self._size] * self._size + positions % self._size,
            query_starts=np.arange(len(token_ids) + 1),
            context_lens=positions + 1,
            block_tables=self._tables[:, : -(-longest // self._size)],
            logit_rows=rows,
            max_query_len=1,
            max_context_len=longest,
        )
