"""Content and metadata copies on ext4, tmpfs, XFS and btrfs, each mounted in a namespace of its own."""

from __future__ import annotations

import errno
import os
import stat as st_mod
import struct
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NoReturn

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from udbad.branch import copydata, datacalls, syscalls
from udbad.branch.copydata import CopyResult, copy_contents, copy_metadata, copy_xattrs
from udbad.types import CopyMethod

BLOCK = 4096
MIB = 1 << 20
NOTHING: frozenset[str] = frozenset()
FILE_SYSTEMS = ("ext4", "tmpfs", "xfs", "btrfs")
REFLINKING = ("xfs", "btrfs")

# mkfs.xfs refuses less than 300 MiB, mkfs.btrfs less than 109; the images are sparse.
MKFS = {
    "ext4": ["mkfs.ext4", "-q", "-F"],
    "xfs": ["mkfs.xfs", "-q", "-m", "reflink=1"],
    "btrfs": ["mkfs.btrfs", "-q"],
}


# -- file systems -----------------------------------------------------------------------------


def cannot_mount(why: str) -> NoReturn:
    """No mount, no proof: that may pass on a workstation, not where changes are accepted."""
    if os.environ.get("CI") == "true":
        pytest.fail(why)
    pytest.skip(why)


@contextmanager
def private_mount(arguments: list[str], point: Path) -> Iterator[Path]:
    """mount(8) in the mount namespace of a child, reached through its /proc/PID/root; gone when the child is."""
    point.mkdir()
    script = 'mount "$@" && echo ready && exec cat'
    command = ["unshare", "--mount", "sh", "-c", script, "sh", *arguments, str(point)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as holder:
        assert holder.stdin is not None
        assert holder.stdout is not None
        assert holder.stderr is not None
        if holder.stdout.readline() != b"ready\n":
            why = holder.stderr.read().decode(errors="replace").strip()
            cannot_mount(f"mount {' '.join(arguments)}: {why}")
        try:
            yield Path(f"/proc/{holder.pid}/root{point}")
        finally:
            holder.stdin.close()
            assert holder.wait(timeout=60) == 0


@contextmanager
def private_fs(kind: str, base: Path) -> Iterator[Path]:
    """A fresh file system; `kind` is one of FILE_SYSTEMS, or a file system without a device with its options."""
    point = base / "mnt"
    if kind not in MKFS:
        fs_type, _, options = kind.partition(",")
        with private_mount(["-t", fs_type, "-o", options or "rw", "none"], point) as root:
            yield root
        return
    image = base / "image"
    with image.open("wb") as file:
        file.truncate(320 * MIB)
    try:
        subprocess.run([*MKFS[kind], str(image)], check=True, capture_output=True, timeout=60)
    except (OSError, subprocess.CalledProcessError) as error:
        cannot_mount(f"{kind}: {error}")
    with private_mount(["-t", kind, "-o", "loop", str(image)], point) as root:
        yield root


@pytest.fixture(scope="module", params=FILE_SYSTEMS)
def fs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with private_fs(request.param, tmp_path_factory.mktemp(request.param)) as root:
        yield root


@pytest.fixture
def fs_type(request: pytest.FixtureRequest, fs: Path) -> str:
    return str(request.node.callspec.params["fs"])


@pytest.fixture
def area(fs: Path) -> Path:
    """An empty directory of the file system under test."""
    return Path(tempfile.mkdtemp(dir=fs))


@pytest.fixture
def foreign(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Makes further file systems: for copies between two, and for ones that refuse things."""
    with ExitStack() as stack:

        def make(kind: str) -> Path:
            base = tmp_path / kind
            base.mkdir()
            return stack.enter_context(private_fs(kind, base))

        yield make


@contextmanager
def opened(path: Path, flags: int) -> Iterator[int]:
    fd = os.open(path, flags | os.O_CLOEXEC, 0o600)
    try:
        yield fd
    finally:
        os.close(fd)


def copy(
    src: Path,
    dst: Path,
    length: int | None = None,
    progress: Callable[[int], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> CopyResult:
    """copy_contents to the new file `dst`."""
    with opened(src, os.O_RDONLY) as src_fd, opened(dst, os.O_RDWR | os.O_CREAT | os.O_EXCL) as dst_fd:
        return copy_contents(src_fd, dst_fd, length, progress, cancelled)


# -- ways to copy -----------------------------------------------------------------------------


def no_reflink(_src_fd: int, _dst_fd: int) -> bool:
    return False


def refuse(number: int) -> Callable[..., NoReturn]:
    def call(*_arguments: object) -> NoReturn:
        raise OSError(number, os.strerror(number))

    return call


def generic_lseek(fd: int, offset: int, whence: int) -> int:
    """generic_file_llseek(): a file system that does not know its holes."""
    size = os.fstat(fd).st_size
    if offset >= size:
        raise OSError(errno.ENXIO, os.strerror(errno.ENXIO))
    return size if whence == os.SEEK_HOLE else offset


def force(way: str, patch: pytest.MonkeyPatch) -> None:
    """Leave copy_contents only one way: reflink (or the best there is), cfr, rw, blind or einval."""
    if way == "best":
        return
    patch.setattr(datacalls, "reflink", no_reflink)
    if way == "rw":
        patch.setattr(datacalls, "copy_in_turns", refuse(errno.EXDEV))
    if way == "blind":
        patch.setattr(os, "lseek", generic_lseek)
    if way == "einval":
        patch.setattr(os, "lseek", refuse(errno.EINVAL))


WAYS = ("best", "cfr", "rw", "blind", "einval")
HOLES_KNOWN = ("best", "cfr", "rw")


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many chunks without many bytes, and no reflink."""
    monkeypatch.setattr(copydata, "KERNEL_CHUNK", 16 * BLOCK)
    monkeypatch.setattr(copydata, "USER_CHUNK", 4 * BLOCK)
    monkeypatch.setattr(datacalls, "reflink", no_reflink)


# -- sparse files -----------------------------------------------------------------------------

Layout = list[tuple[str, int]]

layouts = st.tuples(
    st.lists(st.tuples(st.sampled_from(["hole", "data", "zeros"]), st.integers(1, 12)), max_size=8),
    st.sampled_from([0, 1, 511, BLOCK - 1]),
).map(lambda drawn: [(kind, blocks * BLOCK) for kind, blocks in drawn[0]] + [("data", drawn[1])])


def write_layout(path: Path, layout: Layout) -> bytes:
    """Write the file and return what reading it must give."""
    content = bytearray()
    with opened(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC) as fd:
        for number, (kind, size) in enumerate(layout, 1):
            piece = bytes([number]) * size if kind == "data" else bytes(size)
            if kind != "hole":
                os.pwrite(fd, piece, len(content))
            content += piece
        os.ftruncate(fd, len(content))
    return bytes(content)


def data_blocks(path: Path) -> set[int]:
    """Numbers of the blocks that are data and not hole."""
    blocks: set[int] = set()
    with opened(path, os.O_RDONLY) as fd:
        position, size = 0, os.fstat(fd).st_size
        while position < size:
            try:
                start = os.lseek(fd, position, os.SEEK_DATA)
            except OSError as error:
                if error.errno != errno.ENXIO:
                    raise
                break
            position = os.lseek(fd, start, os.SEEK_HOLE)
            blocks.update(range(start // BLOCK, -(-position // BLOCK)))
    return blocks


@settings(max_examples=60, deadline=None)
@given(layout=layouts, way=st.sampled_from(WAYS), length=st.none() | st.integers(0, 60 * BLOCK))
@example(layout=[("hole", 4 * BLOCK)], way="cfr", length=None)
@example(layout=[("data", 3 * BLOCK), ("hole", 9 * BLOCK)], way="rw", length=None)
@example(layout=[("zeros", 8 * BLOCK), ("data", 100)], way="blind", length=8 * BLOCK + 50)
def test_copy_equals_the_source_and_keeps_its_holes(fs: Path, layout: Layout, way: str, length: int | None) -> None:
    src, dst = fs / "sparse-src", fs / "sparse-dst"
    dst.unlink(missing_ok=True)
    content = write_layout(src, layout)
    wanted = content if length is None else content[:length]
    in_range = {block for block in data_blocks(src) if block * BLOCK < len(wanted)}
    with pytest.MonkeyPatch.context() as patch:
        force(way, patch)
        result = copy(src, dst, length)

    # Before anything reads the copy: XFS calls a cached hole data where it has preallocated (xfs_seek_iomap_begin).
    copied_blocks = data_blocks(dst)
    assert dst.read_bytes() == wanted
    assert result.size == len(wanted)
    assert result.bytes_copied <= len(wanted)
    assert src.read_bytes() == content
    assert copied_blocks <= in_range
    if way in HOLES_KNOWN:
        assert copied_blocks == in_range


@pytest.mark.parametrize("way", WAYS)
def test_huge_hole_costs_no_blocks(area: Path, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    src, dst = area / "src", area / "dst"
    content = write_layout(src, [("hole", 24 * MIB), ("data", BLOCK), ("hole", 24 * MIB), ("data", 10), ("hole", MIB)])
    force(way, monkeypatch)
    copy(src, dst)
    with opened(dst, os.O_RDONLY) as fd:
        os.fsync(fd)  # until blocks are allocated, st_blocks counts what is reserved
    assert os.stat(dst).st_blocks * 512 <= 32 * BLOCK
    assert dst.read_bytes() == content


def test_method_is_the_best_the_file_system_has(area: Path, fs_type: str) -> None:
    src = area / "src"
    content = write_layout(src, [("data", MIB), ("hole", MIB), ("data", MIB)])
    whole, part = copy(src, area / "whole"), copy(src, area / "part", MIB + 17)
    if fs_type in REFLINKING:
        assert whole == CopyResult(CopyMethod.REFLINK, 0, 3 * MIB)
        assert part == CopyResult(CopyMethod.REFLINK, 0, MIB + 17)
    else:
        assert whole == CopyResult(CopyMethod.COPY_FILE_RANGE, 2 * MIB, 3 * MIB)
        assert part == CopyResult(CopyMethod.COPY_FILE_RANGE, MIB, MIB + 17)
    assert (area / "whole").read_bytes() == content
    assert (area / "part").read_bytes() == content[: MIB + 17]


def test_between_two_file_systems_bytes_are_copied(area: Path, foreign: Callable[[str], Path]) -> None:
    src, dst = area / "src", foreign("ramfs") / "dst"
    content = write_layout(src, [("data", 3 * MIB + 5)])
    assert copy(src, dst) == CopyResult(CopyMethod.COPY, len(content), len(content))
    assert dst.read_bytes() == content


def test_small_files_are_copied_at_once(area: Path) -> None:
    """Those of which nothing can be lost by that; of others nothing is left."""
    src, dst = area / "src", area / "dst"

    def copy_at_once(content: bytes, length: int | None = None, size: int | None = None) -> CopyResult | None:
        src.write_bytes(content)
        if size is not None:
            os.truncate(src, size)
        src.chmod(0o2751)
        os.utime(src, ns=(1_000_000_001, 2_000_000_002))
        dst.unlink(missing_ok=True)
        with opened(src, os.O_RDONLY) as src_fd, opened(dst, os.O_RDWR | os.O_CREAT) as dst_fd:
            return copydata.copy_small(os.fstat(src_fd), src_fd, dst_fd, length)

    for content, length in ((b"", None), (b"small", None), (b"small", 2), (bytes(9 * BLOCK), 0)):
        result = copy_at_once(content, length)
        st = dst.stat()
        assert dst.read_bytes() == content[:length]
        assert (st.st_mode & 0o7777, st.st_atime_ns, st.st_mtime_ns) == (0o2751, 1_000_000_001, 2_000_000_002)
        assert result is not None
        assert (result.bytes_copied, result.size) == (st.st_size, st.st_size)
    assert copy_at_once(bytes(BLOCK + 1)) is None
    assert copy_at_once(b"", size=BLOCK) is None, "it is a hole"
    assert copy_at_once(bytes(2 * BLOCK), BLOCK) is None
    if os.getuid() == 0:
        src.write_bytes(b"")
        os.setxattr(src, "trusted.a", b"")
        assert copy_at_once(b"small") is None
        assert (dst.read_bytes(), os.listxattr(dst)) == (b"", [])


@pytest.mark.parametrize("length", [None, 0, 100])
def test_nothing_to_copy(area: Path, length: int | None) -> None:
    (area / "src").write_bytes(b"" if length != 0 else b"content")
    calls: list[int] = []
    assert copy(area / "src", area / "dst", length, calls.append) == CopyResult(CopyMethod.NONE, 0, 0)
    assert (area / "dst").read_bytes() == b""
    assert calls == []


@pytest.mark.parametrize("way", HOLES_KNOWN)
def test_only_a_hole(area: Path, fs_type: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write_layout(area / "src", [("hole", 5 * MIB)])
    force(way, monkeypatch)
    method = CopyMethod.REFLINK if way == "best" and fs_type in REFLINKING else CopyMethod.NONE
    assert copy(area / "src", area / "dst") == CopyResult(method, 0, 5 * MIB)
    assert data_blocks(area / "dst") == set()


@pytest.mark.parametrize(
    "number",
    [
        errno.EXDEV,
        errno.EINVAL,
        errno.EOPNOTSUPP,
        errno.ENOSYS,
        errno.EPERM,
        errno.EACCES,
        errno.ETXTBSY,
        errno.EBADF,
    ],
)
def test_refused_copy_file_range_is_replaced(tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    content = write_layout(tmp_path / "src", [("data", 3 * MIB), ("hole", MIB), ("data", 3)])
    monkeypatch.setattr(datacalls, "reflink", no_reflink)
    monkeypatch.setattr(datacalls, "copy_in_turns", refuse(number))
    assert copy(tmp_path / "src", tmp_path / "dst") == CopyResult(CopyMethod.COPY, 3 * MIB + 3, len(content))
    assert (tmp_path / "dst").read_bytes() == content


@pytest.mark.usefixtures("small_chunks")
def test_copy_file_range_that_stops_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = write_layout(tmp_path / "src", [("data", MIB)])
    real = datacalls.copy_in_turns
    calls = []

    def once(*arguments: int) -> int:
        calls.append(arguments)
        return real(*arguments) if len(calls) == 1 else 0

    monkeypatch.setattr(datacalls, "copy_in_turns", once)
    assert copy(tmp_path / "src", tmp_path / "dst") == CopyResult(CopyMethod.COPY, MIB, MIB)
    assert (tmp_path / "dst").read_bytes() == content
    assert len(calls) == 2


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = write_layout(tmp_path / "src", [("data", BLOCK), ("data", 3 * BLOCK + 9)])
    real = os.pwrite
    force("rw", monkeypatch)
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: real(fd, data[:1000], offset))
    copy(tmp_path / "src", tmp_path / "dst")
    assert (tmp_path / "dst").read_bytes() == content


def test_write_of_nothing_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "src").write_bytes(b"content")
    force("rw", monkeypatch)
    monkeypatch.setattr(os, "pwrite", lambda _fd, _data, _offset: 0)
    with pytest.raises(OSError, match="Input/output") as caught:
        copy(tmp_path / "src", tmp_path / "dst")
    assert caught.value.errno == errno.EIO


# -- errors, progress, cancellation, change meanwhile -----------------------------------------


def test_full_file_system(area: Path, foreign: Callable[[str], Path]) -> None:
    tiny = foreign("tmpfs,size=1m")
    write_layout(area / "src", [("data", 4 * MIB)])
    with pytest.raises(OSError, match="No space") as caught:
        copy(area / "src", tiny / "dst")
    assert caught.value.errno == errno.ENOSPC


def test_full_file_system_in_the_kernel(foreign: Callable[[str], Path]) -> None:
    tiny = foreign("tmpfs,size=1m")
    write_layout(tiny / "src", [("data", 768 * 1024)])
    with pytest.raises(OSError, match="No space") as caught:
        copy(tiny / "src", tiny / "dst")
    assert caught.value.errno == errno.ENOSPC


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ENOMEM, errno.EFBIG])
@pytest.mark.parametrize("call", ["copy_in_turns", "pread", "pwrite", "ftruncate", "lseek"])
def test_errors_of_the_disk_pass(tmp_path: Path, call: str, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "src").write_bytes(b"content" * copydata.SMALL)
    os.truncate(tmp_path / "src", 8 * copydata.SMALL)  # a hole at the end
    force("cfr" if call == "copy_in_turns" else "rw", monkeypatch)
    monkeypatch.setattr(datacalls if call == "copy_in_turns" else os, call, refuse(number))
    with pytest.raises(OSError, match=r".") as caught:
        copy(tmp_path / "src", tmp_path / "dst")
    assert caught.value.errno == number


@pytest.mark.parametrize("way", WAYS)
def test_progress_ascends_to_the_size(area: Path, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copydata, "KERNEL_CHUNK", 16 * BLOCK)
    monkeypatch.setattr(copydata, "USER_CHUNK", 4 * BLOCK)
    write_layout(area / "src", [("hole", 8 * BLOCK), ("data", 40 * BLOCK), ("hole", 8 * BLOCK)])
    force(way, monkeypatch)
    calls: list[int] = []
    result = copy(area / "src", area / "dst", progress=calls.append)
    assert calls == sorted(set(calls))
    assert calls[-1] == result.size
    assert (len(calls) > 2) is (result.method is not CopyMethod.REFLINK)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("after", [0, 1, 3])
def test_cancelled(tmp_path: Path, after: int) -> None:
    write_layout(tmp_path / "src", [("data", 2 * MIB)])
    calls: list[int] = []
    with pytest.raises(OSError, match="cancel") as caught:
        copy(tmp_path / "src", tmp_path / "dst", None, calls.append, lambda: len(calls) == after)
    assert caught.value.errno == errno.ECANCELED
    assert len(calls) == after


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("way", WAYS[1:])
@pytest.mark.parametrize("left", [0, 1, 5 * BLOCK + 1, 17 * BLOCK, 100 * BLOCK])
def test_source_that_shrinks_gives_what_is_left(
    area: Path, way: str, left: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = write_layout(area / "src", [("data", 64 * BLOCK), ("hole", 64 * BLOCK), ("data", 64 * BLOCK)])
    force(way, monkeypatch)
    result = copy(area / "src", area / "dst", progress=lambda _offset: os.truncate(area / "src", left))
    assert result.size == left
    assert (area / "dst").read_bytes() == content[:left]


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("way", WAYS[1:])
def test_source_that_grows_is_copied_up_to_its_first_size(
    area: Path, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = write_layout(area / "src", [("data", 64 * BLOCK), ("hole", 64 * BLOCK)])
    force(way, monkeypatch)
    with opened(area / "src", os.O_WRONLY | os.O_APPEND) as log:

        def grow(_offset: int) -> None:
            os.write(log, bytes(MIB))

        result = copy(area / "src", area / "dst", progress=grow)
    assert os.stat(area / "src").st_size > len(content)
    assert result.size == len(content)
    assert (area / "dst").read_bytes() == content


@pytest.mark.usefixtures("small_chunks")
def test_hole_punched_between_the_two_seeks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = write_layout(tmp_path / "src", [("data", 8 * BLOCK), ("hole", 8 * BLOCK), ("data", 8 * BLOCK)])
    real = os.lseek
    # Every answer of SEEK_HOLE is "right here" once the file is known to have holes.
    monkeypatch.setattr(
        os, "lseek", lambda fd, at, whence: at if whence == os.SEEK_HOLE and at else real(fd, at, whence)
    )
    copy(tmp_path / "src", tmp_path / "dst")
    assert (tmp_path / "dst").read_bytes() == content


@pytest.mark.usefixtures("small_chunks")
def test_threads_may_share_a_source(tmp_path: Path) -> None:
    content = write_layout(tmp_path / "src", [("data", MIB), ("hole", MIB)] * 4)

    def work(name: str) -> CopyResult:
        with opened(tmp_path / name, os.O_RDWR | os.O_CREAT) as dst_fd:
            return copy_contents(src_fd, dst_fd, None)

    names = [f"dst{number}" for number in range(6)]
    with opened(tmp_path / "src", os.O_RDONLY) as src_fd, ThreadPoolExecutor(len(names)) as pool:
        assert {result.bytes_copied for result in pool.map(work, names)} == {4 * MIB}
    assert all((tmp_path / name).read_bytes() == content for name in names)


# -- metadata ---------------------------------------------------------------------------------

ACCESS, DEFAULT = "system.posix_acl_access", "system.posix_acl_default"
CAPABILITY = struct.pack("<5I", 0x02000001, 1 << 10, 0, 0, 0)  # vfs_cap_data v2: cap_net_bind_service=ep
USER_OBJ, USER, GROUP_OBJ, MASK, OTHER = 0x01, 0x02, 0x04, 0x10, 0x20  # linux/posix_acl.h
NO_ID = 0xFFFFFFFF


def acl(user: int, group: int, mask: int) -> bytes:
    """An ACL (posix_acl_xattr.h): rw for the owner, `user` bits for uid 4321, `group` bits for the group."""
    entries = [(USER_OBJ, 6, NO_ID), (USER, user, 4321), (GROUP_OBJ, group, NO_ID), (MASK, mask, NO_ID)]
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in [*entries, (OTHER, 0, NO_ID)])


MAKE: dict[str, Callable[[Path], None]] = {
    "file": lambda path: os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)),
    "directory": lambda path: os.mkdir(path, 0o700),
    "symlink": lambda path: os.symlink("nowhere", path),
    "fifo": lambda path: os.mkfifo(path, 0o600),
    "socket": lambda path: os.mknod(path, st_mod.S_IFSOCK | 0o600),
    "char": lambda path: os.mknod(path, st_mod.S_IFCHR | 0o600, os.makedev(1, 3)),
    "block": lambda path: os.mknod(path, st_mod.S_IFBLK | 0o600, os.makedev(7, 200)),
}


def attributes_for(kind: str, area: Path) -> dict[str, bytes]:
    """All sorts of attributes that an object of this kind may have."""
    wanted = {"trusted.udbad": b"\0\xff\n", "trusted.empty": b"", "security.udbad": b"label"}
    if kind != "symlink":
        wanted[ACCESS] = acl(user=7, group=4, mask=7)
    if kind == "directory":
        wanted[DEFAULT] = acl(user=5, group=0, mask=5)
    if kind == "file":
        wanted["security.capability"] = CAPABILITY
    if kind in ("file", "directory") and has_user_xattrs(area):
        wanted["user.caf\udce9"] = b"any bytes in the name"
        wanted["user.overlay.opaque"] = b"y"
    return wanted


def has_user_xattrs(area: Path) -> bool:
    """tmpfs has them since Linux 6.6."""
    try:
        os.setxattr(area, "user.probe", b"")
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise
        return False
    return True


def set_xattrs(path: Path, wanted: dict[str, bytes]) -> None:
    for name, value in wanted.items():
        os.setxattr(path, name, value, follow_symlinks=False)


def get_xattrs(path: Path | int) -> dict[str, bytes]:
    """All attributes, but for XFS' second view of its ACLs."""
    follow = isinstance(path, int)  # there is nothing to follow, and Python refuses the combination
    names = os.listxattr(path, follow_symlinks=follow)
    return {
        name: os.getxattr(path, name, follow_symlinks=follow)
        for name in names
        if not name.startswith("trusted.SGI_ACL_")
    }


@contextmanager
def proc_paths(src: Path, dst: Path, follow_symlinks: bool) -> Iterator[tuple[bytes, bytes]]:
    """The two objects in the form that goes with follow_symlinks."""
    with ExitStack() as stack:

        def form(path: Path) -> bytes:
            dirfd, name = stack.enter_context(opened(path.parent, os.O_PATH)), os.fsencode(path.name)
            if follow_symlinks:
                return stack.enter_context(syscalls.pinned(dirfd, name))
            return b"%s/%s" % (syscalls.proc_path(dirfd), name)

        yield form(src), form(dst)


def copy_attributes(src: Path, dst: Path, ignore: frozenset[str] = NOTHING, follow_symlinks: bool = True) -> None:
    with proc_paths(src, dst, follow_symlinks) as (src_path, dst_path):
        copy_metadata(os.lstat(src), src_path, dst_path, ignore, follow_symlinks=follow_symlinks)


@pytest.mark.parametrize("follow_symlinks", [True, False])
@pytest.mark.parametrize("kind", MAKE)
def test_metadata_of_every_kind(area: Path, kind: str, follow_symlinks: bool) -> None:
    src, dst = area / "src", area / "dst"
    MAKE[kind](src)
    MAKE[kind](dst)
    os.chown(src, 1234, 5678, follow_symlinks=False)
    if kind != "symlink":
        os.chmod(src, 0o7461)
    set_xattrs(src, attributes_for(kind, area))
    os.utime(src, ns=(1_000_000_001, 2_000_000_000_123_456_789), follow_symlinks=False)
    expected = os.lstat(src)

    copy_attributes(src, dst, follow_symlinks=follow_symlinks)

    found = os.lstat(dst)
    assert (found.st_mode, found.st_uid, found.st_gid) == (expected.st_mode, 1234, 5678)
    assert (found.st_atime_ns, found.st_mtime_ns) == (1_000_000_001, 2_000_000_000_123_456_789)
    assert get_xattrs(dst) == attributes_for(kind, area)
    assert get_xattrs(src) == attributes_for(kind, area)
    assert kind == "symlink" or found.st_mode & 0o7000 == 0o7000


def test_metadata_of_an_unnamed_file(area: Path) -> None:
    src = area / "src"
    MAKE["file"](src)
    os.chown(src, 1234, 5678)
    set_xattrs(src, attributes_for("file", area))
    os.chmod(src, 0o6710)
    with opened(src, os.O_RDONLY) as src_fd, opened(area, os.O_PATH) as dirfd:
        dst_fd = syscalls.open_tmpfile(dirfd, 0o600)
        try:
            paths = syscalls.proc_path(src_fd), syscalls.proc_path(dst_fd)
            copy_metadata(os.fstat(src_fd), *paths, NOTHING, follow_symlinks=True)
            found = os.fstat(dst_fd)
            assert get_xattrs(dst_fd) == get_xattrs(src)
            assert "security.capability" in os.listxattr(dst_fd)
        finally:
            os.close(dst_fd)
    assert (st_mod.S_IMODE(found.st_mode), found.st_uid, found.st_gid) == (0o6710, 1234, 5678)
    assert (found.st_atime_ns, found.st_mtime_ns) == (os.stat(src).st_atime_ns, os.stat(src).st_mtime_ns)


@pytest.mark.parametrize("kind", [kind for kind in MAKE if kind != "symlink"])
@pytest.mark.parametrize("source_has_acl", [False, True])
def test_inherited_acls_are_reset(area: Path, kind: str, source_has_acl: bool) -> None:
    src, dst = area / "src", area / "heir" / "dst"
    MAKE[kind](src)
    os.chmod(src, 0o640)
    own = {ACCESS: acl(user=1, group=2, mask=4)} if source_has_acl else {}
    set_xattrs(src, own)
    (area / "heir").mkdir()
    set_xattrs(area / "heir", {DEFAULT: acl(user=7, group=7, mask=7)})
    MAKE[kind](dst)
    assert ACCESS in get_xattrs(dst)

    copy_attributes(src, dst)

    assert get_xattrs(dst) == own
    assert os.stat(dst).st_mode == os.stat(src).st_mode


def test_overlayfs_records_stay_behind(area: Path) -> None:
    src, dst = area / "src", area / "dst"
    MAKE["directory"](src)
    MAKE["directory"](dst)
    set_xattrs(src, {"trusted.overlay.opaque": b"y", "trusted.overlay.origin": b"x", "trusted.overlayed": b"kept"})
    copy_attributes(src, dst)
    assert get_xattrs(dst) == {"trusted.overlayed": b"kept"}


def test_acls_of_xfs_are_copied_once(foreign: Callable[[str], Path], tmp_path: Path) -> None:
    src, dst = foreign("xfs") / "src", tmp_path / "dst"
    MAKE["directory"](src)
    MAKE["directory"](dst)
    own = {ACCESS: acl(user=1, group=2, mask=4), DEFAULT: acl(user=7, group=5, mask=7)}
    set_xattrs(src, own)
    assert "trusted.SGI_ACL_FILE" in os.listxattr(src)
    copy_attributes(src, dst)
    assert set(os.listxattr(dst)) == set(own)
    assert get_xattrs(dst) == own


def test_group_never_gets_the_bits_of_the_mask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    src, dst = tmp_path / "src", tmp_path / "dst"
    MAKE["file"](src)
    MAKE["file"](dst)
    set_xattrs(src, {ACCESS: acl(user=6, group=0, mask=6)})
    assert st_mod.S_IMODE(os.stat(src).st_mode) == 0o660
    open_to_group: list[str] = []

    def watched(name: str, call: Callable[..., None]) -> Callable[..., None]:
        def wrapper(*arguments: object, **options: object) -> None:
            call(*arguments, **options)
            if os.stat(dst).st_mode & 0o070 and ACCESS not in os.listxattr(dst):
                open_to_group.append(name)

        return wrapper

    for name in ("chown", "chmod", "setxattr", "removexattr", "utime"):
        monkeypatch.setattr(os, name, watched(name, getattr(os, name)))
    copy_attributes(src, dst)
    assert open_to_group == []
    assert st_mod.S_IMODE(os.stat(dst).st_mode) == 0o660


# -- attributes that cannot be set ------------------------------------------------------------

PREFIXES = {
    "icexsec": "security.udbad",
    "icexsys": ACCESS,
    "icextr": "trusted.udbad",
    "icexusr": "user.udbad",
    "icexoth": "other.udbad",
}
EVERY_OTHER = frozenset(PREFIXES) | {"coo_reg", "unpin"}


@pytest.mark.parametrize("flag", ["icexsec", "icexsys", "icextr"])
def test_destination_without_attributes(foreign: Callable[[str], Path], flag: str) -> None:
    """ramfs has none: EOPNOTSUPP aborts, unless the branch has the attribute for this very kind, or icex."""
    src, dst = foreign("tmpfs") / "src", foreign("ramfs") / "dst"
    MAKE["file"](src)
    MAKE["file"](dst)
    value = acl(user=4, group=4, mask=4) if flag == "icexsys" else b"value"
    set_xattrs(src, {PREFIXES[flag]: value})
    for ignore in (NOTHING, EVERY_OTHER - {flag}):
        with pytest.raises(OSError, match="not supported") as caught:
            copy_attributes(src, dst, ignore)
        assert caught.value.errno == errno.EOPNOTSUPP
    for ignore in (frozenset({flag}), frozenset({"icex"})):
        copy_attributes(src, dst, ignore)
    assert get_xattrs(dst) == {}
    assert os.stat(dst).st_mode == os.stat(src).st_mode


def test_source_without_attributes(foreign: Callable[[str], Path], area: Path) -> None:
    src, dst = foreign("ramfs") / "src", area / "dst"
    MAKE["file"](src)
    MAKE["file"](dst)
    copy_attributes(src, dst)
    assert get_xattrs(dst) == {}


@pytest.fixture
def one_attribute(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, int], None]:
    """Pretend that the source has the one attribute `name`, and that setting it fails."""

    def prepare(name: str, number: int) -> None:
        monkeypatch.setattr(os, "listxattr", lambda _path, **_options: [name])
        monkeypatch.setattr(os, "removexattr", lambda _path, _name, **_options: None)

        def get(_path: bytes, wanted: str, **_options: bool) -> bytes:
            if wanted != name:
                raise OSError(errno.ENODATA, os.strerror(errno.ENODATA))
            return b"value"

        def put(_path: bytes, _name: str, _value: bytes, **_options: bool) -> NoReturn:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(os, "getxattr", get)
        monkeypatch.setattr(os, "setxattr", put)

    return prepare


SRC, DST = b"/proc/self/fd/0", b"/proc/self/fd/1"


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.EPERM, errno.E2BIG, errno.EINVAL, errno.EIO])
@pytest.mark.parametrize(("flag", "name"), PREFIXES.items())
def test_icex_forgives_its_own_kind(
    one_attribute: Callable[[str, int], None], flag: str, name: str, number: int
) -> None:
    one_attribute(name, number)
    copy_xattrs(SRC, DST, frozenset({flag}), follow_symlinks=True)
    copy_xattrs(SRC, DST, frozenset({"icex"}), follow_symlinks=True)
    for ignore in (NOTHING, EVERY_OTHER - {flag}):
        with pytest.raises(OSError, match=r".") as caught:
            copy_xattrs(SRC, DST, ignore, follow_symlinks=True)
        assert caught.value.errno == number


