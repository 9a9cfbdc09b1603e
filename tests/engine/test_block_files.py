"""Blocks in files, the store alone: damage, crashes, company, limits and a disk that is full."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tern.engine.block_files import BlockFiles, open_directory
from tern.errors import OptionError

TOKENS = bytes(range(16))
CONTENT = bytes(range(100, 200))
FINGERPRINT = b"f" * 32
PLENTY = 10**9


def store(
    directory: Path, *, limit: int = PLENTY, fingerprint: bytes = FINGERPRINT, content: int = len(CONTENT)
) -> BlockFiles:
    return BlockFiles(directory, fingerprint, content_bytes=content, limit_bytes=limit)


def digest(number: int) -> bytes:
    return number.to_bytes(32)


def path(directory: Path, number: int, fingerprint: bytes = FINGERPRINT) -> Path:
    return directory / fingerprint.hex() / f"{digest(number).hex()}.kv"


def write(files: BlockFiles, number: int, parent: int | None = None) -> bool:
    before = None if parent is None else digest(parent)
    return files.write(digest(number), before, TOKENS, memoryview(CONTENT))


def read(files: BlockFiles, number: int, tokens: bytes = TOKENS) -> bytes | None:
    into = memoryview(bytearray(len(CONTENT)))
    return bytes(into) if files.read(digest(number), tokens, into) else None


def names(directory: Path) -> set[str]:
    return {str(found.relative_to(directory)) for found in directory.rglob("*") if found.is_file()}


def set_time(file: Path, seconds: int) -> None:
    os.utime(file, (seconds, seconds))


def test_a_block_is_read_back_by_another_process(tmp_path: Path) -> None:
    first = store(tmp_path)
    assert write(first, 1)
    assert read(store(tmp_path), 1) == CONTENT
    assert read(store(tmp_path), 2) is None
    assert (store(tmp_path).expect(digest(1)), store(tmp_path).expect(digest(2))) == (True, False)
    assert path(tmp_path, 1).stat().st_size == first.file_bytes(TOKENS)
    assert names(tmp_path) == {f"{FINGERPRINT.hex()}/{digest(1).hex()}.kv"}


def test_nobody_else_may_read_what_was_said(tmp_path: Path) -> None:
    directory = open_directory(tmp_path / "a" / "b")
    write(store(directory), 1)
    for found in (directory, path(directory, 1).parent, path(directory, 1)):
        assert stat.S_IMODE(found.stat().st_mode) & 0o077 == 0


def test_damage_to_any_byte_is_a_miss_with_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(store(tmp_path), 1)
    sound = path(tmp_path, 1).read_bytes()
    for offset in range(len(sound)):
        files = store(tmp_path)
        damaged = bytearray(sound)
        damaged[offset] ^= 1 << offset % 8
        path(tmp_path, 1).write_bytes(damaged)
        caplog.clear()
        assert read(files, 1) is None, f"byte {offset} counts for nothing"
        assert not path(tmp_path, 1).exists()
        assert len(caplog.records) == 1
        path(tmp_path, 1).write_bytes(damaged)
        assert read(files, 1) is None
        assert len(caplog.records) == 1
        assert str(path(tmp_path, 1)) in caplog.text
    assert write(files, 1)
    assert path(tmp_path, 1).read_bytes() == sound


def test_a_file_of_any_other_length_is_a_miss(tmp_path: Path) -> None:
    files = store(tmp_path)
    write(files, 1)
    sound = path(tmp_path, 1).read_bytes()
    for wrong in [sound[:length] for length in range(len(sound))] + [sound + b"\0", sound * 2]:
        path(tmp_path, 1).write_bytes(wrong)
        assert read(files, 1) is None
        assert not path(tmp_path, 1).exists()


@pytest.mark.parametrize("stranger", ["digest", "tokens", "fingerprint", "noise"])
def test_another_blocks_file_is_a_miss(tmp_path: Path, stranger: str) -> None:
    files = store(tmp_path)
    write(files, 1)
    sound = path(tmp_path, 1).read_bytes()
    if stranger == "fingerprint":
        other = b"g" * 32
        write(store(tmp_path, fingerprint=other), 1)
        sound = path(tmp_path, 1, other).read_bytes()
    number = 2 if stranger == "digest" else 1
    path(tmp_path, number).write_bytes(os.urandom(len(sound)) if stranger == "noise" else sound)
    assert read(files, number, tokens=bytes(16) if stranger == "tokens" else TOKENS) is None


@pytest.mark.parametrize("kind", ["directory", "link", "pipe"])
def test_what_is_no_file_is_ignored_and_left_alone(tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    files = store(tmp_path)
    write(files, 1)
    path(tmp_path, 1).rename(tmp_path / "elsewhere")
    place = path(tmp_path, 1)
    if kind == "directory":
        place.mkdir()
    elif kind == "link":
        place.symlink_to(tmp_path / "elsewhere")
    else:
        os.mkfifo(place)
    assert files.expect(digest(1))
    assert read(files, 1) is None
    assert read(files, 1) is None
    files.make_room(PLENTY)
    assert os.path.lexists(place)
    assert (tmp_path / "elsewhere").exists()
    assert len(caplog.records) == 1


def test_a_block_is_written_and_renewed_only_behind_the_one_before_it(tmp_path: Path) -> None:
    files = store(tmp_path)
    assert not write(files, 2, parent=1)
    assert write(files, 1)
    assert write(files, 2, parent=1)
    assert files.renew(digest(2), digest(1))
    files.remove(digest(1))
    assert not files.renew(digest(2), digest(1))
    assert not files.renew(digest(1), None)
    assert not write(files, 3, parent=1)
    assert read(files, 2) == CONTENT
    files.remove(digest(1))  # gone already


def test_the_ends_of_chains_are_older_than_their_beginnings(tmp_path: Path) -> None:
    files = store(tmp_path)
    write(files, 1)
    set_time(path(tmp_path, 1), 1000)
    write(files, 2, parent=1)
    write(files, 3, parent=2)
    times = [path(tmp_path, number).stat().st_mtime_ns for number in (1, 2, 3)]
    assert times == sorted(times, reverse=True)
    assert len(set(times)) == 3
    assert times[2] > 999 * 10**9
    for number, parent in ((1, None), (2, digest(1)), (3, digest(2))):
        assert files.renew(digest(number), parent)
    renewed = [path(tmp_path, number).stat().st_mtime_ns for number in (1, 2, 3)]
    assert renewed == sorted(renewed, reverse=True)
    assert renewed[2] > 1001 * 10**9


def test_the_least_recently_used_go_first_whatever_their_fingerprint(tmp_path: Path) -> None:
    limit = 10 * 4096
    files, other = store(tmp_path, limit=limit), store(tmp_path, fingerprint=b"g" * 32)
    for number in range(5):
        write(other, number)
        set_time(path(tmp_path, number, b"g" * 32), 100 + number)
    (tmp_path / "notes.txt").write_text("not ours")
    (path(tmp_path, 0, b"g" * 32).parent / "other.kv").write_text("not ours either" * 10_000)
    for number in range(5):
        assert write(files, number)
        set_time(path(tmp_path, number), 200 + number)
    assert len(names(tmp_path)) == 12, "nothing is removed within the limit"
    assert write(files, 5)
    assert [path(tmp_path, number, b"g" * 32).exists() for number in range(5)] == [False, True, True, True, True]
    assert [read(files, number) for number in range(6)] == [CONTENT] * 6
    assert (tmp_path / "notes.txt").exists()
    assert (path(tmp_path, 0, b"g" * 32).parent / "other.kv").exists()


@pytest.mark.parametrize("blocks", [1, 2, 7, 40])
def test_the_limit_holds_after_every_write(tmp_path: Path, blocks: int) -> None:
    files = store(tmp_path, limit=blocks * 4096 + 100)
    for number in range(50):
        write(files, number, parent=number - 1 if number % 10 else None)
        assert len(names(tmp_path)) <= blocks
    assert len(names(tmp_path)) >= blocks // 2


def test_a_chain_longer_than_the_limit_keeps_its_beginning(tmp_path: Path) -> None:
    files = store(tmp_path, limit=20 * 4096)
    for number in range(60):
        write(files, number, parent=number - 1 if number else None)
    kept = [path(tmp_path, number).exists() for number in range(60)]
    assert sum(kept) >= 18
    assert kept == sorted(kept, reverse=True), "a block without those before it is of no use"


def test_two_stores_on_one_directory_share_and_bound_it_together(tmp_path: Path) -> None:
    limit = 32 * 4096
    pair = store(tmp_path, limit=limit), store(tmp_path, limit=limit)
    for number in range(200):
        writer, reader = pair if number % 3 else pair[::-1]
        assert write(writer, number)
        assert read(reader, number) == CONTENT
        assert len(names(tmp_path)) <= 32 + 2 * 3, "two sixteenths of the limit may not have been seen yet"
        assert write(reader, number), "the same block twice at the same time is one file"
    assert 20 < len(names(tmp_path)) <= 38


def test_files_may_vanish_at_any_time(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ours, theirs = store(tmp_path), store(tmp_path, limit=4096)
    write(ours, 1)
    write(ours, 2, parent=1)
    theirs.make_room(4096)
    assert names(tmp_path) == set()
    assert read(ours, 1) is None
    assert not ours.renew(digest(2), digest(1))
    theirs.make_room()
    assert not path(tmp_path, 1).parent.exists()
    assert write(ours, 1), "the folder is made again"
    assert read(ours, 1) == CONTENT
    assert not caplog.records


def test_what_dead_writers_left_is_swept_and_what_live_ones_write_is_not(tmp_path: Path) -> None:
    files = store(tmp_path)
    write(files, 1)
    folder = path(tmp_path, 1).parent
    dead, live = folder / f"{digest(2).hex()}.01234567.part", folder / f"{digest(3).hex()}.89abcdef.part"
    foreign = folder / "download.part"
    for found in (dead, live, foreign):
        found.write_bytes(CONTENT)
    with live.open("rb") as writer:
        fcntl.flock(writer, fcntl.LOCK_EX)
        files.make_room()
        assert [found.exists() for found in (dead, live, foreign)] == [False, True, True]
    files.make_room()
    assert [found.exists() for found in (dead, live, foreign)] == [False, False, True]
    assert read(files, 1) == CONTENT


def test_where_nothing_can_be_locked_age_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    files = store(tmp_path)
    assert write(files, 1)
    old, new = (path(tmp_path, 1).parent / f"{digest(2).hex()}.0000000{n}.part" for n in range(2))
    for found in (old, new):
        found.write_bytes(CONTENT)
    set_time(old, 1000)
    files.make_room()
    assert (old.exists(), new.exists()) == (False, True)


@pytest.mark.parametrize("moment", ["write", "utime", "rename"])
def test_a_crash_while_writing_leaves_a_usable_directory(tmp_path: Path, moment: str) -> None:
    code = (
        "import os, sys\nfrom pathlib import Path\nfrom tern.engine.block_files import BlockFiles\n"
        f"files = BlockFiles(Path(sys.argv[1]), {FINGERPRINT!r}, content_bytes=100, limit_bytes=10**9)\n"
        f"write = lambda n: files.write(n.to_bytes(32), None, {TOKENS!r}, memoryview({CONTENT!r}))\n"
        f"write(1)\nos.{moment} = lambda *_, **__: os._exit(9)\nwrite(2)\n"
    )
    assert subprocess.run([sys.executable, "-c", code, tmp_path], check=False).returncode == 9
    assert sum(name.endswith(".part") for name in names(tmp_path)) == 1
    files = store(tmp_path)
    assert read(files, 1) == CONTENT
    assert read(files, 2) is None
    assert write(files, 2)
    assert not any(name.endswith(".part") for name in names(tmp_path))
    assert read(files, 2) == CONTENT


def test_a_full_disk_leaves_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, real = store(tmp_path), os.write

    def nearly_full(file: int, content: Any) -> int:
        if len(content) < 40:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(file, content[:30])

    write(files, 1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", nearly_full)
        with pytest.raises(OSError, match="No space left"):
            write(files, 2, parent=1)
    assert len(names(tmp_path)) == 1
    assert write(files, 2, parent=1)


def test_a_write_in_pieces_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, real = store(tmp_path), os.write
    monkeypatch.setattr(os, "write", lambda file, content: real(file, content[:7]))
    assert write(files, 1)
    assert read(files, 1) == CONTENT


def test_a_temporary_file_swept_before_it_was_locked_is_only_a_miss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, other = store(tmp_path), store(tmp_path)
    write(files, 1)
    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", lambda *_: None)
        real = os.utime
        patch.setattr(os, "utime", lambda file, **times: (other.make_room(), real(file, **times)))
        assert not write(files, 2)
    assert write(files, 2)


def test_files_that_cannot_be_removed_stop_the_writing_at_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = store(tmp_path, limit=3 * 4096)

    def refuse(*_: Any) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "unlink", refuse)
    assert [write(files, number) for number in range(5)] == [True, True, True, False, False]
    assert len(names(tmp_path)) == 3


def test_a_place_that_is_no_directory_or_cannot_be_written_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    file.write_text("")
    for wrong in (file, file / "below", "a\0b"):
        with pytest.raises(OptionError, match=r"kv_cache_dir is .*, where no files can be made \(.*\): give a dir"):
            open_directory(wrong)

    def read_only(*_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("tempfile.TemporaryFile", read_only)
    with pytest.raises(OptionError, match="Read-only file system"):
        open_directory(tmp_path)


def test_a_home_directory_may_be_written_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert open_directory("~/kv") == tmp_path / "kv"
    assert (tmp_path / "kv").is_dir()
