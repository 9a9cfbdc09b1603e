"""Blocks of a KV cache as files in a directory that any number of processes share.

Knows digests, bytes and files; knows no tensors, no threads and nothing of what the bytes mean.

    DIR / fingerprint, 64 hex digits / digest, 64 hex digits .kv       a block; its time of modification is its last use
                                     / digest . 8 hex digits .part     a block being written, locked by its writer

    file: magic | fingerprint | digest | tokens, int64 each | content | XXH3-128 of all before

The directory is its own index: a block is there if its file is. Files appear whole, by a rename, and are never changed
but for their time. A process that dies leaves at most a `.part`, whose lock died with it. What a power failure or
anything else did to a file shows in its checksum. Any file may vanish at any moment, which is a miss.

A block is never more recent than the one before it in its chain, so that the ends of chains are removed first, and it
is written only behind one that is there: nobody could find it otherwise.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import secrets
import stat
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import xxhash

from tern.errors import OptionError

logger = logging.getLogger(__name__)

MAGIC = b"TERN-KV1"
CHECKSUM_BYTES = 16
KEPT_SHARE = 0.9  # of the limit that stays when the limit is passed, so that not every block begins a search
UNSEEN_SHARE = 1 / 16  # of the limit that may be written before other processes' writing is looked at again
STEP_NS = 1000  # by which a block is older than the one before it
PAGE_BYTES = 4096  # files take whole pages of the disk
ABANDONED_SECONDS = 3600.0  # after which a .part counts as abandoned where files cannot be locked

_READING = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW  # a pipe or a link would be no file of ours
_FOLDER = re.compile(r"[0-9a-f]{64}")
_BLOCK = re.compile(r"[0-9a-f]{64}\.kv")
_PART = re.compile(r"[0-9a-f]{64}\.[0-9a-f]{8}\.part")


def open_directory(path: str | os.PathLike[str]) -> Path:
    """The directory for blocks, made if need be, with access for its user alone: its files tell what was said.

    Raises `OptionError` if it is no directory or cannot be written to.
    """
    directory = Path(os.path.expanduser(path)).absolute()
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise OptionError(
            f"kv_cache_dir is {os.fspath(path)!r}, where no files can be made ({reason}): "
            "give a directory that this user may write to."
        ) from None
    return directory


class _Found(NamedTuple):
    """A block's file as a search sees it; the first field orders by last use (ns)."""

    last_use: int
    size: int
    path: str


