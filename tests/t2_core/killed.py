"""A mount process that is killed before or after any single system call that changes something, and its successor.

The process is objects in this one: what kills it is an exception that nobody catches, and from then on no system call
changes anything, whatever cleans up. The successor gets what a record would have (`Remembered`) and the slots.
"""

from __future__ import annotations

import os
import socket
import stat as st_mod
import struct
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest

from tests.helpers.mount import DEADLINE
from tests.t2_core.core import Core, core
from udbad.branch import sweep, syscalls, whiteout
from udbad.coherence.base import Coherence
from udbad.edge.native import Native
from udbad.edge.once import RESENT, SLOT
from udbad.inodes.table import Dir, Layer, Node
from udbad.kernel import wire
from udbad.types import ROOT_ID, Caller

if TYPE_CHECKING:
    from udbad.inodes.record import Record

UNIQUE = 4242
Tree = dict[str, Any]


class Killed(BaseException):
    """The process is not there any more."""


class Faults:
    """Counts system calls that change something, and kills at one of them."""

    _OS = (
        "mkdir", "mknod", "symlink", "link", "unlink", "rmdir", "rename", "chmod", "chown", "utime", "setxattr",
        "removexattr", "ftruncate", "pwrite", "pwritev", "copy_file_range", "write", "writev", "sendfile",
    )  # fmt: skip
    _LIBC = ("linkat", "renameat2", "utimensat")

    def __init__(self, at: int = 0, after: bool = False, on_write: Callable[[], None] = lambda: None) -> None:
        """at: number of the call, from 1 on; 0: none. on_write: called before the answer is written."""
        self.at = at
        self.after = after
        self.count = 0
        self.fired = False
        self.calls: list[str] = []
        self.on_write = on_write

    def _call(self, name: str, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self.fired:
            raise Killed
        if name == "write":
            self.on_write()
        self.count += 1
        self.calls.append(name)
        if self.count == self.at and not self.after:
            self.fired = True
            raise Killed
        result = call(*args, **kwargs)
        if self.count == self.at:
            self.fired = True
            raise Killed
        return result

    @contextmanager
    def armed(self) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            for name in self._OS:
                patch.setattr(os, name, self._wrapped(name, getattr(os, name)))
            opening = os.open

            def open_(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
                if flags & (os.O_CREAT | os.O_TRUNC) or flags & os.O_TMPFILE == os.O_TMPFILE:
                    return self._call("open", opening, path, flags, *args, **kwargs)  # type: ignore[no-any-return]
                return opening(path, flags, *args, **kwargs)

            patch.setattr(os, "open", open_)
            libc = syscalls._libc
            faults = self

            class Libc:
                def __getattr__(self, name: str) -> Any:
                    function = getattr(libc, name)
                    return faults._wrapped(name, function) if name in Faults._LIBC else function

            patch.setattr(syscalls, "_libc", Libc())
            patch.setattr(syscalls, "_fallocate", self._wrapped("fallocate", syscalls._fallocate))
            yield

    def _wrapped(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            return self._call(name, call, *args, **kwargs)

        return wrapped


class Remembered:
    """What a record has: nodes and open files. As at the last answer."""

    def __init__(self, fs: Any) -> None:
        table = fs.table
        self.nodes = [
            (
                node.id, node.kind, node.branch.index, node.identity, node.nlookup, node.nlink_extra, node.dead,
                [(parent.id, name) for parent, name in node.names()],
                [(layer.branch.index, layer.identity, layer.nlink) for layer in node.layers]
                if type(node) is Dir
                else [],
                getattr(node, "floor", 0),
            )
            for node in table.nodes.values()
        ]  # fmt: skip
        self.files = [
            (handle.fh, handle.node.id, os.dup(handle.fd), handle.flags, handle.writable)
            for handle in fs.handles.files.values()
        ]
        self.dirs = [(handle.fh, handle.node.id) for handle in fs.handles.dirs.values()]
        self.next = fs.handles.next

    def recall(self, fs: Any) -> None:
        sb = fs.sb
        branches = sb.branches
        made: dict[int, Node] = {ROOT_ID: sb.root}
        for number, kind, index, identity, nlookup, extra, dead, _, layers, floor in self.nodes:
            if number == ROOT_ID:
                continue
            node: Node
            if kind == st_mod.S_IFDIR:
                node = Dir(number, [Layer(branches[at], *who, links, -1) for at, who, links in layers])
                node.floor = floor
            else:
                node = Node(number, kind, branches[index], *identity)
            node.nlookup, node.nlink_extra, node.dead = nlookup, extra, dead
            sb.inomap.alias(*identity, number)
            sb.table.add(node)
            made[number] = node
        for number, _, _, _, _, _, _, names, _, _ in self.nodes:
            for parent, name in reversed(names):
                directory = made[parent]
                assert type(directory) is Dir
                sb.table.attach(made[number], directory, name)
        for fh, number, fd, flags, writable in self.files:
            fs.handles.next = fh
            fs.handles.add_file(made[number], os.dup(fd), flags, Caller(0, 0), writable)
        for fh, number in self.dirs:
            fs.handles.next = fh
            directory = made[number]
            assert type(directory) is Dir
            fs.handles.add_dir(directory, 0)
        fs.handles.next = self.next

    def close(self) -> None:
        for _, _, fd, _, _ in self.files:
            os.close(fd)


class Slots:
    """Of a record what edge/once.py keeps there; the rest is `Remembered`."""

    changed = ()

    def __init__(self) -> None:
        self.slots = memoryview(bytearray(4 * SLOT))


class Mount:
    """One process: the union, its edge, and the other end of /dev/fuse."""

    def __init__(self, union: Core, record: Slots) -> None:
        self.union = union
        self.fs = union.fs
        self.device, self._ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for each in (self.device, self._ours):
            each.setblocking(False)
        coherence = self.fs.sb.changes.hooks
        assert isinstance(coherence, Coherence)
        self.native = Native(
            self._ours.fileno(), self.fs, coherence, self.fs.walks.stale, record=cast("Record", record)
        )

    def close(self) -> None:
        self.native.close()
        for each in (self.device, self._ours):
            each.close()

    def id(self, path: str) -> int:
        return self.union.find(path).id

    def send(self, opcode: int, node: int, body: bytes, unique: int = UNIQUE, uid: int = 0) -> None:
        self.device.send(struct.pack("<IIQQIIIHH", 40 + len(body), opcode, unique, node, uid, uid, 1, 0, 0) + body)
        self.native.take()

    def answer(self, stopped: Callable[[], bool] = lambda: False) -> tuple[int, int, bytes] | None:
        """Unique number, errno, body; None when it was stopped before that."""
        end = time.monotonic() + DEADLINE
        while True:
            try:
                reply = self.device.recv(1 << 21)
            except BlockingIOError:
                if stopped():
                    return None
                assert time.monotonic() < end, "no answer"
                self.native.loop.call_posted()
                time.sleep(0.0005)
                continue
            _, error, unique = wire.REPLY.unpack_from(reply)
            return unique, -error, reply[wire.REPLY.size :]


@contextmanager
def mounted(directory: Path, layers: Mapping[str, str], record: Slots, **options: Any) -> Iterator[Mount]:
    whiteout._digits.renew()  # as in another process
    with core(directory, layers, fsync_copyup=False, **options) as union:
        mount = Mount(union, record)
        try:
            yield mount
        finally:
            mount.close()


# -- what is compared ---------------------------------------------------------------------------------


def union_tree(directory: Path, layers: Mapping[str, str], **options: Any) -> Tree:
    """What the next mount shows."""
    tree: Tree = {}
    with core(directory, layers, **options) as union:

        def walk(path: str) -> None:
            for name in sorted(union.names(path)):
                child = f"{path}/{name}" if path else name
                node = union.find(child)
                st = union.fs.getattr(node.id)[1]
                content: object = None
                if node.kind == st_mod.S_IFREG:
                    content = union.content(child)
                elif node.kind == st_mod.S_IFLNK:
                    content = union.fs.readlink(node.id)
                extra = {key: union.fs.getxattr(node.id, key) for key in union.fs.listxattr(node.id, Caller(0, 0))}
                links = 0 if node.kind == st_mod.S_IFDIR else wire.links(node, st)
                tree[child] = (oct(st.st_mode), st.st_uid, st.st_gid, st.st_rdev, links, content, extra)
                if node.kind == st_mod.S_IFDIR:
                    walk(child)

        walk("")
    return tree


def branch_tree(root: Path) -> Tree:
    """What is on a branch, marks too, after a sweep."""
    fd = os.open(root, os.O_PATH | os.O_DIRECTORY)
    whiteout._digits.renew()
    try:
        sweep.sweep_temporaries(fd)
    finally:
        os.close(fd)
    tree: Tree = {}
    first: dict[int, str] = {}
    for above, directories, files in os.walk(root):
        for name in sorted(directories + files):
            path = Path(above, name)
            relative = str(path.relative_to(root))
            if relative.startswith(".wh..wh.plnk/"):
                relative = ".wh..wh.plnk/*"  # numbers
            st = path.lstat()
            if name.startswith(".wh.") and relative != ".wh..wh.plnk/*":
                tree[relative] = "mark"
                continue
            content: object = None
            if st_mod.S_ISREG(st.st_mode):
                content = path.read_bytes()
            elif st_mod.S_ISLNK(st.st_mode):
                content = os.readlink(path)
            group = first.setdefault(st.st_ino, relative) if not st_mod.S_ISDIR(st.st_mode) else ""
            tree[relative] = (oct(st.st_mode), st.st_uid, st.st_gid, st.st_rdev, group, content)
    return tree


def comparable(opcode: int, body: bytes) -> object:
    """An answer without what differs from mount to mount: numbers and times."""
    attributes = {wire.SETATTR: 16}.get(opcode, wire.ENTRY_SIZE - 88)
    if opcode in (wire.WRITE, wire.OPEN, wire.OPENDIR, wire.COPY_FILE_RANGE) or not body:
        return len(body), body[:4] if opcode not in (wire.OPEN, wire.OPENDIR) else body[8:]
    size = wire.QWORD.unpack_from(body, attributes + 8)[0]
    return len(body), size, struct.unpack_from("<IIII", body, attributes + 60)


class Outcome:
    """What became of one request."""

    def __init__(self, errno: int, answer: object, handles: int, union: Tree, branches: dict[str, Tree]) -> None:
        self.errno = errno
        self.answer = answer
        self.handles = handles
        self.union = union
        self.branches = branches

    def differs(self, other: Outcome) -> list[str]:
        found = []
        for what in ("errno", "answer", "handles"):
            if getattr(self, what) != getattr(other, what):
                found.append(f"{what}: {getattr(self, what)}, not {getattr(other, what)}")
        trees = {"union": (self.union, other.union)}
        trees |= {name: (tree, other.branches[name]) for name, tree in self.branches.items()}
        for name, (mine, right) in trees.items():
            for path in sorted(mine.keys() | right.keys()):
                if mine.get(path) != right.get(path):
                    found.append(f"{name}: {path}: {mine.get(path)}, not {right.get(path)}")
        return found


def descriptors() -> set[int]:
    numbers = {int(name) for name in os.listdir("/proc/self/fd")}
    return {number for number in numbers if os.path.lexists(f"/proc/self/fd/{number}")}  # not the listing's own


Request = tuple[int, int, bytes]
"""Opcode, node id, body."""


def outcome(
    directory: Path,
    layers: Mapping[str, str],
    ask: Callable[[Mount], Request],
    at: int = 0,
    after: bool = False,
    meanwhile: Callable[[Path], None] = lambda _: None,
    **options: Any,
) -> tuple[Outcome, Faults]:
    """One request, by a process that is killed at a system call (Faults) and, if it was, by its successor.

    meanwhile: what others do in between.
    """
    record = Slots()
    before = descriptors()
    with ExitStack() as stack:
        first = stack.enter_context(mounted(directory, layers, record, **options))
        opcode, node, body = ask(first)
        memory = [Remembered(first.fs)]
        faults = Faults(at, after, lambda: memory.append(Remembered(first.fs)))
        answer = None
        with faults.armed():
            try:
                first.send(opcode, node, body)
                answer = first.answer(lambda: faults.fired)
            except Killed:
                pass
        last = first
        if answer is None:
            meanwhile(directory)
            last = stack.enter_context(mounted(directory, layers, record, **options))
            memory[-1].recall(last.fs)
            assert last.native.once is not None
            last.native.once.settle()
            last.send(opcode, node, body, UNIQUE | RESENT)
            answer = last.answer()
            assert answer is not None
            assert answer[0] == UNIQUE | RESENT
        handles = len(last.fs.handles)
        for remembered in memory:
            remembered.close()
    for fd in descriptors() - before:
        os.close(fd)  # of what was killed
    union = union_tree(directory, layers)
    branches = {name: branch_tree(directory / name) for name in layers}
    return Outcome(answer[1], comparable(opcode, answer[2]), handles, union, branches), faults
