"""What kernel/fast.py answers by itself, and what it hands over; a socket pair is /dev/fuse."""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest

from tests.helpers.inprocess import Union, notify_union
from tests.helpers.scenarios import ACL
from udbad.kernel import wire
from udbad.kernel.fast import FastPath
from udbad.types import ROOT_ID, Perm

T = TypeVar("T")

MKDIR = 9


class Kernel:
    """The other ends: of /dev/fuse, and of where pyfuse3 reads."""

    def __init__(self, union: Union, setxattr_ext: bool = True) -> None:
        self.device, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.pyfuse3s, handed = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.sockets = [self.device, ours, self.pyfuse3s, handed]
        for each in self.sockets:
            each.setblocking(False)
        self.fast = FastPath(
            ours.fileno(), handed, union.fs, union.coherence, self._perform, union.fs.walks.stale, setxattr_ext
        )

    async def _perform(self, operation: Callable[[], T]) -> T:
        return self.fast.fs.run(operation)

    def ask(self, opcode: int, node: int, body: bytes) -> bool:
        """What `take` says: whether the request is done with, for pyfuse3 has nothing to read."""
        self.device.send(struct.pack("<IIQQIIIHH", 40 + len(body), opcode, 7, node, 0, 0, 1, 0, 0) + body)
        return self.fast.take()

    def forget_all(self) -> None:
        table = self.fast.fs.table
        for node in list(table.nodes.values()):
            if node.id != ROOT_ID:
                table.forget(node.id, node.nlookup)

    def close(self) -> None:
        self.fast.close()
        for each in self.sockets:
            each.close()

    def answer(self) -> tuple[int, bytes]:
        """(errno, body) of the answer. Raises BlockingIOError when there is none."""
        reply = self.device.recv(1 << 17)
        _, error, unique = wire.REPLY.unpack_from(reply)
        assert unique == 7
        return -error, reply[wire.REPLY.size :]


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
    assert kernel.ask(wire.LOOKUP, ROOT_ID, b"file\0")
    error, body = kernel.answer()
    assert error == 0
    (node,) = wire.QWORD.unpack_from(body)
    assert isinstance(node, int)
    return node


@pytest.mark.parametrize("batch", [False, True])
def test_a_forget_is_neither_answered_nor_handed_over(kernel: Kernel, batch: bool) -> None:
    """To hand it over, or to say so, costs a round through pyfuse3 that is longer than an unlink."""
    node = look_up(kernel)
    assert node in kernel.fast.fs.table.nodes
    if batch:
        assert kernel.ask(wire.BATCH_FORGET, 0, struct.pack("<II", 1, 0) + wire.FORGET_ONE.pack(node, 1))
    else:
        assert kernel.ask(wire.FORGET, node, wire.QWORD.pack(1))
    assert node not in kernel.fast.fs.table.nodes
    for silent in (kernel.device, kernel.pyfuse3s):
        with pytest.raises(BlockingIOError):
            silent.recv(1)


def test_what_is_not_served_is_handed_over_as_it_came(kernel: Kernel) -> None:
    assert not kernel.ask(MKDIR, ROOT_ID, struct.pack("<II", 0o755, 0) + b"made\0")
    request = kernel.pyfuse3s.recv(1 << 17)
    assert wire.REQUEST.unpack_from(request) == (MKDIR, 7, ROOT_ID)
    assert request.endswith(b"made\0")


def test_the_answer_to_an_error(kernel: Kernel) -> None:
    assert kernel.ask(wire.GETXATTR, ROOT_ID, struct.pack("<II", 100, 0) + b"user.none\0")
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
            assert kernel.ask(wire.SETXATTR, node, head + key + b"\0" + value)
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
            assert kernel.ask(wire.SETATTR, node, body)
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
        with pytest.raises(BlockingIOError):
            kernel.pyfuse3s.recv(1)
        kernel.forget_all()
        kernel.close()
