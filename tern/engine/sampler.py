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
"""

from __future__ import annotations

import logging
import math
import time
from array import array
from collections.abc import Container, Mapping
from collections.abc import Sequence as Ordered
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tern import ops
from tern.engine.request import GeneratedToken, TokenLogprob
from tern.engine.sampling_state import SamplingState, uniform

logger = logging.getLogger(__name__)

NOT_FINITE = "The model gave no finite score for any next token; its weights or its number format are damaged."
ALL_MASKED = "logit_bias, bad_words and min_tokens together forbid every next token; relax one of them."
GRAMMAR_FAILED = (
    "The grammar of this request cannot go on from here: it allows no next token or is too costly; simplify it."
)


class SamplingRow(Protocol):
    """What the sampler reads of the sequence that a row of logits belongs to."""

    @property
    def sampling(self) -> SamplingState: ...

    @property
    def token_ids(self) -> array[int]: ...

    @property
    def num_generated_tokens(self) -> int: ...

    @property
    def ahead(self) -> Ordered[int]: ...


class Sampler:
    """Chooses the next token of every row. `grammar_seconds` went into the masks of grammars so far."""

    def __init__(self) -> None:
        self.grammar_seconds = 0.0

    def sample(self, logits: Tensor, sequences: Ordered[SamplingRow]) -> list[GeneratedToken | str]:
        """One token a row of `logits` [rows, vocab], or the sentence that ends that row's request.

        The logits are float32 and are overwritten.
        """
        states = [sequence.sampling for sequence in sequences]
        drawn = [row for row, state in enumerate(states) if not state.greedy]
        scored = [row for row, state in enumerate(states) if state.params.logprobs is not None]

        raw = logits[_index(scored, logits)] if scored else None
        peaks, tokens = ops.largest(logits)
        broken = dict.fromkeys(_not_finite_rows(peaks), NOT_FINITE)
        masks = self._masks(sequences, logits.shape[1], broken)
        edited = [
            row for row, s in enumerate(sequences) if row in masks or states[row].edits_logits(s.num_generated_tokens)
        ]
        if edited:
            _edit(logits, edited, sequences, masks)
            self._keep(logits, masks)
            rows = _index(edited, logits)
            peaks[rows], tokens[rows] = ops.largest(logits[rows])
            for row in _not_finite_rows(peaks):
                broken.setdefault(row, ALL_MASKED)
        drawn = [row for row in drawn if row not in broken]
        if drawn:
            rows = _index(drawn, logits)
            chosen = [states[row] for row in drawn]
            counters = [sequences[row].num_generated_tokens for row in drawn]
            scores = logits if len(drawn) == len(sequences) else logits[rows]
            tokens[rows] = ops.draw(scores, peaks[rows], _draws(chosen, counters, logits.shape[1]))
        logprobs = {} if raw is None else _logprobs(raw, scored, tokens, states)
        return [
            broken[row] if row in broken else logprobs.get(row) or GeneratedToken(token)
            for row, token in enumerate(tokens.tolist())
        ]

    def _masks(
        self, sequences: Ordered[SamplingRow], vocab: int, broken: dict[int, str]
    ) -> dict[int, npt.NDArray[np.uint32]]:
        """What the grammars of the rows allow: row -> bits [ceil(vocab / 32)]. A grammar that fails breaks its row."""
        started = time.perf_counter()
        masks = {}
        for row, sequence in enumerate(sequences):
            grammar = sequence.sampling.grammar
            if grammar is None or row in broken:
                continue
            mask = np.zeros(-(-vocab // 32), np.uint32)
            try:
                if grammar.fill(mask, sequence.ahead):
                    masks[row] = sequence.sampling.narrow(mask, sequence.token_ids)
            except Exception:
                logger.exception("A grammar failed")
                broken[row] = GRAMMAR_FAILED
        self.grammar_seconds += time.perf_counter() - started
        return masks

    def _keep(self, logits: Tensor, masks: Mapping[int, npt.NDArray[np.uint32]]) -> None:
        if masks:
            started = time.perf_counter()
            ops.keep_allowed(logits, list(masks), np.stack(list(masks.values())))
            self.grammar_seconds += time.perf_counter() - started


def _index(rows: Ordered[int], like: Tensor) -> Tensor:
    return torch.tensor(rows, dtype=torch.int64, device=like.device)


def _not_finite_rows(peaks: Tensor) -> list[int]:
    return [row for row, peak in enumerate(peaks.tolist()) if not math.isfinite(peak)]


def _edit(logits: Tensor, rows: Ordered[int], sequences: Ordered[SamplingRow], held: Container[int]) -> None:
    """Apply bias, penalties and masks to `rows` of `logits` [rows, vocab], in place.

    The masks of rows that are `held` by a grammar stand in the grammar's.
    """
    states = [(row, sequences[row].sampling) for row in rows]
    biased = [(row, state.bias_ids, state.bias_values) for row, state in states if len(state.bias_ids)]
    if biased:
        at = _entries([(row, ids) for row, ids, _ in biased], logits)
        logits[at] += torch.from_numpy(np.concatenate([values for _, _, values in biased])).to(logits.device)
    penalised = [(row, state) for row, state in states if state.penalised]
    if penalised:
        _penalise(logits, penalised, sequences)
    masked = [(row, state.masked_ids(sequences[row].token_ids)) for row, state in states if row not in held]
    if any(len(ids) for _, ids in masked):
        logits[_entries(masked, logits)] = -math.inf


def _penalise(logits: Tensor, rows: Ordered[tuple[int, SamplingState]], sequences: Ordered[SamplingRow]) -> None:
    """Repetition divides positive and multiplies negative logits; presence and frequency subtract."""
    histories = []
    for row, state in rows:
        state.catch_up(sequences[row].token_ids)
        assert state.history is not None
        histories.append((row, state.history.ids, state.history.counts))
    at = _entries([(row, ids) for row, ids, _ in histories], logits)
    counts = torch.from_numpy(np.concatenate([counts for _, _, counts in histories])).to(logits.device)
    lengths = torch.tensor([len(ids) for _, ids, _ in histories])
    penalties = torch.tensor(
        [(s.params.repetition_penalty, s.params.presence_penalty, s.params.frequency_penalty) for _, s in rows]
    )
    repetition, presence, frequency = penalties.repeat_interleave(lengths, dim=0).to(logits.device).unbind(1)
    values = logits[at]
    values = torch.where(values > 0, values / repetition, values * repetition)
    logits[at] = values - presence * (counts > 0) - frequency * counts


def _entries(parts: Ordered[tuple[int, np.ndarray]], like: Tensor) -> tuple[Tensor, Tensor]:
    """The entries (row, token) of a matrix, for rows given with their token ids."""
    lengths = [len(ids) for _, ids in parts]
    rows = np.repeat(np.array([row for row, _ in parts], np.int64), lengths)
    tokens = np.concatenate([ids for _, ids in parts])
    return torch.from_numpy(rows).to(like.device), torch.from_numpy(tokens).to(like.device)


def _draws(states: Ordered[SamplingState], counters: Ordered[int], vocab: int) -> ops.Draws:
    params = [state.params for state in states]
    numbers = [uniform(state.stream, counter) for state, counter in zip(states, counters, strict=True)]
    return ops.Draws(
        uniforms=torch.tensor(numbers, dtype=torch.float64),
        temperatures=torch.tensor([p.temperature for p in params]),
        min_p=torch.tensor([p.min_p for p in params], dtype=torch.float64),
        top_k=torch.tensor([min(p.top_k, vocab) if p.top_k > 0 else vocab for p in params]),
        top_p=torch.tensor([p.top_p for p in params], dtype=torch.float64),
    )


def _best_scores(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """As `ops.likeliest`, and of the scores that equal the last one those of the lowest ids: [rows, count]."""
    vocab = scores.shape[1]
    best, ids = ops.likeliest(scores, min(count + 1, vocab))
    if count < vocab and count > 0 and bool((best[:, count - 1] == best[:, count]).any()):
        best, ids = ops.likeliest(scores, vocab)
    return best[:, :count], ids[:, :count]


def _logprobs(
    raw: Tensor, rows: Ordered[int], tokens: Tensor, states: Ordered[SamplingState]
) -> dict[int, GeneratedToken]:
    """The chosen and the likeliest tokens of `rows`, scored by the unmodified logits `raw` [len(rows), vocab]."""
    scores = raw.log_softmax(dim=-1)
    ids = tokens[_index(rows, tokens)]
    chosen = scores.gather(1, ids[:, None])
    earlier = torch.arange(raw.shape[1], device=raw.device) < ids[:, None]
    ranks = (((scores > chosen) | ((scores == chosen) & earlier)).sum(dim=-1) + 1).tolist()
    wanted = [min(states[row].params.logprobs or 0, raw.shape[1]) for row in rows]
    best, best_ids = (part.tolist() for part in _best_scores(scores, max(wanted)))
    answer = {}
    for place, (row, token, score) in enumerate(zip(rows, ids.tolist(), chosen.squeeze(1).tolist(), strict=True)):
        top = zip(best_ids[place][: wanted[place]], best[place], strict=False)
        answer[row] = GeneratedToken(
            token,
            TokenLogprob(token, score, ranks[place]),
            tuple(TokenLogprob(other, value, rank) for rank, (other, value) in enumerate(top, start=1)),
        )
    return answer
