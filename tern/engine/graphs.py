"""Decode steps that a GPU replays. Knows batch sizes, padding and static buffers; knows no sequences and no sampling.

A decode step launches some hundred kernels of a few microseconds each, and the host is slower to launch them than the
GPU to run them. A CUDA graph launches all of them at once, but always with the same addresses and shapes. So there is
one graph for each of a few numbers of rows, over buffers that stay where they are; a step takes the next larger one.
A row is a token. Sequences follow each other as in any step, and with them stand padding and, where sequences have
drafts, as many empty ones as there are rows too many:

    rows of a step   | 0  1  2  3  4 | 5  6  7 |    5 rows in the graph for 8: a with two drafts, b, c
    token_ids        | a  d  d  b  c | c  c  c |    padding is the row with the shortest context once more, which so
    positions        | 3  4  5  8  0 | 0  0  0 |    chooses experts that are read anyway,
    slots            | of a step     | spare   |    and writes its keys and values where nobody's are
    query_starts     | 0  3  4 | 5  6  7 | 8 8 |    sequences: of the step, of a row of padding each, and empty
    context_lens     | 6  9  1 | 1  1  1 | 0 0 |
    block_tables     | A  B  C | C  C  C | . . |

Steps without drafts have graphs of their own, in which no sequence has a second row. Those for drafts are made for as
many as a sequence may have: sequences that have fewer, or none, take the same.

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
"""Most rows of a step with drafts that has a graph. Larger steps take long enough to hide their launches."""

Compute = Callable[[], Tensor]
"""Hidden states [rows, hidden_size] of the rows in the buffers."""
Capture = Callable[[Compute], Compute]
"""Makes of a computation over static buffers one that does the same, faster."""


@dataclass(frozen=True)
class GraphLimits:
    """The largest step that is captured, over a cache whose `spare_block` no sequence is ever given.

    It has `max_num_seqs` sequences, each with up to `max_drafts` drafts.
    """

    max_num_seqs: int
    max_drafts: int
    max_context_len: int
    block_size: int
    spare_block: int

    @property
    def max_rows(self) -> int:
        """Rows of the largest step."""
        return max(self.max_num_seqs, *drafted_sizes(self.max_num_seqs, self.max_drafts), 0)


def graph_sizes(max_num_seqs: int) -> list[int]:
    """Numbers of rows that have a graph: 1, 2, 4, every multiple of 8, and the largest of a step."""
    return [size for size in (1, 2, 4, *range(8, max_num_seqs, 8)) if size < max_num_seqs] + [max_num_seqs]


def drafted_sizes(max_num_seqs: int, max_drafts: int) -> list[int]:
    """Numbers of rows, drafts among them, that have a graph: powers of two, to `DRAFTED_ROWS` or the largest step's."""
    if not max_drafts:
        return []
    most = min(max_num_seqs * (1 + max_drafts), DRAFTED_ROWS)
    return [size for size in (2, 4, 8, 16, 32) if size < most] + [most]


