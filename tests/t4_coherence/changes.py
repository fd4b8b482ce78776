"""Direct changes of a branch directory, and the small tree that each of them is made in.

A case is one change made on one branch, in a directory of its own that exists on all three. What must be
visible before and after is not written here: tests compute it from the branches with tests/helpers/merge.py.
Nothing in this module touches a mount.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.helpers.merge import OVERLAY, Tree, merge, resolve

LETTERS = "ABC"
PERMISSIONS = ("rw", "ro+wh", "ro")
WHABLE = (True, OVERLAY, False)
"""Whose whiteouts count: those of every branch but one that is plain ro; those of overlayfs where nothing is written.
"""
WHABLE_OVERLAY = (OVERLAY, OVERLAY, False)
"""The same with `whiteouts=overlay`."""

OLD = b"old " * 1500
NEW = b"new " * 1500
"""As long as OLD: only times tell that a file was overwritten."""
QUIET = "quiet/by"
"""A file that no change concerns; nothing of it may be asked again."""

_OVERLAY = (1,)
"""Where marks of overlayfs count, and with `whiteouts=overlay` on the first branch, too."""
_OPAQUE = "trusted.overlay.opaque"


def build(roots: Sequence[Path], at: int, overlay: bool) -> None:
    """Fill one case's directory, given for each branch, top first; branch `at` is the one to be changed.

    overlay: marks of overlayfs count there.
    """
    for letter, root in zip(LETTERS, roots, strict=True):
        for name in ("d/o", "d/p", "d/q", "e", "quiet"):
            (root / name).mkdir(parents=True)
        for name in ("d/o", "d/p", "d/q"):
            (root / name / letter).write_text(letter)
    here, lowest = roots[at], roots[-1]
    (here / QUIET).write_bytes(OLD)
    (here / "d/file").write_bytes(OLD)
    (here / "d/other").write_bytes(OLD * 2)
    (here / "d/link").symlink_to("file")
    (here / "d/tree/deep").mkdir(parents=True)
    (here / "d/tree/leaf").write_bytes(OLD)
    (here / "d/tree/deep/leaf").write_bytes(OLD)
    (here / "d/q/.wh..wh..opq").touch()
    (here / "d/.wh.hidden").touch()
    (lowest / "d/hidden").write_bytes(OLD)
    if overlay:
        os.mknod(here / "d/covered", stat.S_IFCHR)
        os.setxattr(here / "d/p", _OPAQUE, b"y")
        (lowest / "d/covered").write_bytes(OLD)
    (lowest / "d/low").write_bytes(OLD)
    (lowest / "d/lowdir").mkdir()
    (lowest / "d/lowdir/low").write_bytes(OLD)
    if at < len(roots) - 1:
        (here / "d/upper").write_bytes(NEW)
        (lowest / "d/upper").write_bytes(OLD)
        for root, content in ((here, NEW), (lowest, OLD)):
            (root / "d/updir").mkdir()
            (root / "d/updir/both").write_bytes(content)
        (here / "d/updir/upper").write_bytes(NEW)
        (lowest / "d/updir/lower").write_bytes(OLD)


@dataclass(frozen=True)
class Change:
    """One kind of direct change. act: gets the case's directory on the branch to be changed.

    files: regular files it concerns that are visible before; others: what else is; absent: names that
    appear (on the branches where the change shows at all). branches: indices where it makes sense. cwd: where
    a process sits in the state about current directories.
    """

    id: str
    act: Callable[[Path], object]
    files: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()
    branches: tuple[int, ...] = (0, 1, 2)
    cwd: str = "d"

    @property
    def names(self) -> tuple[str, ...]:
        return self.files + self.others + self.absent


def _append(here: Path) -> None:
    with (here / "d/file").open("ab") as stream:
        stream.write(NEW)


def _overwrite(here: Path) -> None:
    with (here / "d/file").open("r+b") as stream:
        stream.write(NEW)


def _save(here: Path) -> None:
    """What an editor does: write beside, rename over."""
    (here / "d/.file.tmp").write_bytes(NEW)
    os.rename(here / "d/.file.tmp", here / "d/file")


def _remove_as_overlayfs(here: Path) -> None:
    os.mknod(here / "d/.tmp", stat.S_IFCHR)
    os.rename(here / "d/.tmp", here / "d/file")


def _retarget(here: Path) -> None:
    (here / "d/link.tmp").symlink_to("other")
    os.rename(here / "d/link.tmp", here / "d/link")


def _relink(here: Path) -> None:
    (here / "d/link").unlink()
    (here / "d/link").symlink_to("low")


def _make_tree(here: Path) -> None:
    (here / "d/made/deep").mkdir(parents=True)
    (here / "d/made/leaf").write_bytes(NEW)
    (here / "d/made/deep/leaf").write_bytes(NEW)


def _make_directory(path: Path) -> None:
    path.mkdir()
    (path / "inside").write_bytes(NEW)


def _file_to_directory(here: Path) -> None:
    (here / "d/file").unlink()
    _make_directory(here / "d/file")


def _tree_to_file(here: Path) -> None:
    shutil.rmtree(here / "d/tree")
    (here / "d/tree").write_bytes(NEW)


_TREE_FILES = ("d/tree/leaf", "d/tree/deep/leaf")
_TREE_DIRS = ("d/tree", "d/tree/deep")
_O = ("d/o/A", "d/o/B", "d/o/C")
_Q = ("d/q/A", "d/q/B", "d/q/C")
_ABOVE = (0, 1)

CHANGES = (
    Change("create", lambda p: (p / "d/new").write_bytes(NEW), absent=("d/new",)),
    Change("delete", lambda p: (p / "d/file").unlink(), files=("d/file",)),
    Change("rename", lambda p: os.rename(p / "d/file", p / "d/renamed"), files=("d/file",), absent=("d/renamed",)),
    Change(
        "rename-across", lambda p: os.rename(p / "d/file", p / "e/renamed"), files=("d/file",), absent=("e/renamed",)
    ),
    Change("replace", lambda p: os.rename(p / "d/other", p / "d/file"), files=("d/file", "d/other")),
    Change("save", _save, files=("d/file",)),
    Change("chmod", lambda p: (p / "d/file").chmod(0o604), files=("d/file",)),
    Change("chmod-directory", lambda p: (p / "d/tree").chmod(0o705), others=("d/tree",), cwd="d/tree"),
    Change("chown", lambda p: os.chown(p / "d/file", 12, 34), files=("d/file",)),
    Change("xattr", lambda p: os.setxattr(p / "d/file", "user.udbad", b"value"), files=("d/file",)),
    Change("truncate", lambda p: os.truncate(p / "d/file", 1000), files=("d/file",)),
    Change("append", _append, files=("d/file",)),
    Change("overwrite", _overwrite, files=("d/file",)),
    Change("utimens", lambda p: os.utime(p / "d/file", ns=(10**18, 10**18 + 1)), files=("d/file",)),
    Change("retarget", _retarget, others=("d/link",)),
    Change("relink", _relink, others=("d/link",)),
    Change("link", lambda p: os.link(p / "d/file", p / "d/second"), files=("d/file",), absent=("d/second",)),
    Change("whiteout", lambda p: (p / "d/.wh.low").touch(), files=("d/low",)),
    Change(
        "whiteout-directory",
        lambda p: (p / "d/.wh.lowdir").touch(),
        files=("d/lowdir/low",),
        others=("d/lowdir",),
        cwd="d/lowdir",
    ),
    Change("no-whiteout", lambda p: (p / "d/.wh.hidden").unlink(), absent=("d/hidden",)),
    Change("opaque", lambda p: (p / "d/o/.wh..wh..opq").touch(), files=_O, others=("d/o",), cwd="d/o"),
    Change("no-opaque", lambda p: (p / "d/q/.wh..wh..opq").unlink(), others=("d/q",), absent=_Q, cwd="d/q"),
    Change("device", lambda p: os.mknod(p / "d/low", stat.S_IFCHR), files=("d/low",), branches=_OVERLAY),
    Change("device-over-file", _remove_as_overlayfs, files=("d/file",), branches=_OVERLAY),
    Change("no-device", lambda p: (p / "d/covered").unlink(), absent=("d/covered",), branches=_OVERLAY),
    Change(
        "opaque-attribute",
        lambda p: os.setxattr(p / "d/o", _OPAQUE, b"y"),
        files=_O,
        others=("d/o",),
        branches=_OVERLAY,
        cwd="d/o",
    ),
    Change(
        "no-opaque-attribute",
        lambda p: os.removexattr(p / "d/p", _OPAQUE),
        others=("d/p",),
        absent=("d/p/A", "d/p/B", "d/p/C"),
        branches=_OVERLAY,
        cwd="d/p",
    ),
    Change("make-tree", _make_tree, absent=("d/made", "d/made/leaf", "d/made/deep", "d/made/deep/leaf")),
    Change(
        "move-tree",
        lambda p: os.rename(p / "d/tree", p / "e/moved"),
        files=_TREE_FILES,
        others=_TREE_DIRS,
        absent=("e/moved", "e/moved/leaf", "e/moved/deep", "e/moved/deep/leaf"),
        cwd="d/tree/deep",
    ),
    Change(
        "remove-tree",
        lambda p: shutil.rmtree(p / "d/tree"),
        files=_TREE_FILES,
        others=_TREE_DIRS,
        cwd="d/tree/deep",
    ),
    Change("file-to-directory", _file_to_directory, files=("d/file",), absent=("d/file/inside",)),
    Change("tree-to-file", _tree_to_file, files=_TREE_FILES, others=_TREE_DIRS, cwd="d/tree"),
    Change("upper-appears", lambda p: (p / "d/low").write_bytes(NEW), files=("d/low",), branches=_ABOVE),
    Change(
        "upper-directory-appears",
        lambda p: _make_directory(p / "d/lowdir"),
        files=("d/lowdir/low",),
        others=("d/lowdir",),
        absent=("d/lowdir/inside",),
        branches=_ABOVE,
        cwd="d/lowdir",
    ),
    Change(
        "upper-file-hides-directory",
        lambda p: (p / "d/lowdir").write_bytes(NEW),
        files=("d/lowdir/low",),
        others=("d/lowdir",),
        branches=_ABOVE,
        cwd="d/lowdir",
    ),
    Change("upper-disappears", lambda p: (p / "d/upper").unlink(), files=("d/upper",), branches=_ABOVE),
    Change(
        "upper-directory-disappears",
        lambda p: shutil.rmtree(p / "d/updir"),
        files=("d/updir/both", "d/updir/upper", "d/updir/lower"),
        others=("d/updir",),
        branches=_ABOVE,
        cwd="d/updir",
    ),
)


def build_cases(root: Path, cases: Sequence[Case]) -> list[Path]:
    """The branches, below a new directory, each with what every case needs of it."""
    branches = [root / letter for letter in LETTERS]
    for branch in branches:
        branch.mkdir()
    for case in cases:
        case.build(branches)
    return branches


@dataclass(frozen=True)
class Case:
    """One change on branch number `at`. whable: whose whiteouts count."""

    change: Change
    at: int
    whable: tuple[int, ...] = WHABLE

    @property
    def id(self) -> str:
        return f"{self.change.id}-{LETTERS[self.at]}"

    def build(self, branches: Sequence[Path]) -> None:
        for branch in branches:
            (branch / self.id).mkdir()
        build([branch / self.id for branch in branches], self.at, self.whable[self.at] == OVERLAY)

    def act(self, branches: Sequence[Path]) -> None:
        self.change.act(branches[self.at] / self.id)

    def expected(self, branches: Sequence[Path]) -> Tree:
        """What must be visible below the case's directory according to the branches now."""
        return merge((branch / self.id, whable) for branch, whable in zip(branches, self.whable, strict=True))

    def winner(self, branches: Sequence[Path], name: str) -> bytes:
        """Path of the branch object that `name` shows; it must be visible."""
        found = [(os.fsencode(branch / self.id), whable) for branch, whable in zip(branches, self.whable, strict=True)]
        for part in os.fsencode(name).split(b"/"):
            found = resolve(found, part)
        return found[0][0]


CASES = tuple(Case(change, at) for change in CHANGES for at in change.branches)
OVERLAY_CASES = tuple(
    Case(change, 0, WHABLE_OVERLAY) for change in CHANGES if 0 in change.branches or change.branches == _OVERLAY
)
"""Changes of a top branch that is in the notation of overlayfs."""
