"""The second level of the prefix cache: blocks of the KV cache that outlive it in files.

Knows the cache's memory and the files; knows no requests. Blocks that the pool offers are written by a thread of their
own, in order, straight from the cache: the queue holds their numbers and no copies. Before the pool reuses a block that
is still queued, its bytes are set aside, up to `MAX_ASIDE_BYTES` of them; what does not fit is not written. So the
engine's thread waits for a copy at most, never for a disk, save when it reads the blocks with which a prompt begins.

    offer --> queue --> [there already? renew its last use] --> copy, under the lock --> file
               |  block is reused: copy now, or drop
               '  block must not be found again: remove its file
"""

from __future__ import annotations

import hashlib
import json
import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import islice, takewhile
from typing import TYPE_CHECKING

from tern import __version__
from tern.engine.block_files import BlockFiles, disk_bytes, open_directory
from tern.engine.block_pool import CachedBlock
from tern.engine.options import DEFAULT_KV_CACHE_DIR_SIZE, EngineOptions
from tern.errors import OptionError
from tern.model.batch import KVCache

if TYPE_CHECKING:
    from tern.model import ErnieModel

logger = logging.getLogger(__name__)

MAX_ASIDE_BYTES = 64 * 2**20
READ_AHEAD = 8  # files that the system fetches while one is read: alone, each would wait for the disk
PAUSE_SECONDS = 60.0  # before a disk that took no more blocks is tried again
FLUSH_SECONDS = 5.0  # that queued blocks get when the engine closes
HANG_SECONDS = 1.0  # after which a writer that is late is left to its disk


@dataclass
class _Job:
    """A block to write: where its bytes are, its number in the cache or a copy; with neither, a file to remove."""

    content: CachedBlock
    block: int | None
    aside: bytearray | None = None

    @property
    def removes(self) -> bool:
        return self.block is None and self.aside is None