@pytest.mark.parametrize("number", [errno.ENOMEM, errno.EDQUOT, errno.ENOSPC])
@pytest.mark.parametrize("name", PREFIXES.values())
def test_lack_of_room_is_never_forgiven(one_attribute: Callable[[str, int], None], name: str, number: int) -> None:
    one_attribute(name, number)
    with pytest.raises(OSError, match=r".") as caught:
        copy_xattrs(SRC, DST, EVERY_OTHER | {"icex"}, follow_symlinks=True)
    assert caught.value.errno == number


def test_value_too_big_for_the_destination(foreign: Callable[[str], Path]) -> None:
    src, dst = foreign("xfs") / "src", foreign("ext4") / "dst"
    MAKE["file"](src)
    MAKE["file"](dst)
    set_xattrs(src, {"user.big": bytes(60_000)})
    with pytest.raises(OSError, match="No space") as caught:
        copy_attributes(src, dst, frozenset({"icex"}))
    assert caught.value.errno == errno.ENOSPC


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.ENODATA])
def test_unlistable_source_has_nothing(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "removexattr", lambda _path, _name, **_options: None)
    monkeypatch.setattr(os, "listxattr", lambda _path, **_options: refuse(number)())
    monkeypatch.setattr(os, "setxattr", lambda *_arguments, **_options: pytest.fail("nothing to set"))
    copy_xattrs(SRC, DST, NOTHING, follow_symlinks=True)


