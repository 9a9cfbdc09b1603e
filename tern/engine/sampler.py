"""Logits to tokens, the whole batch at once. Knows rows and their `SamplingState`; knows no queue and no cache.

A row goes through the moves below; a batch of plain greedy rows stops after the first.

    peak       the largest logit of every row; a row without a finite one ends its request
    edit       logit_bias, penalties, masks: scattered into the few entries concerned, never over the vocabulary
    scale      (logit - peak) / temperature, so that the likeliest token stands at 0 and no exponential overflows
    min_p      drops tokens less likely than min_p times the likeliest
    top_k/p    sorts what can be in the nucleus, keeps the first k, then the shortest prefix that reaches top_p
    draw       one uniform number a row and the inverse of the cumulative distribution

The order of the filters is vLLM's. Only the rows that ask for a move pay for it. Log-probabilities are those of the
logits as the model gave them.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence as Ordered
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from tern.engine.request import GeneratedToken, TokenLogprob
from tern.engine.sampling_state import SamplingState, uniform

CANDIDATES = (256, 8192)  # how many to look for a nucleus in before sorting a whole row, which takes 30 times as long
_BLOCK = 256  # tokens reduced together before the search for one descends into a block

NOT_FINITE = "The model gave no finite score for any next token; its weights or its number format are damaged."
ALL_MASKED = "logit_bias, bad_words and min_tokens together forbid every next token; relax one of them."


class SamplingRow(Protocol):
    """What the sampler reads of the sequence that a row of logits belongs to."""

    @property
    def sampling(self) -> SamplingState: ...

    @property
    def token_ids(self) -> array[int]: ...

    @property
    def num_generated_tokens(self) -> int: ...


class Sampler:
    """Chooses the next token of every row."""

    def sample(self, logits: Tensor, sequences: Ordered[SamplingRow]) -> list[GeneratedToken | str]:
        """One token a row of `logits` [rows, vocab], or the sentence that ends that row's request.

        The logits are float32 and are overwritten.
        """
        states = [sequence.sampling for sequence in sequences]
        edited = [row for row, s in enumerate(sequences) if states[row].edits_logits(s.num_generated_tokens)]
        drawn = [row for row, state in enumerate(states) if not state.greedy]
        scored = [row for row, state in enumerate(states) if state.params.logprobs is not None]

        raw = logits[_index(scored, logits)] if scored else None
        peaks, tokens = _peaks(logits)
        broken = dict.fromkeys(_not_finite_rows(peaks), NOT_FINITE)
        if edited:
            _edit(logits, edited, sequences)
            rows = _index(edited, logits)
            peaks[rows], tokens[rows] = _peaks(logits[rows])
            for row in _not_finite_rows(peaks):
                broken.setdefault(row, ALL_MASKED)
        drawn = [row for row in drawn if row not in broken]
        if drawn:
            rows = _index(drawn, logits)
            chosen = [states[row] for row in drawn]
            counters = [sequences[row].num_generated_tokens for row in drawn]
            scores = logits if len(drawn) == len(sequences) else logits[rows]
            tokens[rows] = _draw(scores.sub_(peaks[rows, None]), chosen, counters)
        logprobs = {} if raw is None else _logprobs(raw, scored, tokens, states)
        return [
            broken[row] if row in broken else logprobs.get(row) or GeneratedToken(token)
            for row, token in enumerate(tokens.tolist())
        ]


def _index(rows: Ordered[int], like: Tensor) -> Tensor:
    return torch.tensor(rows, dtype=torch.int64, device=like.device)


def _column(values: Ordered[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None]


def _blocks(rows: Tensor, fill: float) -> Tensor:
    """[rows, vocab] in blocks, the last filled up: [rows, blocks, _BLOCK]; a view where nothing is missing."""
    missing = -rows.shape[1] % _BLOCK
    if missing:
        rows = torch.nn.functional.pad(rows, (0, missing), value=fill)
    return rows.view(len(rows), -1, _BLOCK)


def _peaks(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The largest logit of each row and its token id, the lowest on ties: [rows], [rows]. NaN counts as largest.

    In two levels, because a maximum alone is found many times faster than its place.
    """
    blocks = _blocks(logits, -math.inf)
    block = blocks.amax(dim=-1).argmax(dim=-1)
    inside = blocks[torch.arange(len(logits), device=logits.device), block]
    peaks, place = inside.max(dim=-1)
    return peaks, block * _BLOCK + place


def _not_finite_rows(peaks: Tensor) -> list[int]:
    return [row for row, peak in enumerate(peaks.tolist()) if not math.isfinite(peak)]


def _edit(logits: Tensor, rows: Ordered[int], sequences: Ordered[SamplingRow]) -> None:
    """Apply bias, penalties and masks to `rows` of `logits` [rows, vocab], in place."""
    states = [(row, sequences[row].sampling) for row in rows]
    biased = [(row, state.bias_ids, state.bias_values) for row, state in states if len(state.bias_ids)]
    if biased:
        at = _entries([(row, ids) for row, ids, _ in biased], logits)
        logits[at] += torch.from_numpy(np.concatenate([values for _, _, values in biased])).to(logits.device)
    penalised = [(row, state) for row, state in states if state.penalised]
    if penalised:
        _penalise(logits, penalised, sequences)
    masked = [(row, state.masked_ids(sequences[row].token_ids)) for row, state in states]
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


