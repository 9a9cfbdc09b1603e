"""A composed step to tensors, through the model, to the tokens of each sampling sequence. Owns the KV cache's memory.

Knows chunks, block tables and the model's door; knows no queue and no request's end.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from collections.abc import Sequence as Ordered
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from tern.engine.predictor import Followed, Predictor
from tern.engine.request import GeneratedToken
from tern.engine.sampler import Sampler
from tern.engine.scheduler import Chunk
from tern.engine.sequence import Continuation, Sequence
from tern.model.batch import Batch, KVCache

if TYPE_CHECKING:
    from tern.model import ErnieModel


@dataclass(frozen=True)
class Sampled:
    """What a step gave one sequence that samples.

    `tokens` in order: drafts that turned out right, and one more; a sentence in the last place ends the request.
    `predicted` are the predictor's drafts of what follows them.
    """

    tokens: list[GeneratedToken | str]
    predicted: tuple[int, ...] = ()

    @property
    def accepted(self) -> int:
        """How many of the chunk's drafts were right."""
        return len(self.tokens) - 1


@dataclass(frozen=True)
class StepResult:
    """A computed step: one entry for each chunk that samples, in order, and the seconds that its two parts took."""

    sampled: list[Sampled]
    seconds: float
    predictor_seconds: float = 0.0


class Runner:
    """Computes steps with `model` and a cache of `num_blocks` blocks of `block_size` tokens in `kv_dtype`.

    With `predicted_drafts`, and at most `max_num_seqs` sequences a step, those that are followed get drafts from the
    model's predictor for the next step.
    """

    def __init__(
        self,
        model: ErnieModel,
        *,
        num_blocks: int,
        block_size: int,
        kv_dtype: torch.dtype,
        max_num_seqs: int,
        predicted_drafts: int = 0,
    ) -> None:
        self.model = model
        self.kv = KVCache.allocate(
            model.config, num_blocks=num_blocks, block_size=block_size, dtype=kv_dtype, device=model.device
        )
        self.sampler = Sampler()
        self.predictor: Predictor | None = None
        if predicted_drafts:
            self.predictor = Predictor(
                model,
                num_blocks=num_blocks,
                block_size=block_size,
                kv_dtype=kv_dtype,
                max_num_seqs=max_num_seqs,
                num_drafts=predicted_drafts,
            )

    @property
    def grammar_seconds(self) -> float:
        """What the grammars' masks took so far, those of the predictor's drafts included."""
        ahead = self.predictor.sampler.grammar_seconds if self.predictor is not None else 0.0
        return self.sampler.grammar_seconds + ahead

    @torch.inference_mode()
    def run(self, chunks: Ordered[Chunk], follows: Callable[[Sequence], bool] = lambda _: False) -> StepResult:
        """Compute the chunks, and let the predictor draft for the sequences that it `follows`."""
        started = time.perf_counter()
        batch = pack(chunks, self.kv.block_size, self.model.device)
        hidden = self.model.hidden(batch, self.kv)
        sampled = self._sample(hidden, batch, chunks)
        computed = time.perf_counter()
        if self.predictor is None or not any(follows(chunk.sequence) for chunk in chunks):
            return StepResult(sampled, computed - started)
        sampled = self._predict(self.predictor, hidden, batch, chunks, sampled, follows)
        return StepResult(sampled, computed - started, time.perf_counter() - computed)

    def _sample(self, hidden: Tensor, batch: Batch, chunks: Ordered[Chunk]) -> list[Sampled]:
        """Draw the next token of every sequence that samples, and the one after each of its drafts."""
        rows = [
            Continuation(chunk.sequence, chunk.drafts[:ahead]) if ahead else chunk.sequence
            for chunk in chunks
            if chunk.samples
            for ahead in range(1 + len(chunk.drafts))
        ]
        if not rows:
            return []
        logits = self.model.logits(hidden.index_select(0, batch.logit_rows))
        return verify([chunk.drafts for chunk in chunks if chunk.samples], self.sampler.sample(logits, rows))

    def _predict(
        self,
        predictor: Predictor,
        hidden: Tensor,
        batch: Batch,
        chunks: Ordered[Chunk],
        sampled: Ordered[Sampled],
        follows: Callable[[Sequence], bool],
    ) -> list[Sampled]:
        """The same entries with the predictor's drafts."""
        places = [place for place, chunk in enumerate(chunks) if chunk.samples]
        followed: dict[int, Followed] = {}
        for entry, (place, result) in enumerate(zip(places, sampled, strict=True)):
            token_ids = tuple(token.token_id for token in result.tokens if not isinstance(token, str))
            if len(token_ids) == len(result.tokens) and follows(chunks[place].sequence):
                followed[entry] = Followed(place, chunks[place].sequence, token_ids)
        drafts = predictor.draft(batch, hidden, chunks, list(followed.values()))
        by_entry = dict(zip(followed, drafts, strict=True))
        return [replace(result, predicted=by_entry.get(entry, ())) for entry, result in enumerate(sampled)]


def verify(drafts: Ordered[tuple[int, ...]], drawn: Ordered[GeneratedToken | str]) -> list[Sampled]:
    """What stands of `drawn`: for each sequence the token after its own tokens and the one after each of its drafts.

    A token drawn after a draft stands if that draft was the token drawn before it: it is then the very token that the
    sequence would have drawn there alone.
    """
    sampled, start = [], 0
    for mine in drafts:
        tokens = drawn[start : start + 1 + len(mine)]
        start += len(tokens)
        kept = 1
        for draft, token in zip(mine, tokens, strict=False):
            if isinstance(token, str) or token.token_id != draft:
                break
            kept += 1
        sampled.append(Sampled(list(tokens[:kept])))
    return sampled


def pack(chunks: Ordered[Chunk], block_size: int, device: torch.device) -> Batch:
    """Lay the chunks' tokens out as the model reads them (see `tern.model.batch`).

    Everything is written into one int64 buffer, which reaches the device in a single copy.
    """
    counts = np.array([chunk.num_tokens + len(chunk.drafts) for chunk in chunks])
    firsts = np.array([chunk.sequence.num_computed_tokens for chunk in chunks])
    context_lens = firsts + counts
    starts = np.concatenate([[0], np.cumsum(counts)])
    longest = int(context_lens.max())

    token_ids = np.empty(starts[-1], np.int64)
    tables = np.zeros((len(chunks), -(-longest // block_size)), np.int64)
    for row, chunk in enumerate(chunks):
        tokens = np.frombuffer(chunk.sequence.token_ids, np.int64)
        first_draft = starts[row] + chunk.num_tokens
        token_ids[starts[row] : first_draft] = tokens[firsts[row] : firsts[row] + chunk.num_tokens]
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
