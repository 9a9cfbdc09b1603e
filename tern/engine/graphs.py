"""Decode steps that a GPU replays. Knows batch sizes, padding and static buffers; knows no sequences and no sampling.

A decode step launches some hundred kernels of a few microseconds each, and the host is slower to launch them than the
GPU to run them. A CUDA graph launches all of them at once, but always with the same addresses and shapes. So there is
one graph for each of a few numbers of rows, over buffers that stay where they are; a step takes the next larger one.
A row is a token, and stands for a sequence of its own, even where several are one sequence's newest and its drafts:

    rows of a step   | 0  1  2  3  4 | 5  6  7 |    5 rows in the graph for 8
    token_ids        | a  d  d  b  c | c  c  c |    padding is the row with the shortest context once more, which so
    positions        | 3  4  5  8  0 | 0  0  0 |    chooses no expert that is not read anyway,
    context_lens     | 4  5  6  9  1 | 1  1  1 |    sees what that sees,
    block_tables     | A  A  A  B  C | C  C  C |
    slots            | of a step     | spare   |    and writes its keys and values where nobody's are

So drafts need no graphs of their own, however many a sequence has: what a step can be depends on its rows alone. All
keys of a layer are written before any is read, so a row finds those of the rows before it; and no result depends on
which rows stand in which sequence (`tern.ops.cuda.attention`). What it costs is that a context is fetched once a row,
mostly from the GPU's cache, since the rows of a sequence read it together.

Logits are not part of it: their product is launched while the graph still runs, and for every graph to keep its own
would take gigabytes. Whoever owns the cache keeps one block for the padding. What is captured is a function of no
arguments over the buffers; how it is captured is the caller's choice (`Capture`), so the same padding is tested on the
processor without a graph.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from tern.checkpoint.progress import item_progress
from tern.engine.device import current
from tern.engine.packing import PackedStep
from tern.model.batch import Batch

WARM_UPS = 2  # runs before a capture: kernels are compiled in the first, and workspaces allocated
DRAFTED_ROWS = 64
"""Rows that have a graph because of drafts, where `max_num_seqs` are fewer; every eight more would be a further one."""

Compute = Callable[[], Tensor]
"""Hidden states [rows, hidden_size] of the rows in the buffers."""
Capture = Callable[[Compute], Compute]
"""Makes of a computation over static buffers one that does the same, faster."""


@dataclass(frozen=True)
class GraphLimits:
    """The largest step that is captured, over a cache whose `spare_block` no sequence is ever given."""

    max_rows: int
    max_context_len: int
    block_size: int
    spare_block: int


def graph_rows(max_num_seqs: int, max_drafts: int) -> int:
    """Most rows of a step that has a graph, if a sequence has up to `max_drafts` drafts."""
    return max(max_num_seqs, min(max_num_seqs * (1 + max_drafts), DRAFTED_ROWS))


def graph_sizes(max_rows: int) -> list[int]:
    """Numbers of rows that have a graph: 1, 2, 4, every multiple of 8, and the largest of a step."""
    return [size for size in (1, 2, 4, *range(8, max_rows, 8)) if size < max_rows] + [max_rows]


class CudaCapture:
    """Captures into CUDA graphs that share one pool of memory: only one of them runs at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, compute: Compute) -> Compute:
        """Run `compute` to warm up, then record it. Raises what torch raises if it does what no graph can."""
        side = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                compute()
        torch.cuda.current_stream(self._device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            hidden = compute()

        def replay() -> Tensor:
            graph.replay()
            return hidden

        return replay


def capture_for(device: torch.device, *, enforce_eager: bool) -> Capture | None:
    """How decode steps are captured on a device; None where they are not."""
    return CudaCapture(device) if device.type == "cuda" and not enforce_eager else None


class StepGraphs:
    """A pass over the rows of a decode step, `compute`: batch -> hidden states [rows, hidden_size], within `limits`.

    All graphs are captured when this is made, the largest first, with a progress bar of that `title` if there is one;
    that takes a second or some.
    """

    def __init__(
        self,
        compute: Callable[[Batch], Tensor],
        device: torch.device,
        limits: GraphLimits,
        *,
        capture: Capture,
        title: str | None = None,
    ) -> None:
        self.sizes = graph_sizes(limits.max_rows)
        self._spare_slot = limits.spare_block * limits.block_size
        self._inputs = _StaticInputs(limits.max_rows, -(-limits.max_context_len // limits.block_size), device)
        self._graphs: dict[int, Compute] = {}
        with current(device), item_progress(title or "", len(self.sizes), enabled=title is not None) as advance:
            self._inputs.receive(_nobodys(limits))  # warm-ups must write where nobody's keys are
            for size in reversed(self.sizes):
                batch = self._inputs.batch(size, limits.max_context_len)
                self._graphs[size] = capture(partial(compute, batch))
                advance(1)

    def takes(self, step: PackedStep) -> bool:
        """Whether a step can be replayed."""
        return step.is_decode and len(step.token_ids) <= self.sizes[-1]

    def run(self, step: PackedStep, token_ids: Tensor | None = None) -> Tensor:
        """Compute a decode step -> its hidden states, without the padding; the next step overwrites them.

        `token_ids` [rows], on the device, stand for those of the step, if given.
        """
        rows = len(step.token_ids)
        size = self.sizes[bisect.bisect_left(self.sizes, rows)]
        context_lens = step.positions + 1
        order = np.arange(size)
        order[rows:] = copied = int(context_lens.argmin())
        heads = np.stack([step.token_ids, step.positions, step.slots, context_lens])[:, order]
        heads[2, rows:] = self._spare_slot
        owners = np.repeat(np.arange(len(step.block_tables)), np.diff(step.query_starts))
        self._inputs.receive(_Padded(heads, step.block_tables[owners[order]]))
        if token_ids is not None:
            self._inputs.replace_tokens(token_ids, size, copied)
        return self._graphs[size]()[:rows]


def _nobodys(limits: GraphLimits) -> _Padded:
    """As many rows as there can be, of token 0 at position 0 of the spare block."""
    heads = np.zeros((4, limits.max_rows), np.int64)
    heads[2:] = [[limits.spare_block * limits.block_size], [1]]
    return _Padded(heads, np.full((limits.max_rows, 1), limits.spare_block, np.int64))


@dataclass(frozen=True)
class _Padded:
    """What changes from step to step, with padding.

    `heads` [4, size] are token ids, positions, slots and lengths of contexts, `tables` [size, blocks of the longest].
    """

    heads: np.ndarray
    tables: np.ndarray


class _StaticInputs:
    """Buffers on the device for `max_rows` rows and tables of `width` blocks, filled by one copy from the host.

    The host writes into pinned memory, two pieces of it in turn: the copy of the step before may still be under way.
    """

    def __init__(self, max_rows: int, width: int, device: torch.device) -> None:
        capacity, pinned = (4 + width) * max_rows, device.type == "cuda"
        self._heads = torch.zeros(4, max_rows, dtype=torch.int64, device=device)
        self._tables = torch.zeros(max_rows, width, dtype=torch.int64, device=device)
        self._counts = torch.arange(max_rows + 1, device=device)
        self._arrived = torch.zeros(capacity, dtype=torch.int64, device=device)
        self._staging = [torch.zeros(capacity, dtype=torch.int64, pin_memory=pinned) for _ in range(2)]
        self._copied: list[torch.cuda.Event | None] = [None, None]
        self._turn = 0

    def receive(self, padded: _Padded) -> None:
        """Bring a step's numbers to the first rows and columns of the buffers."""
        self._turn = 1 - self._turn
        if (event := self._copied[self._turn]) is not None:
            event.synchronize()  # two steps ago: over long since
        parts = (padded.heads, padded.tables)
        count = sum(part.size for part in parts)
        staging = self._staging[self._turn][:count]
        np.concatenate([part.ravel() for part in parts], out=staging.numpy())
        arrived = self._arrived[:count]
        arrived.copy_(staging, non_blocking=True)
        if staging.is_pinned():
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
            self._copied[self._turn] = event
        heads, tables = torch.split(arrived, [part.size for part in parts])
        size, width = padded.tables.shape
        self._heads[:, :size].copy_(heads.view(4, size))
        self._tables[:size, :width].copy_(tables.view(size, width))

    def replace_tokens(self, token_ids: Tensor, size: int, copied: int) -> None:
        """Take the step's tokens from the device, and those of its padding up to `size` from its row `copied`."""
        rows = len(token_ids)
        self._heads[0, :rows].copy_(token_ids)
        if rows < size:
            self._heads[0, rows:size].copy_(token_ids[copied])

    def batch(self, rows: int, max_context_len: int) -> Batch:
        """The first `rows` rows, each of them one sequence."""
        token_ids, positions, slots, context_lens = self._heads[:, :rows]
        return Batch(
            token_ids=token_ids,
            positions=positions,
            slots=slots,
            query_starts=self._counts[: rows + 1],
            context_lens=context_lens,
            block_tables=self._tables[:rows],
            logit_rows=self._counts[:rows],
            max_query_len=1,
            max_context_len=max_context_len,
        )
