"""The mutation vectors of semantics 17: do it through the mount, then look at the branches on disk.

Each row is a directory of its own in one shared union (A=rw, B=ro+wh, C=ro) per mode, filled before the
mount, and on a branch only where the row says so; a row that needs other options or branches has its own mount.
"""

from __future__ import annotations

import errno
import os
import stat
import subprocess
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.helpers.merge import OVERLAY, Tree, diff, merge, snapshot
from tests.helpers.mount import Mount, UnionFactory, mounted
from tests.helpers.profile import scaled

pytestmark = pytest.mark.fuse

Content = Mapping[str, str | None]
"""Path below the row's directory -> text of a file, None for a directory. Parents come first."""

BASE_NS = 1_000_000_000_000_000_000
"""Time stamp of everything made before the mount, ns."""

DIR = None
WH = ""
OPQ = ".wh..wh..opq"
OPAQUE_ATTRIBUTE = "trusted.overlay.opaque"


@dataclass(frozen=True)
class Row:
    """One vector. a, b, c: the branches before; after: branch A afterwards. None: the row's directory is not there.

    fails: errno that `act` must raise.
    """

    id: str
    act: Callable[[Path], object]
    a: Content | None = None
    b: Content | None = None
    c: Content | None = None
    after: Content | None = None
    fails: int = 0


def write_byte(path: Path) -> None:
    with path.open("r+b", buffering=0) as stream:
        stream.write(b"x")


def read_through_rdwr(path: Path) -> None:
    fd = os.open(path, os.O_RDWR)
    try:
        assert os.read(fd, 10) == b"C file"
    finally:
        os.close(fd)


