"""fallocate(2), copy_file_range(2) and lseek(2) to holes through a mount: values, and what the kernel has afterwards.

What callers without privileges get is compared with a native directory in test_native_parity.py.
"""

from __future__ import annotations

import mmap
import os
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.mount import Mount, UnionFactory, mounted
from tests.helpers.posix import COLLAPSE_RANGE, KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE, birth_ns, fallocate
from tests.t3_fuse.live import errno_of, file_system, lower, modes, opened

pytestmark = pytest.mark.fuse

PUNCH = KEEP_SIZE | PUNCH_HOLE
MIB = 1 << 20
CONTENT = os.urandom(MIB)


def told(path: Path) -> tuple[int, ...]:
    st = path.stat()
    return st.st_size, st.st_blocks, st.st_mtime_ns, st.st_ctime_ns, st.st_mode, st.st_nlink


def same_as_branch(mount: Mount, name: str) -> bool:
    """Whether the attributes that the kernel has are those of the file on the upper branch."""
    return told(mount.path / name) == told(mount["top"] / name)


io = pytest.mark.parametrize("how", ["requests", "passthrough"])

CHANGES: dict[str, Callable[[int, int], object]] = {
    "allocate": lambda fd, _source: fallocate(fd, 0, MIB, MIB),
    "allocate beyond the end": lambda fd, _source: fallocate(fd, KEEP_SIZE, 2 * MIB, MIB),
    "punch": lambda fd, _source: fallocate(fd, PUNCH, 1000, MIB // 2),
    "zero": lambda fd, _source: fallocate(fd, ZERO_RANGE, MIB - 10, 20),
    "copy": lambda fd, source: os.copy_file_range(source, fd, 9000, 1, 5000),
    "copy beyond the end": lambda fd, source: os.copy_file_range(source, fd, 9000, 1, 3 * MIB),
}


@modes
@io
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("place", ["top", "base"])
def test_what_is_cached_is_right_afterwards(
    union: UnionFactory, tmp_path: Path, udba: str, how: str, change: str, place: str
) -> None:
    """Attributes, pages that were read, pages that are mapped; of the file, and of the lower one that was copied up."""
    for name in ("top", "base"):
        (tmp_path / name).mkdir()
    (tmp_path / place / "f").write_bytes(CONTENT)
    (tmp_path / "base/source").write_bytes(CONTENT[::-1])
    (tmp_path / "expected").write_bytes(CONTENT)
    mount = union({"top": "rw", "base": "ro"}, udba, f"io={how}")
    with (
        opened(tmp_path / "expected", os.O_RDWR) as native,
        opened(mount.path / "source", os.O_RDONLY) as source,
        opened(mount.path / "f", os.O_RDONLY) as reader,
        opened(mount.path / "f", os.O_RDWR) as fd,
        mmap.mmap(reader, MIB, prot=mmap.PROT_READ) as mapped,
    ):
        assert os.pread(reader, MIB, 0) == mapped[:] == CONTENT
        told(mount.path / "f")
        CHANGES[change](fd, source)
        with opened(tmp_path / "base/source", os.O_RDONLY) as branch_source:
            CHANGES[change](native, branch_source)
        assert same_as_branch(mount, "f")
        expected = (tmp_path / "expected").read_bytes()
        assert mapped[:] == expected[:MIB]
        assert os.pread(reader, 4 * MIB, 0) == expected
        assert (mount["top"] / "f").read_bytes() == expected
    assert (mount.path / "f").read_bytes() == expected
    assert (tmp_path / "base/source").read_bytes() == CONTENT[::-1]
    assert place == "top" or (tmp_path / "base/f").read_bytes() == CONTENT


@modes
def test_modes_that_the_kernel_refuses(union: UnionFactory, udba: str) -> None:
    mount = union({"top": "rw"}, udba)
    (mount.path / "f").write_bytes(CONTENT)
    with opened(mount.path / "f", os.O_RDWR) as fd:
        for mode in (COLLAPSE_RANGE, 0x20, 0x40):  # INSERT_RANGE, UNSHARE_RANGE
            assert errno_of(lambda: fallocate(fd, mode, 0, 4096)) == "EOPNOTSUPP"  # noqa: B023  # called at once
        fallocate(fd, PUNCH, 0, 4096)
    assert (mount.path / "f").read_bytes() == bytes(4096) + CONTENT[4096:]


def test_one_branch_that_cannot_does_not_speak_for_the_others(tmp_path: Path) -> None:
    """The kernel remembers an ENOSYS for ever."""
    (tmp_path / "able").mkdir()
    (tmp_path / "able/f").write_bytes(CONTENT)
    with (
        file_system(tmp_path / "old", "ext3", megabytes=64) as old,  # no extents, and so no fallocate
        mounted([f"{old}=rw", f"{tmp_path}/able=rw"], tmp_path / "mnt", "notify") as mount,
    ):
        (mount.path / "new").write_bytes(CONTENT)
        with opened(mount.path / "new", os.O_RDWR) as fd:
            for _ in range(2):
                assert errno_of(lambda: fallocate(fd, 0, 0, 2 * MIB)) == "EOPNOTSUPP"
        with opened(mount.path / "f", os.O_RDWR) as fd:
            fallocate(fd, 0, 0, 2 * MIB)
        assert (mount.path / "f").stat().st_size == 2 * MIB


@modes
def test_a_full_disk(tmp_path: Path, udba: str) -> None:
    """After an error the kernel goes on with the attributes that it has, but a part may have been allocated."""
    (tmp_path / "base").mkdir()
    with (
        file_system(tmp_path / "top", "ext4", megabytes=16) as top,
        mounted([f"{top}=rw", f"{tmp_path}/base=ro"], tmp_path / "mnt", udba) as mount,
    ):
        (mount.path / "f").write_bytes(b"content")
        with opened(mount.path / "f", os.O_RDWR) as fd:
            told(mount.path / "f")
            assert errno_of(lambda: fallocate(fd, 0, 0, 64 * MIB)) == "ENOSPC"
            mount.flush()
            assert told(mount.path / "f") == told(top / "f")
        assert (mount.path / "f").read_bytes().rstrip(b"\0") == b"content"


@modes
@io
def test_while_others_look(union: UnionFactory, udba: str, how: str) -> None:
    """Changes of ranges run in threads, beside stat(2) of the same file, which must not leave an old answer behind."""
    mount = union({"top": "rw", "base": "ro"}, udba, f"io={how}")
    (mount.path / "f").write_bytes(CONTENT)
    done = threading.Event()

    def look() -> None:
        while not done.is_set():
            (mount.path / "f").stat()

    looking = threading.Thread(target=look)
    looking.start()
    try:
        with opened(mount.path / "f", os.O_RDWR) as fd:
            for turn in range(100):
                fallocate(fd, 0, MIB + turn * 4096, 4096)
                assert (mount.path / "f").stat().st_size == MIB + (turn + 1) * 4096
                os.copy_file_range(fd, fd, 4096, 0, MIB + turn * 4096)
    finally:
        done.set()
        looking.join()
    assert same_as_branch(mount, "f")
    assert (mount.path / "f").read_bytes() == CONTENT + CONTENT[:4096] * 100


# -- copying ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["btrfs", "xfs"])
def test_cp_inside_the_mount_shares_blocks(tmp_path: Path, kind: str) -> None:
    """From an upper and from a lower file: next to no space is taken."""
    size = 64 * MIB
    with file_system(tmp_path / "fs", kind) as disk:
        for name in ("top", "base"):
            (disk / name).mkdir()
            (disk / name / f"of-{name}").write_bytes(os.urandom(size))
        os.sync()
        before = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
        with mounted([f"{disk}/top=rw", f"{disk}/base=ro"], tmp_path / "mnt", "notify") as mount:
            for name in ("top", "base"):
                subprocess.run(["cp", f"of-{name}", f"copy-of-{name}"], cwd=mount.path, check=True, timeout=60)
                os.sync()
                assert before - os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize < size // 4
                expected = (disk / name / f"of-{name}").read_bytes()
                assert (mount.path / f"copy-of-{name}").read_bytes() == expected
                assert (disk / f"top/copy-of-{name}").stat().st_size == size


@modes
def test_copying_from_one_file_system_to_another(tmp_path: Path, udba: str) -> None:
    """What the kernel refuses on the branches is copied by us, beginning and end within pages."""
    lower(tmp_path, CONTENT, "f")
    with (
        file_system(tmp_path / "top", "tmpfs", "size=16m") as top,
        mounted([f"{top}=rw", f"{tmp_path}/base=ro"], tmp_path / "mnt", udba) as mount,
    ):
        before = mount.requests()
        with opened(mount.path / "f", os.O_RDONLY) as source, opened(mount.path / "new", os.O_RDWR | os.O_CREAT) as fd:
            assert os.copy_file_range(source, fd, 2 * MIB, 7, 1000) == MIB - 7
            assert os.pread(fd, 2 * MIB, 0) == bytes(1000) + CONTENT[7:]
        after = mount.requests()
        assert (after["write"], after["copy_file_range"]) == (before["write"], before["copy_file_range"] + 1)


# -- sparse files -----------------------------------------------------------------------------------


def make_sparse(path: Path) -> None:
    with path.open("wb") as stream:
        stream.truncate(64 * MIB)
        for at in (0, 8 * MIB, 64 * MIB - 10):
            stream.seek(at)
            stream.write(b"0123456789")


COPIERS = {
    "cp": "cp --sparse=auto sparse copy",
    "cp without reflinks": "cp --reflink=never --sparse=auto sparse copy",
    "cp -a": "cp -a sparse copy",
    "tar": "tar -S -cf - sparse | tar -S -xf - --transform=s/sparse/copy/",
    "rsync": "rsync -S --inplace sparse copy",
}


@modes
@pytest.mark.parametrize("copier", COPIERS)
@pytest.mark.parametrize("place", ["top", "base"])
def test_a_sparse_file_stays_sparse(union: UnionFactory, tmp_path: Path, udba: str, copier: str, place: str) -> None:
    for name in ("top", "base"):
        (tmp_path / name).mkdir()
    make_sparse(tmp_path / place / "sparse")
    mount = union({"top": "rw", "base": "ro"}, udba, "io=requests")
    before = mount.requests()["read"]
    subprocess.run(COPIERS[copier], shell=True, cwd=mount.path, check=True, timeout=60)
    if copier != "rsync":
        assert mount.requests()["read"] - before < 30, "nobody looks into holes that are known"
    copy = mount.path / "copy"
    assert copy.read_bytes() == (tmp_path / place / "sparse").read_bytes()
    assert copy.stat().st_blocks * 512 < MIB
    assert same_as_branch(mount, "copy")


@modes
@io
def test_what_is_stored_through_a_mapping_is_no_hole(union: UnionFactory, udba: str, how: str) -> None:
    """The page is the kernel's until it is written, and the branch knows nothing of it: cp must not leave it out."""
    mount = union({"top": "rw", "base": "ro"}, udba, f"io={how}")
    make_sparse(mount.path / "sparse")
    with opened(mount.path / "sparse", os.O_RDWR) as fd, mmap.mmap(fd, 64 * MIB) as mapped:
        # With passthrough the holes are known all the same.
        assert os.lseek(fd, 5000, os.SEEK_DATA) == (8 * MIB if how == "passthrough" else 5000)
        mapped[32 * MIB : 32 * MIB + 6] = b"stored"
        subprocess.run(["cp", "--sparse=auto", "sparse", "copy"], cwd=mount.path, check=True, timeout=60)
        with (mount.path / "copy").open("rb") as copy:
            copy.seek(32 * MIB)
            assert copy.read(6) == b"stored"


# -- birth times --------------------------------------------------------------------------------------


@modes
def test_birth_times_are_those_of_the_branch(union: UnionFactory, tmp_path: Path, udba: str) -> None:
    lower(tmp_path)
    mount = union({"top": "rw", "base": "ro"}, udba)
    (mount.path / "new").touch()
    for name, place in (("d", "base"), ("d/f", "base"), ("new", "top")):
        assert birth_ns(str(mount.path / name)) == birth_ns(str(tmp_path / place / name)) > 0
    assert told(mount.path / "d/f") == told(tmp_path / "base/d/f"), "which came with it"
    assert errno_of(lambda: birth_ns(str(mount.path / "missing"))) == "ENOENT"
