"""The lookup truth table of semantics 17, and the same rules with five branches.

Each vector is a directory of its own in one shared union per mode, filled before the mount. It is asked
twice over in two copies of itself: names first, then the listing, and the other way round, because a
directory's merged view may be loaded by either. Where udbad differs from aufs on purpose (NAME beside
its own whiteout is visible; the topmost opaque mark is the boundary) the vectors say what udbad does.
"""

from __future__ import annotations

import errno
import itertools
import os
import stat
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.helpers.merge import OPAQUE, OVERLAY, InconsistentBranch, merge
from tests.helpers.mount import Mount, mounted

NAME = "n"
LETTERS = "ABCDE"
THREE = ("rw", "ro+wh", "ro")
FIVE = ("rw", "ro+wh", "ro", "ro+wh", "ro+wh")
WHABLE = {"rw": True, "ro+wh": True, "ro": False}


@dataclass(frozen=True)
class Vector:
    """One row. cells: what each branch has for NAME, words of: file, dir, opq (in the dir), wh, wh=dir, wh=symlink.

    expect: "absent", "EIO", "file X" (the one of branch X) or "dir XY" (merged from X and Y).
    parents: the directory around NAME in each branch: "dir", "opq" or "wh" (whited, not there).
    """

    id: str
    cells: tuple[str, ...]
    expect: str
    parents: tuple[str, ...] = ()

    def parent(self, i: int) -> str:
        return self.parents[i] if self.parents else "dir"


TABLE = (
    Vector("lowest", ("", "", "file"), "file C"),
    Vector("whited-in-A", ("wh", "file", "file"), "absent"),
    Vector("whited-in-B", ("", "wh", "file"), "absent"),
    Vector("above-whiteout", ("file", "wh", "file"), "file A"),
    Vector("file-over-dir", ("file", "", "dir"), "file A"),
    Vector("dir-file-dir", ("dir", "file", "dir"), "dir AC"),
    Vector("dir-wh-dir", ("dir", "wh", "dir"), "dir A"),
    Vector("opaque-in-A", ("dir opq", "dir", "dir"), "dir A"),
    Vector("opaque-in-B", ("dir", "dir opq", "dir"), "dir AB"),
    Vector("opaque-in-A-and-B", ("dir opq", "dir opq", "dir"), "dir A"),
    Vector("opaque-ignored-in-C", ("dir", "dir", "dir opq"), "dir ABC"),
    Vector("whiteout-ignored-in-C", ("", "", "wh"), "absent"),
    Vector("whiteout-beside-file-ignored-in-C", ("", "", "wh file"), "file C"),
    # aufs: EIO or negative for the first two, ENOENT for the third
    Vector("both-in-A", ("wh file", "file", "file"), "file A"),
    Vector("both-in-A-dir", ("wh dir", "dir", "dir"), "dir A"),
    Vector("both-in-B", ("", "wh file", "file"), "file B"),
    Vector("both-in-B-dir", ("dir", "wh dir", "dir"), "dir AB"),
    Vector("both-in-B-other-type", ("dir", "wh file", "dir"), "dir A"),
    Vector("whiteout-is-dir", ("wh=dir", "file", "file"), "EIO"),
    Vector("whiteout-is-symlink", ("wh=symlink", "file", "file"), "EIO"),
    Vector("parent-opaque-in-A", ("", "file", "file"), "absent", ("opq", "dir", "dir")),
    Vector("parent-opaque-in-A-own", ("file", "file", "file"), "file A", ("opq", "dir", "dir")),
    Vector("parent-whited-in-B", ("", "", "file"), "absent", ("dir", "wh", "dir")),
    Vector("parent-whited-in-B-own", ("dir", "", "dir"), "dir A", ("dir", "wh", "dir")),
)


