"""The writer between a cache and its files: order, reuse of blocks, removal, a disk that is full, the end."""

from __future__ import annotations

import errno
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from tern.engine import disk_cache
from tern.engine.block_files import BlockFiles
from tern.engine.block_pool import CachedBlock
from tern.engine.disk_cache import PAUSE_SECONDS, DiskCache
from tern.model.batch import KVCache

BLOCKS = 8
PATIENCE = 60.0  # seconds; never reached unless something hangs


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a slow machine write all that is queued."""
    monkeypatch.setattr(disk_cache, "FLUSH_SECONDS", PATIENCE)


def make_kv() -> KVCache:
    """Two layers, one head; every block holds its own number."""
    numbers = torch.arange(float(BLOCKS)).view(1, 1, BLOCKS, 1, 1, 1).repeat(2, 1, 1, 3, 4, 1)
    return KVCache(numbers, numbers + 0.5)


def make_files(directory: Path) -> BlockFiles:
    return BlockFiles(directory, b"f" * 32, content_bytes=make_kv().block_bytes, limit_bytes=10**9)


def chain(count: int, start: int = 0) -> list[CachedBlock]:
    """Contents whose digests are their numbers, each behind the one before it."""
    numbers = range(start, start + count)
    return [CachedBlock(n.to_bytes(32), bytes([n] * 8), (n - 1).to_bytes(32) if n > start else None) for n in numbers]


def offer(cache: DiskCache, contents: list[CachedBlock]) -> None:
    """Offer contents that lie in the blocks of their numbers."""
    cache.offer([(content.tokens[0], content) for content in contents])


def kept(directory: Path, contents: list[CachedBlock]) -> list[float | None]:
    """For each content the number that its block held when it was written."""
    kv = make_kv()
    cache = DiskCache(kv, make_files(directory))
    found: list[float | None] = []
    for content in contents:
        kv.keys[:, :, 7], kv.values[:, :, 7] = -1, -1
        hit = cache.restore([(7, content)])
        found.append(float(kv.keys[0, 0, 7, 0, 0, 0]) if hit else None)
        assert bool((kv.keys[:, :, 7] == (found[-1] if hit else -1)).all())
        assert bool((kv.values[:, :, 7] == (found[-1] + 0.5 if found[-1] is not None else -1)).all())
    cache.close()
    return found


class HeldFiles(BlockFiles):
    """Files whose writer waits at its first write until it may go on, or fails as asked."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory, b"f" * 32, content_bytes=make_kv().block_bytes, limit_bytes=10**9)
        self.reached, self.go_on = threading.Event(), threading.Event()
        self.fails = False
        self.attempts: list[bytes] = []

    def write(self, digest: bytes, parent: bytes | None, tokens: bytes, content: memoryview) -> bool:
        self.attempts.append(digest)
        self.reached.set()
        assert self.go_on.wait(PATIENCE)
        if self.fails:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(digest, parent, tokens, content)


@contextmanager
def held(directory: Path, kv: KVCache, **arguments: Any) -> Iterator[tuple[DiskCache, HeldFiles]]:
    """A cache whose writer has just taken block 0 and now waits."""
    files = HeldFiles(directory)
    cache = DiskCache(kv, files, **arguments)
    offer(cache, chain(1))
    assert files.reached.wait(PATIENCE)
    yield cache, files
    files.go_on.set()
    cache.close()


def test_what_is_offered_is_found_by_the_next(tmp_path: Path) -> None:
    cache = DiskCache(make_kv(), make_files(tmp_path))
    offer(cache, chain(5))
    cache.close()
    assert kept(tmp_path, chain(6)) == [0, 1, 2, 3, 4, None]
    assert cache.bytes_written == 5 * make_files(tmp_path).file_bytes(bytes(8))
    assert cache.bytes_read == 0


def test_a_block_with_a_file_is_not_written_again(tmp_path: Path) -> None:
    for _ in range(2):
        cache = DiskCache(make_kv(), make_files(tmp_path))
        offer(cache, chain(3))
        cache.close()
    assert cache.bytes_written == 0
    cache = DiskCache(make_kv(), make_files(tmp_path))
    assert cache.restore([(0, chain(3)[2])])
    assert cache.bytes_read == make_files(tmp_path).file_bytes(bytes(8))
    cache.close()