ROWS = (
    Row("unlink-lower", lambda d: (d / "n").unlink(), c={"n": "C"}, after={".wh.n": WH}),
    Row("unlink-both", lambda d: (d / "n").unlink(), a={"n": "A"}, c={"n": "C"}, after={".wh.n": WH}),
    Row("unlink-upper", lambda d: (d / "n").unlink(), a={"n": "A"}, c={}, after={}),
    Row("unlink-hidden", lambda d: (d / "n").unlink(), a={"n": "A"}, b={".wh.n": WH}, c={"n": "C"}, after={}),
    Row(
        "mkdir-over-whiteout",
        lambda d: (d / "n").mkdir(),
        a={".wh.n": WH},
        c={"n": DIR, "n/x": "C"},
        after={"n": DIR, f"n/{OPQ}": WH},
    ),
    Row(
        "mkdir-over-whiteout-of-b",
        lambda d: (d / "n").mkdir(),
        b={".wh.n": WH},
        c={"n": DIR, "n/x": "C"},
        after={"n": DIR},
    ),
    Row(
        "create-over-whiteout",
        lambda d: (d / "n").write_text("new"),
        a={".wh.n": WH},
        c={"n": "C"},
        after={"n": "new"},
    ),
    Row("rmdir-lower", lambda d: (d / "n").rmdir(), c={"n": DIR}, after={".wh.n": WH}),
    Row(
        "rmdir-whited",
        lambda d: (d / "n").rmdir(),
        a={"n": DIR, "n/.wh.x": WH, "n/.wh.y": WH},
        c={"n": DIR, "n/x": "C", "n/y": "C"},
        after={".wh.n": WH},
    ),
    Row(
        "rmdir-not-empty",
        lambda d: (d / "n").rmdir(),
        a={"n": DIR, "n/.wh.x": WH},
        c={"n": DIR, "n/x": "C", "n/y": "C"},
        after={"n": DIR, "n/.wh.x": WH},
        fails=errno.ENOTEMPTY,
    ),
    Row(
        "rename-lower-dir",
        lambda d: (d / "n").rename(d / "m"),
        c={"n": DIR, "n/x": "C"},
        after={".wh.n": WH, "m": DIR},
    ),
    Row(
        "rename-upper-dir",
        lambda d: (d / "n").rename(d / "m"),
        a={"n": DIR, "n/x": "A"},
        c={},
        after={"m": DIR, "m/x": "A"},
    ),
    Row(
        "rename-dir-with-whited-children",
        lambda d: (d / "n").rename(d / "m"),
        a={"n": DIR, "n/.wh.x": WH, "n/own": "A"},
        c={"n": DIR, "n/x": "C"},
        after={".wh.n": WH, "m": DIR, "m/.wh.x": WH, "m/own": "A"},
    ),
    Row(
        "rename-dir-over-whiteout",
        lambda d: (d / "n").rename(d / "m"),
        a={"n": DIR, "n/own": "A", ".wh.m": WH},
        c={"m": DIR, "m/old": "C"},
        after={"m": DIR, "m/own": "A", f"m/{OPQ}": WH},
    ),
    Row(
        "rename-dir-over-empty-lower-dir",
        lambda d: (d / "n").rename(d / "m"),
        a={"n": DIR, "n/own": "A"},
        c={"m": DIR},
        after={"m": DIR, "m/own": "A", f"m/{OPQ}": WH},
    ),
    Row(
        "rename-dir-over-logically-empty-dir",
        lambda d: (d / "n").rename(d / "m"),
        a={"n": DIR, "n/own": "A", "m": DIR, "m/.wh.old": WH},
        c={"m": DIR, "m/old": "C"},
        after={"m": DIR, "m/own": "A", f"m/{OPQ}": WH},
    ),
    Row(
        "rename-dir-with-lower-child",
        lambda d: (d / "n").rename(d / "m"),
        a={"n": DIR, "n/own": "A"},
        c={"n": DIR, "n/x": "C"},
        after={".wh.n": WH, "m": DIR, "m/own": "A"},
    ),
    Row(
        "rename-lower-file",
        lambda d: (d / "n").rename(d / "m"),
        c={"n": "C"},
        after={".wh.n": WH, "m": "C"},
    ),
    Row(
        "rename-lower-file-over-upper",
        lambda d: (d / "f").rename(d / "m"),
        a={"m": "A"},
        c={"f": "C"},
        after={".wh.f": WH, "m": "C"},
    ),
    Row("truncate", lambda d: os.truncate(d / "n", 2), c={"n": "C file"}, after={"n": "C "}),
    Row("open-rdwr-read-close", lambda d: read_through_rdwr(d / "n"), c={"n": "C file"}),
    Row("open-rdwr-write", lambda d: write_byte(d / "n"), c={"n": "C file"}, after={"n": "x file"}),
    Row("chmod", lambda d: (d / "n").chmod(0o600), c={"n": "C"}, after={"n": "C"}),
    Row("chown", lambda d: os.chown(d / "n", 7, 8), c={"n": "C"}, after={"n": "C"}),
    Row("utimes", lambda d: os.utime(d / "n", (3, 4)), c={"n": "C"}, after={"n": "C"}),
    Row("setxattr", lambda d: os.setxattr(d / "n", "user.k", b"v"), c={"n": "C"}, after={"n": "C"}),
    Row("chmod-dir", lambda d: (d / "n").chmod(0o700), c={"n": DIR, "n/x": "C"}, after={"n": DIR}),
    Row("chown-dir", lambda d: os.chown(d / "n", 7, 8), c={"n": DIR, "n/x": "C"}, after={"n": DIR}),
    Row("utimes-dir", lambda d: os.utime(d / "n", (3, 4)), c={"n": DIR, "n/x": "C"}, after={"n": DIR}),
    Row("setxattr-dir", lambda d: os.setxattr(d / "n", "user.k", b"v"), c={"n": DIR, "n/x": "C"}, after={"n": DIR}),
    Row(
        "create-in-lower-dir",
        lambda d: (d / "D/sub/x").write_text("new"),
        a={"D": DIR},
        c={"D": DIR, "D/sub": DIR, "D/sub/old": "C"},
        after={"D": DIR, "D/sub": DIR, "D/sub/x": "new"},
    ),
)

