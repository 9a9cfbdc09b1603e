"""The choice of tokens: the largest of each row, masks of grammars, and draws by one uniform number, without a sort.

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

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tern.ops.cuda.launch import tl, triton
from tern.ops.reference_sampling import Draws
from tern.ops.transfer import send

_CHUNK = 2048  # tokens a program; 16 a thread, which is four loads of 16 bytes
_CANDIDATES = 8192  # gathered at most a row; a row with more of them in its bins is read as a whole
_ID_BITS = tl.constexpr(18)  # of a place, which is the bits of -score and then the id: falling scores, rising ids
_ID_MASK = tl.constexpr(2**18 - 1)
MAX_VOCAB = 2**18 - 1  # more weights of 1 than that would not fit into an int64 sum, nor their ids into a place

_UNIT = tl.constexpr(2.0**45)
_LOWEST = tl.constexpr(-31.0)  # the lowest score whose weight is not 0
_BINS = tl.constexpr(1024)  # more than -_LOWEST * _BINS_A_UNIT
_BINS_A_UNIT = tl.constexpr(32.0)
_NONE = tl.constexpr(2**62)  # above every place


def largest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """As `tern.ops.reference_sampling.largest`."""
    logits = _with_plain_rows(logits)
    rows, vocab = logits.shape
    chunks = triton.cdiv(vocab, _CHUNK)
    best = torch.empty(rows, chunks, dtype=torch.int64, device=logits.device)
    peaks = torch.empty(rows, dtype=logits.dtype, device=logits.device)
    ids = torch.empty(rows, dtype=torch.int64, device=logits.device)
    if rows:
        _largest_of_chunks[(chunks, rows)](logits, logits.stride(0), best, vocab, chunks, CHUNK=_CHUNK)
        size = triton.next_power_of_2(chunks)
        _largest_of_rows[(rows,)](logits, logits.stride(0), best, peaks, ids, chunks, CHUNKS=size, num_warps=1)
    return peaks, ids


def keep_allowed(logits: Tensor, rows: Sequence[int], masks: npt.NDArray[np.uint32]) -> None:
    """As `tern.ops.reference_sampling.keep_allowed`."""
    if not len(rows):
        return
    vocab = logits.shape[1]
    places, words = send([np.array(rows, np.int64), masks.view(np.int32)], logits.device)
    grid = (triton.cdiv(vocab, _CHUNK), len(rows))
    _keep_allowed[grid](logits, *logits.stride(), places, words, words.stride(0), vocab, CHUNK=_CHUNK)


def draw(logits: Tensor, peaks: Tensor, draws: Draws) -> Tensor:
    """As `tern.ops.reference_sampling.draw`, but for the last bits of sums; the logits stay as they are.

    A row without a finite peak gets some token of the vocabulary. Raises `ValueError` if that has more than
    `MAX_VOCAB` tokens, or if there is not a draw for each row.
    """
    logits = _with_plain_rows(logits)
    rows, vocab = logits.shape
    if vocab > MAX_VOCAB:
        raise ValueError(f"a vocabulary of {vocab} tokens cannot be drawn from on a GPU: at most {MAX_VOCAB}")
    if len(draws.uniforms) != rows:
        raise ValueError(f"{len(draws.uniforms)} draws for {rows} rows of logits: there must be a draw for each row")
    device = logits.device
    tokens = torch.empty(rows, dtype=torch.int64, device=device)
    if not rows:
        return tokens
    draws = draws.to(device)
    peaks = peaks.contiguous()
    chunks = triton.cdiv(vocab, _CHUNK)
    sums = torch.empty(rows, chunks, dtype=torch.int64, device=device)
    masses, counts = torch.zeros(2, rows, _BINS.value, dtype=torch.int64, device=device)
    ranges = torch.empty(rows, 6, dtype=torch.int32, device=device)
    found = torch.zeros(rows, dtype=torch.int32, device=device)
    places = torch.empty(rows, _CANDIDATES, dtype=torch.int64, device=device)

    row = (logits, logits.stride(0), peaks, draws.temperatures, draws.min_p, vocab)
    cuts = (draws.top_k, draws.top_p)
    size = triton.next_power_of_2(chunks)
    _weigh[(chunks, rows)](*row, *cuts, sums, masses, counts, chunks, CHUNK=_CHUNK)
    _bracket[(rows,)](draws.uniforms, *cuts, masses, counts, ranges, vocab)
    _gather[(chunks, rows)](*row, *cuts, ranges, found, places, CHUNK=_CHUNK, MOST=_CANDIDATES)
    sizes = {"CHUNK": _CHUNK, "CHUNKS": size, "MOST": _CANDIDATES, "num_warps": 8}
    _choose[(rows,)](*row, *cuts, draws.uniforms, sums, masses, counts, found, places, tokens, chunks, **sizes)
    return tokens


def _with_plain_rows(logits: Tensor) -> Tensor:
    return logits if logits.stride(1) == 1 else logits.contiguous()


# One program reads 8 KB of a row, so that a single row keeps 51 of them busy: the limit is memory. A number and its
# place in one int64: the largest is the first of the largest numbers, and NaN above all.
@triton.jit
def _largest_of_chunks(logits, stride, best, vocab, chunks, CHUNK: tl.constexpr):
    """Rows [vocab] of `logits` -> the largest of each chunk and its id, in one number: `best` [rows, chunks]."""
    chunk = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    ids = chunk * CHUNK + tl.arange(0, CHUNK)
    x = tl.load(logits + row * stride + ids, mask=ids < vocab, other=float("-inf"))
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)  # -0.0 equals 0.0
    rising = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    rising = tl.where(x != x, 0x7FFFFFFF, rising)
    tl.store(best + row * chunks + chunk, tl.max((rising.to(tl.int64) << 32) + (0x7FFFFFFF - ids)))


@triton.jit
def _largest_of_rows(logits, stride, best, peaks, tokens, chunks, CHUNKS: tl.constexpr):
    """The largest of the numbers in `best` [rows, chunks] -> `peaks` [rows], `tokens` [rows]."""
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.arange(0, CHUNKS)
    found = tl.max(tl.load(best + row * chunks + chunk, mask=chunk < chunks, other=-(2**63)))
    token = 0x7FFFFFFF - (found & 0xFFFFFFFF)
    tl.store(tokens + row, token)
    tl.store(peaks + row, tl.load(logits + row * stride + token))


# Only what is forbidden is written; each word of the mask serves the 32 lanes of a warp from one cache line.
@triton.jit
def _keep_allowed(logits, stride, step, rows, masks, words, vocab, CHUNK: tl.constexpr):
    """-inf into the `rows` of `logits` wherever the bit of a token in `masks` [rows, words] is 0."""
    ids = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    place = tl.program_id(1).to(tl.int64)
    inside = ids < vocab
    bits = tl.load(masks + place * words + (ids >> 5), mask=inside, other=-1) >> (ids & 31)
    start = tl.load(rows + place) * stride
    tl.store(logits + start + ids.to(tl.int64) * step, float("-inf"), mask=inside & ((bits & 1) == 0))


@triton.jit
def _row(logits, stride, peaks, temperatures, min_p, vocab, row):
    """What the scores of a row are made of: its first logit, their number, its peak, temperature and lowest score."""
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


# The pass that weighs every token: a float64 exponential each, of which a Hopper computes enough to stay near the speed
# of memory. Atomics are spared where a token weighs nothing or its row is not cut.
@triton.jit
def _weigh(
    logits,
    stride,
    peaks,
    temperatures,
    min_p,
    vocab,
    top_k,
    top_p,
    sums,
    masses,
    counts,
    chunks,
    CHUNK: tl.constexpr,
):
    """The masses of chunks -> `sums` [rows, chunks]; those of bins and their tokens -> `masses`, `counts` [rows, bins].

    Bins only of rows that are cut, counts only of those that top_k cuts.
    """
    chunk = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    ids = chunk * CHUNK + tl.arange(0, CHUNK)
    scores = _scores(_row(logits, stride, peaks, temperatures, min_p, vocab, row), ids)
    weights = _weights(scores)
    tl.store(sums + row * chunks + chunk, tl.sum(weights))
    limited = tl.load(top_k + row) < vocab
    if limited | (tl.load(top_p + row) < 1.0):
        kept = weights > 0
        bins = row * _BINS + _bins(scores, kept)
        tl.atomic_add(masses + bins, weights, mask=kept, sem="relaxed")
        if limited:
            tl.atomic_add(counts + bins, kept.to(tl.int64), mask=kept, sem="relaxed")


@triton.jit
def _bracket(uniforms, top_k, top_p, masses, counts, ranges, vocab):
    """The first and last bin that can hold the end of top_k, that of the nucleus, and the token: `ranges` [rows, 6]."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.load(top_k + row)
    p = tl.load(top_p + row)
    if (k < vocab) | (p < 1.0):
        uniform = tl.load(uniforms + row)
        bins = tl.arange(0, _BINS)
        mass = tl.load(masses + row * _BINS + bins)
        reached = tl.cumsum(mass)
        end = tl.sum(
            (tl.cumsum(tl.load(counts + row * _BINS + bins)) < k).to(tl.int32)
        )  # _BINS: there are fewer than k
        least = _needed(p, tl.sum(tl.where(bins < end, mass, 0)))
        most = _needed(p, tl.sum(tl.where(bins <= end, mass, 0)))
        last = tl.sum((reached < most).to(tl.int32))
        kept = tl.sum(tl.where(bins <= last, mass, 0))
        mine = ranges + row * 6
        tl.store(mine, end)
        tl.store(mine + 1, end)
        tl.store(mine + 2, tl.sum((reached < least).to(tl.int32)))
        tl.store(mine + 3, last)
        tl.store(mine + 4, tl.sum((reached < _target(uniform, least)).to(tl.int32)))
        tl.store(mine + 5, tl.sum((reached < _target(uniform, kept)).to(tl.int32)))


