"""io=cached: the kernel opens, reads what it has and closes without a request."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.helpers.mount import Mount, UnionFactory
from tests.t3_fuse.live import as_nobody, errno_of

pytestmark = pytest.mark.fuse

CACHED = "io=cached"
LAYERS = {"top": "rw", "base": "ro"}
CONTENT = b"old." * 4096
KEEPING_10 = """
from udbad.union.kept import KeptFiles
begin = KeptFiles.__init__
KeptFiles.__init__ = lambda self, sb, most, *rest: begin(self, sb, 10, *rest)
"""
without_reval = pytest.mark.parametrize("udba", ["none", "notify"])


def fill(tmp_path: Path, files: int = 1) -> None:
    (tmp_path / "base/d").mkdir(parents=True)
    for number in range(files):
        (tmp_path / "base/d" / f"f{number}").write_bytes(CONTENT)


@without_reval
def test_the_second_pass_asks_for_nothing(union: UnionFactory, tmp_path: Path, udba: str) -> None:
    fill(tmp_path, 100)
    mount = union(LAYERS, udba, CACHED)
    (mount.path / "d/own").write_bytes(CONTENT)
    mount.flush()  # a directory was copied up for it
    names = [f"d/f{number}" for number in range(100)] + ["d/own"]

    def read_all() -> None:
        for name in names:
            fd = os.open(mount.path / name, os.O_RDONLY)
            assert os.read(fd, 1 << 20) == CONTENT
            os.close(fd)

    read_all()
    before = mount.requests()
    read_all()
    assert mount.requests() == before
    for name in names:
        (mount.path / name).stat()  # the first pass has made the times of access old
    before = mount.requests()
    for name in names:
        assert (mount.path / name).read_bytes() == CONTENT
    assert mount.requests() == before


@without_reval
def test_writing(union: UnionFactory, tmp_path: Path, udba: str) -> None:
    fill(tmp_path)
    mount = union(LAYERS, udba, CACHED)
    path, home = mount.path / "d/f0", tmp_path / "top/d/f0"
    with path.open("rb") as reader, path.open("r+b", buffering=0) as stream, path.open("ab", buffering=0) as end:
        assert reader.read() == CONTENT
        stream.write(b"new.")
        assert home.read_bytes() == b"new." + CONTENT[4:]
        end.write(b"end")
        os.fsync(end.fileno())
        assert any(mount.requests()["fsync"] for _ in range(1000))  # a thread counts late
        reader.seek(0)
        assert reader.read() == home.read_bytes() == b"new." + CONTENT[4:] + b"end"
    fd = os.open(path, os.O_WRONLY | os.O_SYNC)
    os.pwrite(fd, b"sync", 4)
    os.close(fd)
    assert home.read_bytes()[:8] == b"new.sync"
    path.write_bytes(b"short")  # O_TRUNC
    assert path.read_bytes() == home.read_bytes() == b"short"
    assert (tmp_path / "base/d/f0").read_bytes() == CONTENT


@without_reval
def test_deleted_while_open(union: UnionFactory, tmp_path: Path, udba: str) -> None:
    fill(tmp_path, 3)
    mount = union(LAYERS, udba, CACHED)
    own = mount.path / "own"
    own.write_bytes(CONTENT)
    files = [mount.path / name for name in ("d/f0", "own", "d/f1")]
    fds = [os.open(path, os.O_RDWR) for path in files]
    try:
        files[0].unlink()
        files[1].unlink()
        os.rename(mount.path / "d/f2", files[2])
        for fd in fds:
            assert os.pread(fd, 1 << 20, 0) == CONTENT
            os.pwrite(fd, b"still", 0)
            assert os.pread(fd, 5, 0) == b"still"
            os.ftruncate(fd, 5)
            assert (os.fstat(fd).st_size, os.fstat(fd).st_nlink) == (5, 0)
            os.fchmod(fd, 0o600)
    finally:
        for fd in fds:
            os.close(fd)
    assert files[2].read_bytes() == CONTENT


@without_reval
def test_appending(union: UnionFactory, tmp_path: Path, udba: str) -> None:
    """Where the file ends is for the branch to say, also when others append to it directly."""
    (tmp_path / "top").mkdir()
    real = tmp_path / "top/log"
    real.write_bytes(b"begin\n")
    mount = union(LAYERS, udba, CACHED)
    with (mount.path / "log").open("ab", buffering=0) as stream:
        for number in range(20):
            with real.open("ab") as direct:
                direct.write(b"direct %d\n" % number)
            stream.write(b"mine %d\n" % number)
    lines = [b"%s %d\n" % (who, number) for number in range(20) for who in (b"direct", b"mine")]
    assert real.read_bytes() == b"begin\n" + b"".join(lines)


def write(path: Path) -> None:
    with path.open("r+b") as stream:
        stream.write(b"new")


def test_content_costs_setuid_whoever_writes(union: UnionFactory, tmp_path: Path) -> None:
    (tmp_path / "top").mkdir()
    real = tmp_path / "top/file"
    real.write_bytes(CONTENT)
    mount = union(LAYERS, "notify", CACHED)
    path = mount.path / "file"
    for call in (as_nobody, lambda change: change()):
        path.chmod(0o4777)
        assert path.stat().st_mode & 0o7777 == 0o4777
        call(lambda: write(path))
        assert real.stat().st_mode & 0o7777 == path.stat().st_mode & 0o7777 == 0o777


def test_a_program_is_not_open_for_writing_for_long(union: UnionFactory, tmp_path: Path) -> None:
    """On its branch: ETXTBSY ends soon after the last write."""
    (tmp_path / "top").mkdir()
    program = tmp_path / "top/program"
    program.write_bytes(Path("/bin/false").read_bytes())
    program.chmod(0o755)
    mount = union(LAYERS, "notify", CACHED)
    with (mount.path / "program").open("r+b") as stream:
        stream.write(Path("/bin/true").read_bytes())
        stream.truncate()
    end = time.monotonic() + 20
    while errno_of(lambda: subprocess.run([program], check=True, timeout=60)) == "ETXTBSY":
        assert time.monotonic() < end
        time.sleep(0.1)
    subprocess.run([mount.path / "program"], check=True, timeout=60)


def test_deleted_directly(union: UnionFactory, tmp_path: Path) -> None:
    """What was read through the mount stays readable, all of it, while it is open; then its space is free."""
    fill(tmp_path)
    big = os.urandom(8 << 20)
    (tmp_path / "base/d/f0").write_bytes(big)
    mount = union(LAYERS, "notify", CACHED)
    with (mount.path / "d/f0").open("rb", buffering=0) as stream:
        assert stream.read(10) == big[:10]
        (tmp_path / "base/d/f0").unlink()
        mount.flush()
        assert errno_of((mount.path / "d/f0").stat) == "ENOENT"
        assert stream.read() == big[10:]
        assert os.fstat(stream.fileno()).st_nlink == 0
    assert kept_ends(mount)


def kept_ends(mount: Mount) -> bool:
    """Whether nothing is kept open, once the kernel has forgotten what has no name any more."""
    return any(not mount.control({"op": "status"})["open_handles"] for _ in range(1000))


def test_what_is_removed_is_closed(union: UnionFactory, tmp_path: Path) -> None:
    (tmp_path / "top").mkdir()
    for number in range(20):
        (tmp_path / "top" / f"f{number}").write_bytes(CONTENT)
    mount = union(LAYERS, "notify", CACHED)
    for number in range(20):
        assert (mount.path / f"f{number}").read_bytes() == CONTENT
    assert 0 < mount.control({"op": "status"})["open_handles"] <= 20
    for number in range(20):
        (mount.path / f"f{number}").unlink()
    assert kept_ends(mount)


@contextmanager
def another_has(path: Path, how: str) -> Iterator[int]:
    """A process that has a file open, or mapped only; its id."""
    script = (
        "import mmap, os, sys\n"
        "fd = os.open(sys.argv[1], os.O_RDONLY)\n"
        "if sys.argv[2] == 'mapped':\n"
        "    import ctypes\n"
        "    libc = ctypes.CDLL(None)\n"
        "    libc.mmap.restype = ctypes.c_void_p\n"
        "    assert libc.mmap(None, 4096, 1, 1, fd, 0)\n"
        "    os.close(fd)\n"
        "print('ready', flush=True)\n"
        "sys.stdin.read()\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script, path, how], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    with process, process.stdin, process.stdout:
        assert process.stdout.readline() == b"ready\n"
        yield process.pid


@pytest.mark.parametrize("how", ["open", "mapped"])
def test_who_has_a_file_open_is_found(union: UnionFactory, tmp_path: Path, how: str) -> None:
    fill(tmp_path)
    mount = union({"top": "rw", "middle": "rw", "base": "ro"}, "notify", CACHED)
    (tmp_path / "middle/f").write_bytes(CONTENT)
    middle = tmp_path / "middle"
    busy = {"op": "busy", "branch": str(middle)}
    assert (mount.path / "f").read_bytes() == CONTENT
    assert mount.control(busy)["users"] == []
    with another_has(mount.path / "f", how) as pid:
        (user,) = mount.control(busy)["users"]
        assert (user["pid"], user["path"], user["what"]) == (pid, "/f", "open file")
        answer = mount.control({"op": "branches", "edits": [["del", str(middle)]]})
        assert not answer["ok"]
        assert f"open file /f of process {pid}" in answer["error"]
        answer = mount.control({"op": "mvdown", "path": "f", "read_only_lower": True})
        assert not answer["ok"]
        assert f"it is open, by process {pid}" in answer["error"]
    assert mount.control({"op": "branches", "edits": [["del", str(middle)]]})["ok"]
    assert errno_of((mount.path / "f").stat) == "ENOENT"
    assert (mount.path / "d/f0").read_bytes() == CONTENT


def status(mount: Mount) -> tuple[str, list[str]]:
    answer = mount.control({"op": "status"})
    return answer["io"], answer["io_fallbacks"]


@pytest.mark.parametrize(
    ("layers", "udba", "more", "why"),
    [
        (LAYERS, "reval", "", "=rw is served as reval, which looks at a file each time it is opened"),
        ({"top": "rw", "base": "ro+udba=reval"}, "notify", "", "base=ro"),
        ({"top": "rw", "base": "ro+coo_reg"}, "notify", "", "copies files up when they are opened"),
        (LAYERS, "notify", ",nodio", "nodio is about each open(2)"),
    ],
)
def test_where_each_open_matters_the_kernel_asks(
    union: UnionFactory, tmp_path: Path, layers: dict[str, str], udba: str, more: str, why: str
) -> None:
    fill(tmp_path)
    mount = union(layers, udba, CACHED + more)
    assert (mount.path / "d/f0").read_bytes() == CONTENT
    io, (line,) = status(mount)
    assert (io, why in line, mount.log().count(line)) == ("requests", True, 1)
    assert mount.requests()["open"] == 1


def test_a_kernel_that_cannot(union: UnionFactory, tmp_path: Path, patch_daemon: Callable[[str], None]) -> None:
    patch_daemon("from udbad.kernel import protocol; protocol._NO_OPEN_SUPPORT = 0")
    fill(tmp_path)
    mount = union(LAYERS, "notify", CACHED)
    assert (mount.path / "d/f0").read_bytes() == CONTENT
    assert status(mount) == ("requests", ["io=cached cannot be: the kernel does not offer it"])
    assert mount.requests()["open"] == 1


def test_a_branch_that_copies_on_open_cannot_come(union: UnionFactory, tmp_path: Path) -> None:
    mount = union(LAYERS, "notify", CACHED)
    (tmp_path / "more").mkdir()
    answer = mount.control({"op": "branches", "edits": [["append", f"{tmp_path / 'more'}=ro+coo_reg"]]})
    assert not answer["ok"]
    assert "copy files up when they are opened" in answer["error"]
    assert status(mount) == ("cached", [])


def test_the_mode_becomes_reval(union: UnionFactory, tmp_path: Path) -> None:
    """Then every look at a file asks for its attributes, and pages go with them."""
    fill(tmp_path)
    mount = union(LAYERS, "notify", CACHED)
    path = mount.path / "d/f0"
    assert path.read_bytes() == CONTENT
    assert mount.control({"op": "udba", "mode": "reval"})["ok"]
    for content in (b"direct", b"DIRECT", b"once more"):
        (tmp_path / "base/d/f0").write_bytes(content)
        assert path.read_bytes() == content


def test_more_files_than_may_be_kept(union: UnionFactory, tmp_path: Path, patch_daemon: Callable[[str], None]) -> None:
    """Those without a name stay."""
    patch_daemon(KEEPING_10)
    fill(tmp_path, 50)
    mount = union(LAYERS, "notify", CACHED)
    removed = [os.open(mount.path / "d" / f"f{number}", os.O_RDWR) for number in range(5)]
    try:
        for number in range(5):
            (mount.path / "d" / f"f{number}").unlink()
        for turn in range(2):
            for number in range(5, 50):
                fd = os.open(mount.path / "d" / f"f{number}", os.O_RDONLY)
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
                assert os.read(fd, 1 << 20) == CONTENT
                os.close(fd)
            # Fewer than 15 when the kernel needs memory and forgets some.
            assert 5 <= mount.control({"op": "status"})["open_handles"] <= 15, turn
        for fd in removed:
            os.pwrite(fd, b"new.", 0)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            assert os.pread(fd, 1 << 20, 0) == b"new." + CONTENT[4:]
    finally:
        for fd in removed:
            os.close(fd)


@without_reval
def test_ranges(union: UnionFactory, tmp_path: Path, udba: str) -> None:
    """fallocate(2), lseek(2) and copy_file_range(2), of files on both branches."""
    fill(tmp_path)
    (tmp_path / "top").mkdir()
    (tmp_path / "top/file").write_bytes(CONTENT)
    mount = union(LAYERS, udba, CACHED)
    source, target = os.open(mount.path / "d/f0", os.O_RDONLY), os.open(mount.path / "file", os.O_RDWR)
    try:
        os.posix_fallocate(target, 0, 2 * len(CONTENT))
        assert os.fstat(target).st_size == 2 * len(CONTENT)
        assert os.copy_file_range(source, target, 100, 0, len(CONTENT)) == 100
        assert os.pread(target, 1 << 20, 0) == CONTENT + CONTENT[:100] + bytes(len(CONTENT) - 100)
        assert os.lseek(target, 0, os.SEEK_DATA) == 0
        assert os.lseek(target, 0, os.SEEK_HOLE) == 2 * len(CONTENT)
    finally:
        os.close(source)
        os.close(target)
    assert (tmp_path / "top/file").read_bytes()[: len(CONTENT) + 100] == CONTENT + CONTENT[:100]
    assert any(mount.requests()["fallocate"] and mount.requests()["copy_file_range"] for _ in range(1000))


@without_reval
def test_files_that_were_made_are_closed(union: UnionFactory, udba: str, patch_daemon: Callable[[str], None]) -> None:
    """There is no RELEASE that would tell. With a name all but those that are kept, and without one."""
    patch_daemon(KEEPING_10)
    mount = union(LAYERS, udba, CACHED)
    (mount.path / "first").touch()
    assert (mount.path / "first").read_bytes() == b""  # from the first open(2) on, nothing is released
    before = len(os.listdir(f"/proc/{mount.process.pid}/fd"))
    for number in range(100):
        (mount.path / f"f{number}").touch()
        os.close(os.open(mount.path, os.O_TMPFILE | os.O_RDWR))
    mount.flush()
    assert len(os.listdir(f"/proc/{mount.process.pid}/fd")) < before + 20