@pytest.mark.parametrize("missing", [None, 0, 3, 4, 19])
def test_a_chain_is_read_up_to_its_first_gap_and_not_beyond(tmp_path: Path, missing: int | None) -> None:
    """Longer than what is read ahead; each block goes to its own place."""
    contents, kv = chain(20), make_kv()
    cache = DiskCache(kv, make_files(tmp_path))
    cache.offer([(content.tokens[0] % BLOCKS, content) for content in contents])
    cache.close()
    if missing is not None:
        make_files(tmp_path).remove(contents[missing].digest)
    for part in (kv.keys, kv.values):
        part.fill_(-1)
    places = [BLOCKS - 1 - number % BLOCKS for number in range(20)]
    count = cache.restore(zip(places, contents, strict=True))
    assert count == (20 if missing is None else missing)
    for place in range(BLOCKS):
        filled = [number % BLOCKS for number in range(count) if places[number] == place]
        assert float(kv.keys[1, 0, place, 2, 3, 0]) == (filled[-1] if filled else -1)


def test_behind_a_damaged_block_all_are_written_again_once(tmp_path: Path) -> None:
    contents, size = chain(6), make_files(tmp_path).file_bytes(bytes(8))
    cache = DiskCache(make_kv(), make_files(tmp_path))
    offer(cache, contents)
    cache.close()
    for file in sorted(tmp_path.rglob("*.kv"))[2:5]:
        file.write_bytes(file.read_bytes()[:-1] + b"?")
    cache = DiskCache(make_kv(), make_files(tmp_path))
    assert cache.restore(enumerate(contents)) == 2
    offer(cache, contents)
    wait_until_taken(cache)
    offer(cache, contents)
    cache.close()
    assert cache.bytes_written == 4 * size
    assert kept(tmp_path, contents) == [0, 1, 2, 3, 4, 5]


def wait_until_taken(cache: DiskCache) -> None:
    """Until nothing is queued, though the last block may still be on its way."""
    waiting = threading.Event()
    for _ in range(int(PATIENCE / 0.002)):
        with cache._changed:
            if not cache._queue:
                return
        waiting.wait(0.002)
    raise AssertionError("the writer did not finish")


def test_a_hole_in_a_chain_is_mended_when_the_chain_is_offered_again(tmp_path: Path) -> None:
    contents = chain(4)
    for dropped in (contents[1], None):
        cache = DiskCache(make_kv(), make_files(tmp_path))
        offer(cache, [content for content in contents if content is not dropped])
        cache.close()
        assert kept(tmp_path, contents) == ([0, None, None, None] if dropped else [0, 1, 2, 3])


def test_a_shared_beginning_offered_again_does_not_fall_behind_what_follows_it(tmp_path: Path) -> None:
    with held(tmp_path, make_kv()) as (cache, _):
        offer(cache, chain(4))
        offer(cache, chain(2))
    assert kept(tmp_path, chain(4)) == [0, 1, 2, 3]


def test_a_queued_block_that_is_reused_keeps_its_content(tmp_path: Path) -> None:
    kv = make_kv()
    with held(tmp_path, kv) as (cache, _):
        offer(cache, chain(4))
        cache.rescue(chain(3)[1:])
        kv.keys[:, :, :3] = kv.values[:, :, :3] = 99
        cache.rescue(chain(4))  # once more: what is safe is not copied again
    assert kept(tmp_path, chain(4)) == [0, 1, 2, 3]
    assert cache._aside_bytes == 0


def test_copies_have_a_bound_and_what_is_beyond_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kv = make_kv()
    monkeypatch.setattr(disk_cache, "MAX_ASIDE_BYTES", 2 * kv.block_bytes)
    with held(tmp_path, kv) as (cache, _):
        offer(cache, chain(5)[1:])
        cache.rescue(chain(5))
        kv.keys[:] = kv.values[:] = 99
    assert kept(tmp_path, chain(5)) == [0, 1, 2, None, None]


