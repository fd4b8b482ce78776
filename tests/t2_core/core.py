"""A `UnionFs` on real directories without a kernel: everything below kernel/, driven by direct calls.

`Core` stands for the kernel: it walks paths by lookups, counts the references it takes as the kernel does,
and gives them back. The coherence strategy tells a FakeNotifier what the kernel should forget.
"""

from __future__ import annotations

import errno
import itertools
import os
import resource
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import pytest

from tests.t2_core.fake_notifier import FakeNotifier
from udbad import compiled
from udbad.branch import syscalls
from udbad.branch.accept import open_branches, prepare_writable
from udbad.branch.branches import BranchSet
from udbad.branch.credentials import Credentials
from udbad.branch.policy import parse_copyup, parse_create
from udbad.branch.spec import parse_branches
from udbad.coherence.base import Coherence
from udbad.coherence.none import NoneCoherence
from udbad.coherence.reval import RevalCoherence
from udbad.inodes.handles import OpenFile
from udbad.inodes.node import Dir, Node
from udbad.types import ROOT_CALLER, ROOT_ID, Caller
from udbad.union import homes, ranges
from udbad.union.fs import UnionFs
from udbad.union.superblock import Superblock, UnionOptions

T = TypeVar("T")

in_python = pytest.mark.skipif(
    not compiled.why_not(),
    reason="ok: what is compiled calls in C what the test replaces; the run without compiled modules has this test",
)

STRATEGIES: Mapping[str, type[Coherence]] = {"none": NoneCoherence, "reval": RevalCoherence}
"""The modes that need no event loop."""


class OwnIds(Credentials):
    """Makes everything as the caller of the test: the real one gives up a capability of the process for good."""

    def __init__(self) -> None:
        self.privileged = False


@dataclass
class Core:
    """fs: the union. notifier: what its strategy told the kernel. top-level directories of the branches: paths."""

    fs: UnionFs
    notifier: FakeNotifier
    paths: dict[str, Path]
    caller: Caller = ROOT_CALLER
    _refs: dict[int, int] = field(default_factory=dict)

    @property
    def sb(self) -> Superblock:
        return self.fs.sb

    def __getitem__(self, name: str) -> Path:
        """The directory of the branch called `name`."""
        return self.paths[name]

    def run(self, operation: Callable[[], T]) -> T:
        """The operation with the copy-ups it needs."""
        return self.fs.run(operation)

    def took(self, node: Node) -> Node:
        """The kernel got an entry: it holds a reference more."""
        self.fs.table.refer(node)
        self._refs[node.id] = self._refs.get(node.id, 0) + 1
        return node

    def forget_all(self) -> None:
        """The kernel forgets everything it holds, children before parents as it must."""
        for node_id, count in reversed(list(self._refs.items())):
            self.fs.forget(node_id, count)
        self._refs.clear()

    def find(self, path: str) -> Node:
        """Walk to `path` as the kernel does. Raises FileNotFoundError."""
        node: Node = self.sb.root
        for name in filter(None, path.split("/")):
            found = self.fs.lookup(node.id, os.fsencode(name))
            if found is None:
                raise FileNotFoundError(path)
            node = self.took(found[0])
        return node

    def parent(self, path: str) -> tuple[int, bytes]:
        """(node id of the directory, last name) of `path`."""
        directory, _, name = path.rpartition("/")
        return self.find(directory).id if directory else ROOT_ID, os.fsencode(name)

    def exists(self, path: str) -> bool:
        try:
            self.find(path)
        except FileNotFoundError:
            return False
        return True

    def create(self, path: str, content: bytes = b"") -> OpenFile:
        parent, name = self.parent(path)
        flags = os.O_RDWR | os.O_CREAT
        handle, _ = self.run(lambda: self.fs.create(parent, name, flags, 0o644, self.caller))
        self.took(handle.node)
        if content:
            self.run(lambda: self.fs.write(handle.fh, 0, content))
        return handle

    def open(self, path: str, flags: int = os.O_RDONLY) -> OpenFile:
        node = self.find(path)
        return self.run(lambda: self.fs.open(node.id, flags, self.caller))[0]

    def write(self, handle: OpenFile, data: bytes, offset: int = 0) -> int:
        return self.run(lambda: self.fs.write(handle.fh, offset, data))

    def read(self, handle: OpenFile, size: int = 1000, offset: int = 0) -> bytes:
        return os.pread(self.fs.handles.file(handle.fh).fd, size, offset)

    def change(self, begin: Callable[[], ranges.Change]) -> int:
        """Run a change of a range, with the copy-up it needs; the bytes it says."""
        change = self.run(begin)
        failed = True
        try:
            count = change.run()
            failed = False
        finally:
            self.fs.changed(change, failed)
        return count

    def fallocate(self, handle: OpenFile, mode: int, offset: int, length: int) -> int:
        return self.change(lambda: self.fs.fallocate(handle.fh, mode, offset, length))

    def copy_range(self, source: OpenFile, at: int, target: OpenFile, to: int, length: int) -> int:
        return self.change(lambda: self.fs.copy_file_range(source.fh, at, target.fh, to, length))

    def tmpfile(self, directory: str = "", content: bytes = b"", mode: int = 0o644) -> OpenFile:
        parent = self.find(directory).id
        handle, _ = self.run(lambda: self.fs.tmpfile(parent, os.O_RDWR, mode, self.caller))
        self.took(handle.node)
        if content:
            self.write(handle, content)
        return handle

    def publish(self, handle: OpenFile, path: str) -> Node:
        """link(2) of an open file, as by /proc/self/fd."""
        parent, name = self.parent(path)
        return self.took(self.run(lambda: self.fs.link(handle.node.id, parent, name))[0])

    def content(self, path: str) -> bytes:
        handle = self.open(path)
        try:
            return self.read(handle)
        finally:
            self.fs.release(handle.fh)

    def mkdir(self, path: str) -> Node:
        parent, name = self.parent(path)
        return self.took(self.run(lambda: self.fs.mkdir(parent, name, 0o755, self.caller))[0])

    def unlink(self, path: str) -> None:
        parent, name = self.parent(path)
        self.run(lambda: self.fs.unlink(parent, name))

    def rmdir(self, path: str) -> None:
        parent, name = self.parent(path)
        self.run(lambda: self.fs.rmdir(parent, name))

    def rename(self, src: str, dst: str, flags: int = 0) -> None:
        src_dir, src_name = self.parent(src)
        dst_dir, dst_name = self.parent(dst)
        self.run(lambda: self.fs.rename(src_dir, src_name, dst_dir, dst_name, flags))

    def link(self, src: str, dst: str) -> Node:
        node = self.find(src)
        parent, name = self.parent(dst)
        return self.took(self.run(lambda: self.fs.link(node.id, parent, name))[0])

    def names(self, path: str = "") -> list[str]:
        """What a listing of the directory shows, without the dots, in order."""
        handle = self.run(lambda: self.fs.opendir(self.find(path).id))
        try:
            names = [os.fsdecode(name) for name, *_ in self.fs.readdir(handle.fh, 0)]
        finally:
            self.fs.releasedir(handle.fh)
        assert names[:2] == [".", ".."]
        return names[2:]


