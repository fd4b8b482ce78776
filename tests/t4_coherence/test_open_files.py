"""Files that are open or mapped through the mount while they change directly on their branch.

A write is seen by the next read (notify: after flush; reval: at once), a file that was replaced or removed stays
what it was for descriptors that are open. What a descriptor must show is what one opened on the branch shows.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.helpers.mount import Mount, UnionFactory

pytestmark = [pytest.mark.fuse, pytest.mark.parametrize("mode", ["reval", "notify"])]

PAGE = mmap.PAGESIZE
OLD = b"old." * (16 * PAGE // 4)
NEW = b"NEW." * (16 * PAGE // 4)
LAYERS = {"top": "rw", "middle": "ro+wh", "base": "ro"}


@contextmanager
def opened(*paths: Path, flags: int = os.O_RDONLY) -> Iterator[list[int]]:
    descriptors: list[int] = []
    try:
        for path in paths:
            descriptors.append(os.open(path, flags))
        yield descriptors
    finally:
        for fd in descriptors:
            os.close(fd)


def content(fd: int) -> bytes:
    return os.pread(fd, 1 << 22, 0)


def settle(mount: Mount) -> None:
    if mount.udba == "notify":
        mount.flush()


def write_at(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as stream:
        stream.seek(offset)
        stream.write(data)


@pytest.fixture(params=list(LAYERS))
def branch(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The branch that is changed; it has d/file."""
    path = tmp_path / str(request.param)
    (path / "d").mkdir(parents=True)
    (path / "d/file").write_bytes(OLD)
    return path


def test_writes_are_seen_by_the_next_read(union: UnionFactory, branch: Path, mode: str) -> None:
    mount = union(LAYERS, mode)
    with opened(mount.path / "d/file", mount.path / "d/file") as (first, second):
        shown = bytearray(OLD)
        for page in range(16):
            assert content(first) == content(second) == shown
            word = b"%04d" % page
            write_at(branch / "d/file", page * PAGE, word)
            shown[page * PAGE : page * PAGE + 4] = word
            settle(mount)
            assert os.pread(first, 4, page * PAGE) == word
        assert content(second) == shown
        assert (mount.path / "d/file").read_bytes() == shown


def test_a_growing_file_can_be_followed(union: UnionFactory, branch: Path, mode: str) -> None:
    """tail -f: read(2) at the end of the file goes on when there is more."""
    mount = union(LAYERS, mode)
    with opened(mount.path / "d/file") as (fd,):
        assert os.read(fd, 1 << 22) == OLD
        for number in range(20):
            line = b"line %d\n" % number
            assert os.read(fd, 1 << 22) == b""
            with (branch / "d/file").open("ab") as stream:
                stream.write(line)
            settle(mount)
            assert os.read(fd, 1 << 22) == line


def test_a_shrunk_and_regrown_file_has_no_old_bytes(union: UnionFactory, branch: Path, mode: str) -> None:
    mount = union(LAYERS, mode)
    with opened(mount.path / "d/file") as (fd,):
        assert content(fd) == OLD
        for size in (PAGE + 100, 8 * PAGE, 0, 10):
            os.truncate(branch / "d/file", size)
            settle(mount)
            assert os.fstat(fd).st_size == size
            assert content(fd) == (branch / "d/file").read_bytes()


def test_an_overwrite_that_restores_size_and_times(union: UnionFactory, branch: Path, mode: str) -> None:
    """rsync --times --inplace and the like: only ctime tells. The next open must see it, whatever is cached."""
    mount = union(LAYERS, mode)
    path = mount.path / "d/file"
    before = path.stat()
    assert path.read_bytes() == OLD
    write_at(branch / "d/file", 0, NEW)
    os.utime(branch / "d/file", ns=(before.st_atime_ns, before.st_mtime_ns))
    settle(mount)
    assert path.read_bytes() == NEW


def test_a_mapping_shows_writes(union: UnionFactory, branch: Path, mode: str) -> None:
    """In reval a mapping that exists is exempt until the file is read again or opened."""
    mount = union(LAYERS, mode)
    with (
        opened(mount.path / "d/file") as (fd,),
        mmap.mmap(fd, 0, mmap.MAP_SHARED, mmap.PROT_READ) as shared,
        mmap.mmap(fd, 0, mmap.MAP_PRIVATE, mmap.PROT_READ) as private,
    ):
        for number in range(8):
            assert shared[:] == private[:] == content(fd)
            write_at(branch / "d/file", number * PAGE, NEW[:PAGE])
            settle(mount)
            if mode == "reval":
                (mount.path / "d/file").read_bytes()
            assert shared[number * PAGE : (number + 1) * PAGE] == NEW[:PAGE]
            assert private[number * PAGE : (number + 1) * PAGE] == NEW[:PAGE]
        assert shared[:] == (branch / "d/file").read_bytes()


def test_replaced_by_rename(union: UnionFactory, branch: Path, mode: str) -> None:
    """New opens have the new file, old descriptors and mappings the old one, also when only its identity differs."""
    mount = union(LAYERS, mode)
    path = mount.path / "d/file"
    with opened(path) as (old,), mmap.mmap(old, 0, mmap.MAP_SHARED, mmap.PROT_READ) as mapping:
        first = os.pread(old, PAGE, 0)  # the rest has never been read: it must come from the old file, too
        times = os.stat(branch / "d/file")
        (branch / "d/.new").write_bytes(NEW)
        os.utime(branch / "d/.new", ns=(times.st_atime_ns, times.st_mtime_ns))
        os.rename(branch / "d/.new", branch / "d/file")
        settle(mount)
        with opened(path) as (new,):
            assert content(new) == NEW
            assert first + os.pread(old, 1 << 22, PAGE) == OLD
            assert mapping[:] == OLD
            assert os.fstat(new).st_ino != os.fstat(old).st_ino
            assert os.fstat(new).st_ino == path.stat().st_ino
            assert os.fstat(old).st_nlink == 0
            write_at(branch / "d/file", 0, b"again")
            settle(mount)
            assert content(new) == b"again" + NEW[5:]
            assert content(old) == OLD


