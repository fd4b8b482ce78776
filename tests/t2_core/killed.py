"""A mount process that is killed before or after any single system call that changes something, and its successor.

The process is objects in this one: what kills it is an exception that nobody catches, and from then on no system call
changes anything, whatever cleans up. Its descriptors stay open, so that this process is its keeper, too. The successor
gets what the record says at that moment.
"""

from __future__ import annotations

import gc
import os
import socket
import stat as st_mod
import struct
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FunctionType
from typing import Any, ClassVar

import pytest

from tests.helpers.mount import DEADLINE
from tests.t2_core.core import Core, core
from udbad.branch import datacalls, sweep, syscalls, whiteout
from udbad.branch.branches import Branch
from udbad.coherence.base import Coherence
from udbad.edge import poison
from udbad.edge.native import Native
from udbad.edge.once import copies
from udbad.inodes.record import Record
from udbad.inodes.slot import RESENT
from udbad.kernel import device, wire
from udbad.types import Caller, Perm
from udbad.union import recall

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
    _COMPILED: ClassVar = {
        "create_file_at": "open", "link_at": "link", "mkdir_at": "mkdir", "mknod_at": "mknod", "symlink_at": "symlink",
        "unlink_at": "unlink", "rmdir_at": "rmdir", "rename_at": "rename", "utime_at": "utime", "link_fd": "linkat",
        "utime_fd": "utimensat", "chmod_fd": "chmod", "chown_fd": "chown", "open_tmpfile": "open",
    }  # fmt: skip
    """Functions of syscalls that may be compiled, and how they are counted."""
    _LIBC = ("linkat", "renameat2", "utimensat")

    def __init__(self, at: int = 0, after: bool = False) -> None:
        """at: number of the call, from 1 on; 0: none."""
        self.at = at
        self.after = after
        self.count = 0
        self.fired = False
        self.calls: list[str] = []

    def _call(self, name: str, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self.fired:
            raise Killed
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

            for name, called in self._COMPILED.items():
                function = getattr(syscalls, name)
                if not isinstance(function, FunctionType):  # in C: it calls nothing of these
                    patch.setattr(syscalls, name, self._wrapped(called, function))
            if not isinstance(device.answer, FunctionType):
                patch.setattr("udbad.edge.native.answer", self._wrapped("answer", device.answer))
            patch.setattr(syscalls, "_libc", Libc())
            patch.setattr(datacalls, "_fallocate", self._wrapped("fallocate", datacalls._fallocate))
            yield

    def _wrapped(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            return self._call(name, call, *args, **kwargs)

        return wrapped


class Mount:
    """One process: the union, its edge, and the other end of /dev/fuse."""

    def __init__(self, union: Core, record: Record) -> None:
        self.union = union
        self.fs = union.fs
        self.device, self._ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for each in (self.device, self._ours):
            each.setblocking(False)
        coherence = self.fs.sb.changes.hooks
        assert isinstance(coherence, Coherence)
        self.coherence = coherence
        self.record = record
        self.native = Native(self._ours.fileno(), self.fs, coherence, self.fs.walks.stale, record=record)

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
def mounted(
    directory: Path, layers: Mapping[str, str], predecessor: Record | None = None, cached: bool = False, **options: Any
) -> Iterator[Mount]:
    """cached: the kernel opens files and directories by itself (io=cached)."""
    whiteout._digits.renew()  # as in another process
    record = Record.create()
    with core(directory, layers, fsync_copyup=False, **options) as union:
        if cached:
            union.fs.keep_files(64)
        recalled = None
        if predecessor is not None:
            recalled = recall.recall(union.fs, predecessor, (os.dup,), copies(predecessor.slots))
            poison.carry_on(predecessor, record, True)
        recall.keep(union.fs, record, recalled)
        mount = Mount(union, record)
        if predecessor is not None:
            mount.coherence.recalled()
            assert mount.native.once is not None
            mount.native.once.settle()
        try:
            yield mount
        finally:
            union.fs.table.read_all()  # it has the predecessor's record in use
            mount.close()
            record.close()


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


def swept(root: Path, overlay: bool = False) -> None:
    fd = os.open(root, os.O_PATH | os.O_DIRECTORY)
    whiteout._digits.renew()
    try:
        branch = Branch(
            0, 0, bytes(root), Perm.RW, frozenset(), None,
            root_fd=fd, anchor_fd=-1, dev=0, fs_type="", writes_overlay=overlay,
        )  # fmt: skip
        sweep.sweep_temporaries(fd, branch=branch)
    finally:
        os.close(fd)


def branch_tree(root: Path, overlay: bool = False) -> Tree:
    """What is on a branch, marks too, after a sweep."""
    swept(root, overlay)
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
            elif overlay and st_mod.S_ISDIR(st.st_mode):
                content = [key for key in os.listxattr(path) if "overlay" in key]
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

    def __init__(self, errno: int, answer: object, files: object, union: Tree, branches: dict[str, Tree]) -> None:
        self.errno = errno
        self.answer = answer
        self.files = files
        self.union = union
        self.branches = branches

    def differs(self, other: Outcome) -> list[str]:
        found = []
        for what in ("errno", "answer", "files"):
            if getattr(self, what) != getattr(other, what):
                found.append(f"{what}: {getattr(self, what)}, not {getattr(other, what)}")
        trees = {"union": (self.union, other.union)}
        trees |= {name: (tree, other.branches[name]) for name, tree in self.branches.items()}
        for name, (mine, right) in trees.items():
            for path in sorted(mine.keys() | right.keys()):
                if mine.get(path) != right.get(path):
                    found.append(f"{name}: {path}: {mine.get(path)}, not {right.get(path)}")
        return found


def opened(mount: Mount) -> object:
    """What is open: how many directories, and the content and links of files; and what is known of pseudo-links."""
    found = []
    for handle in mount.fs.handles.files.values():
        with syscalls.readable(handle.fd) as fd:
            found.append((os.pread(fd, 1000, 0), os.fstat(fd).st_nlink, handle.writable))
    homes = {(plink.pending, plink.counted) for plinks in mount.fs.sb.plinks.values() for plink in plinks}
    return len(mount.fs.handles.dirs), sorted(found), sorted(homes)


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
    meanwhile: Callable[[Path], object] = lambda _: None,
    **options: Any,
) -> tuple[Outcome, Faults]:
    """One request, by a process that is killed at a system call (Faults) and, if it was, by its successor.

    meanwhile: what others do in between.
    """
    before = descriptors()
    with ExitStack() as stack:
        last = first = stack.enter_context(mounted(directory, layers, **options))
        opcode, node, body = ask(first)
        first.record.flush()
        faults = Faults(at, after)
        answer = None
        with faults.armed():
            try:
                first.send(opcode, node, body)
                answer = first.answer(lambda: faults.fired)
            except Killed:
                pass
        if answer is None:
            meanwhile(directory)
            last = stack.enter_context(mounted(directory, layers, first.record, served=first.fs.sb.branches, **options))
            last.send(opcode, node, body, UNIQUE | RESENT)
            answer = last.answer()
            assert answer is not None
            assert answer[0] == UNIQUE | RESENT
        overlay = options.get("whiteouts") == "overlay"
        for name in layers:
            swept(directory / name, overlay and layers[name] == "rw")
        files = opened(last)
    del first, last
    gc.collect()  # what an object has a descriptor of is closed with it, and not once more with another one's number
    for fd in descriptors() - before:
        os.close(fd)  # of what was killed
    union = union_tree(directory, layers, whiteouts="overlay" if overlay else "aufs")
    branches = {name: branch_tree(directory / name, overlay and layers[name] == "rw") for name in layers}
    return Outcome(answer[1], comparable(opcode, answer[2]), files, union, branches), faults
