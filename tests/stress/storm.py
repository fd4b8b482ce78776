"""A storm: random operations through a union and directly on its branches at the same time, and its judge.

Every client is a process of its own (python -m tests.stress.storm ROOT SEED COUNT WHAT) and draws its
operations from its seed alone, never from what it finds, so the same seed means the same operations; when
they meet is up to the scheduler. `in_step` has one process take turns instead, which repeats exactly.

The judge (`Arena.check`) asks the mount for every name there could be, one by one, so that whatever the
kernel has cached answers; then it lists the mount; then it mounts anew; and each of the three must be
the merge of the branch directories that tests/helpers/merge.py computes.
"""

from __future__ import annotations

import errno
import itertools
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.helpers.merge import OPAQUE, WH_PREFIX, Tree, diff, merge, read_entry, snapshot
from tests.helpers.mount import REPOSITORY, Mount, mounted
from tests.helpers.posix import EXCHANGE, NOREPLACE, renameat2

NAMES: Final = (b"a", b"b", b"c", b"d")
DEPTH: Final = 3
UNIVERSE: Final = [b"/".join(words) for n in range(1, DEPTH + 1) for words in itertools.product(NAMES, repeat=n)]
"""The paths that operations name, parents first."""

MODES: Final = ("none", "reval", "notify")
LAYOUTS: Final = (("rw", "ro+wh", "ro"), ("rw", "rw", "ro"))
DEADLINE: Final = 120.0
"""Seconds for the clients of one round."""
AT_REST: Final = 10.0
"""Seconds for what the daemon does in the background."""

_TEMPORARY: Final = re.compile(rb"\.wh\.\.wh\..*\.[0-9a-f]{4,}", re.DOTALL)
# A storm may cost watches and events, above all when another one goes on beside it; being wrong is what it may not.
ALLOWED_LOG: Final = (
    r"and its whiteout are both|lost branch events|coherence limited|was put into .* while it was removed"
)


@dataclass(frozen=True)
class Op:
    """One operation: `kind` is a key of _ACTIONS; `arg` a number that offsets, modes and bytes are made from."""

    kind: str
    path: bytes
    other: bytes
    arg: int


LOOK: Final = (-1, Op("look", b"", b"", 0))


def _data(arg: int) -> bytes:
    return b"%d." % arg * (arg % 40 * (200 if arg % 7 == 0 else 1))


def _write(path: bytes, flags: int, arg: int) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_NOFOLLOW | flags, 0o644)
    try:
        if flags & (os.O_APPEND | os.O_CREAT):
            os.write(fd, _data(arg))
        else:
            os.pwrite(fd, _data(arg), arg % 5000)
    finally:
        os.close(fd)


_RENAME_FLAGS: Final = (0, 0, 0, NOREPLACE, EXCHANGE)


def _rename(path: bytes, other: bytes, arg: int) -> None:
    flags = _RENAME_FLAGS[arg % len(_RENAME_FLAGS)]
    try:
        renameat2(path, other, flags)
    except OSError as error:
        if error.errno != errno.ESTALE or os.path.dirname(path) == os.path.dirname(other):
            raise
        # A directory that was moved directly to one of the names is not found there by a rename between directories,
        # which holds the lock that its old dentry would be moved under (__d_unalias() in fs/dcache.c). Looked up
        # without one, it is.
        for name in (path, other):
            os.path.lexists(name)
        renameat2(path, other, flags)


def _remove_tree(path: bytes, other: bytes, arg: int) -> None:
    try:
        shutil.rmtree(os.fsdecode(path))
    except OSError as error:
        if error.errno is None:  # its own: it has opened another object than the one that it has looked at
            raise NotADirectoryError(errno.ENOTDIR, "something else has the name by now", path) from error
        raise


def _read(path: bytes, other: bytes, arg: int) -> None:
    read_entry(path)


def _list(path: bytes, other: bytes, arg: int) -> None:
    for name in os.listdir(path):
        os.lstat(os.path.join(path, name))


def _hidden(path: bytes, prefix: bytes) -> bytes:
    directory, name = os.path.split(path)
    return os.path.join(directory, prefix + name)


def _copy_up(path: bytes, other: bytes, arg: int) -> None:
    """What a user does by hand: the file of another branch, with its times, put here by a rename."""
    temporary = _hidden(path, b"tmp-%d-" % os.getpid())
    try:
        shutil.copy2(os.fsdecode(other), os.fsdecode(temporary), follow_symlinks=False)
        os.rename(temporary, path)
    except BaseException:
        _gone(temporary)
        raise