@triton.jit
def _in_range(bins, ends):
    return (bins >= tl.load(ends)) & (bins <= tl.load(ends + 1))


# Memory again: a second look at the rows that are cut, of which little is written. Which chunk writes first is left to
# chance; nothing that is asked of `places` depends on it.
@triton.jit
def _gather(
    logits,
    stride,
    peaks,
    temperatures,
    min_p,
    vocab,
    top_k,
    top_p,
    ranges,
    found,
    places,
    CHUNK: tl.constexpr,
    MOST: tl.constexpr,
):
    """The tokens in the bins of `ranges` -> `places` [rows, MOST], as far as they fit, and their number `found`."""
    row = tl.program_id(1).to(tl.int64)
    if (tl.load(top_k + row) < vocab) | (tl.load(top_p + row) < 1.0):
        ids = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
        scores = _scores(_row(logits, stride, peaks, temperatures, min_p, vocab, row), ids)
        kept = scores >= _LOWEST
        bins = _bins(scores, kept)
        mine = ranges + row * 6
        wanted = kept & (_in_range(bins, mine) | _in_range(bins, mine + 2) | _in_range(bins, mine + 4))
        ones = wanted.to(tl.int32)
        number = tl.sum(ones)
        if number > 0:
            at = tl.atomic_add(found + row, number, sem="relaxed") + tl.cumsum(ones) - 1
            tl.store(places + row * MOST + at, _places(scores, ids), mask=wanted & (at < MOST))


