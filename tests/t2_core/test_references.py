"""What is counted as known to the kernel is what it was told: no more after errors, nothing that it did not take."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.inprocess import notify_union
from tests.t2_core.core import in_python
from tests.t2_core.test_native import Kernel
from udbad.coherence.notify import NotifyCoherence
from udbad.inodes.node import Dir, Node
from udbad.kernel import wire
from udbad.types import ROOT_ID, Perm
from udbad.union import readdir
from udbad.union.superblock import Superblock

NAMES = [b"d%d" % i for i in range(8)]


@pytest.fixture
def kernel(tmp_path: Path) -> Iterator[Kernel]:
    for name in NAMES:
        (tmp_path / "top/dir" / name.decode()).mkdir(parents=True)
    with notify_union([(tmp_path / "top", Perm.RW)], tmp_path / "mnt") as union:
        made = Kernel(union)
        try:
            yield made
        finally:
            made.close()


def in_table(kernel: Kernel) -> set[int]:
    return set(kernel.native.fs.table.nodes)


def references(opcode: int, body: bytes) -> tuple[list[int], int | None]:
    """What an answer gives the kernel: nodes, once for each reference, and a handle."""
    if opcode in (wire.OPEN, wire.OPENDIR):
        return [], wire.OPENED.unpack_from(body)[0]
    if opcode != wire.READDIRPLUS:
        (node,) = wire.QWORD.unpack_from(body)
        return [node], wire.OPENED.unpack_from(body, wire.ENTRY_SIZE)[0] if opcode in (
            wire.CREATE,
            wire.TMPFILE,
        ) else None
    nodes = []
    at = 0
    while at < len(body):
        (node,) = wire.QWORD.unpack_from(body, at)
        at += wire.ENTRY_SIZE
        _, _, size, _ = struct.unpack_from("<QQII", body, at)
        at += wire.DIRENT_SIZE
        if node and body[at : at + size] not in (b".", b".."):  # which are no look-up (fuse_direntplus_link())
            nodes.append(node)
        at += size + 7 & ~7
    return nodes, None


def read_directory(kernel: Kernel, fh: int, start: int = 0, room: int = 1 << 16) -> tuple[int, list[int], int]:
    """READDIRPLUS: (errno, nodes that the kernel takes a reference of, offset after the last entry)."""
    kernel.ask(wire.READDIRPLUS, ROOT_ID, wire.READ_IN.pack(fh, start, room) + bytes(20))
    error, body = kernel.answer()
    assert len(body) <= room
    nodes, _ = references(wire.READDIRPLUS, body)
    at, after = 0, start
    while at < len(body):
        _, after, size, _ = struct.unpack_from("<QQII", body, at + wire.ENTRY_SIZE)
        at += wire.ENTRY_SIZE + wire.DIRENT_SIZE + (size + 7 & ~7)
    return error, nodes, after


def forget(kernel: Kernel, nodes: list[int]) -> None:
    for node in nodes:
        kernel.ask(wire.FORGET, node, wire.QWORD.pack(1))


@pytest.fixture
def opened(kernel: Kernel) -> Iterator[int]:
    """Handle of the directory, which the kernel knows; afterwards it has forgotten everything."""
    kernel.ask(wire.LOOKUP, ROOT_ID, b"dir\0")
    (node,) = wire.QWORD.unpack_from(kernel.answer()[1])
    kernel.ask(wire.OPENDIR, node, bytes(8))
    (fh, *_) = wire.OPENED.unpack(kernel.answer()[1])
    yield fh
    kernel.ask(wire.RELEASEDIR, node, wire.QWORD.pack(fh))
    forget(kernel, [node])
    assert in_table(kernel) == {ROOT_ID}


def watches(kernel: Kernel) -> int:
    return kernel.native.operations.coherence.statistics().watches


def test_an_entry_that_does_not_fit_is_not_kept(kernel: Kernel, opened: int) -> None:
    before, watched = in_table(kernel), watches(kernel)
    known: list[int] = []
    after = 0
    while True:
        error, nodes, after = read_directory(kernel, opened, after, room=3 * (wire.ENTRY_SIZE + wire.DIRENT_SIZE + 8))
        assert error == 0
        if not nodes and len(known) == len(NAMES):
            break
        known += nodes
        assert in_table(kernel) == before | set(known)
        assert watches(kernel) == watched + len(known)
    forget(kernel, known)
    assert (in_table(kernel), watches(kernel)) == (before, watched)


@in_python
@pytest.mark.parametrize("position", [0, 3])
def test_an_error_comes_after_what_there_is(
    kernel: Kernel, opened: int, position: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """getdents64(2): entries, and the error when there are none before it."""
    before = in_table(kernel)
    hit = readdir._by_hit

    def fails(sb: Superblock, parent: Dir, layers: Any, name: bytes, current: Any) -> Any:
        if list(parent.view or ()).index(name) == position:
            raise OSError(errno.EACCES, "")
        return hit(sb, parent, layers, name, current)

    monkeypatch.setattr(readdir, "_by_hit", fails)
    error, nodes, after = read_directory(kernel, opened)
    assert (error, len(nodes)) == (0, position)
    assert in_table(kernel) == before | set(nodes)
    assert read_directory(kernel, opened, after) == (errno.EACCES, [], after)
    assert in_table(kernel) == before | set(nodes)
    assert all(kernel.native.fs.table.nodes[node].nlookup == 1 for node in nodes)
    forget(kernel, nodes)


def test_an_answer_that_becomes_an_error_counts_nothing(
    kernel: Kernel, opened: int, monkeypatch: pytest.MonkeyPatch, expect_log: Any
) -> None:
    before = in_table(kernel)
    told = []

    def attr_ttl(node: Node, st: os.stat_result) -> float:
        told.append(node)
        if len(told) > 3:
            raise ZeroDivisionError
        return 0.0

    monkeypatch.setattr(kernel.native.operations.coherence, "attr_ttl", attr_ttl)
    expect_log("readdir of node 1 failed")
    assert read_directory(kernel, opened)[:2] == (errno.EIO, [])
    assert in_table(kernel) - before == {told[-1].id}, "where the bug struck"
    kernel.native.fs.table.not_sent(told[-1])


def test_what_could_not_be_interned_is_not_kept(kernel: Kernel, opened: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The directory is there, and its watch cannot be had: EIO, and nothing is left of it."""
    before, watched = in_table(kernel), watches(kernel)
    descriptors = kernel.native.fs.table.open_fds
    coherence = kernel.native.operations.coherence

    def fails(node: Dir, changed: bool) -> None:
        raise OSError(errno.EIO, "")

    directory = next(node for node in before if node != ROOT_ID)
    with monkeypatch.context() as patch:
        patch.setattr(coherence, "adopt", fails)
        kernel.ask(wire.LOOKUP, directory, b"d0\0")
        assert kernel.answer() == (errno.EIO, b"")
    assert (in_table(kernel), watches(kernel), kernel.native.fs.table.open_fds) == (before, watched, descriptors)


