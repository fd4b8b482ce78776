"""io=passthrough: the kernel reads, writes and maps the branch's file itself, and nobody can tell but by the speed.

Counters of requests prove that it does; every guarantee that could suffer from nobody being asked has a test here,
and so has each reason why it may not be. Direct changes of open files: tests/t4_coherence/test_matrix.py.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import stat
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.mount import Mount, UnionFactory
from tests.t3_fuse.live import as_nobody, errno_of, modes

pytestmark = pytest.mark.fuse

PASSING = "io=passthrough"
POOL = {"a": "rw", "b": "rw"}
PAGE = mmap.PAGESIZE
CONTENT = b"old." * PAGE
LIBC = ctypes.CDLL(None)
"""For mappings whose descriptor is closed: mmap.mmap keeps one."""
LIBC.mmap.restype = ctypes.c_void_p
LIBC.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
LIBC.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


@contextmanager
def opened(path: Path, flags: int = os.O_RDWR) -> Iterator[int]:
    fd = os.open(path, flags, 0o644)
    try:
        yield fd
    finally:
        os.close(fd)


def passed(mount: Mount) -> dict[str, int]:
    """How many files were given to the kernel so far (opens), how many backing ids it has (in_use)."""
    answer: dict[str, int] = mount.control({"op": "stats"})["passthrough"]
    return answer


def ended(mount: Mount) -> bool:
    """Whether all backing ids are given back, once the kernel has told of the last close."""
    for _ in range(1000):
        if not passed(mount)["in_use"]:
            return True
        os.sched_yield()
    return False


@pytest.fixture
def pool(union: UnionFactory, tmp_path: Path) -> Mount:
    """Two writable branches; `file` and `dir/file` are on the lower one."""
    (tmp_path / "b/dir").mkdir(parents=True)
    (tmp_path / "b/file").write_bytes(CONTENT)
    (tmp_path / "b/dir/file").write_bytes(CONTENT)
    return union(POOL, "notify", PASSING)


@modes
def test_the_kernel_asks_for_no_data(union: UnionFactory, tmp_path: Path, udba: str) -> None:
    mount = union(POOL, udba, PASSING)
    path, real = mount.path / "file", tmp_path / "a/file"
    with opened(path, os.O_RDWR | os.O_CREAT) as fd:  # made by CREATE
        os.pwrite(fd, CONTENT, 0)
        assert real.read_bytes() == CONTENT
    with opened(path) as fd, opened(path, os.O_WRONLY | os.O_APPEND) as end, opened(path, os.O_RDONLY) as reader:
        assert passed(mount)["in_use"] == 1
        os.pwrite(fd, b"new.", 0)
        os.write(end, b"end")
        assert os.fstat(reader).st_size == len(CONTENT) + 3
        assert os.lseek(reader, -3, os.SEEK_END) == len(CONTENT)
        assert os.read(reader, 10) == b"end"
        shown = b"new." + CONTENT[4:] + b"end"
        assert os.pread(reader, 1 << 20, 0) == real.read_bytes() == shown
        with mmap.mmap(fd, 0) as mapping:
            mapping[8:12] = b"MAP."
            assert os.pread(reader, 4, 8) == b"MAP."
            assert real.read_bytes()[8:12] == b"MAP."
            with real.open("r+b") as stream:
                stream.write(b"direct")
            assert mapping[:6] == os.pread(reader, 6, 0) == b"direct"
        os.fsync(fd)
    assert ended(mount)
    requests = mount.requests()
    assert (requests.get("read", 0), requests.get("write", 0), requests.get("flush", 0)) == (0, 0, 0)
    assert passed(mount)["opens"] == 4
    assert path.stat().st_size == real.stat().st_size
    assert path.stat().st_mtime_ns == real.stat().st_mtime_ns


@modes
def test_emptied_and_cut_while_open(union: UnionFactory, tmp_path: Path, udba: str) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/file").write_bytes(CONTENT)
    mount = union(POOL, udba, PASSING)
    path = mount.path / "file"
    with opened(path) as fd:
        os.ftruncate(fd, 2 * PAGE)
        assert os.pread(fd, 1 << 20, 0) == CONTENT[: 2 * PAGE]
        os.truncate(path, 3 * PAGE)
        assert os.pread(fd, 1 << 20, 0) == CONTENT[: 2 * PAGE] + bytes(PAGE)
        with opened(path, os.O_WRONLY | os.O_TRUNC):
            assert os.fstat(fd).st_size == 0
            assert os.pread(fd, 10, 0) == b""
        os.pwrite(fd, b"x", 9)
        assert path.read_bytes() == bytes(9) + b"x"
    assert (tmp_path / "a/file").read_bytes() == bytes(9) + b"x"


def test_flags_that_change_while_open(pool: Mount, tmp_path: Path) -> None:
    with opened(pool.path / "file") as fd:
        fcntl.fcntl(fd, fcntl.F_SETFL, os.O_APPEND)
        os.write(fd, b"appended")
        fcntl.fcntl(fd, fcntl.F_SETFL, 0)
        os.write(fd, b"then")
    assert (tmp_path / "b/file").read_bytes() == CONTENT + b"appendedthen"


def test_direct_io(pool: Mount, tmp_path: Path) -> None:
    with opened(pool.path / "file", os.O_RDWR | os.O_DIRECT) as fd, mmap.mmap(-1, PAGE) as buffer:
        buffer[:] = b"n" * PAGE
        assert os.pwritev(fd, [buffer], PAGE) == PAGE
        assert os.preadv(fd, [buffer], 0) == PAGE
        assert buffer[:] == CONTENT[:PAGE]
        assert passed(pool)["in_use"] == 1
    assert (tmp_path / "b/file").read_bytes()[PAGE : 2 * PAGE] == b"n" * PAGE


def test_many_open_and_close_it_at_once(pool: Mount) -> None:
    """All have one backing id, however opens, closes and their RELEASE follow each other."""

    def work(number: int) -> None:
        for turn in range(50):
            access = (os.O_RDONLY, os.O_WRONLY, os.O_RDWR)[(turn + number) % 3]
            with opened(pool.path / ("file" if turn % 5 else "dir/file"), access):
                pass

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(work, range(8)))
    assert ended(pool)
    assert passed(pool)["opens"] == 400


def test_deleted_while_open(pool: Mount, tmp_path: Path) -> None:
    """Through the mount, directly, and by a rename over it."""
    with opened(pool.path / "file") as first, opened(pool.path / "dir/file") as second:
        (pool.path / "file").unlink()
        (tmp_path / "b/dir/file").unlink()
        (pool.path / "new").write_bytes(b"another")
        os.rename(pool.path / "new", pool.path / "dir/file")
        for fd in (first, second):
            os.pwrite(fd, b"still", 0)
            assert os.pread(fd, 1 << 20, 0) == b"still" + CONTENT[5:]
            os.ftruncate(fd, 5)
            assert (os.fstat(fd).st_size, os.fstat(fd).st_nlink) == (5, 0)
        assert (pool.path / "dir/file").read_bytes() == b"another"


def test_a_program_runs(pool: Mount, tmp_path: Path) -> None:
    (pool.path / "program").write_bytes(Path("/bin/true").read_bytes())
    (pool.path / "program").chmod(0o755)
    subprocess.run([pool.path / "program"], check=True, timeout=60)


def test_own_writes_are_no_news(pool: Mount) -> None:
    """They come back as events of the branch; one question at most is due to them, and pages are not spoken of."""
    path = pool.path / "file"
    path.stat()
    pool.flush()
    before = pool.control({"op": "stats"})
    with opened(path) as fd, opened(pool.path / "made", os.O_WRONLY | os.O_CREAT) as made:
        for number in range(2000):
            os.pwrite(fd, b"%d" % number, number)
            os.pwrite(made, b"%d" % number, number)
            if number % 100 == 0:
                pool.flush()
    pool.flush()
    after = pool.control({"op": "stats"})
    sent, earlier = after["invalidator"]["sent"], before["invalidator"]["sent"]
    assert {kind: sent[kind] - earlier[kind] for kind in sent if sent[kind] != earlier[kind]} in ({}, {"attributes": 1})
    assert after["coherence"]["echoes"] - before["coherence"]["echoes"] >= 20
    assert path.stat().st_size == len(CONTENT)


@modes
def test_size_and_times_are_those_of_the_branch(union: UnionFactory, tmp_path: Path, udba: str) -> None:
    """After each write, for another process, and after a store through a mapping whose descriptor is closed."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a/file").write_bytes(CONTENT)
    mount = union(POOL, udba, PASSING)
    path, real = mount.path / "file", tmp_path / "a/file"

    def same() -> None:
        mine, truth = path.stat(), real.stat()
        assert (mine.st_size, mine.st_mtime_ns, mine.st_ctime_ns) == (
            truth.st_size, truth.st_mtime_ns, truth.st_ctime_ns,
        )  # fmt: skip

    same()
    with opened(path) as fd:
        for number in range(5):
            os.pwrite(fd, b"x", len(CONTENT) + number)
            same()
        address = LIBC.mmap(None, PAGE, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED, fd, 0)
    try:
        assert ended(mount)
        same()
        ctypes.memset(address, ord("M"), 1)
        assert real.read_bytes()[:1] == b"M"
        with opened(path, os.O_RDONLY):
            mount.flush()
            same()
    finally:
        LIBC.munmap(ctypes.c_void_p(address), PAGE)


