"""Decode steps that a GPU replays. Knows batch sizes, padding and static buffers; knows no sequences and no sampling.

A decode step launches some hundred kernels of a few microseconds each, and the host is slower to launch them than the
GPU to run them. A CUDA graph launches all of them at once, but always with the same addresses and shapes. So there is
one graph for each of a few numbers of rows, over buffers that stay where they are; a step takes the next larger one:

    rows of a step   | 0 1 2 3 4 | 5 6 7 |     5 sequences in the graph for 8
    token_ids        | of a step |   0   |     padding reads token 0 at position 0,
    slots            | of a step | spare |     writes its keys and values where nobody's are,
    context_lens     | of a step |   1   |     and sees nothing but them
    block_tables     | of a step | spare |     beyond a step's longest table: what earlier steps left, never read

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
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from tern.checkpoint.progress import item_progress
from tern.engine.device import current
from tern.engine.packing import PackedStep
from tern.model.batch import Batch, KVCache

if TYPE_CHECKING:
    from tern.model import ErnieModel

WARM_UPS = 2  # runs before a capture: kernels are compiled in the first, and workspaces allocated

Compute = Callable[[], Tensor]
"""Hidden states [rows, hidden_size] of the rows in the buffers."""
Capture = Callable[[Compute], Compute]
"""Makes of a computation over static buffers one that does the same, faster."""


def graph_sizes(max_num_seqs: int) -> list[int]:
    """Numbers of rows that have a graph: 1, 2, 4, every multiple of 8, and the largest of a step."""
    return [size for size in (1, 2, 4, *range(8, max_num_seqs, 8)) if size < max_num_seqs] + [max_num_seqs]


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


class DecodeGraphs:
    """The decode steps of `model` over `kv` with up to `max_num_seqs` sequences of up to `max_model_len` tokens.

    `spare_block` is a block of `kv` that no sequence is ever given. All graphs are captured when this is made, the
    largest first, with a progress bar if `progress`; that takes a second or some.
    """

    def __init__(
        self,
        model: ErnieModel,
        kv: KVCache,
        *,
        max_num_seqs: int,
        max_model_len: int,
        spare_block: int,
        capture: Capture,
        progress: bool = False,
    ) -> None:
        self.sizes = graph_sizes(max_num_seqs)
        self._spare_block, self._block_size = spare_block, kv.block_size
        width = -(-max_model_len // kv.block_size)
        self._inputs = _StaticInputs(max_num_seqs, width, model.device)
        self._graphs: dict[int, Compute] = {}
        with current(model.device), item_progress("CUDA graphs", len(self.sizes), enabled=progress) as advance:
            self._inputs.receive(self._padded(None, max_num_seqs))  # warm-ups must write where nobody's keys are
            for size in reversed(self.sizes):
                batch = self._inputs.batch(size, max_model_len)
                self._graphs[size] = capture(partial(model.hidden, batch, kv))
                advance(1)

    def takes(self, step: PackedStep) -> bool:
        """Whether a step can be replayed."""
        return step.is_decode and len(step.token_ids) <= self.sizes[-1]

    def run(self, step: PackedStep, token_ids: Tensor | None = None) -> tuple[Batch, Tensor]:
        """Compute a decode step -> its batch and hidden states, without the padding; the next step overwrites both.

        `token_ids` [rows], on the device, stand for those of the step, if given.
        """
        rows = len(step.token_ids)
        size = self.sizes[bisect.bisect_left(self.sizes, rows)]
        self._inputs.receive(self._padded(step, size))
        batch = self._inputs.batch(rows, step.max_context_len)
        if token_ids is not None:
            batch.token_ids.copy_(token_ids)
        return batch, self._graphs[size]()[:rows]

    def _padded(self, step: PackedStep | None, size: int) -> _Padded:
        rows, width = (0, 1) if step is None else step.block_tables.shape
        heads = np.zeros((4, size), np.int64)  # token_ids, positions, slots, context_lens
        heads[2:, rows:] = [[self._spare_block * self._block_size], [1]]
        tables = np.full((size, width), self._spare_block, np.int64)
        if step is not None:
            heads[:, :rows] = step.token_ids, step.positions, step.slots, step.context_lens
            tables[:rows] = step.block_tables
        return _Padded(heads, tables)


@dataclass(frozen=True)
class _Padded:
    """What changes from step to step: `heads` [4, size] and `tables` [size, blocks of the longest context]."""

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
