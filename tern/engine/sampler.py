"""Logits to tokens, the whole batch at once. Knows rows and their `SamplingState`; knows no queue and no cache.

A row goes through the moves below; a batch of plain greedy rows stops after the first.

    peak       the largest logit of every row; a row without a finite one ends its request
    edit       logit_bias, penalties, masks: scattered into the few entries concerned, never over the vocabulary
    keep       what the row's grammar allows, where it has one
    scale      (logit - peak) / temperature, so that the likeliest token stands at 0 and no exponential overflows
    min_p      drops tokens less likely than min_p times the likeliest
    top_k/p    sorts what can be in the nucleus, keeps the first k, then the shortest prefix that reaches top_p
    draw       one uniform number a row and the inverse of the cumulative distribution

The order of the filters is vLLM's. Only the rows that ask for a move pay for it. Log-probabilities are those of the
logits as the model gave them.

What the host knows of the rows goes to the device in one copy, and what was chosen comes back in one, which is waited
for last: between `begin` and `finish` the device has its work and the host is free.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Ordered
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tern import ops
from tern.engine.logit_edits import plan_edits
from tern.engine.request import GeneratedToken, ScoredToken, TokenLogprob
from tern.engine.sampling_state import SamplingRow, uniform
from tern.ops.transfer import Arrival, send

logger = logging.getLogger(__name__)

NOT_FINITE = "The model gave no finite score for any next token; its weights or its number format are damaged."
ALL_MASKED = (
    "logit_bias, bad_words, min_tokens and allowed_token_ids together forbid every next token; relax one of them."
)
GRAMMAR_FAILED = (
    "The grammar of this request cannot go on from here: it allows no next token or is too costly; simplify it."
)


_BROKEN, _MASKED = -1, -2
"""What stands in place of a token where there is none: by the logits of the model, or by what the request forbids."""


@dataclass(frozen=True)
class Choice:
    """Tokens that are being chosen.

    `tokens` [rows] int64 lie on the device, for what it computes next; of a row that failed it is some token of the
    vocabulary. `failures` are the sentences that were known before, by row. `raw` [len(scored), vocab] are the logits
    of the rows that want log-probabilities, `num_top` of how many tokens.
    """

    tokens: Tensor
    outcomes: Arrival
    failures: Mapping[int, str]
    scored: Ordered[int]
    num_top: Ordered[int]
    scored_tokens: Tensor | None
    raw: Tensor | None

    def finish(self) -> list[GeneratedToken | str]:
        """Wait for the tokens: one a row, or the sentence that ends that row's request."""
        outcomes = self.outcomes.tolist()
        logprobs: dict[int, GeneratedToken] = {}
        if self.raw is not None and self.scored_tokens is not None:
            scores = _scores(self.raw, self.scored_tokens, self.num_top)
            for row, (own, top) in zip(self.scored, scores, strict=True):
                logprobs[row] = GeneratedToken(own.token_id, own, top)
        return [self._answer(row, outcome, logprobs.get(row)) for row, outcome in enumerate(outcomes)]

    def _answer(self, row: int, outcome: int, scored: GeneratedToken | None) -> GeneratedToken | str:
        if outcome == _BROKEN:
            return NOT_FINITE
        if row in self.failures:
            return self.failures[row]
        return ALL_MASKED if outcome == _MASKED else scored or GeneratedToken(outcome)