def test_setuid_goes_with_new_content(pool: Mount, tmp_path: Path) -> None:
    """Of a file that has it, and of one that gets it while somebody else has it open for writing."""
    path = pool.path / "file"
    real = tmp_path / "b/file"
    os.chown(path, 1000, 1000)
    path.chmod(0o4777)
    as_nobody(lambda: path.open("r+b").write(b"nobody's"))
    assert stat.S_IMODE(real.stat().st_mode) == stat.S_IMODE(path.stat().st_mode) == 0o777
    assert passed(pool)["opens"] == 0

    def write_later() -> None:
        with opened(path) as fd:
            ready.write(b"r")
            assert go.read(1) == b"g"
            os.pwrite(fd, b"later", 0)

    with opened(path, os.O_RDONLY):  # by root: it is root's open that the kernel goes on with
        (ready_end, ready_fd), (go_fd, go_end) = os.pipe(), os.pipe()
        with (
            os.fdopen(ready_fd, "wb", 0) as ready, os.fdopen(ready_end, "rb", 0) as is_ready,
            os.fdopen(go_fd, "rb", 0) as go, os.fdopen(go_end, "wb", 0) as say_go,
            ThreadPoolExecutor(1) as threads,
        ):  # fmt: skip
            done = threads.submit(as_nobody, write_later)
            assert is_ready.read(1) == b"r"
            path.chmod(0o4777)
            assert passed(pool)["opens"] == 2
            say_go.write(b"g")
            done.result()
        assert real.read_bytes()[:5] == b"later"
        assert stat.S_IMODE(real.stat().st_mode) == 0o777
        pool.flush()
        assert stat.S_IMODE(path.stat().st_mode) == 0o777