def _five() -> Iterator[Vector]:
    """The same rules with a mark, or a thing of another type, at every index of five branches."""

    def row(elsewhere: str, *special: tuple[int, str]) -> tuple[str, ...]:
        return tuple(dict(special).get(i, elsewhere) for i in range(5))

    def up_to(last: int) -> str:
        return "dir " + LETTERS[: last + 1]

    for mark in range(5):
        counts = WHABLE[FIVE[mark]]
        for at in range(5):
            cells = row("", (mark, "wh"), (at, "file" if at != mark else "wh file"))
            visible = not counts or at <= mark
            yield Vector(f"file-{at}-wh-{mark}", cells, f"file {LETTERS[at]}" if visible else "absent")
        rest = LETTERS.replace(LETTERS[mark], "")
        above = LETTERS[:mark] if counts else rest
        last = mark if counts else 4
        yield Vector(f"dirs-wh-{mark}", row("dir", (mark, "wh")), f"dir {above}" if above else "absent")
        yield Vector(f"dirs-wh-beside-{mark}", row("dir", (mark, "wh dir")), up_to(last))
        yield Vector(f"dirs-opq-{mark}", row("dir", (mark, "dir opq")), up_to(last))
        yield Vector(f"dirs-file-{mark}", row("dir", (mark, "file")), f"dir {rest}" if mark else "file A")
        yield Vector(f"parent-opq-{mark}", row("dir"), up_to(last), row("dir", (mark, "opq")))
        if mark:
            yield Vector(f"parent-wh-{mark}", row("dir", (mark, "")), f"dir {above}", row("dir", (mark, "wh")))
    for first, second in itertools.combinations(range(5), 2):
        cells = row("dir", (first, "dir opq"), (second, "dir opq"))
        boundary = next((i for i in (first, second) if WHABLE[FIVE[i]]), 4)
        yield Vector(f"dirs-opq-{first}-{second}", cells, up_to(boundary))


FIVE_TABLE = tuple(_five())
ORDERS = ("names-first", "listing-first")


def hide(directory: Path, name: str, overlay: bool) -> None:
    """Make a whiteout. overlay: as overlayfs does."""
    if overlay:
        os.mknod(directory / name, stat.S_IFCHR)
    else:
        (directory / f".wh.{name}").touch()


def make_opaque(directory: Path, overlay: bool) -> None:
    if overlay:
        os.setxattr(directory, "trusted.overlay.opaque", b"y")
    else:
        (directory / os.fsdecode(OPAQUE)).touch()


def build(branches: Sequence[Path], vector: Vector, directory: str, overlays: Collection[int]) -> None:
    """Write one vector as `directory` on every branch. overlays: those whose marks are made as overlayfs makes them;
    of a whiteout beside its name, which there cannot be, and of wrong ones as ever."""
    for i, branch in enumerate(branches):
        parent, letter, overlay = branch / directory, LETTERS[i], i in overlays
        if vector.parent(i) == "wh":
            hide(branch, directory, overlay)
            continue
        parent.mkdir()
        if vector.parent(i) == "opq":
            make_opaque(parent, overlay)
        for word in vector.cells[i].split():
            match word:
                case "file":
                    (parent / NAME).write_text(letter)
                case "dir":
                    (parent / NAME).mkdir()
                    (parent / NAME / f"in_{letter}").write_text(letter)
                case "opq":
                    make_opaque(parent / NAME, overlay)
                case "wh":
                    hide(parent, NAME, overlay and vector.cells[i] == word)
                case "wh=dir":
                    (parent / f".wh.{NAME}").mkdir()
                case "wh=symlink":
                    (parent / f".wh.{NAME}").symlink_to("anything")
                case _:
                    raise AssertionError(word)


def errno_of(call: Callable[[], object]) -> int:
    with pytest.raises(OSError, match=r".") as caught:
        call()
    assert caught.value.errno is not None
    return caught.value.errno


def open_close(path: Path) -> None:
    os.close(os.open(path, os.O_RDONLY))


def check_name(path: Path, expect: str) -> None:
    """By name: stat, open, and for absent names creating nothing, twice (the second answer may be a cached one)."""
    kind, _, letters = expect.partition(" ")
    for _ in range(2):
        if kind == "file":
            assert path.lstat().st_size == 1
            assert path.read_text() == letters
        elif kind == "dir":
            for letter in LETTERS:
                child = path / f"in_{letter}"
                if letter in letters:
                    assert child.read_text() == letter
                else:
                    assert errno_of(child.lstat) == errno.ENOENT
        else:
            expected = errno.EIO if kind == "EIO" else errno.ENOENT
            assert errno_of(path.lstat) == expected
            assert errno_of(lambda: open_close(path)) == expected


