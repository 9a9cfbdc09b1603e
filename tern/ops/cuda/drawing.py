"""Draws of tokens on a GPU by one uniform number, without a sort, in two launches.

A token's weight is exp(score), as a whole number of 2^-45: sums of whole numbers are exact in any order, so no result
depends on which thread came first, and the masses of a row fall into place by comparing them. What is left out are
scores below -31, together less than 4e-9 of a row of 103 424; float32 rounds each weight more than that.

A draw that nothing cuts walks over token ids: sums of chunks, then the tokens of one. A draw that top_k or top_p cut
walks over falling scores, equal ones in the order of ids, and asks three times for the first token at which a running
sum reaches a need: the count for top_k, the mass for top_p, the mass for the uniform number. Histograms of the row
(1/32 of a score a bin) say in which bin each lies; the tokens of those bins are gathered, and the window around the
wanted one is halved until only it is left. All sizes are fixed by the shapes, and the host waits for nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tern.ops.cuda.arrival import counters, is_last
from tern.ops.cuda.launch import tl, triton
from tern.ops.cuda.sampling import runs_of_rows, with_plain_rows
from tern.ops.reference_sampling import Draws

_CHUNK = 2048  # tokens a program
_WINDOW = 512  # candidates that are looked at together: more would take registers from programs that gather
_CANDIDATES = 8192  # gathered at most a row; a row with more of them in its bins is read as a whole
_ID_BITS = tl.constexpr(18)  # of a place, which is the bits of -score and then the id: falling scores, rising ids
_ID_MASK = tl.constexpr(2**18 - 1)
MAX_VOCAB = 2**18 - 1  # more weights of 1 than that would not fit into an int64 sum, nor their ids into a place

_UNIT = tl.constexpr(2.0**45)
_LOWEST = tl.constexpr(-31.0)  # the lowest score whose weight is not 0
_BINS = tl.constexpr(1024)  # more than -_LOWEST * _BINS_A_UNIT
_BINS_A_UNIT = tl.constexpr(32.0)
_NONE = tl.constexpr(2**62)  # above every place
_AMOUNTS = tl.constexpr(2 * 1024 + 2)  # of a row: the masses of bins, their counts, how many were gathered, and a gap


def draw(logits: Tensor, peaks: Tensor, draws: Draws) -> Tensor:
    """As `tern.ops.reference_sampling.draw`, but for the last bits of sums; the logits stay as they are.

    A row without a finite peak gets some token of the vocabulary. Raises `ValueError` if that has more than
    `MAX_VOCAB` tokens, or if there is not a draw for each row.
    """
    logits = with_plain_rows(logits)
    rows, vocab = logits.shape
    if vocab > MAX_VOCAB:
        raise ValueError(f"a vocabulary of {vocab} tokens cannot be drawn from on a GPU: at most {MAX_VOCAB}")
    if len(draws.uniforms) != rows:
        raise ValueError(f"{len(draws.uniforms)} draws for {rows} rows of logits: there must be a draw for each row")
    draws, peaks = draws.to(logits.device), peaks.contiguous()
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    for some in runs_of_rows(rows):
        _draw_rows(logits[some], peaks[some], draws.rows(some), tokens[some])
    return tokens


def _draw_rows(logits: Tensor, peaks: Tensor, draws: Draws, tokens: Tensor) -> None:
    """Fill `tokens` [rows]; there is a counter for each row."""
    device, (rows, vocab) = logits.device, logits.shape
    chunks = triton.cdiv(vocab, _CHUNK)
    sums = torch.empty(rows, chunks, dtype=torch.int64, device=device)
    amounts = torch.zeros(rows, _AMOUNTS.value, dtype=torch.int64, device=device)
    ranges = torch.empty(rows, 6, dtype=torch.int32, device=device)
    places = torch.empty(rows, _CANDIDATES, dtype=torch.int64, device=device)

    source = (logits, logits.stride(0), peaks, draws.temperatures, draws.min_p, vocab)
    rules = (draws.top_k, draws.top_p, draws.uniforms)
    counter = counters(device)
    _weigh[(chunks, rows)](source, rules, sums, amounts, ranges, counter, chunks, CHUNK=_CHUNK)
    sizes = {"CHUNK": _CHUNK, "CHUNKS": triton.next_power_of_2(chunks), "WINDOW": _WINDOW, "MOST": _CANDIDATES}
    _choose[(chunks, rows)](source, rules, sums, amounts, ranges, places, tokens, counter, chunks, **sizes, num_warps=8)


@triton.jit
def _row(source, row):
    """What the scores of a row are made of: its first logit, their number, its peak, temperature and lowest score."""
    logits, stride, peaks, temperatures, min_p, vocab = source
    peak = tl.load(peaks + row)
    peak = tl.where(tl.abs(peak) < float("inf"), peak, 0.0)  # no one uses the token of a row without one
    least = tl.load(min_p + row)
    floor = tl.where(least > 0.0, tl.log(tl.where(least > 0.0, least, 1.0)), _LOWEST).to(tl.float32)
    return logits + row * stride, vocab, peak, tl.load(temperatures + row), tl.maximum(floor, _LOWEST)


@triton.jit
def _scores(row, ids):
    """The scores of tokens `ids` of a row: (logit - peak) / temperature, -inf where min_p or `_LOWEST` cut."""
    start, vocab, peak, temperature, floor = row
    x = tl.load(start + ids, mask=ids < vocab, other=float("-inf"))
    scores = tl.div_rn(x - peak, tl.zeros_like(x) + temperature)
    return tl.where((scores <= 0.0) & (scores >= floor), scores, float("-inf"))  # and so is NaN


@triton.jit
def _weights(scores):
    """exp(`scores`) in units of 2^-45: 0 for -inf, at least 1 for everything above `_LOWEST`."""
    return (tl.exp(scores.to(tl.float64)) * _UNIT + 0.5).to(tl.int64)


@triton.jit
def _bins(scores, kept):
    """The bins of scores from 0 down to `_LOWEST`; those that are not `kept` get some bin."""
    return (tl.abs(tl.where(kept, scores, 0.0)) * _BINS_A_UNIT).to(tl.int32)


@triton.jit
def _places(scores, ids):
    """Where tokens stand among falling scores, equal ones by their ids: the bits of -score, then those of the id."""
    return (tl.abs(scores).to(tl.int32, bitcast=True).to(tl.int64) << _ID_BITS) | ids


@triton.jit
def _first_place(bin):
    """Where the tokens of a bin begin."""
    return (bin.to(tl.float32) / _BINS_A_UNIT).to(tl.int32, bitcast=True).to(tl.int64) << _ID_BITS


@triton.jit
def _weights_at(places):
    """The weights of tokens at `places`."""
    return _weights(-(places >> _ID_BITS).to(tl.int32).to(tl.float32, bitcast=True))


@triton.jit
def _needed(top_p, mass):
    """The mass that a nucleus of `mass` must reach: a token stays while those before it have less."""
    share = tl.ceil(top_p * mass.to(tl.float64)).to(tl.int64)
    return tl.maximum(tl.where(top_p < 1.0, tl.minimum(share, mass), mass), 1)


@triton.jit
def _target(uniform, mass):
    """The running sum that a draw by `uniform` in [0, 1) must reach of `mass`: one unit more than that share of it."""
    return tl.maximum(tl.minimum((uniform * mass.to(tl.float64)).to(tl.int64), mass - 1), 0) + 1


@triton.jit
def _rules(rules, row):
    """A row's top_k, top_p and uniform number."""
    top_k, top_p, uniforms = rules
    return tl.load(top_k + row), tl.load(top_p + row), tl.load(uniforms + row)