class Sampler:
    """Chooses the next token of every row. `grammar_seconds` went into the masks of grammars so far."""

    def __init__(self) -> None:
        self.grammar_seconds = 0.0

    def sample(self, logits: Tensor, sequences: Ordered[SamplingRow]) -> list[GeneratedToken | str]:
        """One token a row of `logits` [rows, vocab], or the sentence that ends that row's request.

        The logits are float32 and are overwritten.
        """
        return self.begin(logits, sequences).finish()

    def begin(self, logits: Tensor, sequences: Ordered[SamplingRow]) -> Choice:
        """As `sample`, but without waiting for the device."""
        states = [sequence.sampling for sequence in sequences]
        scored = [row for row, state in enumerate(states) if state.params.logprobs is not None]
        drawn = [row for row, state in enumerate(states) if not state.greedy]
        failures: dict[int, str] = {}
        masks = self._masks(sequences, logits.shape[1], failures)
        edited = [
            row for row, s in enumerate(sequences) if row in masks or states[row].edits_logits(s.num_generated_tokens)
        ]
        edits = plan_edits(edited, sequences, masks)
        columns = _draws([sequences[row] for row in drawn], logits.shape[1]) if drawn else []
        indices = [np.array(rows, np.int64) for rows in (scored, edited, drawn)]
        arrays = (array for edit in edits for array in edit.arrays)
        scored_rows, edited_rows, drawn_rows, *sent = send([*indices, *columns, *arrays], logits.device)

        raw = logits[scored_rows] if scored else None
        peaks, tokens = ops.largest(logits)
        sound = peaks.abs() < math.inf
        if edited:
            tensors = iter(sent[len(columns) :])
            for edit in edits:
                edit.apply(logits, *islice(tensors, len(edit.arrays)))
            self._keep(logits, masks)
            peaks[edited_rows], tokens[edited_rows] = ops.largest(logits[edited_rows])
        if drawn:
            draws = ops.Draws(*sent[: len(columns)])
            if len(drawn) == len(sequences):
                tokens = ops.draw(logits, peaks, draws)
            else:
                tokens[drawn_rows] = ops.draw(logits[drawn_rows], peaks[drawn_rows], draws)
        outcomes = torch.where(peaks.abs() < math.inf, tokens, _MASKED) if edited else tokens
        return Choice(
            tokens=tokens,
            outcomes=Arrival(torch.where(sound, outcomes, _BROKEN)),
            failures=failures,
            scored=scored,
            num_top=[states[row].params.logprobs or 0 for row in scored],
            scored_tokens=tokens[scored_rows] if scored else None,
            raw=raw,
        )

    def _masks(
        self, sequences: Ordered[SamplingRow], vocab: int, failures: dict[int, str]
    ) -> dict[int, npt.NDArray[np.uint32]]:
        """What the grammars of the rows allow: row -> bits [ceil(vocab / 32)]. A grammar that fails fails its row."""
        started = time.perf_counter()
        masks = {}
        for row, sequence in enumerate(sequences):
            grammar = sequence.sampling.grammar
            if grammar is None:
                continue
            mask = np.zeros(-(-vocab // 32), np.uint32)
            try:
                if grammar.fill(mask, sequence.ahead):
                    masks[row] = sequence.sampling.narrow(mask, sequence.token_ids)
            except Exception:
                logger.exception("A grammar failed")
                failures[row] = GRAMMAR_FAILED
        self.grammar_seconds += time.perf_counter() - started
        return masks

    def _keep(self, logits: Tensor, masks: Mapping[int, npt.NDArray[np.uint32]]) -> None:
        if masks:
            started = time.perf_counter()
            ops.keep_allowed(logits, list(masks), np.stack(list(masks.values())))
            self.grammar_seconds += time.perf_counter() - started


def score(logits: Tensor, token_ids: Ordered[int], num_top: Ordered[int]) -> list[ScoredToken] | str:
    """`token_ids` [rows] with their scores in `logits` [rows, vocab] float32, and each with its `num_top` likeliest.

    A sentence in their place ends the request: a row has no finite score.
    """
    if _not_finite_rows(ops.largest(logits)[0]):
        return NOT_FINITE
    chosen = torch.tensor(token_ids, device=logits.device)
    return [ScoredToken(own.token_id, own, top) for own, top in _scores(logits, chosen, num_top)]


def _not_finite_rows(peaks: Tensor) -> list[int]:
    return [row for row, peak in enumerate(peaks.tolist()) if not math.isfinite(peak)]


def _draws(rows: Ordered[SamplingRow], vocab: int) -> list[npt.NDArray[Any]]:
    """The columns of `ops.Draws`, in its order."""
    params = [row.sampling.params for row in rows]
    numbers = [uniform(row.sampling.stream, row.num_generated_tokens) for row in rows]
    return [
        np.array(numbers, np.float64),
        np.array([p.temperature for p in params], np.float32),
        np.array([p.min_p for p in params], np.float64),
        np.array([min(p.top_k, vocab) if p.top_k > 0 else vocab for p in params], np.int64),
        np.array([p.top_p for p in params], np.float64),
    ]


def _best_scores(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """As `ops.likeliest`, and of the scores that equal the last one those of the lowest ids: [rows, count]."""
    vocab = scores.shape[1]
    best, ids = ops.likeliest(scores, min(count + 1, vocab))
    if count < vocab and count > 0 and bool((best[:, count - 1] == best[:, count]).any()):
        best, ids = ops.likeliest(scores, vocab)
    return best[:, :count], ids[:, :count]


def _scores(raw: Tensor, ids: Tensor, num_top: Ordered[int]) -> Iterator[tuple[TokenLogprob, tuple[TokenLogprob, ...]]]:
    """The score of the token in `ids` [rows] of each row of `raw` [rows, vocab], and its `num_top` likeliest tokens."""
    scores = raw.log_softmax(dim=-1)
    chosen = scores.gather(1, ids[:, None])
    earlier = torch.arange(raw.shape[1], device=raw.device) < ids[:, None]
    ranks = (((scores > chosen) | ((scores == chosen) & earlier)).sum(dim=-1) + 1).tolist()
    wanted = [min(count, raw.shape[1]) for count in num_top]
    best, best_ids = (part.tolist() for part in _best_scores(scores, max(wanted)))
    for row, (token, value) in enumerate(zip(ids.tolist(), chosen.squeeze(1).tolist(), strict=True)):
        top = zip(best_ids[row][: wanted[row]], best[row], strict=False)
        yield (
            TokenLogprob(token, value, ranks[row]),
            tuple(TokenLogprob(other, score, rank) for rank, (other, score) in enumerate(top, start=1)),
        )