def _gone(path: bytes) -> None:
    try:
        os.unlink(path)
    except OSError:
        pass


def _new_tree(path: bytes, other: bytes, arg: int) -> None:
    os.mkdir(path)
    for name in NAMES[: arg % 3]:
        _write(os.path.join(path, name), os.O_CREAT, arg)


_EVERYWHERE: Final[dict[str, tuple[int, Callable[[bytes, bytes, int], object]]]] = {
    "stat": (16, lambda p, o, a: os.lstat(p)),
    "read": (10, _read),
    "list": (4, _list),
    "create": (8, lambda p, o, a: _write(p, os.O_CREAT | os.O_EXCL, a)),
    "overwrite": (6, lambda p, o, a: _write(p, 0, a)),
    "append": (3, lambda p, o, a: _write(p, os.O_APPEND, a)),
    "replace": (3, lambda p, o, a: _write(p, os.O_CREAT | os.O_TRUNC, a)),
    "truncate": (3, lambda p, o, a: os.truncate(p, a % 6000)),
    "chmod": (4, lambda p, o, a: os.chmod(p, 0o700 | a % 64)),
    "utime": (3, lambda p, o, a: os.utime(p, ns=(a, a * 1_000_003), follow_symlinks=False)),
    "setxattr": (2, lambda p, o, a: os.setxattr(p, "user.t", b"%d" % a)),
    "removexattr": (1, lambda p, o, a: os.removexattr(p, "user.t")),
    "mkdir": (9, lambda p, o, a: os.mkdir(p)),
    "tree": (3, _new_tree),
    "symlink": (2, lambda p, o, a: os.symlink(b"to/%d" % a, p)),
    "link": (3, lambda p, o, a: os.link(p, o, follow_symlinks=False)),
    "unlink": (6, lambda p, o, a: os.unlink(p)),
    "rmdir": (5, lambda p, o, a: os.rmdir(p)),
    "rename": (10, _rename),
}
"""Kind to (weight, what it does); for the mount and for branches."""

_ON_BRANCHES: Final[dict[str, tuple[int, Callable[[bytes, bytes, int], object]]]] = {
    "whiteout": (5, lambda p, o, a: _write(_hidden(p, WH_PREFIX), os.O_CREAT | os.O_EXCL, 0)),
    "unwhite": (4, lambda p, o, a: os.unlink(_hidden(p, WH_PREFIX))),
    "opaque": (2, lambda p, o, a: _write(os.path.join(p, OPAQUE), os.O_CREAT | os.O_EXCL, 0)),
    "unopaque": (2, lambda p, o, a: os.unlink(os.path.join(p, OPAQUE))),
    "copyup": (4, _copy_up),
    "rmtree": (2, _remove_tree),
}
"""What only makes sense directly on a branch."""

_LOOKS: Final = frozenset({"stat", "read", "list"})

_ACTIONS: Final = {**_EVERYWHERE, **_ON_BRANCHES}

_PATH: Final = frozenset({errno.ENOENT, errno.ENOTDIR})
"""Of every path: a name, or a directory above it, is not there (a symlink leads nowhere), or is no directory by now."""

_OPENED: Final = frozenset({errno.EISDIR, errno.ELOOP})
"""open(2) for writing: it is a directory, or with O_NOFOLLOW a symlink."""

_RACES: Final[dict[str, frozenset[int]]] = {
    "stat": frozenset(),
    # It has become a directory, no symlink, or has lost the attribute between two of its calls.
    "read": frozenset({errno.EISDIR, errno.EINVAL, errno.ENODATA}),
    "list": frozenset(),
    "create": frozenset({errno.EEXIST}),
    "overwrite": _OPENED,
    "append": _OPENED,
    "replace": _OPENED,
    "truncate": frozenset({errno.EISDIR}),
    "chmod": frozenset(),
    "utime": frozenset(),
    "setxattr": frozenset(),
    "removexattr": frozenset({errno.ENODATA}),
    "mkdir": frozenset({errno.EEXIST}),
    "tree": frozenset({errno.EEXIST}) | _OPENED,  # others are in the new directory before its files
    "symlink": frozenset({errno.EEXIST}),
    "link": frozenset({errno.EEXIST, errno.EPERM}),  # EPERM: of a directory
    "unlink": frozenset({errno.EISDIR}),
    "rmdir": frozenset({errno.ENOTEMPTY}),
    # EINVAL: below itself. What depends on more than the kind is in `_explained`.
    "rename": frozenset({errno.EISDIR, errno.ENOTEMPTY, errno.EINVAL}),
    "whiteout": frozenset({errno.EEXIST}),
    "unwhite": frozenset(),
    "opaque": frozenset({errno.EEXIST}),
    "unopaque": frozenset(),
    "copyup": frozenset({errno.EISDIR, errno.EINVAL}),  # of a directory, or over one; no symlink by now
    "rmtree": frozenset({errno.ENOTEMPTY}) | _OPENED,  # others put something in, or in its place, meanwhile
}
"""What each operation may answer beside `_PATH` when others work on the same names: the errors of its man page that the
state of the names explains. EIO and the like are failures."""