# The pass that weighs every token: a float64 exponential each, of which a Hopper computes enough to stay near the speed
# of memory. Atomics are spared where a token weighs nothing or its row is not cut.
@triton.jit
def _weigh(source, rules, sums, amounts, ranges, counter, chunks, CHUNK: tl.constexpr):
    """The masses of chunks -> `sums` [rows, chunks]; those of bins and their tokens -> `amounts` [rows, _AMOUNTS].

    Bins only of rows that are cut, counts only of those that top_k cuts. The last program of such a row finds in which
    bins its bounds are: `ranges` [rows, 6].
    """
    chunk = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    ids = chunk * CHUNK + tl.arange(0, CHUNK)
    mine = _row(source, row)
    scores = _scores(mine, ids)
    weights = _weights(scores)
    tl.store(sums + row * chunks + chunk, tl.sum(weights))
    k, p, uniform = _rules(rules, row)
    limited = k < mine[1]
    if limited | (p < 1.0):
        kept = weights > 0
        masses = amounts + row * _AMOUNTS
        bins = _bins(scores, kept)
        tl.atomic_add(masses + bins, weights, mask=kept, sem="relaxed")
        if limited:
            tl.atomic_add(masses + _BINS + bins, kept.to(tl.int64), mask=kept, sem="relaxed")
        if is_last(counter + row, chunks):
            _bracket(masses, ranges + row * 6, k, p, uniform)


