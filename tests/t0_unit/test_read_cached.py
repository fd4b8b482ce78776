"""What is read on the event loop, where the file system cannot say whether that would wait (datacalls.read_cached)."""

from __future__ import annotations

import ctypes
import errno
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest

from tests.helpers.mount import DEADLINE
from tests.helpers.uncompiled import from_source
from udbad.branch import datacalls

SMALL, LARGE = b"s" * 5000, os.urandom(1 << 20)


Read = Callable[[int, int, int], bytes | bool]


@pytest.fixture(params=[datacalls, from_source(datacalls)], ids=["used", "python"])
def read_cached(request: pytest.FixtureRequest) -> Read:
    def read(fd: int, size: int, offset: int) -> bytes | bool:
        data = request.param.read_cached(fd, size, offset)
        return data if type(data) is bool else bytes(data)

    return read


def test_the_end_and_what_cannot_be_read(tmp_path: Path, read_cached: Read) -> None:
    (tmp_path / "file").write_bytes(LARGE)
    fd = os.open(tmp_path / "file", os.O_RDONLY)
    try:
        assert read_cached(fd, 1 << 20, 0) == LARGE
        assert read_cached(fd, 1, 7) == LARGE[7:8]
        assert read_cached(fd, 4096, len(LARGE) - 3) == LARGE[-3:]
        assert read_cached(fd, 4096, len(LARGE) + 1) == b""
        assert read_cached(fd, 0, 0) == b""
    finally:
        os.close(fd)
    with pytest.raises(OSError, match=os.strerror(errno.EBADF)):
        read_cached(fd, 1, 0)


def test_tmpfs_is_memory(read_cached: Read) -> None:
    with tempfile.TemporaryFile(dir="/dev/shm") as file:
        file.write(LARGE)
        file.flush()
        fd = file.fileno()
        assert read_cached(fd, 4096, 0) == LARGE[:4096]
        assert read_cached(fd, len(LARGE), 10) == LARGE[10:]
        assert read_cached(fd, 4096, len(LARGE)) == b""


@pytest.mark.parametrize("begin", ["read_cached", "start_reading"])
@pytest.mark.parametrize("module", [datacalls, from_source(datacalls)], ids=["used", "python"])
def test_the_disk_is_asked_and_not_waited_for(tmp_path: Path, module: ModuleType, begin: str) -> None:
    """Whoever looks again has it after a while, without anything else being done."""
    (tmp_path / "file").write_bytes(SMALL)
    fd = os.open(tmp_path / "file", os.O_RDONLY)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        first = module.start_reading(fd) if begin == "start_reading" else module.read_cached(fd, 4096, 0)
        assert first is None or first is True or first == SMALL[:4096], "a disk may be as quick"
        assert pages(fd) == 2, "it is under way, or there"
        end = time.monotonic() + DEADLINE
        while module.read_cached(fd, len(SMALL), 0) is True:
            assert time.monotonic() < end
        assert module.read_cached(fd, len(SMALL), 0) == SMALL
    finally:
        os.close(fd)


def pages(fd: int) -> int:
    """How many of a file the page cache has, or has asked for (cachestat(2)); to read would ask for them."""
    found = (ctypes.c_uint64 * 5)()
    assert ctypes.CDLL(None).syscall(datacalls._SYS_CACHESTAT, fd, (ctypes.c_uint64 * 2)(), found, 0) == 0
    return found[0]


@contextmanager
def image(tmp_path: Path) -> Iterator[Path]:
    """A squashfs that nobody has read from."""
    tree, place = tmp_path / "tree", tmp_path / "place"
    for directory in (tree, place):
        directory.mkdir()
    (tree / "small").write_bytes(SMALL)
    (tree / "large").write_bytes(LARGE)
    words = ["mksquashfs", str(tree), str(tmp_path / "image"), "-quiet", "-no-progress", "-no-fragments"]
    subprocess.run(words, check=True, capture_output=True, timeout=60)
    subprocess.run(["mount", "-o", "loop,ro", str(tmp_path / "image"), str(place)], check=True, timeout=60)
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True, timeout=60)


@pytest.mark.fuse  # it mounts
def test_an_image_when_it_was_read_before(tmp_path: Path, read_cached: Read) -> None:
    with image(tmp_path) as place:
        for name, content in (("small", SMALL), ("large", LARGE)):
            fd = os.open(place / name, os.O_RDONLY)
            try:
                with pytest.raises(OSError, match=os.strerror(errno.EOPNOTSUPP)):
                    os.preadv(fd, [bytearray(10)], 0, os.RWF_NOWAIT)  # else this tests nothing
                assert read_cached(fd, 4096, 0) is False, "it would have to wait for the disk"
                os.pread(fd, len(content), 0)
                assert read_cached(fd, 4096, 0) == content[:4096]
                assert read_cached(fd, 8192, 1000) == content[1000:9192]
                assert read_cached(fd, 4096, len(content)) is False  # rare, and a thread knows as well
                if name == "large":
                    assert read_cached(fd, len(content), 0) is False, "somebody may be reading ahead"
                    os.posix_fadvise(fd, 65536, 4096, os.POSIX_FADV_DONTNEED)
                    assert read_cached(fd, 128 << 10, 0) is False, "a part would have to be waited for"
                    assert read_cached(fd, 64 << 10, 0) == content[: 64 << 10]
            finally:
                os.close(fd)