def _explained(op: Op, number: int | None, on_branch: bool, alone: bool) -> bool:
    """Whether a race explains this errno. alone: nobody else does anything meanwhile."""
    if number == errno.ESTALE:
        # The kernel walks the path once more: it takes two changes of the branches during one operation.
        return not on_branch and not alone
    if op.kind == "rename" and number == errno.EEXIST:
        return _RENAME_FLAGS[op.arg % len(_RENAME_FLAGS)] == NOREPLACE
    if op.kind == "rename" and number == errno.EXDEV:
        return not on_branch  # of a directory that lower branches have a part of
    return number in _PATH or number in _RACES[op.kind]


def operations(seed: int, count: int, on_branch: bool) -> Iterator[Op]:
    """`count` random operations; the same for the same arguments."""
    random_ = random.Random(seed)
    table = _ACTIONS if on_branch else _EVERYWHERE
    kinds, weights = list(table), [weight for weight, _ in table.values()]
    for _ in range(count):
        kind = random_.choices(kinds, weights)[0]
        # Short paths more often: what lies deep needs parents.
        path, other = (random_.choice(UNIVERSE[: random_.choice((4, 20, 20, 84))]) for _ in range(2))
        yield Op(kind, path, other, random_.randrange(1 << 20))


def perform(op: Op, root: Path, on_branch: bool, alone: bool = True) -> int:
    """Do it below `root`; 0 or the errno. Raises OSError for one that no race explains."""
    base = os.fsencode(root)
    path, other = os.path.join(base, op.path), os.path.join(base, op.other)
    if op.kind == "copyup":
        other = os.path.join(os.path.dirname(base), b"base", op.path)
    try:
        _ACTIONS[op.kind][1](path, other, op.arg)
    except shutil.Error:
        return errno.EINVAL  # copy2 onto itself
    except OSError as error:
        if not _explained(op, error.errno, on_branch, alone):
            error.add_note(f"{op} below {root}")
            raise
        return error.errno or 0
    return 0


# -- the arena --------------------------------------------------------------------------------


def probe(root: Path, truth: Tree) -> Tree:
    """The tree as somebody sees it who asks for every name in every directory and lists nothing.

    Names of `truth` too: a temporary whose directory was renamed amid a copy by hand stays where it went.
    """
    names: dict[bytes, set[bytes]] = {}
    for path in truth:
        names.setdefault(os.path.dirname(path), set(NAMES)).add(os.path.basename(path))
    tree: Tree = {}
    todo = [b""]
    while todo:
        above = todo.pop()
        for name in sorted(names.get(above, NAMES)):
            path = os.path.join(above, name)
            try:
                tree[path] = read_entry(os.path.join(os.fsencode(root), path))
            except FileNotFoundError:
                continue
            if tree[path].is_dir:
                todo.append(path)  # deeper than the universe too: directories are renamed
    return tree


def _content(path: bytes) -> list[bytes]:
    return os.listdir(path) if os.path.isdir(path) else []