class BlockFiles:
    """The blocks of one network and layout, whose digests `fingerprint` (32 bytes) keeps apart from all others.

    All files below `directory`, whatever their fingerprint, together take at most `limit_bytes`, save what several
    processes write between two looks (a sixteenth of the limit each). One thread may write while another reads.
    """

    def __init__(self, directory: Path, fingerprint: bytes, *, content_bytes: int, limit_bytes: int) -> None:
        self.directory = directory
        self.limit_bytes = limit_bytes
        self._fingerprint = fingerprint
        self._folder = directory / fingerprint.hex()
        self._content_bytes = content_bytes
        self._used = limit_bytes  # until the first look
        self._unseen = 0
        self._warned: set[Path] = set()

    def file_bytes(self, tokens: bytes) -> int:
        """Bytes of a block's file."""
        return len(MAGIC) + len(self._fingerprint) + 32 + len(tokens) + self._content_bytes + CHECKSUM_BYTES

    def expect(self, digest: bytes) -> bool:
        """Have the system fetch a block that will be read soon; False if it is not there."""
        try:
            file = os.open(self._path(digest), _READING)
        except OSError as error:
            return not isinstance(error, FileNotFoundError)  # what else is wrong, `read` will say
        if hasattr(os, "posix_fadvise"):
            with suppress(OSError):  # it is no file
                os.posix_fadvise(file, 0, 0, os.POSIX_FADV_WILLNEED)
        os.close(file)
        return True

    def read(self, digest: bytes, tokens: bytes, into: memoryview) -> bool:
        """Read a block's content into `into` [content_bytes]; False if it is not there, and then `into` is undefined.

        A file that is not what was written there is removed, with one warning.
        """
        path = self._path(digest)
        try:
            file = os.open(path, _READING)
        except FileNotFoundError:
            return False
        except OSError as error:
            self._discard(path, error.strerror)
            return False
        try:
            problem = self._read(file, self._head(digest, tokens), into)
            _leave_page_cache(file)
        except OSError as error:
            problem = error.strerror
        finally:
            os.close(file)
        if problem is not None:
            self._discard(path, problem)
        return problem is None

    def renew(self, digest: bytes, parent: bytes | None) -> bool:
        """Note that a block is used now, after `parent`, the one before it; False if either is not there."""
        stamp = self._stamp(parent)
        if stamp is None:
            return False
        try:
            os.utime(self._path(digest), ns=(stamp, stamp))
        except FileNotFoundError:
            return False
        return True

    def write(self, digest: bytes, parent: bytes | None, tokens: bytes, content: memoryview) -> bool:
        """Write a block; False if `parent`, the block before it, is not there, or no room can be made.

        Raises `OSError` if that fails, and leaves nothing then.
        """
        size = disk_bytes(self.file_bytes(tokens))
        if self._used + size > self.limit_bytes or self._unseen > self.limit_bytes * UNSEEN_SHARE:
            self.make_room(size)
        stamp = self._stamp(parent)
        if stamp is None or self._used + size > self.limit_bytes:
            return False
        head = self._head(digest, tokens)
        checksum = xxhash.xxh3_128(head)
        checksum.update(content)
        try:
            self._write(self._path(digest), stamp, (head, content, checksum.digest()))
        except FileNotFoundError:  # swept by another process before it was locked
            return False
        self._used += size
        self._unseen += size
        return True

    def remove(self, digest: bytes) -> None:
        """Let a block not be found again."""
        _unlink(self._path(digest))

    def make_room(self, needed: int = 0) -> None:
        """Look at the whole directory: remove what dead processes left, and the least recently used beyond the limit.

        `needed` bytes are left free within the limit.
        """
        found = sorted(self._search())
        used = sum(block.size for block in found)
        if used + needed > self.limit_bytes:
            kept = max(0, min(int(self.limit_bytes * KEPT_SHARE), self.limit_bytes - needed))
            for block in found:
                if used <= kept:
                    break
                used -= block.size if _unlink(block.path) else 0
        self._used, self._unseen = used, 0

    def _path(self, digest: bytes) -> Path:
        return self._folder / f"{digest.hex()}.kv"

    def _head(self, digest: bytes, tokens: bytes) -> bytes:
        return MAGIC + self._fingerprint + digest + tokens

    def _stamp(self, parent: bytes | None) -> int | None:
        """The time of last use for a block behind `parent`; None if that is not there."""
        if parent is None:
            return time.time_ns()
        try:
            return os.stat(self._path(parent)).st_mtime_ns - STEP_NS
        except FileNotFoundError:
            return None

    def _read(self, file: int, head: bytes, into: memoryview) -> str | None:
        """Read a block's file, and say what is wrong with it, if anything is."""
        status = os.fstat(file)
        expected = len(head) + self._content_bytes + CHECKSUM_BYTES
        if not stat.S_ISREG(status.st_mode):
            return "it is no file"
        if status.st_size != expected:
            return f"it has {status.st_size} bytes instead of {expected}"
        found, stored = bytearray(len(head)), bytearray(CHECKSUM_BYTES)
        if os.preadv(file, [found, into, stored], 0) != expected:
            return "it ends early"
        if found != head:
            return "it holds another block"
        checksum = xxhash.xxh3_128(head)
        checksum.update(into)
        return None if checksum.digest() == stored else "its checksum is wrong"

    def _discard(self, path: Path, problem: str | None) -> None:
        """Warn of a file once, and remove it if it is a file."""
        if path not in self._warned:
            self._warned.add(path)
            logger.warning("A block of the KV cache is computed again, because %s is not usable: %s", path, problem)
        with suppress(OSError):
            if stat.S_ISREG(os.lstat(path).st_mode):
                os.unlink(path)

    def _write(self, path: Path, stamp: int, parts: Iterable[bytes | memoryview]) -> None:
        """Write a whole file under a temporary name, then give it its own."""
        temporary = path.with_suffix(f".{secrets.token_hex(4)}.part")
        file = self._create(temporary)
        try:
            with suppress(OSError):  # not every file system has locks
                fcntl.flock(file, fcntl.LOCK_EX)
            for part in parts:
                rest = memoryview(part)
                while rest:
                    rest = rest[os.write(file, rest) :]
            os.utime(file, ns=(stamp, stamp))
            os.rename(temporary, path)
            _leave_page_cache(file)
        except BaseException:
            _unlink(temporary)
            raise
        finally:
            os.close(file)

    def _create(self, path: Path) -> int:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        try:
            return os.open(path, flags, 0o600)
        except FileNotFoundError:  # the first block, or another process has removed the empty folder
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            return os.open(path, flags, 0o600)

    def _search(self) -> Iterator[_Found]:
        """Every block of every fingerprint; abandoned `.part` files and empty folders are removed on the way."""
        for folder in _entries(self.directory):
            if not _FOLDER.fullmatch(folder.name) or not folder.is_dir(follow_symlinks=False):
                continue
            for entry in _entries(folder.path):
                with suppress(FileNotFoundError):
                    status = entry.stat(follow_symlinks=False)
                    if not stat.S_ISREG(status.st_mode):
                        continue
                    if _BLOCK.fullmatch(entry.name):
                        yield _Found(status.st_mtime_ns, disk_bytes(status.st_size), entry.path)
                    elif _PART.fullmatch(entry.name) and _is_abandoned(entry.path, status.st_mtime):
                        _unlink(entry.path)
            with suppress(OSError):
                os.rmdir(folder.path)  # does nothing unless it is empty


def _entries(directory: str | Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(directory) as entries:
            return list(entries)
    except FileNotFoundError:
        return []


def _is_abandoned(path: str, changed: float) -> bool:
    """Whether the writer of a `.part` is dead: its lock, which it takes for as long as it writes, is gone."""
    try:
        file = os.open(path, _READING)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        finally:
            os.close(file)
    except BlockingIOError:
        return False
    except OSError:
        return time.time() - changed > ABANDONED_SECONDS
    return True


def disk_bytes(size: int) -> int:
    """What a file of `size` bytes takes of the disk."""
    return -(-size // PAGE_BYTES) * PAGE_BYTES


def _unlink(path: str | Path) -> bool:
    """Remove a file; whether it is gone."""
    try:
        os.unlink(path)
    except FileNotFoundError:  # another process was as quick
        return True
    except OSError:
        return False
    return True


def _leave_page_cache(file: int) -> None:
    """Begin to write what is not yet on the disk, and let memory go for what the cache of the engine holds anyway."""
    if hasattr(os, "posix_fadvise"):
        with suppress(OSError):  # it is no file, or a file system without a cache
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