def test_what_would_be_copied_up_stays_while_it_is_open(union: UnionFactory, tmp_path: Path) -> None:
    """A rename or link to where the branch of the file cannot show it."""
    (tmp_path / "b").mkdir(parents=True)
    (tmp_path / "b/file").write_bytes(CONTENT)
    (tmp_path / "a").mkdir()
    (tmp_path / "a/upper").write_bytes(b"upper")
    mount = union(POOL, "notify", PASSING)
    with opened(mount.path / "file") as fd:
        assert errno_of(lambda: os.rename(mount.path / "file", mount.path / "upper")) == "EXDEV"
        os.rename(mount.path / "file", mount.path / "renamed")  # needs no copy
        os.link(mount.path / "renamed", mount.path / "second")
        os.pwrite(fd, b"on", 0)
    assert ended(mount)
    assert (mount.path / "upper").read_bytes() == b"upper"
    os.rename(mount.path / "second", mount.path / "upper")
    assert (mount.path / "upper").read_bytes() == (mount.path / "renamed").read_bytes() == b"on" + CONTENT[2:]


def branches(mount: Mount, *edits: tuple[str, str]) -> dict[str, Any]:
    return mount.control({"op": "branches", "edits": [list(edit) for edit in edits]})


def test_a_branch_becomes_read_only(pool: Mount, tmp_path: Path) -> None:
    """Not while the kernel may write to it. Who reads goes on; who wants to write has to wait for that."""
    path, real = pool.path / "file", tmp_path / "b/file"
    with opened(path):
        answer = branches(pool, ("mod", f"{tmp_path / 'b'}=ro"))
        assert not answer["ok"]
        assert f"open file /file of process {os.getpid()}" in answer["error"]
    with opened(path, os.O_RDONLY) as fd:
        assert branches(pool, ("mod", f"{tmp_path / 'b'}=ro"))["ok"]
        assert os.pread(fd, 4, 0) == CONTENT[:4]
        assert errno_of(lambda: os.close(os.open(path, os.O_RDWR))) == "EBUSY"
        assert errno_of(lambda: path.chmod(0o600)) == "EBUSY"
        with opened(path, os.O_RDONLY) as second:
            assert os.pread(second, 4, 0) == CONTENT[:4]
    assert ended(pool)
    with opened(path) as fd:
        os.pwrite(fd, b"up", 0)
    assert (real.read_bytes(), (tmp_path / "a/file").read_bytes()) == (CONTENT, b"up" + CONTENT[2:])


