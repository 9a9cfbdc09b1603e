"""Choosing tokens from logits in plain torch: the largest, and draws from what temperature and filters leave.

Knows rows of numbers; knows no requests. One uniform number decides a draw, by the inverse of the cumulative
distribution: over token ids where nothing is cut off, over falling scores where top_k or top_p cut.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

CANDIDATES = (256, 8192)  # how many to look for a nucleus in before sorting a whole row, which takes 30 times as long
_BLOCK = 256  # tokens reduced together before the search for one descends into a block


@dataclass(frozen=True)
class Draws:
    """How each of some rows is drawn from, tensors [rows] on the CPU.

    `uniforms` float64 in [0, 1). `temperatures` float32 above 0. `min_p`, `top_p` float64, 0 and 1 cut nothing. `top_k`
    int64, at least 1; the vocabulary's size cuts nothing. They may also lie where the logits do.
    """

    uniforms: Tensor
    temperatures: Tensor
    min_p: Tensor
    top_k: Tensor
    top_p: Tensor

    def rows(self, rows: Tensor | slice) -> Draws:
        """Those of some rows."""
        fields = (self.uniforms, self.temperatures, self.min_p, self.top_k, self.top_p)
        return Draws(*(field[rows] for field in fields))

    def to(self, device: torch.device) -> Draws:
        """The same on another device."""
        fields = (self.uniforms, self.temperatures, self.min_p, self.top_k, self.top_p)
        return Draws(*(field.to(device) for field in fields))


def largest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The largest of each row of `logits` [rows, vocab] and its token id, the lowest on ties: [rows], [rows].

    NaN counts as largest. In two levels, because a maximum alone is found many times faster than its place.
    """
    blocks = _blocks(logits, -math.inf)
    block = blocks.amax(dim=-1).argmax(dim=-1)
    inside = blocks[torch.arange(len(logits), device=logits.device), block]
    peaks, place = inside.max(dim=-1)
    return peaks, block * _BLOCK + place


def keep_allowed(logits: Tensor, rows: Sequence[int], masks: npt.NDArray[np.uint32]) -> None:
    """Set what a mask forbids to -inf in some `rows` of `logits` [rows, vocab], in place.

    `masks` [len(rows), ceil(vocab / 32)]: token t is allowed if bit t % 32 of word t // 32 is set.
    """
    words = torch.from_numpy(masks.view(np.int32)).to(logits.device)
    bits = (words[:, :, None] >> torch.arange(32, dtype=torch.int32, device=logits.device)) & 1
    forbidden = bits.flatten(1)[:, : logits.shape[1]] == 0
    places = torch.tensor(rows, device=logits.device)
    logits[places] = logits[places].masked_fill(forbidden, -math.inf)


def draw(logits: Tensor, peaks: Tensor, draws: Draws) -> Tensor:
    """Draw a token id for every row of `logits` [rows, vocab], whose largest are `peaks`: [rows] int64.

    The logits are float32 and are overwritten. A row without a finite peak gets some token of the vocabulary.
    """
    draws = draws.to(logits.device)
    scores = logits.sub_(peaks[:, None]).div_(draws.temperatures[:, None])
    if bool((draws.min_p > 0).any()):
        floors = draws.min_p.log().float()
        scores.masked_fill_(scores < floors[:, None], -math.inf)
    truncates = (draws.top_k < logits.shape[1]) | (draws.top_p < 1)
    tokens = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    whole, cut = (~truncates).nonzero().flatten(), truncates.nonzero().flatten()
    if len(whole):
        tokens[whole] = _draw_by_id(scores[whole].exp_(), draws.uniforms[whole])
    if len(cut):
        tokens[cut] = _draw_truncated(scores[cut], draws.rows(cut))
    return tokens


def _blocks(rows: Tensor, fill: float) -> Tensor:
    """[rows, vocab] in blocks, the last filled up: [rows, blocks, _BLOCK]; a view where nothing is missing."""
    missing = -rows.shape[1] % _BLOCK
    if missing:
        rows = torch.nn.functional.pad(rows, (0, missing), value=fill)
    return rows.view(len(rows), -1, _BLOCK)


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


def _draw_truncated(scores: Tensor, draws: Draws) -> Tensor:
    """Draw under top_k and top_p from `scores` [rows, vocab], trying the likeliest candidates before all."""
    vocab = scores.shape[1]
    top_k, top_p = draws.top_k[:, None], draws.top_p[:, None]
    totals = scores.exp().sum(dim=-1, dtype=torch.float64, keepdim=True)
    tokens = torch.empty(len(scores), dtype=torch.int64, device=scores.device)
    rows = torch.arange(len(scores), device=scores.device)
    for count in (*CANDIDATES, vocab):
        best, ids = likeliest(scores[rows], min(count, vocab))
        tokens[rows], settled = _draw_sorted(best, ids, totals[rows], top_k[rows], top_p[rows], draws.uniforms[rows])
        weighed = (draws.top_k[rows] <= count) | (draws.top_k[rows] >= vocab)  # what the nucleus is a share of is known
        rows = rows[~(settled & weighed)]
        if count >= vocab or len(rows) == 0:
            break
    return tokens


def likeliest(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` best scores of every row and their token ids, equal scores in the order of ids: [rows, count]."""
    if count == scores.shape[1]:
        return scores.sort(dim=-1, descending=True, stable=True)
    ids = scores.topk(count, dim=-1, sorted=False).indices.sort(dim=-1).values
    best, order = scores.gather(1, ids).sort(dim=-1, descending=True, stable=True)
    return best, ids.gather(1, order)


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
