"""fallocate(2), copy_file_range(2) and lseek(2) of UnionFs, without a kernel: what each does in its three steps."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.inprocess import Union, notify_union
from tests.helpers.posix import COLLAPSE_RANGE, KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE
from tests.t2_core.core import STRATEGIES, Core, core
from tests.t2_core.fake_notifier import Message
from tests.t3_fuse.live import errno_of
from udbad.branch import copydata, datacalls
from udbad.branch.credentials import Credentials
from udbad.types import ROOT_CALLER, ROOT_ID, Caller, Perm, Trigger
from udbad.union import ranges
from udbad.union.superblock import NeedCopyUp

PUNCH = KEEP_SIZE | PUNCH_HOLE
PAGE = 4096
CONTENT = b"0123456789" * PAGE


@pytest.fixture(params=list(STRATEGIES))
def union(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Core]:
    (tmp_path / "base").mkdir()
    for name in ("f", "g"):
        (tmp_path / "base" / name).write_bytes(CONTENT)
    with core(tmp_path, udba=request.param) as made:
        yield made


# -- fallocate ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "offset", "length", "expected"),
    [
        (0, len(CONTENT), PAGE, CONTENT + bytes(PAGE)),
        (KEEP_SIZE, len(CONTENT), PAGE, CONTENT),
        (PUNCH, 1, PAGE, CONTENT[:1] + bytes(PAGE) + CONTENT[1 + PAGE :]),
        (ZERO_RANGE, len(CONTENT) - 1, 3, CONTENT[:-1] + bytes(3)),
        (ZERO_RANGE | KEEP_SIZE, len(CONTENT) - 1, 3, CONTENT[:-1] + bytes(1)),
        (COLLAPSE_RANGE, 0, PAGE, CONTENT[PAGE:]),
    ],
)
def test_a_lower_file_is_copied_up_and_then_changed(
    union: Core, mode: int, offset: int, length: int, expected: bytes
) -> None:
    handle = union.open("f", os.O_RDWR)
    with pytest.raises(NeedCopyUp) as need:
        union.fs.fallocate(handle.fh, mode, offset, length)
    assert need.value.trigger is Trigger.WRITE
    assert not (union["top"] / "f").exists()
    union.fallocate(handle, mode, offset, length)
    assert (union["top"] / "f").read_bytes() == expected
    assert (union["base"] / "f").read_bytes() == CONTENT
    assert union.fs.getattr(handle.node.id)[1].st_size == len(expected)


def test_the_branch_says_what_is_wrong(union: Core) -> None:
    handle = union.create("new", b"content")
    assert errno_of(lambda: union.fallocate(handle, 0, 0, 0)) == "EINVAL"
    assert errno_of(lambda: union.fallocate(handle, 0, 0, 1 << 62)) == "EFBIG"
    assert errno_of(lambda: union.fallocate(handle, 0x4000, 0, 1)) == "EOPNOTSUPP"
    assert (union["top"] / "new").read_bytes() == b"content"


@pytest.mark.parametrize("begin", ["fallocate", "copy"])
def test_only_through_what_was_opened_for_writing(union: Core, begin: str) -> None:
    handle, source = union.open("f"), union.open("g")
    calls = {
        "fallocate": lambda: union.fs.fallocate(handle.fh, 0, 0, 1),
        "copy": lambda: union.fs.copy_file_range(source.fh, 0, handle.fh, 0, 1),
    }
    assert errno_of(calls[begin]) == "EBADF"
    assert not (union["top"] / "f").exists()


def test_where_nothing_is_writable(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base/f").write_bytes(CONTENT)
    with core(tmp_path, {"upper": "ro", "base": "ro"}) as union:
        assert errno_of(lambda: union.open("f", os.O_RDWR)) == "EROFS"


def test_a_change_that_failed_may_have_changed_something(union: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    """After an error the kernel goes on with the attributes that it has (fuse_file_fallocate())."""
    handle = union.create("new", b"content")

    def full(fd: int, mode: int, offset: int, length: int) -> None:
        os.ftruncate(fd, 100)
        raise OSError(errno.ENOSPC, "")

    monkeypatch.setattr(datacalls, "fallocate", full)
    union.notifier.told.clear()
    assert errno_of(lambda: union.fallocate(handle, 0, 0, 1 << 20)) == "ENOSPC"
    held = union.sb.table.nodes[ROOT_ID].ttl
    assert union.notifier.told == ([Message("attributes", handle.node.id)] if held else [])


# -- copying ----------------------------------------------------------------------------------------


def test_copying_between_branches(union: Core) -> None:
    """From a lower file and from an upper one, into a new one and into a lower one, which is copied up."""
    source, target = union.open("f"), union.create("new")
    assert union.copy_range(source, 10, target, 0, PAGE) == PAGE
    assert (union["top"] / "new").read_bytes() == CONTENT[10 : 10 + PAGE]
    assert not (union["top"] / "f").exists(), "reading copies nothing up"
    lower = union.open("g", os.O_WRONLY)
    with pytest.raises(NeedCopyUp):
        union.fs.copy_file_range(source.fh, 0, lower.fh, 0, 1)
    assert union.copy_range(target, 0, lower, 5, PAGE) == PAGE
    assert (union["top"] / "g").read_bytes() == CONTENT[:5] + CONTENT[10 : 10 + PAGE] + CONTENT[5 + PAGE :]
    assert (union["base"] / "g").read_bytes() == CONTENT


def test_copying_within_a_lower_file(union: Core) -> None:
    """Both descriptors are of one file, and so both lead to the copy when it is made."""
    source, target = union.open("f"), union.open("f", os.O_WRONLY)
    assert union.copy_range(source, 0, target, len(CONTENT), PAGE) == PAGE
    assert union.copy_range(source, len(CONTENT), target, 1, 10) == 10
    assert (union["top"] / "f").read_bytes() == CONTENT[:1] + CONTENT[:10] + CONTENT[11:] + CONTENT[:PAGE]


def test_nothing_is_left_to_copy(union: Core) -> None:
    source, target = union.open("f"), union.create("new", b"content")
    assert union.copy_range(source, len(CONTENT) - 3, target, 1, PAGE) == 3
    assert union.copy_range(source, len(CONTENT), target, 0, PAGE) == 0
    assert (union["top"] / "new").read_bytes() == b"c" + CONTENT[-3:] + b"ent"


def test_it_ends_when_it_takes_long(union: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever waits for it cannot be killed meanwhile, and every program goes on with the rest."""
    source, target = union.open("f"), union.create("new")
    monkeypatch.setattr(copydata, "RANGE_CHUNK", 1000)
    monkeypatch.setattr(copydata, "RANGE_SECONDS", 0)
    at = 0
    while count := union.copy_range(source, at, target, at, len(CONTENT)):
        assert count <= 1000
        at += count
    assert (union["top"] / "new").read_bytes() == CONTENT


