"""Random layers and operations for the model of a union, and each operation on a real directory.

An `Op` is one system call that can be applied to a `Model` (what is expected) and below a real directory
(what came); both answer 0 or an errno. `random_op` picks operations that mostly make sense in the
present state of a model, `layers` is a hypothesis strategy for what lies on the branches before.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from hypothesis import strategies as st

from tests.helpers.model import Layer, Model, Node, PathT, fail, spliced
from tests.helpers.posix import EXCHANGE, KEEP_SIZE, NOREPLACE, PUNCH_HOLE, ZERO_RANGE, fallocate, renameat2

DANGLING = b"no/such/target"
"""Where every symlink points."""

T = TypeVar("T")


@dataclass(frozen=True)
class Op:
    """One operation: `name` is a key of _MODEL and _REAL, `arg` what it needs besides the paths."""

    name: str
    path: PathT
    other: PathT = ()
    arg: int = 0

    def on_model(self, model: Model) -> int:
        """Apply; 0 or the errno expected from the system call."""
        return outcome(lambda: _MODEL[self.name](model, self))

    def on_disk(self, root: Path) -> int:
        """Do it below `root`; 0 or the errno that came."""
        return outcome(lambda: _REAL[self.name](real(root, self.path), real(root, self.other), self.arg))


def outcome(call: Callable[[], object]) -> int:
    try:
        call()
    except OSError as error:
        return error.errno or 0
    return 0


def real(root: Path, path: PathT) -> bytes:
    return os.path.join(os.fsencode(root), *path)


CHUNK = 5
"""Bytes that one write of an Op writes; two of its writes overlap or leave a hole."""


def payload(arg: int) -> bytes:
    return b"%d" % (arg % 10) * CHUNK


def _edit_write(offset: int) -> Callable[[Node], None]:
    def edit(node: Node) -> None:
        if node.is_dir:
            raise fail(errno.EISDIR)
        if stat.S_ISFIFO(node.kind):
            raise fail(errno.ENXIO)  # fifo(7): O_WRONLY | O_NONBLOCK without a reader
        node.data = spliced(node.data, offset, payload(offset))

    return edit


def _edit_truncate(size: int) -> Callable[[Node], None]:
    def edit(node: Node) -> None:
        if not stat.S_ISREG(node.kind):
            raise fail(errno.EISDIR if node.is_dir else errno.EINVAL)
        node.data = node.data[:size].ljust(size, b"\0")

    return edit


ALLOCATIONS = (
    (0, 3, 10),
    (KEEP_SIZE, 0, 6000),
    (KEEP_SIZE | PUNCH_HOLE, 2, 6),
    (KEEP_SIZE | PUNCH_HOLE, 0, 5000),
    (ZERO_RANGE, 4, 4100),
    (ZERO_RANGE | KEEP_SIZE, 4, 4100),
)
"""(mode, offset, length) of fallocate(2), by the `arg` of an Op."""

COPIES = ((0, 0, 4), (0, 5, 4), (3, 0, 100), (0, 5000, 100), (5000, 0, 1))
"""(offset in the source, in the destination, length) of copy_file_range(2), likewise."""


def _edit_fallocate(arg: int) -> Callable[[Node], None]:
    mode, offset, length = ALLOCATIONS[arg]

    def edit(node: Node) -> None:
        if not stat.S_ISREG(node.kind):
            raise fail(errno.EISDIR if node.is_dir else errno.ENXIO)
        size = len(node.data)
        data = node.data.ljust(offset + length, b"\0")
        if mode & (PUNCH_HOLE | ZERO_RANGE):
            data = spliced(data, offset, bytes(length))
        node.data = data[:size] if mode & KEEP_SIZE else data

    return edit


def _edit_mode(mode: int) -> Callable[[Node], None]:
    return lambda node: setattr(node, "mode", mode)


def _edit_xattr(arg: int) -> Callable[[Node], None]:
    def edit(node: Node) -> None:
        if not (stat.S_ISREG(node.kind) or node.is_dir):
            raise fail(errno.EPERM)  # xattr(7): user.* on regular files and directories only
        node.xattrs["user.t"] = payload(arg)

    return edit


def _real_create(path: bytes, _other: bytes, arg: int) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        os.write(fd, payload(arg))
    finally:
        os.close(fd)


def _real_write(path: bytes, _other: bytes, offset: int) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
    try:
        os.pwrite(fd, payload(offset), offset)
    finally:
        os.close(fd)


def _real_fallocate(path: bytes, _other: bytes, arg: int) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
    try:
        fallocate(fd, *ALLOCATIONS[arg])
    finally:
        os.close(fd)


def _real_copy_range(path: bytes, other: bytes, arg: int) -> None:
    offset_in, offset_out, count = COPIES[arg]
    dst = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
    try:
        src = os.open(other, os.O_RDONLY | os.O_NONBLOCK)
        try:
            os.copy_file_range(src, dst, count, offset_in, offset_out)
        finally:
            os.close(src)
    finally:
        os.close(dst)


def _real_tmpfile(path: bytes, _other: bytes, arg: int) -> None:
    fd = os.open(os.path.dirname(path), os.O_TMPFILE | os.O_WRONLY, 0o644)
    try:
        assert os.fstat(fd).st_nlink == 0
        os.write(fd, payload(arg))
        os.link(b"/proc/self/fd/%d" % fd, path, src_dir_fd=fd)  # with a dir_fd it is linkat(2), which can follow
        assert os.fstat(fd).st_nlink == 1
    finally:
        os.close(fd)


_MODEL: dict[str, Callable[[Model, Op], None]] = {
    "create": lambda m, o: m.create(o.path, Node(stat.S_IFREG, 0o644, payload(o.arg))),
    "mkdir": lambda m, o: m.create(o.path, Node(stat.S_IFDIR, 0o755)),
    "symlink": lambda m, o: m.create(o.path, Node(stat.S_IFLNK, target=DANGLING)),
    "mkfifo": lambda m, o: m.create(o.path, Node(stat.S_IFIFO, 0o644)),
    "link": lambda m, o: m.link(o.path, o.other),
    "unlink": lambda m, o: m.unlink(o.path),
    "rmdir": lambda m, o: m.rmdir(o.path),
    "rename": lambda m, o: m.rename(o.path, o.other, o.arg),
    "write": lambda m, o: m.change(o.path, _edit_write(o.arg), "write"),
    "truncate": lambda m, o: m.change(o.path, _edit_truncate(o.arg)),
    "fallocate": lambda m, o: m.change(o.path, _edit_fallocate(o.arg), "fallocate"),
    "copy range": lambda m, o: m.copy_range(o.path, o.other, *COPIES[o.arg]),
    "open trunc": lambda m, o: m.open_trunc(o.path),
    "tmpfile": lambda m, o: m.tmpfile(o.path, Node(stat.S_IFREG, 0o644, payload(o.arg))),
    "chmod": lambda m, o: m.change(o.path, _edit_mode(o.arg)),
    "setxattr": lambda m, o: m.change(o.path, _edit_xattr(o.arg)),
}

_REAL: dict[str, Callable[[bytes, bytes, int], None]] = {
    "create": _real_create,
    "mkdir": lambda p, _o, _a: os.mkdir(p, 0o755),
    "symlink": lambda p, _o, _a: os.symlink(DANGLING, p),
    "mkfifo": lambda p, _o, _a: os.mkfifo(p, 0o644),
    "link": lambda p, o, _a: os.link(p, o, follow_symlinks=False),
    "unlink": lambda p, _o, _a: os.unlink(p),
    "rmdir": lambda p, _o, _a: os.rmdir(p),
    "rename": lambda p, o, a: renameat2(p, o, a),
    "write": _real_write,
    "truncate": lambda p, _o, a: os.truncate(p, a),
    "fallocate": _real_fallocate,
    "copy range": _real_copy_range,
    "open trunc": lambda p, _o, _a: os.close(os.open(p, os.O_RDONLY | os.O_TRUNC | os.O_NONBLOCK)),
    "tmpfile": _real_tmpfile,
    "chmod": lambda p, _o, a: os.chmod(p, a),
    "setxattr": lambda p, _o, a: os.setxattr(p, "user.t", payload(a)),
}


# -- random layers and operations ---------------------------------------------------------------

NAMES = (b"a", b"b", b"c")
DEPTH = 3
KINDS = ("dir", "dir", "dir", "file", "file", "symlink", "fifo")

_OFFSETS = (0, 3, 9, 5000)
_NUMBERS = tuple(range(10))
_ARGS: dict[str, tuple[int, ...]] = {
    "create": _NUMBERS,
    "mkdir": (0,),
    "symlink": (0,),
    "mkfifo": (0,),
    "link": (0,),
    "unlink": (0,),
    "rmdir": (0,),
    "rename": (0, 0, NOREPLACE, EXCHANGE),
    "write": _OFFSETS,
    "truncate": _OFFSETS,
    "fallocate": tuple(range(len(ALLOCATIONS))),
    "copy range": tuple(range(len(COPIES))),
    "open trunc": (0,),
    "tmpfile": _NUMBERS,
    "chmod": (0o600, 0o755, 0o4711),
    "setxattr": _NUMBERS,
}
_MAKES = frozenset({"create", "mkdir", "symlink", "mkfifo", "tmpfile"})
_ON_TWO = frozenset({"link", "rename", "copy range"})
_ON_DIRECTORIES = frozenset({"rmdir", "rename dir"})
_CHOICES = (*_ARGS, "mkdir", "unlink", "rmdir", "write", "link", "rename", "rename dir", "rename dir", "rename dir")


class Pick(Protocol):
    """Chooses one of a sequence: random.Random().choice, or a draw of hypothesis."""

    def __call__(self, among: Sequence[T], /) -> T: ...


def random_op(pick: Pick, model: Model) -> Op:
    """An operation, mostly on names that make sense for it in the present state."""
    choice = pick(_CHOICES)
    name = "rename" if choice == "rename dir" else choice
    there: list[PathT] = [tuple(path.split(b"/")) for path in sorted(model.visible())]
    directories = [path for path in there if model.existing(path).is_dir]
    parents: list[PathT] = [(), *directories, *directories, *there]
    fitting = directories if choice in _ON_DIRECTORIES else [path for path in there if path not in directories]

    def anywhere() -> PathT:
        return (*pick(parents), pick(NAMES))[-DEPTH:]

    def likely(share: int) -> PathT:
        return pick(fitting) if fitting and bool(pick(_NUMBERS[:share])) else anywhere()

    path = anywhere() if name in _MAKES else likely(5)
    other = likely(2) if name in _ON_TWO else ()
    return Op(name, path, other, pick(_ARGS[name]))


@st.composite
def op_for(draw: st.DrawFn, model: Model) -> Op:
    """random_op as a hypothesis strategy."""
    return random_op(lambda among: draw(st.sampled_from(among)), model)


def random_layer(pick: Pick, perm: str, linked: bool = True) -> Layer:
    """A random layer: objects, hard links between files (linked), whiteouts (beside objects too), opaque marks."""
    layer = Layer.of(perm)
    directories: list[PathT] = [()]

    def place() -> PathT:
        return (*pick(directories), pick(NAMES))

    for _ in range(pick(range(13))):
        path = place()
        if path in layer.nodes:
            continue
        node = _node(pick(KINDS), pick(_NUMBERS))
        twins = [n for n in layer.nodes.values() if n.kind == node.kind and not n.is_dir]
        layer.nodes[path] = pick(twins) if twins and linked and pick(range(4)) == 0 else node
        if node.is_dir and len(path) < DEPTH:
            directories.append(path)
    layer.whiteouts |= {place() for _ in range(pick(range(4)))}
    if len(directories) > 1:
        layer.opaque |= {pick(directories[1:]) for _ in range(pick(range(3)))}
    return layer


@st.composite
def layers(draw: st.DrawFn, perm: str, linked: bool = True) -> Layer:
    """random_layer as a hypothesis strategy."""
    return random_layer(lambda among: draw(st.sampled_from(among)), perm, linked)


def _node(kind: str, number: int) -> Node:
    if kind == "dir":
        return Node(stat.S_IFDIR, (0o755, 0o700)[number % 2])
    if kind == "symlink":
        return Node(stat.S_IFLNK, target=DANGLING)
    if kind == "fifo":
        return Node(stat.S_IFIFO, 0o644)
    return Node(stat.S_IFREG, (0o644, 0o600)[number % 2], payload(number) * number, xattrs={"user.n": payload(number)})