@pytest.mark.parametrize("call", ["listxattr", "getxattr", "removexattr"])
def test_other_errors_pass_even_with_icex(tmp_path: Path, call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    MAKE["file"](tmp_path / "src")
    MAKE["file"](tmp_path / "dst")
    monkeypatch.setattr(os, call, lambda *_arguments, **_options: refuse(errno.EIO)())
    with pytest.raises(OSError, match="Input/output") as caught:
        copy_attributes(tmp_path / "src", tmp_path / "dst", frozenset({"icex"}))
    assert caught.value.errno == errno.EIO


def test_attribute_removed_meanwhile(area: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    MAKE["file"](area / "src")
    MAKE["file"](area / "dst")
    set_xattrs(area / "src", {"trusted.stays": b"value"})
    monkeypatch.setattr(os, "listxattr", lambda _path, **_options: ["trusted.gone", "trusted.stays"])
    copy_attributes(area / "src", area / "dst")
    monkeypatch.undo()
    assert get_xattrs(area / "dst") == {"trusted.stays": b"value"}


def test_acl_that_is_not_listed_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    MAKE["file"](tmp_path / "src")
    MAKE["file"](tmp_path / "dst")
    set_xattrs(tmp_path / "src", {ACCESS: acl(user=4, group=4, mask=4)})
    monkeypatch.setattr(os, "listxattr", lambda _path, **_options: [])
    copy_attributes(tmp_path / "src", tmp_path / "dst")
    monkeypatch.undo()
    assert get_xattrs(tmp_path / "dst") == {ACCESS: acl(user=4, group=4, mask=4)}


@pytest.mark.parametrize(
    ("path", "follow_symlinks"),
    [
        (b"/proc/self/fd/5", False),  # would be the link in /proc
        (b"/proc/self/fd/5/name", True),  # would follow a symlink out of the branch
        (b"/proc/self/fd/5/a/name", False),
        (b"/etc/passwd", False),
        (b"/etc/passwd", True),
        (b"/proc/self/fd/5/..\n/x", False),
    ],
)
def test_only_safe_paths_are_taken(tmp_path: Path, path: bytes, follow_symlinks: bool) -> None:
    good = b"/proc/self/fd/0" if follow_symlinks else b"/proc/self/fd/0/name"
    for src, dst in ((path, good), (good, path)):
        with pytest.raises(ValueError, match="follow_symlinks"):
            copy_xattrs(src, dst, NOTHING, follow_symlinks=follow_symlinks)
        with pytest.raises(ValueError, match="follow_symlinks"):
            copy_metadata(os.stat(tmp_path), src, dst, NOTHING, follow_symlinks=follow_symlinks)


def test_symlink_in_place_of_the_destination_is_not_followed(area: Path) -> None:
    outside = area / "outside"
    MAKE["file"](outside)
    MAKE["file"](area / "src")
    set_xattrs(area / "src", {"trusted.udbad": b"value"})
    os.chown(area / "src", 1234, 5678)
    os.symlink(outside, area / "dst")
    before = os.stat(outside)
    with pytest.raises((OSError, NotImplementedError, ValueError)):  # chmod of a symlink; CPython has its own opinion
        copy_attributes(area / "src", area / "dst", follow_symlinks=False)
    assert os.stat(outside) == before
    assert get_xattrs(outside) == {}
