"""What edge/native.py makes of requests, byte by byte; a socket pair is /dev/fuse."""

from __future__ import annotations

import errno
import os
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.inprocess import Union, notify_union
from tests.helpers.mount import DEADLINE
from tests.helpers.scenarios import ACL
from udbad.edge.native import Native
from udbad.kernel import wire
from udbad.types import ROOT_ID, Perm


class Kernel:
    """The other end of /dev/fuse."""

    def __init__(self, union: Union, setxattr_ext: bool = True) -> None:
        self.device, self._ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for each in (self.device, self._ours):
            each.setblocking(False)
        self.native = Native(self._ours.fileno(), union.fs, union.coherence, union.fs.walks.stale, setxattr_ext)

    def ask(self, opcode: int, node: int, body: bytes, unique: int = 7, pid: int = 1) -> None:
        """Send a request and have it taken."""
        self.device.send(struct.pack("<IIQQIIIHH", 40 + len(body), opcode, unique, node, 0, 0, pid, 0, 0) + body)
        self.native.take()

    def forget_all(self) -> None:
        table = self.native.fs.table
        for node in list(table.nodes.values()):
            if node.id != ROOT_ID:
                table.forget(node.id, node.nlookup)

    def close(self) -> None:
        self.native.close()
        for each in (self.device, self._ours):
            each.close()

    def answers(self) -> dict[int, tuple[int, bytes]]:
        """All that there are: by unique number, (errno, body)."""
        found: dict[int, tuple[int, bytes]] = {}
        while True:
            try:
                reply = self.device.recv(1 << 21)
            except BlockingIOError:
                return found
            size, error, unique = wire.REPLY.unpack_from(reply)
            assert size == len(reply)
            assert unique not in found
            found[unique] = -error, reply[wire.REPLY.size :]

    def answer(self) -> tuple[int, bytes]:
        """(errno, body) of the answer. Raises KeyError when there is none."""
        return self.answers()[7]

    def wait(self, count: int = 1) -> dict[int, tuple[int, bytes]]:
        """Answers that come later: run the event loop until there are so many."""
        found: dict[int, tuple[int, bytes]] = {}
        end = time.monotonic() + DEADLINE
        while len(found) < count:
            assert time.monotonic() < end, f"{len(found)} answers of {count}"
            self.native.loop.call_posted()
            self.native.look()
            found |= self.answers()
            time.sleep(0.001)
        return found


@pytest.fixture
def kernel(tmp_path: Path) -> Iterator[Kernel]:
    (tmp_path / "base").mkdir()
    (tmp_path / "base/file").write_bytes(b"content")
    with notify_union([(tmp_path / "base", Perm.RO)], tmp_path / "mnt") as union:
        made = Kernel(union)
        try:
            yield made
        finally:
            made.close()


def look_up(kernel: Kernel) -> int:
    kernel.ask(wire.LOOKUP, ROOT_ID, b"file\0")
    error, body = kernel.answer()
    assert error == 0
    (node,) = wire.QWORD.unpack_from(body)
    assert isinstance(node, int)
    return node


@pytest.mark.parametrize("batch", [False, True])
def test_a_forget_is_not_answered(kernel: Kernel, batch: bool) -> None:
    node = look_up(kernel)
    assert node in kernel.native.fs.table.nodes
    if batch:
        kernel.ask(wire.BATCH_FORGET, 0, struct.pack("<II", 1, 0) + wire.FORGET_ONE.pack(node, 1))
    else:
        kernel.ask(wire.FORGET, node, wire.QWORD.pack(1))
    assert node not in kernel.native.fs.table.nodes
    assert kernel.answers() == {}


def test_many_that_are_forgotten_at_a_time_hold_up_nobody(kernel: Kernel) -> None:
    """Some at once, the rest between other requests, with what comes meanwhile behind it."""
    top = os.fsdecode(kernel.native.fs.sb.branches[0].path)
    names = [b"n%d" % number for number in range(150)]
    for name in names:
        Path(top, os.fsdecode(name)).touch()
    kernel.native.take_events()
    found = []
    for name in names:
        kernel.ask(wire.LOOKUP, ROOT_ID, name + b"\0")
        found.append(wire.QWORD.unpack_from(kernel.answer()[1])[0])
    nodes, loop = kernel.native.fs.table.nodes, kernel.native.loop
    for some in found[:-1], found[-1:]:
        ones = b"".join(wire.FORGET_ONE.pack(node, 1) for node in some)
        kernel.ask(wire.BATCH_FORGET, 0, struct.pack("<II", len(some), 0) + ones)
    assert 0 < sum(node in nodes for node in found) < len(found)
    assert found[-1] in nodes
    kernel.ask(wire.LOOKUP, ROOT_ID, names[-1] + b"\0")
    assert kernel.answer()[0] == 0
    for _ in range(10):
        loop.call_posted()
    assert [node for node in found if node in nodes] == found[-1:]
    kernel.forget_all()