REFUSED: dict[str, tuple[int, bytes]] = {
    "lookup": (wire.LOOKUP, b"dir\0"),
    "tmpfile": (wire.TMPFILE, wire.FOUR_WORDS.pack(os.O_RDWR, 0o100644, 0o022, 0) + b"/\0"),
    "create": (wire.CREATE, wire.FOUR_WORDS.pack(os.O_RDWR | os.O_CREAT, 0o100644, 0o022, 0) + b"new\0"),
    "mkdir": (wire.MKDIR, wire.TWO_WORDS.pack(0o755, 0) + b"made\0"),
    "mknod": (wire.MKNOD, wire.FOUR_WORDS.pack(0o100644, 0, 0, 0) + b"node\0"),
    "symlink": (wire.SYMLINK, b"link\0target\0"),
    "link": (wire.LINK, b""),
    "opendir": (wire.OPENDIR, bytes(8)),
    "readdir": (wire.READDIRPLUS, b""),
    "open": (wire.OPEN, bytes(8)),
}


@pytest.mark.parametrize("number", [errno.ENOENT, errno.EINVAL])
@pytest.mark.parametrize("what", REFUSED)
def test_our_answer_that_the_kernel_does_not_take(
    kernel: Kernel, opened: int, what: str, number: int, monkeypatch: pytest.MonkeyPatch, expect_log: Any
) -> None:
    """write(2) says ENOENT: whoever asked was killed meanwhile; EINVAL: it makes no sense to the kernel, a bug."""
    fs = kernel.native.fs
    kernel.ask(wire.CREATE, ROOT_ID, wire.FOUR_WORDS.pack(os.O_RDWR, 0o100644, 0, 0) + b"file\0")
    body = kernel.answer()[1]
    (file,), fh = references(wire.CREATE, body)
    before, handles = {number: node.nlookup for number, node in fs.table.nodes.items()}, len(fs.handles)
    cached, watched = directory_of(kernel, opened).cached_opens, watches(kernel)
    opcode, request = REFUSED[what]
    if what == "readdir":
        request = wire.READ_IN.pack(opened, 0, 1 << 16) + bytes(20)
    if what == "link":
        request = wire.QWORD.pack(file) + b"linked\0"
    refused = []

    def refuse(fd: int, unique: int, failed: int, body: bytes) -> None:
        refused.append(body)
        raise OSError(number, "refused")

    if number == errno.EINVAL:
        expect_log("cannot answer a request: refused")
    with monkeypatch.context() as patch:
        patch.setattr("udbad.edge.native.answer", refuse)
        node = {"open": file, "opendir": directory_of(kernel, opened).id}.get(what, ROOT_ID)
        kernel.ask(opcode, node, request)
    assert refused
    after = {number: node.nlookup for number, node in fs.table.nodes.items()}
    assert (after, len(fs.handles)) == (before, handles)
    # With a second name, a file is watched itself.
    assert (directory_of(kernel, opened).cached_opens, watches(kernel)) == (cached, watched + (what == "link"))
    kernel.ask(wire.RELEASE, file, wire.QWORD.pack(fh or 0))
    forget(kernel, [file])