class DiskCache:
    """Writes offered blocks of `kv` to `files`, and reads them back. A `tern.engine.block_pool.BlockStore`.

    `bytes_read` and `bytes_written` count whole files. One thread may call it, beside its own.
    """

    def __init__(self, kv: KVCache, files: BlockFiles, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.bytes_read = 0
        self.bytes_written = 0
        self._kv = kv
        self._files = files
        self._clock = clock
        self._block_bytes = kv.block_bytes
        self._read_buffer = memoryview(bytearray(self._block_bytes))  # of the engine's thread
        self._write_buffer = memoryview(bytearray(self._block_bytes))  # of the writer
        self._changed = threading.Condition()  # guards what follows
        self._queue: OrderedDict[bytes, _Job] = OrderedDict()  # by digest, each behind the one before it
        self._aside_bytes = 0
        self._unsound: set[bytes] = set()  # files that were, and those behind them that have been written again
        self._paused_until: float | None = None
        self._deadline: float | None = None  # for the writer to be done, once the cache closes
        self._writer = threading.Thread(target=self._run, name="tern-kv-writer", daemon=True)
        self._writer.start()

    @classmethod
    def open(
        cls, options: EngineOptions, model: ErnieModel, kv: KVCache, weights_identity: str | None
    ) -> DiskCache | None:
        """The cache in `options.kv_cache_dir` for the blocks of `kv` under this model; None if there is no directory.

        Raises `OptionError` if nothing can be written there, if a single block takes more than `kv_cache_dir_size`, or
        if it is not known which weights the model has.
        """
        if options.kv_cache_dir is None:
            return None
        if weights_identity is None:
            raise OptionError(
                f"kv_cache_dir is {str(options.kv_cache_dir)!r}, but nothing tells this model's weights from others: "
                "open it with Engine.open, or give weights_identity."
            )
        limit = options.kv_cache_dir_size or DEFAULT_KV_CACHE_DIR_SIZE
        name = fingerprint(options, model, kv, weights_identity)
        files = BlockFiles(open_directory(options.kv_cache_dir), name, content_bytes=kv.block_bytes, limit_bytes=limit)
        needed = disk_bytes(files.file_bytes(bytes(8 * kv.block_size)))
        if needed > limit:
            raise OptionError(
                f"kv_cache_dir_size is {limit} bytes, but a block of {kv.block_size} tokens takes {needed}: allow more."
            )
        return cls(kv, files)

    def offer(self, blocks: Iterable[tuple[int, CachedBlock]]) -> None:
        """Queue blocks, each after the one before it; those that have a file count as used now."""
        with self._changed:
            if self._deadline is not None or self._is_paused():
                return
            for block, content in blocks:
                self._queue.setdefault(content.digest, _Job(content, block))  # keeps its place before those behind it
            self._changed.notify_all()

    def rescue(self, contents: Iterable[CachedBlock]) -> None:
        """Copy what is queued of these: their blocks are about to be reused."""
        with self._changed:
            for content in contents:
                job = self._queue.get(content.digest)
                if job is None or job.block is None:
                    continue
                if self._aside_bytes + self._block_bytes > MAX_ASIDE_BYTES:
                    del self._queue[content.digest]
                    continue
                copy = bytearray(self._block_bytes)
                self._kv.copy_block(job.block, memoryview(copy))
                job.block, job.aside = None, copy
                self._aside_bytes += len(copy)

    def remove(self, contents: Iterable[CachedBlock]) -> None:
        """Let these not be found again, in the queue or in files."""
        with self._changed:
            for content in contents:
                self._drop(content.digest)
                self._queue[content.digest] = _Job(content, None)
            self._changed.notify_all()

    def restore(self, blocks: Iterable[tuple[int, CachedBlock]]) -> int:
        """Read keys and values of a chain into its blocks, up to the first without a sound file -> how many."""
        present = takewhile(lambda pair: self._files.expect(pair[1].digest), blocks)
        window = deque(islice(present, READ_AHEAD))
        count = 0
        while window:
            block, content = window.popleft()
            if not self._read(block, content):
                with self._changed:
                    self._unsound.add(content.digest)
                break
            window.extend(islice(present, 1))
            count += 1
        return count

    def _read(self, block: int, content: CachedBlock) -> bool:
        with self._changed:
            job = self._queue.get(content.digest)
            if job is not None and job.removes:
                return False
        if not self._files.read(content.digest, content.tokens, self._read_buffer):
            return False
        self._kv.fill_block(block, self._read_buffer)
        self.bytes_read += self._files.file_bytes(content.tokens)
        return True

    def close(self) -> None:
        """Take no more blocks, write what is queued for at most `FLUSH_SECONDS`, and end the thread."""
        with self._changed:
            if self._deadline is None:
                self._deadline = time.monotonic() + FLUSH_SECONDS
            self._changed.notify_all()
        self._writer.join(max(0.0, self._deadline - time.monotonic()) + HANG_SECONDS)
        with self._changed:
            if self._queue:
                logger.warning("%d blocks of the KV cache were not written in time", len(self._queue))
                self._queue.clear()

    # --- the writer's thread -----------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._attempt(self._files.make_room)
            while (job := self._next()) is not None:
                self._attempt(partial(self._do, job))
        except Exception:
            logger.exception("Blocks of the KV cache are no longer written")
            with self._changed:
                self._deadline = time.monotonic()
                self._queue.clear()

    def _next(self) -> _Job | None:
        """The first job, which stays in the queue; None to end."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._deadline is not None)
            late = self._deadline is not None and time.monotonic() > self._deadline
            return None if late or not self._queue else next(iter(self._queue.values()))

    def _attempt(self, work: Callable[[], None]) -> None:
        """Do something with files; if they cannot be written, warn once, forget what is queued, and pause."""
        try:
            work()
        except OSError as error:
            with self._changed:
                first = self._paused_until is None
                self._paused_until = self._clock() + PAUSE_SECONDS
                for digest in [digest for digest, job in self._queue.items() if not job.removes]:
                    self._drop(digest)
            if first:
                logger.warning(
                    "%s takes no more blocks of the KV cache (%s): tried again from time to time, requests go on",
                    self._files.directory,
                    error.strerror or error,
                )

    def _do(self, job: _Job) -> None:
        content = job.content
        if job.removes:
            try:
                self._files.remove(content.digest)
            finally:
                self._take(job)
        elif not self._is_doubtful(content) and self._files.renew(content.digest, content.parent):
            self._take(job)
        elif (data := self._take(job)) is not None and self._files.write(
            content.digest, content.parent, content.tokens, data
        ):
            self.bytes_written += self._files.file_bytes(content.tokens)
            with self._changed:
                self._paused_until = None

    def _is_doubtful(self, content: CachedBlock) -> bool:
        """Whether a block stands behind one whose file was not sound, and has not been written again since.

        What spoilt one file of a chain may have spoilt all, and those behind the first are not read any more.
        """
        with self._changed:
            doubtful = content.parent in self._unsound and content.digest not in self._unsound
            if doubtful:
                self._unsound.add(content.digest)
        return doubtful

    def _take(self, job: _Job) -> memoryview | None:
        """Take a job out of the queue -> its block's bytes; None if it is not there any more, or removes a file."""
        with self._changed:
            if self._queue.get(job.content.digest) is not job:
                return None
            self._drop(job.content.digest)
            if job.block is not None:
                self._kv.copy_block(job.block, self._write_buffer)
                return self._write_buffer
            return None if job.aside is None else memoryview(job.aside)

    def _drop(self, digest: bytes) -> None:
        job = self._queue.pop(digest, None)
        if job is not None and job.aside is not None:
            self._aside_bytes -= len(job.aside)

    def _is_paused(self) -> bool:
        return self._paused_until is not None and self._clock() < self._paused_until


def fingerprint(options: EngineOptions, model: ErnieModel, kv: KVCache, weights_identity: str) -> bytes:
    """32 bytes that differ wherever the same tokens would leave other bytes in a block.

    The version of Tern counts too: its kernels may round another way, or have been wrong.
    """
    layout = [[str(part.dtype), *part.shape[:2], *part.shape[3:]] for part in (kv.keys, kv.values)]
    weights = [weights_identity, options.quantization, model.quantization, model.is_split]
    network = [*weights, str(model.dtype), model.device.type]
    return hashlib.sha256(json.dumps([__version__, network, layout]).encode()).digest()