@triton.jit
def _bracket(masses, ranges, k, p, uniform):
    """The first and last bin that can hold the end of top_k, that of the nucleus, and the token: `ranges` [6]."""
    bins = tl.arange(0, _BINS)
    mass = tl.load(masses + bins, cache_modifier=".cg")
    count = tl.load(masses + _BINS + bins, cache_modifier=".cg")
    reached = tl.cumsum(mass)
    end = tl.sum((tl.cumsum(count) < k).to(tl.int32))  # _BINS: there are fewer than k
    least = _needed(p, tl.sum(tl.where(bins < end, mass, 0)))
    most = _needed(p, tl.sum(tl.where(bins <= end, mass, 0)))
    last = tl.sum((reached < most).to(tl.int32))
    kept = tl.sum(tl.where(bins <= last, mass, 0))
    tl.store(ranges, end)
    tl.store(ranges + 1, end)
    tl.store(ranges + 2, tl.sum((reached < least).to(tl.int32)))
    tl.store(ranges + 3, last)
    tl.store(ranges + 4, tl.sum((reached < _target(uniform, least)).to(tl.int32)))
    tl.store(ranges + 5, tl.sum((reached < _target(uniform, kept)).to(tl.int32)))


@triton.jit
def _in_range(bins, ends):
    return (bins >= tl.load(ends)) & (bins <= tl.load(ends + 1))


# Memory again: a second look at the rows that are cut, of which little is written. Which chunk writes first is left to
# chance; nothing that is asked of `places` depends on it. Then one program a row, bound by the latency of its
# reductions: about a dozen steps for each of three bounds, over what is mostly one chunk of candidates in the
# first-level cache. Eight warps, eight candidates a thread.
@triton.jit
def _choose(
    source,
    rules,
    sums,
    amounts,
    ranges,
    places,
    tokens,
    counter,
    chunks,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    WINDOW: tl.constexpr,
    MOST: tl.constexpr,
):
    """The drawn tokens -> `tokens` [rows].

    Of a row that is cut each program gathers the tokens in the bins of `ranges` -> `places` [rows, MOST], as far as
    they fit, and the last draws from them.
    """
    chunk = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    k, p, uniform = _rules(rules, row)
    mine = _row(source, row)
    vocab = mine[1]
    own = amounts + row * _AMOUNTS
    found = own + 2 * _BINS
    turn = chunk == 0
    if (k < vocab) | (p < 1.0):
        _gather(mine, chunk * CHUNK + tl.arange(0, CHUNK), ranges + row * 6, found, places + row * MOST, MOST)
        turn = is_last(counter + row, chunks)
    if turn:
        number = tl.load(found, cache_modifier=".cg").to(tl.int32)
        if number > 0:
            token = _draw_by_score(mine, places + row * MOST, number, own, k, p, uniform, WINDOW, MOST)
        else:
            token = _draw_by_id(mine, sums + row * chunks, chunks, uniform, CHUNK, CHUNKS)
        tl.store(tokens + row, tl.minimum(token, vocab - 1))


@triton.jit
def _gather(row, ids, ranges, found, places, MOST: tl.constexpr):
    """Those of the tokens `ids` in the bins of `ranges` -> `places` [MOST], as far as they fit; `found` counts them."""
    scores = _scores(row, ids)
    kept = scores >= _LOWEST
    bins = _bins(scores, kept)
    wanted = kept & (_in_range(bins, ranges) | _in_range(bins, ranges + 2) | _in_range(bins, ranges + 4))
    ones = wanted.to(tl.int32)
    number = tl.sum(ones)
    if number > 0:
        at = tl.atomic_add(found, number.to(tl.int64), sem="relaxed") + tl.cumsum(ones) - 1
        tl.store(places + at, _places(scores, ids), mask=wanted & (at < MOST))