def directory_of(kernel: Kernel, fh: int) -> Dir:
    return kernel.native.fs.handles.directory(fh).node


@in_python
@pytest.mark.parametrize("fails", ["stat", "gone"])
@pytest.mark.parametrize("which", [0, 3, 7])
def test_an_entry_whose_status_cannot_be_had(
    kernel: Kernel, opened: int, which: int, fails: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of a listing: one that is gone is left out, an error ends the reply before it."""
    before = in_table(kernel)
    asked, asking = [], os.stat

    def stat(name: Any, **how: Any) -> os.stat_result:
        if name == NAMES[which]:
            asked.append(name)
            raise OSError(errno.EACCES if fails == "stat" else errno.ENOENT, "")
        return asking(name, **how)

    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", stat)
        error, nodes, after = read_directory(kernel, opened)
    assert asked
    order = [name for name in directory_of(kernel, opened).view or () if name in NAMES]
    expected = len(NAMES) - 1 if fails == "gone" else order.index(NAMES[which])
    assert (error if nodes else 0, len(nodes)) == (0, expected)
    assert in_table(kernel) == before | set(nodes)
    rest = read_directory(kernel, opened, after) if fails == "stat" else (0, [], after)
    assert len(rest[1]) == (len(NAMES) - expected if fails == "stat" else 0), "once it can be had, the listing goes on"
    forget(kernel, nodes + rest[1])
    assert in_table(kernel) == before


def test_a_forgotten_directory_leaves_nothing_in_the_strategy(kernel: Kernel, opened: int) -> None:
    """Nor while IN_IGNORED has not been read, which comes for each watch, and never after an overflow."""
    coherence = kernel.native.operations.coherence
    assert isinstance(coherence, NotifyCoherence)
    watcher = coherence._watches.watcher
    assert watcher is not None

    def held() -> list[int]:
        return [len(each) for each in (coherence._watches.directories, watcher._handles)]

    before = held()
    error, nodes, _ = read_directory(kernel, opened)
    assert (error, len(nodes)) == (0, len(NAMES))
    assert held()[0] == before[0] + len(NAMES)
    forget(kernel, nodes)
    assert held() == before
    kernel.native.fs.table._give_back()
    assert held() == before
    (directory,) = in_table(kernel) - {ROOT_ID}
    kernel.ask(wire.LOOKUP, directory, b"d0\0")  # all goes on as before
    (node,) = wire.QWORD.unpack_from(kernel.answer()[1])
    assert held()[0] == before[0] + 1
    forget(kernel, [node])