@pytest.mark.parametrize(("opcode", "number"), [(39, errno.ENOSYS), (4711, errno.ENOSYS), (wire.DESTROY, 0)])
def test_what_there_is_no_operation_for(kernel: Kernel, opcode: int, number: int) -> None:
    """IOCTL, something from the future, and the end, which needs none."""
    kernel.ask(opcode, ROOT_ID, bytes(32))
    assert kernel.answer() == (number, b"")


def test_the_answer_to_an_error(kernel: Kernel) -> None:
    kernel.ask(wire.GETXATTR, ROOT_ID, struct.pack("<II", 100, 0) + b"user.none\0")
    assert kernel.answer() == (61, b"")  # ENODATA


@pytest.mark.parametrize("extended", [True, False])
def test_both_forms_of_setxattr(tmp_path: Path, extended: bool) -> None:
    """The longer one came with Linux 5.13; its flag says that an ACL costs the setgid bit."""
    (tmp_path / "top").mkdir()
    file = tmp_path / "top/file"
    file.touch()
    file.chmod(0o2775)
    with notify_union([(tmp_path / "top", Perm.RW)], tmp_path / "mnt") as union:
        kernel = Kernel(union, extended)
        node = look_up(kernel)

        def put(key: bytes, value: bytes, flags: int = 0) -> int:
            more = struct.pack("<II", wire.ACL_KILL_SGID, 0) if extended else b""
            head = struct.pack("<II", len(value), flags) + more
            kernel.ask(wire.SETXATTR, node, head + key + b"\0" + value)
            return kernel.answer()[0]

        assert put(b"user.a", b"with\0zero\0", os.XATTR_REPLACE) == errno.ENODATA
        assert put(b"user.a", b"with\0zero\0", os.XATTR_CREATE) == 0
        assert put(b"user.a", b"", os.XATTR_CREATE) == errno.EEXIST
        assert put(b"user.empty", b"") == 0
        assert (os.getxattr(file, "user.a"), os.getxattr(file, "user.empty")) == (b"with\0zero\0", b"")
        assert file.stat().st_mode & 0o7777 == 0o2775, "not by just any attribute"
        assert put(b"system.posix_acl_access", ACL) == 0
        assert file.stat().st_mode & 0o7777 == (0o770 if extended else 0o2770)
        kernel.forget_all()
        kernel.close()


def test_attributes_are_set_as_they_are_asked_for(tmp_path: Path) -> None:
    (tmp_path / "top").mkdir()
    (tmp_path / "top/file").write_bytes(b"content")
    with notify_union([(tmp_path / "top", Perm.RW)], tmp_path / "mnt") as union:
        kernel = Kernel(union)
        node = look_up(kernel)

        def change(valid: int, size: int = 0, times: tuple[int, int] = (0, 0), mode: int = 0) -> os.stat_result:
            body = struct.pack("<IIQQQqqqIIIIIIII", valid, 0, 9, size, 0, *times, 0, 5, 6, 0, mode, 0, 12, 34, 0)
            kernel.ask(wire.SETATTR, node, body)
            assert kernel.answer()[0] == 0
            return (tmp_path / "top/file").stat()

        st = change(wire.SET_MTIME | wire.SET_SIZE, size=3, times=(1, -7))
        assert (st.st_size, st.st_mtime_ns) == (3, -7 * 10**9 + 6), "before 1970"
        assert st.st_atime_ns != 10**9 + 5, "was not asked for"
        st = change(wire.SET_MODE | wire.SET_ATIME, times=(1, -7), mode=0o100640)
        assert (st.st_mode & 0o7777, st.st_atime_ns, st.st_size) == (0o640, 10**9 + 5, 3)
        st = change(wire.SET_UID | wire.SET_GID)
        assert (st.st_uid, st.st_gid) == (12, 34)
        earlier, later = (tmp_path / "top" / name for name in ("earlier", "later"))
        earlier.touch()
        st = change(wire.SET_ATIME | wire.SET_MTIME | wire.SET_ATIME_NOW | wire.SET_MTIME_NOW)
        later.touch()
        # By the clock that stamps every file of the branch: a finer one would be ahead of it (make, which compares).
        assert earlier.stat().st_mtime_ns <= st.st_mtime_ns <= later.stat().st_mtime_ns
        assert st.st_atime_ns == st.st_mtime_ns
        old = st.st_atime_ns
        st = change(wire.SET_MTIME | wire.SET_MTIME_NOW)
        assert (st.st_atime_ns, st.st_mtime_ns >= later.stat().st_mtime_ns) == (old, True)
        kernel.forget_all()
        kernel.close()