CHANGED: dict[str, Callable[[os.stat_result, Path], bool]] = {
    "chmod": lambda info, _: stat.S_IMODE(info.st_mode) == 0o600,
    "chown": lambda info, _: (info.st_uid, info.st_gid) == (7, 8),
    "utimes": lambda info, _: (info.st_atime, info.st_mtime) == (3, 4),
    "setxattr": lambda _, path: os.getxattr(path, "user.k") == b"v",
    "chmod-dir": lambda info, _: stat.S_IMODE(info.st_mode) == 0o700,
    "chown-dir": lambda info, _: (info.st_uid, info.st_gid) == (7, 8),
    "utimes-dir": lambda info, _: (info.st_atime, info.st_mtime) == (3, 4),
    "setxattr-dir": lambda _, path: os.getxattr(path, "user.k") == b"v",
}
"""What the row's object on A must show afterwards."""

KEPT = {"rename-lower-file": "m", "open-rdwr-write": "n", "setxattr": "n", "setxattr-dir": "n"}
"""Objects that were copied up without a change of mode and owner."""


@dataclass
class Shared:
    """The shared union and the two lower branches as they were before the mount.

    overlay: the first one is in the notation of overlayfs.
    """

    mount: Mount
    overlay: bool
    lower: dict[str, Tree] = field(default_factory=dict)

    @property
    def branches(self) -> list[tuple[Path, int]]:
        return [(self.mount["A"], OVERLAY if self.overlay else True), (self.mount["B"], True), (self.mount["C"], False)]


def write_content(directory: Path, content: Content | None, overlay: bool = False) -> None:
    """Make the row's directory; everything has mode bits and times that a copy-up must keep.

    overlay: marks, which the rows have as aufs does, are made as overlayfs does.
    """
    if content is None:
        return
    directory.mkdir()
    for name, text in content.items():
        path = directory / name
        if text is None:
            path.mkdir()
        elif overlay and path.name == OPQ:
            os.setxattr(path.parent, OPAQUE_ATTRIBUTE, b"y")
        elif overlay and path.name.startswith(".wh."):
            os.mknod(path.with_name(path.name.removeprefix(".wh.")), stat.S_IFCHR)
        else:
            path.write_text(text)
    for path in [*sorted(directory.rglob("*"), reverse=True), directory]:
        path.chmod(0o751 if path.is_dir() else 0o640)
        os.chown(path, 5, 6)
        os.utime(path, ns=(BASE_NS, BASE_NS))


def read_content(directory: Path, overlay: bool = False) -> Content | None:
    """As `write_content` has it; a mark of the other notation is as any object of that name."""
    if not directory.exists():
        return None
    content: dict[str, str | None] = {}
    for path in directory.rglob("*"):
        name = path.relative_to(directory)
        if path.is_dir():
            content[str(name)] = None
            if overlay and OPAQUE_ATTRIBUTE in os.listxattr(path):
                content[str(name / OPQ)] = WH
        elif overlay and path.is_char_device() and not path.stat().st_rdev:
            content[str(name.with_name(f".wh.{name.name}"))] = WH
        else:
            assert not (overlay and name.name.startswith(".wh.")), f"{name}: the notation of aufs"
            content[str(name)] = path.read_text()
    return dict(sorted(content.items()))


WAYS = (
    ("none", ""),
    ("reval", ""),
    ("notify", "whiteouts=overlay,io=cached"),
    *scaled(
        (),
        (
            ("none", "whiteouts=overlay"),
            ("reval", "whiteouts=overlay,io=passthrough"),
            ("notify", "whiteouts=overlay"),
        ),
    ),
)