def together(roots: Sequence[tuple[Path, str]], seed: int, count: int) -> None:
    """Let a process for each root do `count` operations, at the same time. Raises AssertionError.

    roots: with what they are: a mount, a branch, or a mount where somebody only "looks".
    """
    module = [sys.executable, "-m", "tests.stress.storm"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    with ExitStack() as stack:
        clients: list[subprocess.Popen[bytes]] = []
        for n, (root, what) in enumerate(roots):
            words = [*module, str(root), str(seed + n), str(count), what]
            client = subprocess.Popen(words, cwd=REPOSITORY, env=environment, stderr=subprocess.PIPE)
            clients.append(stack.enter_context(client))
            stack.callback(client.kill)
        for client in clients:
            _, errors = client.communicate(timeout=DEADLINE)
            assert client.returncode == 0, errors.decode(errors="replace")


class Arena:
    """A mounted union in which storms happen. Attributes: mount, layout, direct (whether branches are changed)."""

    def __init__(self, mount: Mount, layout: Sequence[str], direct: bool) -> None:
        self.mount = mount
        self.layout = layout
        self.direct = direct

    @property
    def roots(self) -> list[tuple[Path, bool]]:
        """Where clients work, and whether that is a branch. The mount twice: its own requests overlap, too."""
        branches = [(branch, True) for branch in self.mount.branches] if self.direct else []
        return [(self.mount.path, False), (self.mount.path, False), *branches]

    def storm(self, seed: int, count: int) -> None:
        """Let a process for each root do `count` operations at the same time. Raises AssertionError."""
        together([(root, "branch" if on_branch else "mount") for root, on_branch in self.roots], seed, count)

    def in_step(self, turns: Sequence[tuple[int, Op]]) -> list[str]:
        """(index into `roots`, operation), one after the other; exactly repeatable.

        LOOK stands for a check; the first one that finds something ends it, and is what is returned.
        """
        roots = self.roots
        behind = False
        for index, op in turns:
            if index == LOOK[0]:
                if found := self.check(fresh=False):
                    return found
                continue
            root, on_branch = roots[index]
            if behind and not on_branch:
                self.mount.flush()
                behind = False
            perform(op, root, on_branch)
            behind = behind or on_branch
        return []

    def turns(self, seed: int, count: int) -> list[tuple[int, Op]]:
        """Random operations for `in_step`, about half of them through the mount."""
        random_ = random.Random(seed)
        sources = [operations(seed + n, count, on_branch) for n, (_, on_branch) in enumerate(self.roots)]
        weights = [3 if not on_branch else 2 for _, on_branch in self.roots]
        chosen = random_.choices(range(len(sources)), weights, k=count)
        return [(index, next(sources[index])) for index in chosen]

    def check(self, fresh: bool) -> list[str]:
        """Judge at rest: everything that differs, in words; fresh: after the warm mount look at a new one."""
        self.mount.flush()
        truth = self.merged()
        warm, listed = probe(self.mount.path, truth), snapshot(self.mount.path)
        found = [f"asked by name: {line}" for line in diff(truth, warm)]
        found += [f"listed: {line}" for line in diff(truth, listed)]
        found += self._daemon_trouble()
        if fresh:
            self.mount.remount()
            found += [f"after a remount: {line}" for line in diff(truth, snapshot(self.mount.path))]
        return found

    def merged(self) -> Tree:
        whable = [permission == "rw" or "+wh" in permission for permission in self.layout]
        return merge(zip(self.mount.branches, whable, strict=True))

    def _daemon_trouble(self) -> list[str]:
        statistics = self.mount.control({"op": "stats"})
        found = [f"{statistics['bugs']} bugs in the daemon:\n{self.mount.log()}"] if statistics["bugs"] else []
        # The marks of a removed directory are removed in the background.
        end = time.monotonic() + AT_REST
        while (left := self._temporaries()) and time.monotonic() < end:
            time.sleep(0.05)
        return found + [f"left behind: {path!r}, which has {_content(path)}" for path in left]

    def _temporaries(self) -> list[bytes]:
        return [
            os.path.join(directory, name)
            for branch in self.mount.branches
            for directory, names, files in os.walk(os.fsencode(branch))
            for name in names + files
            if _TEMPORARY.fullmatch(name)
        ]


@contextmanager
def arena(
    directory: Path, udba: str, layout: Sequence[str], options: str = "noplink", allow_log: str = ALLOWED_LOG
) -> Iterator[Arena]:
    """An empty union of new branch directories below `directory`.

    Without pseudo-links: what joins the names of a copied-up hard link is known to the mount only, and
    the merge could not know it.
    """
    branches = [directory / name for name in ("top", "middle", "base")]
    for branch in branches:
        branch.mkdir()
    words = [f"{branch}={permission}" for branch, permission in zip(branches, layout, strict=True)]
    with mounted(words, directory / "mnt", udba, options, allow_log=allow_log) as mount:
        yield Arena(mount, layout, direct=udba != "none")


def fill(arena_: Arena, seed: int, count: int) -> None:
    """Put something into the branches first, in every mode: a mount that trusts them has seen nothing yet."""
    for number, branch in enumerate(arena_.mount.branches):
        for op in operations(seed - number, count, True):
            perform(op, branch, True)
    arena_.mount.remount()


def main(root: str, seed: str, count: str, what: str) -> None:
    """One client."""
    for op in operations(int(seed), int(count), what == "branch"):
        if what != "looks":
            perform(op, Path(root), what == "branch", alone=False)
        elif op.kind in _LOOKS:
            # What a file system of a network answers about an object that has gone meanwhile is its own affair.
            with suppress(OSError):
                perform(op, Path(root), on_branch=False)


if __name__ == "__main__":
    main(*sys.argv[1:])