def test_a_read_only_union_passes_everything(union: UnionFactory, tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base/file").write_bytes(CONTENT)
    mount = union({"top": "rw", "base": "ro"}, "notify", PASSING + ",ro")
    path = mount.path / "file"
    with opened(path, os.O_RDONLY) as fd:
        assert passed(mount)["in_use"] == 1
        assert mount.control({"op": "remount", "options": "rw"})["ok"]
        assert errno_of(lambda: os.close(os.open(path, os.O_RDWR))) == "EBUSY"
        assert os.pread(fd, 1 << 20, 0) == CONTENT
    assert ended(mount)
    with opened(path) as fd:
        os.pwrite(fd, b"up", 0)
    assert (tmp_path / "top/file").read_bytes() == b"up" + CONTENT[2:]


def test_lower_files_are_not_passed(union: UnionFactory, tmp_path: Path) -> None:
    """Readers must follow the copy-up."""
    (tmp_path / "base").mkdir()
    (tmp_path / "base/file").write_bytes(CONTENT)
    mount = union({"top": "rw", "base": "ro"}, "notify", PASSING)
    path = mount.path / "file"
    with opened(path, os.O_RDONLY) as reader:
        with opened(path) as writer:
            os.pwrite(writer, b"up", 0)
            assert os.pread(reader, 4, 0) == b"up" + CONTENT[2:4]
        with opened(path) as writer:  # on the writable branch by now, but opened otherwise as well
            os.pwrite(writer, b"UP", 0)
            assert os.pread(reader, 4, 0) == b"UP" + CONTENT[2:4]
        assert passed(mount)["opens"] == 0
    for _ in range(1000):  # until the kernel has told of the close
        with opened(path) as writer:
            os.pwrite(writer, b"passed", 0)
        if passed(mount)["opens"]:
            break
    assert passed(mount)["opens"] == 1
    assert path.read_bytes() == (tmp_path / "top/file").read_bytes() == b"passed" + CONTENT[6:]


def status(mount: Mount) -> tuple[str, list[str]]:
    answer = mount.control({"op": "status"})
    return answer["io"], answer["io_fallbacks"]


def works(mount: Mount) -> None:
    (mount.path / "f").write_bytes(CONTENT)
    with opened(mount.path / "f") as fd, opened(mount.path / "f") as second:
        os.pwrite(fd, b"new.", 0)
        assert os.pread(second, 1 << 20, 0) == b"new." + CONTENT[4:]


FAKED = """
import errno, os
from udbad.kernel import passthrough, protocol

def no_ioctl(fd, request, *rest):
    raise OSError(errno.{error}, os.strerror(errno.{error}))

if {error!r} == "ENOSYS":
    protocol._PASSTHROUGH = 1 << 31  # a flag that no kernel offers
else:
    passthrough.fcntl.ioctl = no_ioctl
"""


@pytest.mark.parametrize(
    ("error", "io", "line"),
    [
        ("ENOSYS", "requests", "no passthrough: the kernel does not offer it"),
        ("EPERM", "passthrough", "no passthrough: it takes CAP_SYS_ADMIN in the first user namespace"),
        ("ELOOP", "passthrough", "lies on other file systems itself"),
        ("EOPNOTSUPP", "passthrough", "Operation not supported"),
    ],
)
def test_without_it_the_kernel_asks(
    union: UnionFactory, patch_daemon: Callable[[str], None], error: str, io: str, line: str
) -> None:
    """One line in the log and in the status says why."""
    patch_daemon(FAKED.format(error=error))
    mount = union(POOL, "notify", PASSING)
    for _ in range(3):
        works(mount)
    assert mount.requests()["write"] > 0
    mode, (said,) = status(mount)
    assert (mode, line in said) == (io, True)
    assert mount.log().count(said) == 1


def test_a_branch_that_is_a_union_itself(union: UnionFactory, tmp_path: Path) -> None:
    for name in ("lower", "upper", "work", "b"):
        (tmp_path / name).mkdir()
    options = f"lowerdir={tmp_path / 'lower'},upperdir={tmp_path / 'upper'},workdir={tmp_path / 'work'}"
    subprocess.run(["mount", "-t", "overlay", "none", "-o", options, str(tmp_path / "b")], check=True, timeout=60)
    try:
        (tmp_path / "b/file").write_bytes(CONTENT)
        mount = union(POOL, "notify", PASSING)
        works(mount)
        with opened(mount.path / "file") as fd:
            os.pwrite(fd, b"new.", 0)
            assert os.pread(fd, 1 << 20, 0) == b"new." + CONTENT[4:]
        assert passed(mount)["opens"] == 3  # on the other branch
        mount.unmount()
    finally:
        subprocess.run(["umount", str(tmp_path / "b")], check=True, timeout=60)


def test_without_being_asked_for_nothing_is_passed(union: UnionFactory) -> None:
    mount = union(POOL, "notify", "io=requests")
    works(mount)
    assert mount.requests()["write"] > 0
    assert status(mount) == ("requests", [])