def test_deleted_directly(union: UnionFactory, branch: Path, mode: str) -> None:
    """Readable through what was open, parts that were never read included; a new file of that name is another one."""
    mount = union(LAYERS, mode)
    path = mount.path / "d/file"
    with opened(path) as (fd,):
        os.pread(fd, 100, 0)
        (branch / "d/file").unlink()
        settle(mount)
        with pytest.raises(FileNotFoundError):
            path.stat()
        assert content(fd) == OLD
        assert os.fstat(fd).st_nlink == 0
        (branch / "d/file").write_bytes(NEW)
        settle(mount)
        assert path.read_bytes() == NEW
        assert content(fd) == OLD
        assert os.fstat(fd).st_ino != path.stat().st_ino


def test_directory_removed_around_an_open_file(union: UnionFactory, branch: Path, mode: str) -> None:
    mount = union(LAYERS, mode)
    with opened(mount.path / "d/file") as (fd,):
        os.rename(branch / "d", branch / "moved")
        settle(mount)
        assert not (mount.path / "d").exists()
        assert (mount.path / "moved/file").read_bytes() == OLD
        write_at(branch / "moved/file", 0, b"moved")
        settle(mount)
        assert content(fd) == b"moved" + OLD[5:]
        (branch / "moved/file").unlink()
        (branch / "moved").rmdir()
        settle(mount)
        assert content(fd) == b"moved" + OLD[5:]
        assert not (mount.path / "moved").exists()


def test_copy_up_under_open_readers(union: UnionFactory, branch: Path, mode: str, tmp_path: Path) -> None:
    """Readers opened on the lower file follow it up, and then see direct changes of the copy."""
    mount = union(LAYERS, mode)
    path = mount.path / "d/file"
    with opened(path) as (reader,), mmap.mmap(reader, 0, mmap.MAP_SHARED, mmap.PROT_READ) as mapping:
        assert content(reader) == mapping[:] == OLD
        with opened(path, flags=os.O_RDWR) as (writer,):
            os.pwrite(writer, b"up", 0)
        home = tmp_path / "top/d/file"
        assert home.read_bytes() == b"up" + OLD[2:]
        assert content(reader) == b"up" + OLD[2:]
        assert mapping[:] == b"up" + OLD[2:]
        if branch.name != "top":
            write_at(branch / "d/file", 10, b"the lower file matters no more")
        write_at(home, 2, b"per")
        settle(mount)
        assert content(reader) == b"upper" + OLD[5:]
        assert mapping[:] == b"upper" + OLD[5:]
        assert path.read_bytes() == b"upper" + OLD[5:]


def test_own_writes_do_not_hide_direct_ones(union: UnionFactory, branch: Path, mode: str, tmp_path: Path) -> None:
    """Writers on both sides of one file, in turns: what was cached of the other's part must go."""
    mount = union(LAYERS, mode)
    with opened(mount.path / "d/file", flags=os.O_RDWR) as (fd,):
        os.pwrite(fd, b"0", 0)
        home = tmp_path / "top/d/file"
        shown = bytearray(b"0" + OLD[1:])
        for number in range(16):
            assert content(fd) == shown
            at = number * PAGE + 8
            write_at(home, at, b"direct")
            os.pwrite(fd, b"own", at + 6)
            shown[at : at + 9] = b"directown"
            settle(mount)
        assert content(fd) == shown == home.read_bytes()


def test_changed_through_a_name_in_a_directory_nobody_watches(union: UnionFactory, branch: Path, mode: str) -> None:
    """A file known to have several names is followed through all of them."""
    (branch / "elsewhere").mkdir()
    os.link(branch / "d/file", branch / "elsewhere/second")
    mount = union(LAYERS, mode)
    path = mount.path / "d/file"
    assert path.stat().st_nlink == 2
    assert path.read_bytes() == OLD
    write_at(branch / "elsewhere/second", 0, NEW)
    settle(mount)
    assert path.read_bytes() == NEW
    with opened(path) as (fd,), mmap.mmap(fd, 0, mmap.MAP_SHARED, mmap.PROT_READ) as mapping:
        assert mapping[:] == NEW
        write_at(branch / "elsewhere/second", 0, OLD)
        settle(mount)
        assert content(fd) == OLD
        assert mapping[:] == OLD
    (branch / "elsewhere/second").chmod(0o600)
    settle(mount)
    assert path.stat().st_mode & 0o777 == 0o600
    (branch / "elsewhere/second").unlink()
    settle(mount)
    assert path.stat().st_nlink == 1


def test_a_second_name_that_appears_later(union: UnionFactory, branch: Path, mode: str) -> None:
    """link(2) sends no event to the name that is known: it becomes known with the next event or question."""
    mount = union(LAYERS, mode)
    path = mount.path / "d/file"
    assert path.stat().st_nlink == 1
    os.link(branch / "d/file", branch / "d/second")
    (branch / "elsewhere").mkdir()
    os.link(branch / "d/file", branch / "elsewhere/third")
    settle(mount)
    assert path.stat().st_nlink == 3
    assert path.read_bytes() == OLD
    write_at(branch / "elsewhere/third", 0, NEW)
    settle(mount)
    assert path.read_bytes() == NEW