def _draw(scores: Tensor, states: Ordered[SamplingState], counters: Ordered[int]) -> Tensor:
    """Draw a token for every row of `scores` [rows, vocab]: logits less their peak, overwritten. Returns [rows]."""
    numbers = [uniform(state.stream, counter) for state, counter in zip(states, counters, strict=True)]
    uniforms = torch.tensor(numbers, dtype=torch.float64, device=scores.device)
    scores /= _column([state.params.temperature for state in states], scores)
    if any(state.params.min_p > 0 for state in states):
        floors = [math.log(state.params.min_p) if state.params.min_p > 0 else -math.inf for state in states]
        scores.masked_fill_(scores < _column(floors, scores), -math.inf)
    truncated = [row for row, state in enumerate(states) if state.truncates]
    if not truncated:
        return _draw_by_id(scores.exp_(), uniforms)
    tokens = torch.empty(len(states), dtype=torch.int64, device=scores.device)
    rest = [row for row, state in enumerate(states) if not state.truncates]
    if rest:
        rows = _index(rest, scores)
        tokens[rows] = _draw_by_id(scores[rows].exp_(), uniforms[rows])
    rows = _index(truncated, scores)
    tokens[rows] = _draw_truncated(scores[rows] if rest else scores, [states[row] for row in truncated], uniforms[rows])
    return tokens


def _draw_by_id(weights: Tensor, uniforms: Tensor) -> Tensor:
    """Inverse-CDF draw from unnormalised `weights` [rows, vocab] in the order of token ids.

    Two levels, so that the running sums are short and exact: first a block of tokens, then a token in it.
    """
    blocks = _blocks(weights, 0.0)
    block_sums = blocks.sum(dim=-1, dtype=torch.float64).cumsum(dim=-1)  # [rows, blocks]
    targets = uniforms[:, None] * block_sums[:, -1:]
    block = _first_above(block_sums, targets)  # [rows, 1]
    before = torch.where(block > 0, block_sums.gather(1, (block - 1).clamp(min=0)), 0.0)
    inside = blocks.gather(1, block[:, :, None].expand(-1, -1, _BLOCK)).squeeze(1)
    return (block * _BLOCK + _first_above(inside.double().cumsum(dim=-1), targets - before)).squeeze(1)


def _first_above(sums: Tensor, targets: Tensor) -> Tensor:
    """Index of the first running sum in `sums` [rows, n] above `targets` [rows, 1]: [rows, 1].

    A weight of zero is never chosen: where rounding puts the target at the total, the last positive weight is taken.
    """
    return torch.minimum((sums <= targets).sum(dim=-1), (sums < sums[:, -1:]).sum(dim=-1))[:, None]


def _draw_truncated(scores: Tensor, states: Ordered[SamplingState], uniforms: Tensor) -> Tensor:
    """Draw under top_k and top_p from `scores` [rows, vocab], trying the likeliest candidates before all."""
    vocab = scores.shape[1]
    top_k = torch.tensor([state.params.top_k if state.params.top_k > 0 else vocab for state in states])
    top_k = top_k.to(scores.device)[:, None].clamp(max=vocab)
    top_p = torch.tensor([state.params.top_p for state in states], dtype=torch.float64, device=scores.device)[:, None]
    totals = scores.exp().sum(dim=-1, dtype=torch.float64, keepdim=True)
    tokens = torch.empty(len(states), dtype=torch.int64, device=scores.device)
    rows = torch.arange(len(states), device=scores.device)
    for count in (*CANDIDATES, vocab):
        best, ids = _likeliest(scores[rows], min(count, vocab))
        tokens[rows], settled = _draw_sorted(best, ids, totals[rows], top_k[rows], top_p[rows], uniforms[rows])
        rows = rows[~settled]
        if count >= vocab or len(rows) == 0:
            break
    return tokens


def _likeliest(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` best scores of every row and their token ids, equal scores in the order of ids: [rows, count]."""
    if count == scores.shape[1]:
        return scores.sort(dim=-1, descending=True, stable=True)
    ids = scores.topk(count, dim=-1, sorted=False).indices.sort(dim=-1).values
    best, order = scores.gather(1, ids).sort(dim=-1, descending=True, stable=True)
    return best, ids.gather(1, order)


def _best_scores(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """As `_likeliest`, and of the scores that equal the last one those of the lowest ids: [rows, count]."""
    vocab = scores.shape[1]
    best, ids = _likeliest(scores, min(count + 1, vocab))
    if count < vocab and count > 0 and bool((best[:, count - 1] == best[:, count]).any()):
        best, ids = _likeliest(scores, vocab)
    return best[:, :count], ids[:, :count]


def _draw_sorted(
    best: Tensor, ids: Tensor, totals: Tensor, top_k: Tensor, top_p: Tensor, uniforms: Tensor
) -> tuple[Tensor, Tensor]:
    """Draw from rows sorted by falling score, and say for which rows the candidates at hand were enough.

    `best`, `ids` [rows, candidates]; `totals` [rows, 1] is the weight of the whole row, candidates and others;
    `top_k`, `top_p` [rows, 1]; `uniforms` [rows]. Returns token ids [rows] and a mask [rows]. Candidates are enough
    when the last one is clearly outside the nucleus: if it is kept, or ties with one that is, so may be others.
    """
    weights = best.double().exp() * (torch.arange(best.shape[1], device=best.device) < top_k)
    sums = weights.cumsum(dim=-1)
    mass = torch.where(top_k <= best.shape[1], sums[:, -1:], totals)
    kept = (weights > 0) & (sums - weights < top_p * mass)  # a token stays while those before it have not reached top_p
    kept[:, :1] = True  # the likeliest stays even under a top_p whose product with the mass is zero
    last_kept = best.gather(1, kept.sum(dim=-1, keepdim=True) - 1)
    settled = (last_kept > best[:, -1:]).squeeze(1)
    weights *= kept
    sums = weights.cumsum(dim=-1)
    place = _first_above(sums, uniforms[:, None] * sums[:, -1:])
    return ids.gather(1, place).squeeze(1), settled


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