@pytest.fixture(scope="module", params=WAYS, ids=lambda way: "-".join(filter(None, way)))
def shared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    root = tmp_path_factory.mktemp("mutation")
    branches = [root / letter for letter in "ABC"]
    for branch in branches:
        branch.mkdir()
    udba, options = request.param
    overlay = "whiteouts=overlay" in options
    for row in ROWS:
        for branch, content in zip(branches, (row.a, row.b, row.c), strict=True):
            write_content(branch / row.id, content, overlay and branch is branches[0])
    lower = {branch.name: snapshot(branch) for branch in branches[1:]}
    words = [f"{branch}={perm}" for branch, perm in zip(branches, ("rw", "ro+wh", "ro"), strict=True)]
    with mounted(words, root / "mnt", udba, options) as mount:
        yield Shared(mount, overlay, lower)
    for branch in branches[1:]:
        assert diff(lower[branch.name], snapshot(branch)) == []


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.id)
def test_row(shared: Shared, row: Row) -> None:
    mount = shared.mount
    directory = mount.path / row.id
    if row.fails:
        with pytest.raises(OSError, match=r".") as caught:
            row.act(directory)
        assert caught.value.errno == row.fails
    else:
        row.act(directory)
    mount.flush()
    on_disk = mount["A"] / row.id
    if row.id in CHANGED:  # before anything is read, which would change the access time
        assert CHANGED[row.id]((on_disk / "n").stat(), on_disk / "n")
    if row.a is None and row.after:
        check_copied_up(row, on_disk)
    assert read_content(on_disk, shared.overlay) == (None if row.after is None else dict(sorted(row.after.items())))
    for name in ("B", "C"):
        branch = {k: v for k, v in shared.lower[name].items() if k.startswith(os.fsencode(row.id) + b"/")}
        now = snapshot(mount[name] / row.id) if (mount[name] / row.id).exists() else {}
        assert diff(branch, {os.fsencode(f"{row.id}/") + k: v for k, v in now.items()}) == []
    prefix = os.fsencode(row.id) + b"/"
    expected = {k.removeprefix(prefix): v for k, v in merge(shared.branches).items() if k.startswith(prefix)}
    assert diff(expected, snapshot(directory)) == []


def check_copied_up(row: Row, on_disk: Path) -> None:
    """The row's directory, which was not on A, and the object keep what the operation did not change."""
    info = on_disk.stat()
    assert (stat.S_IMODE(info.st_mode), info.st_uid, info.st_gid) == (0o751, 5, 6)
    if row.id in CHANGED or row.id == "open-rdwr-write":
        # No name came or went in the union, so the copy-up alone may not show in the parent's times.
        assert info.st_mtime_ns == BASE_NS
    name = KEPT.get(row.id)
    if name is not None:
        info = (on_disk / name).stat()
        expected = 0o751 if stat.S_ISDIR(info.st_mode) else 0o640
        assert (stat.S_IMODE(info.st_mode), info.st_uid, info.st_gid) == (expected, 5, 6)
        if row.id != "open-rdwr-write":
            assert info.st_mtime_ns == BASE_NS


def three(union: UnionFactory, udba: str, options: str = "") -> Mount:
    return union({"A": "rw", "B": "ro+wh", "C": "ro"}, udba, options)


modes = pytest.mark.parametrize("udba", ["none", "reval"])


@modes
def test_link_of_a_lower_file_with_plink(union: UnionFactory, tmp_path: Path, udba: str) -> None:
    (tmp_path / "C").mkdir()
    (tmp_path / "C/n").write_text("C")
    mount = three(union, udba)
    inode = (mount.path / "n").stat().st_ino
    os.link(mount.path / "n", mount.path / "m")
    plinks = list((mount["A"] / ".wh..wh.plnk").iterdir())
    assert len(plinks) == 1
    assert all(part.isdigit() for part in plinks[0].name.split("."))
    assert plinks[0].samefile(mount["A"] / "m")
    assert not (mount["A"] / "n").exists()
    for name in ("n", "m"):
        info = (mount.path / name).stat()
        assert (info.st_ino, info.st_nlink) == (inode, 2)
    (mount.path / "m").write_text("changed")
    assert (mount.path / "n").read_text() == "changed"
    assert (mount["C"] / "n").read_text() == "C"
    mount.remount()
    assert (mount.path / "n").read_text() == "changed"
    assert (mount.path / "n").stat().st_ino == (mount.path / "m").stat().st_ino


@modes
def test_rename_of_a_lower_file_that_has_a_pseudo_link(union: UnionFactory, tmp_path: Path, udba: str) -> None:
    """Its data is on A already, under the other name only."""
    (tmp_path / "C").mkdir()
    (tmp_path / "C/n").write_text("C")
    mount = three(union, udba)
    os.link(mount.path / "n", mount.path / "m")
    (mount.path / "n").rename(mount.path / "moved")
    assert sorted(os.listdir(mount.path)) == ["m", "moved"]
    assert (mount["A"] / "moved").samefile(mount["A"] / "m")
    assert (mount["A"] / ".wh.n").exists()