def check_listing(path: Path, expect: str) -> None:
    kind, _, letters = expect.partition(" ")
    names = os.listdir(path.parent)
    if kind == "EIO":  # whether a name that only answers EIO is listed is left open
        assert set(names) <= {NAME}
        return
    assert names == ([NAME] if kind in ("file", "dir") else [])
    if kind == "dir":
        assert sorted(os.listdir(path)) == [f"in_{letter}" for letter in letters]
    with os.scandir(path.parent) as entries:
        for entry in entries:
            assert entry.is_dir() == (kind == "dir")
            assert entry.inode() == path.lstat().st_ino


def overlays_of(permissions: Sequence[str], notation: str) -> set[int]:
    """The branches in the notation of overlayfs, which counts where nothing is written."""
    return {i for i, permission in enumerate(permissions) if permission == "ro+wh" and notation == "overlay"}


def fill(root: Path, permissions: Sequence[str], vectors: Sequence[Vector], notation: str = "aufs") -> list[str]:
    """All vectors in both copies below root/A, root/B, …; the branch arguments of the mount."""
    branches = [root / LETTERS[i] for i in range(len(permissions))]
    for branch in branches:
        branch.mkdir()
    overlays = overlays_of(permissions, notation)
    for vector in vectors:
        for order in ORDERS:
            build(branches, vector, f"{vector.id}.{order}", overlays)
    return [f"{branch}={permission}" for branch, permission in zip(branches, permissions, strict=True)]


@pytest.fixture(scope="module", params=["none-aufs", "reval-aufs", "notify-overlay"])
def how(request: pytest.FixtureRequest) -> str:
    """The mode, and the notation of what is read only."""
    return str(request.param)


def _mounted(
    factory: pytest.TempPathFactory, permissions: Sequence[str], vectors: Sequence[Vector], how: str
) -> Iterator[Mount]:
    root = factory.mktemp("lookup")
    udba, notation = how.split("-")
    # Each pair of NAME and its whiteout, and each whiteout that is no file, is rightly warned about.
    with mounted(fill(root, permissions, vectors, notation), root / "mnt", udba, allow_log=r"\.wh\.|whiteout") as mount:
        yield mount


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory, how: str) -> Iterator[Mount]:
    yield from _mounted(tmp_path_factory, THREE, TABLE, how)


@pytest.fixture(scope="module")
def five(tmp_path_factory: pytest.TempPathFactory, how: str) -> Iterator[Mount]:
    yield from _mounted(tmp_path_factory, FIVE, FIVE_TABLE, how)


def ask(mount: Mount, vector: Vector, order: str) -> None:
    path = mount.path / f"{vector.id}.{order}" / NAME
    checks = [check_name, check_listing]
    for check in checks if order == "names-first" else reversed(checks):
        check(path, vector.expect)
    assert errno_of((path.parent / f".wh.{NAME}").lstat) == errno.EPERM


@pytest.mark.fuse
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("vector", TABLE, ids=lambda v: v.id)
def test_table(three: Mount, vector: Vector, order: str) -> None:
    ask(three, vector, order)


@pytest.mark.fuse
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("vector", FIVE_TABLE, ids=lambda v: v.id)
def test_marks_at_every_index_of_five_branches(five: Mount, vector: Vector, order: str) -> None:
    ask(five, vector, order)


@pytest.mark.parametrize("notation", ["aufs", "overlay"])
@pytest.mark.parametrize(
    ("permissions", "vector"),
    [(THREE, vector) for vector in TABLE] + [(FIVE, vector) for vector in FIVE_TABLE],
    ids=lambda value: value.id if isinstance(value, Vector) else f"{len(value)}",
)
def test_the_merge_oracle_agrees(tmp_path: Path, permissions: Sequence[str], vector: Vector, notation: str) -> None:
    """The expectations above were written by hand; the independent merge must come to the same."""
    branches = [tmp_path / LETTERS[i] for i in range(len(permissions))]
    for branch in branches:
        branch.mkdir()
    overlays = overlays_of(permissions, notation)
    build(branches, vector, "D", overlays)
    whable = [
        (branch, OVERLAY if at in overlays else WHABLE[permission])
        for at, (branch, permission) in enumerate(zip(branches, permissions, strict=True))
    ]
    kind, _, letters = vector.expect.partition(" ")
    if kind == "EIO":
        with pytest.raises(InconsistentBranch):
            merge(whable)
        return
    expected = {b"D"} | ({b"D/n"} if kind != "absent" else set())
    if kind == "dir":
        expected |= {b"D/n/in_%c" % ord(letter) for letter in letters}
    assert merge(whable).keys() == expected
