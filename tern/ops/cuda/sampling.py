"""The choice of tokens on a GPU: the largest of each row, and masks of grammars. Draws are `drawing`'s."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tern.ops.cuda.arrival import MOST, counters, is_last
from tern.ops.cuda.launch import tl, triton
from tern.ops.transfer import send

_CHUNK = 2048  # tokens a program; 16 a thread, which is four loads of 16 bytes


def largest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """As `tern.ops.reference_sampling.largest`."""
    logits = with_plain_rows(logits)
    rows, vocab = logits.shape
    chunks = triton.cdiv(vocab, _CHUNK)
    best = torch.empty(rows, chunks, dtype=torch.int64, device=logits.device)
    peaks = torch.empty(rows, dtype=logits.dtype, device=logits.device)
    ids = torch.empty(rows, dtype=torch.int64, device=logits.device)
    sizes = {"CHUNK": _CHUNK, "CHUNKS": triton.next_power_of_2(chunks)}
    for some in runs_of_rows(rows):
        grid = (chunks, some.stop - some.start)
        parts = (logits[some], logits.stride(0), best[some], peaks[some], ids[some])
        _largest[grid](*parts, counters(logits.device), vocab, chunks, **sizes)
    return peaks, ids


def keep_allowed(logits: Tensor, rows: Sequence[int], masks: npt.NDArray[np.uint32]) -> None:
    """As `tern.ops.reference_sampling.keep_allowed`."""
    if not len(rows):
        return
    vocab = logits.shape[1]
    places, words = send([np.array(rows, np.int64), masks.view(np.int32)], logits.device)
    grid = (triton.cdiv(vocab, _CHUNK), len(rows))
    _keep_allowed[grid](logits, *logits.stride(), places, words, words.stride(0), vocab, CHUNK=_CHUNK)


def with_plain_rows(logits: Tensor) -> Tensor:
    """The same with the numbers of a row side by side."""
    return logits if logits.stride(1) == 1 else logits.contiguous()


def runs_of_rows(rows: int) -> list[slice]:
    """As many rows at a time as there are counters for."""
    return [slice(start, min(start + MOST, rows)) for start in range(0, rows, MOST)]


# One program reads 8 KB of a row, so that a single row keeps 51 of them busy: the limit is memory. A number and its
# place in one int64: the largest is the first of the largest numbers, and NaN above all.
@triton.jit
def _largest(logits, stride, best, peaks, tokens, counter, vocab, chunks, CHUNK: tl.constexpr, CHUNKS: tl.constexpr):
    """Rows [vocab] of `logits` -> `peaks` [rows], `tokens` [rows]. `best` [rows, chunks] between them."""
    chunk = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    ids = chunk * CHUNK + tl.arange(0, CHUNK)
    x = tl.load(logits + row * stride + ids, mask=ids < vocab, other=float("-inf"))
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)  # -0.0 equals 0.0
    rising = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    rising = tl.where(x != x, 0x7FFFFFFF, rising)
    tl.store(best + row * chunks + chunk, tl.max((rising.to(tl.int64) << 32) + (0x7FFFFFFF - ids)))
    if is_last(counter + row, chunks):
        places = tl.arange(0, CHUNKS)
        others = tl.load(best + row * chunks + places, mask=places < chunks, other=-(2**63), cache_modifier=".cg")
        token = 0x7FFFFFFF - (tl.max(others) & 0xFFFFFFFF)
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