@modes
def test_link_of_a_lower_file_without_plink(union: UnionFactory, tmp_path: Path, udba: str) -> None:
    (tmp_path / "C").mkdir()
    (tmp_path / "C/n").write_text("C")
    mount = three(union, udba, "noplink")
    os.link(mount.path / "n", mount.path / "m")
    assert (mount["A"] / "n").samefile(mount["A"] / "m")
    assert (mount["A"] / "n").stat().st_nlink == 2
    assert (mount["A"] / "m").read_text() == "C"


@modes
def test_truncate_copies_only_what_stays(union: UnionFactory, tmp_path: Path, udba: str) -> None:
    (tmp_path / "C").mkdir()
    with (tmp_path / "C/n").open("wb") as stream:
        stream.write(b"0123456789abcdef")
        stream.truncate(1 << 30)
    mount = three(union, udba)
    os.truncate(mount.path / "n", 10)
    assert (mount["A"] / "n").read_bytes() == b"0123456789"
    assert (mount["A"] / "n").stat().st_blocks <= 8
    assert (mount["C"] / "n").stat().st_size == 1 << 30
    assert (mount.path / "n").read_bytes() == b"0123456789"


@modes
def test_file_of_a_lower_writable_branch_is_changed_in_place(union: UnionFactory, tmp_path: Path, udba: str) -> None:
    (tmp_path / "B").mkdir()
    (tmp_path / "B/n").write_text("B file")
    mount = union({"A": "rw", "B": "rw"}, udba)
    write_byte(mount.path / "n")
    assert (mount["B"] / "n").read_text() == "x file"
    assert not (mount["A"] / "n").exists()
    (mount.path / "n").unlink()
    assert [name for name in os.listdir(mount["A"]) if not name.startswith(".wh..wh.")] == []
    assert [name for name in os.listdir(mount["B"]) if not name.startswith(".wh..wh.")] == []


@modes
def test_new_file_with_the_inode_number_of_a_removed_one(union: UnionFactory, tmp_path: Path, udba: str) -> None:
    """The removed file had a pseudo-link, so its number on B stood for a copy on A; the new one is its own file."""
    for name in ("A/p", "B/p", "B/c"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "A/p" / OPQ).touch()  # hides B/p, so that a link into p needs a copy on A
    mount = union({"A": "rw", "B": "rw"}, udba)
    for _ in range(20):
        (mount.path / "c/old").write_text("removed")
        os.link(mount.path / "c/old", mount.path / "p/old")
        (mount.path / "c/old").unlink()
        (mount.path / "p/old").chmod(0o600)
        (mount.path / "p/old").unlink()
        (mount.path / "c/new").write_text("new")
        assert (mount.path / "c/new").read_text() == (mount["B"] / "c/new").read_text() == "new"
        assert (mount.path / "c/new").stat().st_mode == (mount["B"] / "c/new").stat().st_mode
        (mount.path / "c/new").unlink()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of 1 MiB at tmp_path/A, to be the top branch."""
    directory = tmp_path / "A"
    directory.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(directory)], check=True, timeout=20)
    try:
        yield directory
    finally:
        # -l: the daemon of a failed test may still hold it
        subprocess.run(["umount", "-l", str(directory)], check=True, timeout=20)


@modes
def test_copy_up_without_space_leaves_nothing(tmp_path: Path, small_disk: Path, udba: str) -> None:
    lower = tmp_path / "C"
    lower.mkdir()
    (lower / "n").write_bytes(os.urandom(4 << 20))
    before = snapshot(lower)
    with mounted([f"{small_disk}=rw", f"{lower}=ro"], tmp_path / "mnt", udba) as mount:
        fd = os.open(mount.path / "n", os.O_WRONLY)
        try:
            with pytest.raises(OSError, match=r".") as caught:
                os.write(fd, b"x")
        finally:
            os.close(fd)
        assert caught.value.errno == errno.ENOSPC
        assert [name for name in os.listdir(small_disk) if not name.startswith(".wh..wh.")] == []
        assert not list(small_disk.rglob(".wh..wh.n.*"))
        assert diff(before, snapshot(lower)) == []
        assert diff(before, snapshot(mount.path)) == []
        (mount.path / "small").write_text("fits")
        assert (small_disk / "small").read_text() == "fits"