def test_an_error_in_the_middle_is_for_the_rest(union: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = union.open("f"), union.create("new")
    real = os.copy_file_range

    def full(src: int, dst: int, count: int, at: int, to: int) -> int:
        if to >= PAGE:
            raise OSError(errno.ENOSPC, "")
        return real(src, dst, min(count, PAGE), at, to)

    monkeypatch.setattr(os, "copy_file_range", full)
    assert union.copy_range(source, 0, target, 0, len(CONTENT)) == PAGE
    assert errno_of(lambda: union.copy_range(source, PAGE, target, PAGE, PAGE)) == "ENOSPC"


@pytest.mark.parametrize("number", [errno.EXDEV, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL])
def test_where_the_kernel_refuses_we_copy(union: Core, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two file systems: the kernel would do it in pieces of 64 KiB, each by way of two requests."""

    def refuse(*_: object) -> int:
        raise OSError(number, "")

    monkeypatch.setattr(os, "copy_file_range", refuse)
    monkeypatch.setattr(copydata, "USER_CHUNK", 1000)
    source, target = union.open("f"), union.create("new")
    assert union.copy_range(source, 1, target, 0, len(CONTENT) + 5) == len(CONTENT) - 1
    assert (union["top"] / "new").read_bytes() == CONTENT[1:]


# -- what both have in common -----------------------------------------------------------------------


@pytest.mark.parametrize("begin", ["fallocate", "copy"])
def test_set_id_bits_go_as_on_the_branch(tmp_path: Path, begin: str) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base/f").write_bytes(CONTENT)
    os.chmod(tmp_path / "base/f", 0o4777)
    with core(tmp_path, udba="none") as union:
        union.fs.creds = Credentials()
        source, target = union.open("f"), union.run(lambda: union.fs.open(union.find("f").id, os.O_RDWR, ALICE))[0]
        union.notifier.told.clear()
        if begin == "copy":
            union.copy_range(source, 0, target, PAGE, 1)
        else:
            union.fallocate(target, PUNCH, 0, 1)
        assert stat.S_IMODE((union["top"] / "f").stat().st_mode) == 0o777
        assert Message("attributes", target.node.id) in union.notifier.told
        assert target.id_bits == 0
        assert os.geteuid() == 0
        assert Path("/proc/thread-self/status").read_text().count("Uid:\t0\t0\t0\t0") == 1


ALICE = Caller(1001, 1001)


@pytest.fixture
def notifying(tmp_path: Path) -> Iterator[Union]:
    for name in ("top", "base"):
        (tmp_path / name).mkdir()
    (tmp_path / "top/f").write_bytes(CONTENT)
    (tmp_path / "base/g").write_bytes(CONTENT)
    with notify_union([(tmp_path / "top", Perm.RW), (tmp_path / "base", Perm.RO)], tmp_path / "mnt") as union:
        yield union


def opened(union: Union, name: bytes, flags: int) -> tuple[int, int]:
    node = union.look_up(ROOT_ID, name)
    return node, union.fs.run(lambda: union.fs.open(node, flags, ROOT_CALLER))[0].fh


def test_an_own_change_of_a_range_is_no_news(notifying: Union) -> None:
    """The event comes after the answer; the kernel has dropped by itself what it had of that range."""
    fs = notifying.fs
    node, target = opened(notifying, b"f", os.O_RDWR)
    _, source = opened(notifying, b"g", os.O_RDONLY)
    for change in (fs.fallocate(target, PUNCH, 0, PAGE), fs.copy_file_range(source, 0, target, 0, PAGE)):
        change.run()
        fs.changed(change, False)
        assert notifying.told() == set()
        assert fs.getattr(node)[1].st_size == len(CONTENT)
    fs.release(source)
    fs.release(target)


def test_its_event_may_come_before_its_end(notifying: Union) -> None:
    """A thread makes the change, and the event loop has other things to do before it hears of that."""
    fs = notifying.fs
    node, target = opened(notifying, b"f", os.O_RDWR)
    change = fs.fallocate(target, 0, 0, 2 * len(CONTENT))
    change.run()
    assert notifying.told() == set()
    fs.changed(change, False)
    assert notifying.told() == set()
    assert fs.getattr(node)[1].st_size == 2 * len(CONTENT)
    fs.release(target)


def test_a_direct_change_before_it_is_told(notifying: Union, tmp_path: Path) -> None:
    fs = notifying.fs
    node, target = opened(notifying, b"f", os.O_RDWR)
    with (tmp_path / "top/f").open("r+b") as stream:
        stream.write(b"directly")
    change = fs.fallocate(target, PUNCH, PAGE, PAGE)
    change.run()
    fs.changed(change, False)
    assert Message("data", node) in notifying.told()
    fs.release(target)


# -- holes --------------------------------------------------------------------------------------------


def seek(union: Core, path: str, flags: int, offset: int, whence: int) -> int:
    handle = union.open(path, flags)
    try:
        return ranges.seeker(handle, whence)(handle.fd, offset, whence)
    finally:
        union.fs.release(handle.fh)


def make_sparse(path: Path) -> None:
    """Data from 1 MiB to 2 MiB of 4."""
    with path.open("wb") as stream:
        stream.truncate(4 << 20)
        stream.seek(1 << 20)
        stream.write(b"x" * (1 << 20))


@pytest.mark.parametrize("name", ["base", "top"])
def test_holes_are_those_of_the_branch(union: Core, name: str) -> None:
    make_sparse(union[name] / "sparse")
    assert seek(union, "sparse", os.O_RDONLY, 0, os.SEEK_DATA) == 1 << 20
    assert seek(union, "sparse", os.O_RDONLY, 1 << 20, os.SEEK_HOLE) == 2 << 20
    assert seek(union, "sparse", os.O_WRONLY, 0, os.SEEK_HOLE) == 0
    assert errno_of(lambda: seek(union, "sparse", os.O_RDONLY, 2 << 20, os.SEEK_DATA)) == "ENXIO"
    assert errno_of(lambda: seek(union, "sparse", os.O_RDONLY, 0, os.SEEK_END)) == "EINVAL"


def test_what_can_be_mapped_for_writing_has_no_holes(union: Core) -> None:
    """Its holes may be full of pages that nobody has written yet; cp would leave them out."""
    make_sparse(union["top"] / "sparse")
    handle = union.open("sparse", os.O_RDWR)
    assert seek(union, "sparse", os.O_RDONLY, 5, os.SEEK_DATA) == 5
    assert seek(union, "sparse", os.O_RDONLY, 5, os.SEEK_HOLE) == 4 << 20
    assert errno_of(lambda: seek(union, "sparse", os.O_RDONLY, 4 << 20, os.SEEK_HOLE)) == "ENXIO"
    union.fs.release(handle.fh)
    assert seek(union, "sparse", os.O_RDONLY, 5, os.SEEK_HOLE) == 5


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EOPNOTSUPP])
def test_a_file_system_that_does_not_know_its_holes(union: Core, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    make_sparse(union["top"] / "sparse")

    def refuse(fd: int, offset: int, whence: int) -> int:
        raise OSError(number, "")

    monkeypatch.setattr(os, "lseek", refuse)
    assert seek(union, "sparse", os.O_RDONLY, 5, os.SEEK_DATA) == 5
    assert seek(union, "sparse", os.O_RDONLY, 5, os.SEEK_HOLE) == 4 << 20
