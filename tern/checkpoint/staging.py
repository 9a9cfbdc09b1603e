"""Stored tensors -> a GPU, read ahead by a thread of its own. Knows pieces and their places; knows no names.

    files --(reader's thread)--> one of DEPTH buffers of CHUNK_BYTES --(copy engine)--> a run of rows on the device

Plain floats go in runs of rows, in the type and orientation of the file: to convert and to turn them over is the
device's work. Other forms become floats in the reader's thread, a tensor at a time, in a buffer if that holds it. At
any time at most DEPTH runs or tensors are on their way, so that memory beside the network is small and the files are
read while what came before is copied and rounded. The buffers are pinned where there is CUDA: only from such does a
copy go on beside the program.
"""

from __future__ import annotations

import math
import queue
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType

import torch
from torch import Tensor

from tern.checkpoint.placement import Piece, Place, Shape
from tern.checkpoint.safetensors_file import WEIGHT_DTYPES, MappedFiles, TensorEntry
from tern.checkpoint.stored_weights import fill, is_plain

CHUNK_BYTES = 32 * 2**20
"""Above what a row of any network may take (a vocabulary of 2^22 in float32, transposed)."""
DEPTH = 4


@dataclass(frozen=True)
class Load:
    """What one stored tensor, or `expert` of a stored stack, fills: `place` of a matrix, or of a vector, of `dtype`."""

    piece: Piece
    place: Place
    dtype: torch.dtype
    expert: int | None = None

    @property
    def shape(self) -> Shape:
        """The shape of the place."""
        return self.piece.shape if self.expert is None else self.piece.shape[1:]

    @property
    def stored_shape(self) -> Shape:
        """The shape in which it travels: as it is stored, where the file holds floats."""
        return self.shape[::-1] if self.turned else self.shape

    @property
    def turned(self) -> bool:
        """Whether it travels transposed."""
        return self.piece.transposed and is_plain(self.piece.entry)

    def runs(self) -> Iterator[slice]:
        """The rows of `stored_shape` that travel together."""
        rows, *rest = self.stored_shape
        if not is_plain(self.piece.entry):
            yield slice(0, rows)
            return
        row_bytes = math.prod(rest) * WEIGHT_DTYPES[self.piece.entry.dtype].itemsize
        step = max(1, CHUNK_BYTES // max(1, row_bytes))
        for start in range(0, rows, step):
            yield slice(start, min(rows, start + step))


def loads_of(pieces: Iterable[Piece], dtype: torch.dtype, expert: int | None = None) -> list[Load]:
    """What fills a tensor of `dtype`, or one `expert` of a stack of them."""
    if expert is None:
        return [Load(piece, piece.place, dtype) for piece in pieces]
    loads = []
    for piece in pieces:
        first, *rest = piece.place
        if first in (expert, slice(None)):
            loads.append(Load(piece, tuple(rest), dtype, None if first == expert else expert))
    return loads


@dataclass
class _Buffer:
    """Memory of the host; `copied`: the last copy from it, None if none can be under way."""

    memory: Tensor
    copied: torch.cuda.Event | None = None


class Staging:
    """Brings `loads` to `device`; they are asked for by `fill`, in their order. A context manager: it ends its thread.

    An error of the reader is raised by the `fill` that comes to it.
    """

    def __init__(self, loads: Sequence[Load], files: MappedFiles, device: torch.device) -> None:
        self._device = device
        self._loads = loads
        self._files = files
        self._free: queue.SimpleQueue[_Buffer | None] = queue.SimpleQueue()
        self._ready: queue.SimpleQueue[tuple[Tensor, _Buffer] | BaseException] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, name="tern-reads-weights", daemon=True)

    def __enter__(self) -> Staging:
        if self._loads:
            pinned = self._device.type == "cuda"
            for _ in range(DEPTH):
                self._free.put(_Buffer(torch.empty(CHUNK_BYTES, dtype=torch.uint8, pin_memory=pinned)))
            self._reader.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._loads:
            self._free.put(None)
            self._reader.join()

    def fill(self, tensor: Tensor, loads: Iterable[Load]) -> None:
        """Fill `tensor` on the device from the next loads, which must be these."""
        for load in loads:
            target = tensor[load.place].t() if load.turned else tensor[load.place]
            for rows in load.runs():
                arrived = self._ready.get()
                if isinstance(arrived, BaseException):
                    raise arrived
                run, buffer = arrived
                target[rows].copy_(run.to(self._device, non_blocking=True))
                if self._device.type == "cuda":
                    buffer.copied = torch.cuda.current_stream(self._device).record_event()
                self._free.put(buffer)

    def _read(self) -> None:
        """The reader's thread."""
        try:
            for load in self._loads:
                for rows in load.runs():
                    buffer = self._free.get()
                    if buffer is None:
                        return
                    if buffer.copied is not None:
                        buffer.copied.synchronize()
                    self._ready.put((self._host_run(load, rows, buffer), buffer))
        except BaseException as error:
            self._ready.put(error)

    def _host_run(self, load: Load, rows: slice, buffer: _Buffer) -> Tensor:
        """The rows in the host's memory: a plain tensor's, else the floats made of the whole tensor."""
        entry = load.piece.entry
        if not (isinstance(entry, TensorEntry) and is_plain(entry)):
            made = self._room(load, buffer)
            fill(made, entry, self._files, transposed=load.piece.transposed, expert=load.expert)
            return made
        stored = self._files.tensor(entry)
        if load.expert is not None:
            stored = stored.view(-1, *load.shape)[load.expert]
        part = stored.view(load.stored_shape)[rows]
        run = buffer.memory[: part.nbytes].view(part.dtype).view(part.shape)
        run.copy_(part)
        return run

    def _room(self, load: Load, buffer: _Buffer) -> Tensor:
        """Where the floats of a whole tensor are made: in the buffer, as far as it is large enough."""
        size = math.prod(load.shape) * load.dtype.itemsize
        if size > buffer.memory.nbytes:
            return torch.empty(load.shape, dtype=load.dtype)
        return buffer.memory[:size].view(load.dtype).view(load.shape)
