"""Listing directories through the kernel: numbers, positions and what a rewind sees (semantics 5)."""

from __future__ import annotations

import ctypes
import itertools
import os
import random
import signal
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.helpers.mount import Mount, UnionFactory
from tests.helpers.profile import scaled
from tests.t3_fuse.live import errno_of, file_system, modes

pytestmark = pytest.mark.fuse

MANY = scaled(20_000, 100_000)

_libc = ctypes.CDLL(None, use_errno=True)
_buffer = ctypes.create_string_buffer(1 << 16)

Record = tuple[bytes, int, int, int]
"""name, d_ino, d_type, d_off: the position after it."""


def getdents(fd: int) -> list[Record]:
    """One getdents64(2), the records in order; none at the end."""
    size = _libc.getdents64(fd, _buffer, len(_buffer))
    if size < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    data = ctypes.string_at(_buffer, size)
    records = []
    at = 0
    while at < size:
        inode, offset, length, kind = struct.unpack_from("<QqHB", data, at)
        name = data[at + 19 : at + length].split(b"\0", 1)[0]
        records.append((name, inode, kind, offset))
        at += length
    return records


def read_all(fd: int) -> Iterator[Record]:
    while records := getdents(fd):
        yield from records


@contextmanager
def opened(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield fd
    finally:
        os.close(fd)


@modes
def test_names_alone_make_no_nodes(union: UnionFactory, tmp_path: Path, udba: str) -> None:
    """Of a big directory that is listed; what the kernel asks for with attributes is the beginning."""
    for number in range(5000):
        path = tmp_path / "base" / "d" / f"{number:04}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    mount = union(None, udba)
    listing = sorted(os.listdir(mount.path / "d"))
    assert listing == [f"{number:04}" for number in range(5000)]
    assert mount.control({"op": "stats"})["table"]["nodes"] < 2000
    with opened(mount.path / "d") as fd:
        for name, number, kind, _ in read_all(fd):
            if name not in (b".", b".."):
                assert kind == 8
                assert number == (mount.path / "d" / os.fsdecode(name)).stat().st_ino


@modes
def test_d_ino_is_st_ino(union: UnionFactory, tmp_path: Path, udba: str) -> None:
    """For every kind of object on either branch, merged directories, hard links, and after copy-up."""
    for branch in ("top", "base"):
        root = tmp_path / branch
        root.mkdir()
        for directory in (f"dir-{branch}", "dir-both"):
            (root / directory).mkdir()
        for name in (f"file-{branch}", "file-both", f"hard-{branch}"):
            (root / name).write_text(name)
        os.link(root / f"hard-{branch}", root / f"hard2-{branch}")
        os.mkfifo(root / f"fifo-{branch}")
        (root / f"link-{branch}").symlink_to("x")
        os.mknod(root / f"null-{branch}", 0o20666, os.makedev(1, 3))
    mount = union(None, udba)

    def check() -> dict[str, int]:
        numbers = {}
        with os.scandir(mount.path) as entries:
            for entry in entries:
                info = os.lstat(entry.path)
                assert entry.inode() == info.st_ino, entry.name
                assert entry.is_dir(follow_symlinks=False) == os.path.isdir(entry.path)
                assert entry.is_symlink() == os.path.islink(entry.path)
                numbers[entry.name] = info.st_ino
        assert len(numbers) == 16
        assert numbers["hard-base"] == numbers["hard2-base"]
        assert numbers["hard-top"] == numbers["hard2-top"]
        assert len(set(numbers.values())) == 14
        return numbers

    before = check()
    for name in before:
        os.chown(mount.path / name, 7, 8, follow_symlinks=False)
    assert check() == before
    with opened(mount.path / "dir-both") as fd:
        dots = {name: inode for name, inode, _, _ in read_all(fd)}
    assert dots == {b".": before["dir-both"], b"..": os.stat(mount.path).st_ino}


@modes
def test_numbers_for_programs_without_large_files(union: UnionFactory, tmp_path: Path, udba: str) -> None:
    """An inode number or a position of more than 32 bits is EOVERFLOW for them, and the directory cannot be listed.

    Two file systems that number from the same start: no number comes twice.
    """
    with file_system(tmp_path / "top", "tmpfs"), file_system(tmp_path / "base", "tmpfs"):
        for branch in ("top", "base"):
            for number in range(100):
                (tmp_path / branch / f"{branch}{number}").mkdir()
                (tmp_path / branch / f"{branch}{number}" / "f").touch()
        mount = union(None, udba)
        found = set()
        for _ in range(3):
            with opened(mount.path) as fd:
                records = list(read_all(fd))
            assert max(offset for *_, offset in records) < 1 << 31
            assert len({offset for *_, offset in records}) == len(records) == 202
        for name in os.listdir(mount.path):
            found |= {(mount.path / name).stat().st_ino, (mount.path / name / "f").stat().st_ino}
        assert len(found) == 400
        assert max(found) < 1 << 32
        (mount.path / "base0/f").write_text("copied up")
        (mount.path / "new").touch()
        assert {(mount.path / name).stat().st_ino for name in ("base0/f", "new")} - found
        assert (mount.path / "new").stat().st_ino < 1 << 32
        assert (mount.path / "base0/f").stat().st_ino in found


@modes
def test_dots_and_types(union: UnionFactory, tmp_path: Path, udba: str) -> None:
    (tmp_path / "base/d/sub").mkdir(parents=True)
    (tmp_path / "base/d/f").touch()
    (tmp_path / "base/d/l").symlink_to("f")
    os.mkfifo(tmp_path / "base/d/p")
    mount = union(None, udba)
    with opened(mount.path / "d") as fd:
        records = list(read_all(fd))
    assert [name for name, *_ in records][:2] == [b".", b".."]
    assert {name: kind for name, _, kind, _ in records} == {
        b".": 4, b"..": 4, b"sub": 4, b"f": 8, b"l": 10, b"p": 1  # DT_*, readdir(3)
    }  # fmt: skip
    root = {name: inode for name, inode, _, _ in _list(mount.path)}
    assert root[b"."] == os.stat(mount.path).st_ino
    assert root[b"d"] == os.stat(mount.path / "d").st_ino == records[0][1]


def _list(path: Path) -> list[Record]:
    with opened(path) as fd:
        return list(read_all(fd))


@modes
def test_rewind_sees_what_is_new(union: UnionFactory, tmp_path: Path, udba: str) -> None:
    (tmp_path / "base").mkdir()
    for name in ("a", "b", "c"):
        (tmp_path / "base" / name).touch()
    mount = union(None, udba)
    with opened(mount.path) as fd:
        assert {name for name, *_ in read_all(fd)} == {b".", b"..", b"a", b"b", b"c"}
        (mount.path / "new").touch()
        (mount.path / "a").unlink()
        assert list(read_all(fd)) == []
        os.lseek(fd, 0, os.SEEK_SET)
        assert {name for name, *_ in read_all(fd)} == {b".", b"..", b"b", b"c", b"new"}
        if udba != "none":  # none does not promise to see what is done on a branch
            (tmp_path / "base/direct").touch()
            mount.flush()
            os.lseek(fd, 0, os.SEEK_SET)
            assert b"direct" in {name for name, *_ in read_all(fd)}


@modes
def test_a_removed_directory_that_is_open(union: UnionFactory, tmp_path: Path, udba: str) -> None:
    """ENOENT, as from a native file system (iterate_dir() of a dead directory)."""
    (tmp_path / "base/d").mkdir(parents=True)
    mount = union(None, udba)
    with opened(mount.path / "d") as fd:
        (mount.path / "d").rmdir()
        assert errno_of(lambda: getdents(fd)) == "ENOENT"


def _disturb(mount: Mount, direct: Path, seed: int) -> None:
    """Until killed: create, delete and rename names that begin with `x`, through the mount and on the branch."""
    rng = random.Random(seed)
    for number in itertools.count():
        root = direct if rng.random() < 0.3 else mount.path / "d"
        name = root / f"x{rng.randrange(1000)}"
        try:
            if number % 3 == 0:
                os.close(os.open(name, os.O_CREAT | os.O_WRONLY))
            elif number % 3 == 1:
                os.unlink(name)
            else:
                os.rename(name, root / f"x{rng.randrange(1000)}")
        except (FileNotFoundError, FileExistsError):
            continue


@pytest.mark.usefixtures("in_memory")
@modes
def test_positions_hold_in_a_huge_changing_directory(union: UnionFactory, tmp_path: Path, udba: str) -> None:
    """Two passes over very many names, and a thousand jumps to remembered positions, while others change it.

    What nobody touches is there exactly once, and after the jump to a position comes what came there before.
    """
    for branch, numbers in (("top", range(0, MANY, 2)), ("base", range(1, MANY, 2))):
        (tmp_path / branch / "d").mkdir(parents=True)
        fd = os.open(tmp_path / branch / "d", os.O_RDONLY)
        for number in numbers:
            os.close(os.open(f"f{number}", os.O_CREAT | os.O_WRONLY, dir_fd=fd))
        os.close(fd)
    for number in range(0, 1000, 2):
        (tmp_path / "base/d" / f"x{number}").touch()
    wanted = {b"f%d" % number for number in range(MANY)}
    mount = union(None, udba)
    direct = tmp_path / "base/d" if udba != "none" else mount.path / "d"
    child = os.fork()
    if child == 0:
        try:
            _disturb(mount, direct, 20)
        finally:
            os._exit(1)
    try:
        with opened(mount.path / "d") as fd:
            records = list(read_all(fd))
            stable = [record for record in records if record[0] in wanted]
            assert len(stable) == MANY
            assert {name for name, *_ in stable} == wanted
            assert len({offset for *_, offset in records}) == len(records)
            assert max(offset for *_, offset in records) < 1 << 31, "for an off_t of 32 bits"
            rng = random.Random(0)
            for _ in range(1000):
                place = rng.randrange(len(records) - 1)
                os.lseek(fd, records[place][3], os.SEEK_SET)
                after: list[bytes] = []
                while not after and (part := getdents(fd)):  # hundreds in a row may be the others'
                    after = [name for name, *_ in part if name in wanted]
                expected = (name for name, *_ in itertools.islice(records, place + 1, None) if name in wanted)
                assert after == list(itertools.islice(expected, len(after)))
                assert after
            os.lseek(fd, records[-1][3], os.SEEK_SET)
            assert getdents(fd) == []
            os.lseek(fd, 0, os.SEEK_SET)
            assert sum(name in wanted for name, *_ in read_all(fd)) == MANY
        assert os.waitpid(child, os.WNOHANG) == (0, 0), "the other process still runs"
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


@modes
def test_deleting_while_reading(union: UnionFactory, tmp_path: Path, udba: str) -> None:
    """What rm -r does: every name is met, although each is removed as soon as it was read."""
    for branch in ("top", "base"):
        (tmp_path / branch / "d").mkdir(parents=True)
        for number in range(3000):
            (tmp_path / branch / "d" / f"{branch}{number}").touch()
    mount = union(None, udba)
    with opened(mount.path / "d") as fd:
        while records := getdents(fd):
            for name, *_ in records:
                if name not in (b".", b".."):
                    os.unlink(name, dir_fd=fd)
    assert os.listdir(mount.path / "d") == []
    (mount.path / "d").rmdir()
    assert not (mount.path / "d").exists()