@contextmanager
def few_descriptors(spare: int) -> Iterator[None]:
    """This process can open no more than so many descriptors beyond those it has (RLIMIT_NOFILE goes by number)."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    first = os.open("/", os.O_PATH)  # the lowest free number
    os.close(first)
    taken = {int(name) for name in os.listdir("/proc/self/fd")} - {first}  # which was the listing's own
    limit = next(number for number in itertools.count(first) if sum(n not in taken for n in range(number)) >= spare)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@contextmanager
def core(
    directory: Path,
    layers: Mapping[str, str] | None = None,
    udba: str = "reval",
    max_fds: int = 1000,
    all_fds: int = sys.maxsize,
    whiteouts: str = "aufs",
    served: BranchSet | None = None,
    **options: Any,
) -> Iterator[Core]:
    """A union of directories below `directory` (name → permission, top first), which are made if missing.

    served: what another process has of them, by whose mounts they are reached. options: fields of UnionOptions.
    At the end every descriptor it holds is closed.
    """
    paths = {name: directory / name for name in (layers or {"top": "rw", "base": "ro"})}
    for path in (*paths.values(), directory / "mnt"):
        path.mkdir(parents=True, exist_ok=True)
    text = ":".join(f"{paths[name]}={perm}" for name, perm in (layers or {"top": "rw", "base": "ro"}).items())
    if served is None:
        branches = open_branches(parse_branches(text), False, os.fsencode(directory / "mnt"), whiteouts)
    else:
        ones = [one.but(root_fd=os.dup(one.root_fd), anchor_fd=os.dup(one.anchor_fd)) for one in served.branches]
        branches = BranchSet(tuple(ones), served.generation)
    umask = os.umask(0o022)
    try:
        for branch in branches.branches:
            if branch.writable:
                prepare_writable(branch, options.get("plink", True))
        chosen = {"create": parse_create("tdp"), "copyup": parse_copyup("tdp"), **options}
        sb = Superblock(branches, UnionOptions(**chosen), max_fds, all_fds)
        homes.load(sb)
        notifier = FakeNotifier()
        strategy = STRATEGIES[udba](sb, notifier)
        strategy.start()
        fs = UnionFs(sb, OwnIds())
        try:
            yield Core(fs, notifier, paths)
        finally:
            for fh in list(fs.handles.files):
                fs.release(fh)
            strategy.stop()
            for node in sb.table.nodes.values():
                if type(node) is Dir and node is not sb.root:
                    sb.table.close_layers(node)
                if node.orphan_fd >= 0:
                    os.close(node.orphan_fd)
            homes.close(sb)
    finally:
        os.umask(umask)
        branches.close()


def refuse_tmpfile(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a file system that has no files without a name: a copy-up makes a temporary one."""

    def refuse(*_: object) -> int:
        raise OSError(errno.EOPNOTSUPP, "injected")

    monkeypatch.setattr(syscalls, "open_tmpfile", refuse)