@triton.jit
def _split(row, places, number, first, middle, last, COUNT: tl.constexpr, CHUNK: tl.constexpr, MOST: tl.constexpr):
    """Of the tokens from place `first` to `last`: the count or mass up to `middle`, the last place up to it, the next.

    They are read from `places`, or from the row itself if those did not fit.
    """
    _, vocab, _, _, _ = row
    fits = number <= MOST
    amounts = tl.zeros([CHUNK], tl.int64)
    lower = tl.full([CHUNK], -1, tl.int64)
    upper = tl.full([CHUNK], _NONE, tl.int64)
    for start in range(0, tl.where(fits, number, vocab), CHUNK):
        ids = start + tl.arange(0, CHUNK)
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
def _find(
    row,
    places,
    number,
    amounts,
    need,
    COUNT: tl.constexpr,
    CHUNK: tl.constexpr,
    MOST: tl.constexpr,
):
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
        amount, lower, upper = _split(row, places, number, first, middle, last, COUNT, CHUNK, MOST)
        enough = before + amount >= need
        last = tl.where(enough, lower, last)
        first = tl.where(enough, first, upper)
        before = tl.where(enough, before, before + amount)
    return first, bin, before


@triton.jit
def _draw_by_score(
    row,
    places,
    number,
    masses,
    counts,
    top_k,
    top_p,
    uniform,
    CHUNK: tl.constexpr,
    MOST: tl.constexpr,
):
    """The token at which the mass over falling scores passes `uniform` of what top_k and top_p keep."""
    bins = tl.arange(0, _BINS)
    mass = tl.load(masses + bins)
    count = tl.load(counts + bins)
    kept = tl.sum(mass)
    if tl.sum(count) > top_k:
        place, bin, _ = _find(row, places, number, count, top_k, True, CHUNK, MOST)
        inside, _, _ = _split(row, places, number, _first_place(bin), place, place, False, CHUNK, MOST)
        kept = tl.sum(tl.where(bins < bin, mass, 0)) + inside
    if top_p < 1.0:
        place, _, before = _find(row, places, number, mass, _needed(top_p, kept), False, CHUNK, MOST)
        kept = before + _weights_at(place)
    place, _, _ = _find(row, places, number, mass, _target(uniform, kept), False, CHUNK, MOST)
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


# One program a row, bound by the latency of its reductions: about a dozen steps for each of three bounds, over what is
# mostly one chunk of candidates in the first-level cache. Eight warps, eight candidates a thread.
@triton.jit
def _choose(
    logits,
    stride,
    peaks,
    temperatures,
    min_p,
    vocab,
    top_k,
    top_p,
    uniforms,
    sums,
    masses,
    counts,
    found,
    places,
    tokens,
    chunks,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    MOST: tl.constexpr,
):
    """The drawn tokens -> `tokens` [rows]."""
    row = tl.program_id(0).to(tl.int64)
    mine = _row(logits, stride, peaks, temperatures, min_p, vocab, row)
    uniform = tl.load(uniforms + row)
    k = tl.load(top_k + row)
    p = tl.load(top_p + row)
    number = tl.load(found + row)
    if number > 0:
        start = row * _BINS
        token = _draw_by_score(
            mine, places + row * MOST, number, masses + start, counts + start, k, p, uniform, CHUNK, MOST
        )
    else:
        token = _draw_by_id(mine, sums + row * chunks, chunks, uniform, CHUNK, CHUNKS)
    tl.store(tokens + row, tl.minimum(token, vocab - 1))