@triton.jit
def _split(row, places, number, first, middle, last, COUNT: tl.constexpr, WINDOW: tl.constexpr, MOST: tl.constexpr):
    """Of the tokens from place `first` to `last`: the count or mass up to `middle`, the last place up to it, the next.

    They are read from `places`, or from the row itself if those did not fit.
    """
    _, vocab, _, _, _ = row
    fits = number <= MOST
    amounts = tl.zeros([WINDOW], tl.int64)
    lower = tl.full([WINDOW], -1, tl.int64)
    upper = tl.full([WINDOW], _NONE, tl.int64)
    for start in range(0, tl.where(fits, number, vocab), WINDOW):
        ids = start + tl.arange(0, WINDOW)
        if fits:
            at = tl.load(places + ids, mask=ids < number, other=_NONE)
        else:
            scores = _scores(row, ids)
            at = tl.where(scores >= _LOWEST, _places(scores, ids), _NONE)
        below = (at >= first) & (at <= middle)
        if COUNT:
            amounts += below.to(tl.int64)
        else:
            amounts += tl.where(below, _weights_at(tl.where(below, at, 0)), 0)
        lower = tl.maximum(lower, tl.where(below, at, -1))
        upper = tl.minimum(upper, tl.where((at > middle) & (at <= last), at, _NONE))
    return tl.sum(amounts), tl.max(lower), tl.min(upper)


@triton.jit
def _find(row, places, number, amounts, need, COUNT: tl.constexpr, WINDOW: tl.constexpr, MOST: tl.constexpr):
    """The first place at which the count or mass of tokens up to it reaches `need`, its bin, and the amount before it.

    `amounts` [bins] add up to at least `need`. The window is halved in numbers and shrinks to tokens that are there,
    so its steps go with the logarithm of how many there are.
    """
    bins = tl.arange(0, _BINS)
    bin = tl.sum((tl.cumsum(amounts) < need).to(tl.int32))
    before = tl.sum(tl.where(bins < bin, amounts, 0))
    first = _first_place(bin)
    last = _first_place(bin + 1) - 1
    while first < last:
        middle = first + (last - first) // 2
        amount, lower, upper = _split(row, places, number, first, middle, last, COUNT, WINDOW, MOST)
        enough = before + amount >= need
        last = tl.where(enough, lower, last)
        first = tl.where(enough, first, upper)
        before = tl.where(enough, before, before + amount)
    return first, bin, before


@triton.jit
def _draw_by_score(row, places, number, masses, top_k, top_p, uniform, WINDOW: tl.constexpr, MOST: tl.constexpr):
    """The token at which the mass over falling scores passes `uniform` of what top_k and top_p keep."""
    bins = tl.arange(0, _BINS)
    mass = tl.load(masses + bins)
    count = tl.load(masses + _BINS + bins)
    kept = tl.sum(mass)
    if tl.sum(count) > top_k:
        place, bin, _ = _find(row, places, number, count, top_k, True, WINDOW, MOST)
        inside, _, _ = _split(row, places, number, _first_place(bin), place, place, False, WINDOW, MOST)
        kept = tl.sum(tl.where(bins < bin, mass, 0)) + inside
    if top_p < 1.0:
        place, _, before = _find(row, places, number, mass, _needed(top_p, kept), False, WINDOW, MOST)
        kept = before + _weights_at(place)
    place, _, _ = _find(row, places, number, mass, _target(uniform, kept), False, WINDOW, MOST)
    return place & _ID_MASK


@triton.jit
def _draw_by_id(row, sums, chunks, uniform, CHUNK: tl.constexpr, CHUNKS: tl.constexpr):
    """The token at which the mass over rising ids passes `uniform` of that of the row, which is in `sums` [chunks]."""
    chunk = tl.arange(0, CHUNKS)
    mass = tl.load(sums + chunk, mask=chunk < chunks, other=0)
    need = _target(uniform, tl.sum(mass))
    place = tl.minimum(tl.sum((tl.cumsum(mass) < need).to(tl.int32)), chunks - 1)
    before = tl.sum(tl.where(chunk < place, mass, 0))
    ids = place * CHUNK + tl.arange(0, CHUNK)
    reached = before + tl.cumsum(_weights(_scores(row, ids)))
    return (place * CHUNK + tl.sum((reached < need).to(tl.int32))).to(tl.int64)