class CudaCapture:
    """Captures into CUDA graphs that share one pool of memory: only one of them runs at a time.

    All on one stream of the device: what torch frees on a stream it gives to nobody on another, and its own stream for
    captures belongs to the card on which it was first used.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def __call__(self, compute: Compute) -> Compute:
        """Run `compute` to warm up, then record it. Raises what torch raises if it does what no graph can."""
        side = self._side
        side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                compute()
        torch.cuda.current_stream(self._device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=side, capture_error_mode="thread_local"):
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

    All graphs are captured when this is made, with a progress bar of that `title` if there is one; that takes a second
    or some. What has the most rows comes first, and the others find room in its memory.
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
        self.sizes = graph_sizes(limits.max_num_seqs)
        self.drafted_sizes = drafted_sizes(limits.max_num_seqs, limits.max_drafts)
        self._limits = limits
        self._inputs = _StaticInputs(limits.max_rows, -(-limits.max_context_len // limits.block_size), device)
        self._graphs: dict[tuple[bool, int], Compute] = {}
        keys = [(False, size) for size in self.sizes] + [(True, size) for size in self.drafted_sizes]
        with current(device), item_progress(title or "", len(keys), enabled=title is not None) as advance:
            for drafted, size in sorted(keys, key=lambda key: -key[1]):
                self._inputs.receive(_nobodys(size, limits))  # warm-ups must write where nobody's keys are
                query_len = 1 + limits.max_drafts if drafted else 1
                batch = self._inputs.batch(size, query_len, limits.max_context_len)
                self._graphs[drafted, size] = capture(partial(compute, batch))
                advance(1)

    def takes(self, step: PackedStep) -> bool:
        """Whether a step can be replayed."""
        if not step.is_decode or step.max_query_len > 1 + self._limits.max_drafts:
            return False
        return len(step.token_ids) <= self._sizes(step)[-1]

    def run(self, step: PackedStep, token_ids: Tensor | None = None) -> Tensor:
        """Compute a decode step -> its hidden states, without the padding; the next step overwrites them.

        `token_ids` [rows], on the device, stand for those of the step, if given.
        """
        rows, sizes = len(step.token_ids), self._sizes(step)
        size = sizes[bisect.bisect_left(sizes, rows)]
        copied = int(step.positions.argmin())
        self._inputs.receive(_padded(step, size, copied, self._limits))
        if token_ids is not None:
            self._inputs.replace_tokens(token_ids, size)
        return self._graphs[step.max_query_len > 1, size]()[:rows]

    def _sizes(self, step: PackedStep) -> list[int]:
        return self.drafted_sizes if step.max_query_len > 1 else self.sizes


def _padded(step: PackedStep, size: int, copied: int, limits: GraphLimits) -> _Padded:
    """A step with padding up to `size` rows, each a sequence of its own, that repeats the row `copied`."""
    rows, sequences = len(step.token_ids), len(step.context_lens)
    padding = slice(sequences, sequences + size - rows)
    heads = np.zeros((_HEADS, _pitch(size)), np.int64)
    heads[:3, :rows] = step.token_ids, step.positions, step.slots
    heads[:2, rows:size] = heads[:2, copied, None]
    heads[2, rows:size] = limits.spare_block * limits.block_size
    heads[3, :sequences] = step.context_lens
    heads[3, padding] = step.positions[copied] + 1
    heads[4] = size
    heads[4, :sequences] = step.query_starts[:-1]
    heads[4, padding] = np.arange(rows, size)
    heads[5, :rows] = np.arange(rows)
    heads[5, rows:size] = copied
    owner = int(np.searchsorted(step.query_starts, copied, side="right")) - 1
    tables = np.full((size, step.block_tables.shape[1]), limits.spare_block, np.int64)
    tables[:sequences] = step.block_tables
    tables[padding] = step.block_tables[owner]
    return _Padded(heads, tables)


def _nobodys(size: int, limits: GraphLimits) -> _Padded:
    """`size` rows of token 0 at position 0 of the spare block."""
    heads = np.zeros((_HEADS, _pitch(size)), np.int64)
    heads[2:4] = [[limits.spare_block * limits.block_size], [1]]
    heads[4] = np.arange(_pitch(size))
    return _Padded(heads, np.full((size, 1), limits.spare_block, np.int64))


_HEADS = 6


def _pitch(size: int) -> int:
    """Numbers from the beginning of a head to that of the next: room for one more than rows, and 16 bytes divide it."""
    return (size // 2 + 1) * 2


@dataclass(frozen=True)
class _Padded:
    """What changes from step to step, with padding.

    `heads` [_HEADS, _pitch(size)] are token ids, positions and slots of rows, lengths of contexts and first rows of
    sequences, and of each row the one whose token it takes where tokens come from the device; `tables` [size, blocks of
    the longest]. Only first rows have one more than `size`.
    """

    heads: np.ndarray
    tables: np.ndarray


class _StaticInputs:
    """Buffers on the device for `max_rows` rows and tables of `width` blocks, filled by one copy from the host.

    What arrives is read where it lies: for each number of rows, heads have their places, and so has the table of a
    single one. Other tables are of a width that changes, and are spread by a second copy. The host writes into pinned
    memory, two pieces of it in turn: the copy of the step before may still be under way.
    """

    def __init__(self, max_rows: int, width: int, device: torch.device) -> None:
        capacity, pinned = _HEADS * _pitch(max_rows) + width * max_rows, device.type == "cuda"
        self._width = width
        self._tables = torch.zeros(max_rows, width, dtype=torch.int64, device=device)
        self._counts = torch.arange(max_rows, device=device)
        self._arrived = torch.zeros(capacity, dtype=torch.int64, device=device)
        self._staging = [torch.zeros(capacity, dtype=torch.int64, pin_memory=pinned) for _ in range(2)]
        self._copied: list[torch.cuda.Event | None] = [None, None]
        self._turn = 0

    def receive(self, padded: _Padded) -> None:
        """Bring a step's numbers to where its graph reads them."""
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
        size, width = padded.tables.shape
        if size > 1:
            self._tables[:size, :width].copy_(arrived[padded.heads.size :].view(size, width))

    def replace_tokens(self, token_ids: Tensor, size: int) -> None:
        """Take the tokens of what was received for `size` rows from the device, those of its padding among them."""
        heads = self._heads(size)
        torch.index_select(token_ids, 0, heads[5, :size], out=heads[0, :size])

    def batch(self, rows: int, max_query_len: int, max_context_len: int) -> Batch:
        """What is received for `rows` rows, of up to as many sequences."""
        heads = self._heads(rows)
        token_ids, positions, slots, context_lens = heads[:4, :rows]
        return Batch(
            token_ids=token_ids,
            positions=positions,
            slots=slots,
            query_starts=heads[4, : rows + 1],
            context_lens=context_lens,
            block_tables=self._arrived[heads.numel() :][None, : self._width] if rows == 1 else self._tables[:rows],
            logit_rows=self._counts[:rows],
            max_query_len=max_query_len,
            max_context_len=max_context_len,
        )

    def _heads(self, rows: int) -> Tensor:
        """Where the heads of a step of `rows` rows arrive."""
        return self._arrived[: _HEADS * _pitch(rows)].view(_HEADS, _pitch(rows))
