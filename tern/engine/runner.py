"""A composed step to tensors, through the model, to the tokens of each sampling sequence. Owns the KV cache's memory.

Knows chunks, block tables and the model's door; knows no queue and no request's end.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from collections.abc import Sequence as Ordered
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from tern import ops
from tern.engine.device import current
from tern.engine.graphs import Capture, GraphLimits, StepGraphs
from tern.engine.packing import PackedStep, pack
from tern.engine.predictor import Followed, Predictor
from tern.engine.request import GeneratedToken, ScoredToken
from tern.engine.sampler import Choice, Sampler, score
from tern.engine.sampling_state import SamplingRow
from tern.engine.scheduler import Chunk
from tern.engine.sequence import Continuation, Sequence
from tern.model.batch import KVCache
from tern.ops.transfer import send

if TYPE_CHECKING:
    from tern.model import ErnieModel

logger = logging.getLogger(__name__)

SCORED_ROWS = 128
"""Rows of a prompt whose logits stand in memory at once: a row of a large vocabulary is 400 KB."""


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
    """A computed step: one entry for each chunk that samples, in order, and the seconds that its two parts took.

    `scores` are those of the prompt tokens behind the `scoring_positions` of chunks that have some, by the chunk's
    place; a sentence ends the request.
    """

    sampled: list[Sampled]
    scores: dict[int, list[ScoredToken] | str]
    seconds: float
    predictor_seconds: float = 0.0


@dataclass
class BegunStep:
    """A step whose work is enqueued on the device, or done where nothing is enqueued.

    `logits` are those of the rows that sample, None if none does. On a device that replays graphs the predictor and
    the next step overwrite `hidden`. `choice` has the tokens where the step after this one was begun already.
    `started`: when it was begun, a time of `time.perf_counter()`.
    """

    chunks: Ordered[Chunk]
    step: PackedStep
    hidden: Tensor
    logits: Tensor | None
    started: float
    choice: Choice | None = None


class Runner:
    """Computes steps with `model` and a cache of `num_blocks` blocks of `block_size` tokens in `kv_dtype`.

    A step is computed by `run`, or by `begin` and `finish` with the beginning of the next one between them. With
    `capture`, and at most `max_num_seqs` sequences of `max_model_len` tokens a step, decodes are computed by what it
    captures (`tern.engine.graphs`), those that verify up to `max_drafts` drafts a sequence too. With `attention`, that
    attends the chunks of prompts. With `predicted_drafts`, sequences that are followed get drafts from the model's
    predictor for the next step.
    """

    def __init__(
        self,
        model: ErnieModel,
        *,
        num_blocks: int,
        block_size: int,
        kv_dtype: torch.dtype,
        max_num_seqs: int,
        max_model_len: int,
        max_drafts: int = 0,
        predicted_drafts: int = 0,
        capture: Capture | None = None,
        attention: ops.AttentionLibrary | None = None,
        progress: bool = False,
    ) -> None:
        self.model = model
        self.attention = attention
        blocks = num_blocks + (capture is not None)  # the last for the padding of graphs
        self.kv = KVCache.allocate(
            model.config, num_blocks=blocks, block_size=block_size, dtype=kv_dtype, device=model.device
        )
        self.sampler = Sampler()
        self.predictor: Predictor | None = None
        if predicted_drafts:
            self.predictor = Predictor(
                model,
                num_blocks=blocks,
                block_size=block_size,
                kv_dtype=kv_dtype,
                max_num_seqs=max_num_seqs,
                num_drafts=predicted_drafts,
                attention=attention,
            )
        self.graphs: StepGraphs | None = None
        if capture is not None:
            limits = GraphLimits(max_num_seqs, max_drafts, max_model_len, block_size, spare_block=num_blocks)
            self._capture(capture, limits, progress)

    def _capture(self, capture: Capture, limits: GraphLimits, progress: bool) -> None:
        """Capture the decoder's steps and the predictor's; what cannot be captured runs without."""
        device, titles = self.model.device, ("CUDA graphs", "The predictor's graphs") if progress else (None, None)
        try:
            compute = partial(self.model.hidden, kv=self.kv)
            self.graphs = StepGraphs(compute, device, limits, capture=capture, title=titles[0])
            if self.predictor is not None:
                self.predictor.capture(limits, capture, titles[1])
        except RuntimeError:
            logger.exception("Decode steps cannot be captured as CUDA graphs, so they run without: slower, not wrong")

    @property
    def grammar_seconds(self) -> float:
        """What the grammars' masks took so far, those of the predictor's drafts included."""
        ahead = self.predictor.sampler.grammar_seconds if self.predictor is not None else 0.0
        return self.sampler.grammar_seconds + ahead

    def run(self, chunks: Ordered[Chunk], follows: Callable[[Sequence], bool] = lambda _: False) -> StepResult:
        """Compute the chunks, and let the predictor draft for the sequences that it `follows`."""
        return self.finish(self.begin(chunks), follows)

    @torch.inference_mode()
    def begin(self, chunks: Ordered[Chunk], after: BegunStep | None = None) -> BegunStep:
        """Enqueue the network's work for the chunks.

        `after` is the step before, if that is not finished: then both are decodes, `chunks` continue sequences of it,
        and their tokens are those that the sampler chooses for it, taken where they lie; the tokens before those have
        been delivered. Its `choice` is set.
        """
        started = time.perf_counter()
        with current(self.model.device):
            token_ids = None
            if after is not None:
                assert after.logits is not None
                after.choice = after.choice or self.sampler.begin(after.logits, _rows(after.chunks))
                token_ids = _tokens_for(chunks, after.chunks, after.choice.tokens)
            step = pack(chunks, self.kv.block_size, ahead=0 if after is None else 1)
            hidden, logits = self._compute(step, token_ids)
        return BegunStep(chunks, step, hidden, logits, started)

    @torch.inference_mode()
    def finish(self, begun: BegunStep, follows: Callable[[Sequence], bool] = lambda _: False) -> StepResult:
        """Wait for what a step gives, and let the predictor draft for the sequences that it `follows`."""
        chunks = begun.chunks
        with current(self.model.device):
            sampled = self._sample(begun)
            scores = self._score(begun.hidden, chunks)
            computed = time.perf_counter()
            if self.predictor is None or not any(follows(chunk.sequence) for chunk in chunks):
                return StepResult(sampled, scores, computed - begun.started)
            sampled = self._predict(self.predictor, begun, sampled, follows)
        return StepResult(sampled, scores, computed - begun.started, time.perf_counter() - computed)

    def _compute(self, step: PackedStep, token_ids: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The step on the device -> its hidden states, and the logits of the rows that sample."""
        if self.graphs is not None and self.graphs.takes(step):
            hidden = self.graphs.run(step, token_ids)
            return hidden, self.model.logits(hidden)
        batch = step.on(self.model.device, self.attention)
        if token_ids is not None:
            batch.token_ids.copy_(token_ids)
        hidden = self.model.hidden(batch, self.kv)
        if not len(step.logit_rows):
            return hidden, None
        return hidden, self.model.logits(hidden.index_select(0, batch.logit_rows))

    def _sample(self, begun: BegunStep) -> list[Sampled]:
        """Draw the next token of every sequence that samples, and the one after each of its drafts."""
        if begun.logits is None:
            return []
        choice = begun.choice or self.sampler.begin(begun.logits, _rows(begun.chunks))
        return verify([chunk.drafts for chunk in begun.chunks if chunk.samples], choice.finish())

    def _score(self, hidden: Tensor, chunks: Ordered[Chunk]) -> dict[int, list[ScoredToken] | str]:
        """Score the prompt tokens that the chunks' rows of `hidden` [tokens, hidden_size] precede."""
        scores: dict[int, list[ScoredToken] | str] = {}
        start = 0
        for place, chunk in enumerate(chunks):
            if positions := chunk.scoring_positions:
                first = start + positions.start - chunk.sequence.num_computed_tokens
                scores[place] = self._score_rows(hidden[first : first + len(positions)], chunk.sequence, positions)
            start += chunk.num_tokens + len(chunk.drafts)
        return scores

    def _score_rows(self, hidden: Tensor, sequence: Sequence, positions: range) -> list[ScoredToken] | str:
        """Score the token behind each of `positions`, whose rows `hidden` [positions, hidden_size] are."""
        num_top = sequence.sampling.params.prompt_logprobs or 0
        scored: list[ScoredToken] = []
        for begin in range(0, len(positions), SCORED_ROWS):
            logits = self.model.logits(hidden[begin : begin + SCORED_ROWS])
            first = positions.start + begin + 1
            tokens = sequence.token_ids[first : first + len(logits)]
            piece = score(logits, tokens, [num_top] * len(logits))
            if isinstance(piece, str):
                return piece
            scored += piece
        return scored

    def _predict(
        self,
        predictor: Predictor,
        begun: BegunStep,
        sampled: Ordered[Sampled],
        follows: Callable[[Sequence], bool],
    ) -> list[Sampled]:
        """The same entries with the predictor's drafts."""
        chunks = begun.chunks
        places = [place for place, chunk in enumerate(chunks) if chunk.samples]
        followed: dict[int, Followed] = {}
        for entry, (place, result) in enumerate(zip(places, sampled, strict=True)):
            token_ids = tuple(token.token_id for token in result.tokens if not isinstance(token, str))
            if len(token_ids) == len(result.tokens) and follows(chunks[place].sequence):
                followed[entry] = Followed(place, chunks[place].sequence, token_ids)
        drafts = predictor.draft(begun.step, begun.hidden, chunks, list(followed.values()))
        by_entry = dict(zip(followed, drafts, strict=True))
        return [replace(result, predicted=by_entry.get(entry, ())) for entry, result in enumerate(sampled)]


def _rows(chunks: Ordered[Chunk]) -> list[SamplingRow]:
    """What the sampler reads for each row of logits: a sequence, or one with some of its drafts behind it."""
    return [
        Continuation(chunk.sequence, chunk.drafts[:ahead]) if ahead else chunk.sequence
        for chunk in chunks
        if chunk.samples
        for ahead in range(1 + len(chunk.drafts))
    ]


def _tokens_for(chunks: Ordered[Chunk], before: Ordered[Chunk], tokens: Tensor) -> Tensor:
    """Of the `tokens` of the chunks `before`, on the device, those that `chunks` begin with, which are some of them."""
    if len(chunks) == len(before):
        return tokens
    places = {chunk.sequence: place for place, chunk in enumerate(before)}
    [wanted] = send([np.array([places[chunk.sequence] for chunk in chunks])], tokens.device)
    return tokens.index_select(0, wanted)


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