def test_what_must_not_be_found_is_in_no_file_whenever_it_is_said(tmp_path: Path) -> None:
    contents = chain(5)
    cache = DiskCache(make_kv(), make_files(tmp_path))
    offer(cache, contents[:2])
    cache.close()
    with held(tmp_path / "other", make_kv()) as (cache, _):
        offer(cache, contents)
        cache.remove([contents[0], contents[3]])  # one is being written, one is queued
        offer(cache, contents)
        assert not cache.restore([(5, contents[0])])
    assert kept(tmp_path / "other", contents) == [None, 1, 2, None, None]
    cache = DiskCache(make_kv(), make_files(tmp_path))
    cache.remove(contents[1:2])
    assert not cache.restore([(5, contents[1])])
    cache.close()
    assert kept(tmp_path, contents[:2]) == [0, None]


def test_a_full_disk_pauses_the_writing_with_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    now = [100.0]
    with held(tmp_path, make_kv(), clock=lambda: now[0]) as (cache, files):
        files.fails = True
        offer(cache, chain(3))
        files.go_on.set()
        wait_until_paused(cache)
        offer(cache, chain(4))
        assert not cache._queue, "nothing is queued while the disk is full"
        now[0] += PAUSE_SECONDS
        files.reached.clear()
        offer(cache, chain(4))
        assert files.reached.wait(PATIENCE)
        wait_until_paused(cache)
        assert len(files.attempts) == 2
        now[0] += PAUSE_SECONDS
        files.fails = False
        offer(cache, chain(4))
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "takes no more blocks of the KV cache (No space left on device)" in caplog.text
    assert kept(tmp_path, chain(4)) == [0, 1, 2, 3]


def wait_until_paused(cache: DiskCache) -> None:
    """Until the writer has failed, and forgotten what was queued."""
    waiting = threading.Event()
    for _ in range(int(PATIENCE / 0.002)):
        with cache._changed:
            if cache._is_paused() and not cache._queue:
                return
        waiting.wait(0.002)
    raise AssertionError("the writer did not pause")


def test_a_removal_is_not_forgotten_when_the_disk_is_full(tmp_path: Path) -> None:
    cache = DiskCache(make_kv(), make_files(tmp_path))
    offer(cache, chain(2))
    cache.close()
    with held(tmp_path / "full", make_kv()) as (cache, files):
        files.fails = True
        write_beside(tmp_path / "full", 3)
        cache.remove(chain(1, start=3))
    assert kept(tmp_path / "full", chain(1, start=3)) == [None]


def write_beside(directory: Path, number: int) -> None:
    """As another process would."""
    cache = DiskCache(make_kv(), make_files(directory))
    offer(cache, chain(1, start=number))
    cache.close()
    assert kept(directory, chain(1, start=number)) == [number]


def test_closing_is_bounded_and_final(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(disk_cache, "FLUSH_SECONDS", 0.0)
    monkeypatch.setattr(disk_cache, "HANG_SECONDS", 0.01)
    with held(tmp_path, make_kv()) as (cache, files):
        offer(cache, chain(4)[1:])
        cache.close()  # while the disk hangs
        assert "3 blocks of the KV cache were not written in time" in caplog.text
        offer(cache, chain(6))
        files.go_on.set()
        cache._writer.join(PATIENCE)
        assert not cache._writer.is_alive()
    assert kept(tmp_path, chain(4)) == [0, None, None, None]


def test_a_defect_of_the_writer_stops_it_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    files = make_files(tmp_path)
    monkeypatch.setattr(files, "renew", lambda *_: 1 / 0)
    cache = DiskCache(make_kv(), files)
    offer(cache, chain(2))
    cache._writer.join(PATIENCE)
    assert "Blocks of the KV cache are no longer written" in caplog.text
    offer(cache, chain(2))
    cache.rescue(chain(2))
    cache.remove(chain(2))
    assert not cache.restore([(0, chain(1)[0])])
    cache.close()
