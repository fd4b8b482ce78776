"""Branches that are rewritten from one notation of whiteouts to the other, and what fsck says of them."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.helpers.merge import OVERLAY, Tree, diff, merge
from tests.helpers.mount import REPOSITORY
from tests.t2_core.killed import Faults, Killed, descriptors
from udbad.errors import ExitCode, UserError
from udbad.tools.convert import convert
from udbad.tools.fsck import run_fsck


@pytest.fixture
def lower(tmp_path: Path) -> Path:
    for name in ("gone", "dir/gone", "dir/kept", "covered/inside", "deep/er/gone"):
        path = tmp_path / "low" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return tmp_path / "low"


@pytest.fixture
def aufs(tmp_path: Path, lower: Path) -> Path:
    top = tmp_path / "top"
    for name in ("dir", "covered", "deep/er", ".wh..wh.plnk", ".wh..wh.orph"):
        (top / name).mkdir(parents=True)
    (top / ".wh..wh.aufs").touch(0o444)
    for mark in (".wh.gone", "dir/.wh.gone", "covered/.wh..wh..opq", "deep/er/.wh.gone"):
        os.link(top / ".wh..wh.aufs", top / mark)
    (top / "covered/new").write_text("new")
    os.chown(top / "dir", 5, 6)
    for path in (top / "dir", top / "covered", top / "deep/er", top / "deep", top):
        os.utime(path, ns=(10**9, 2 * 10**9))
    return top


def shown(top: Path, lower: Path, overlay: bool) -> Tree:
    tree = merge([(top, OVERLAY if overlay else 1), (lower, 0)])
    return {
        path: replace(entry, xattrs=tuple(one for one in entry.xattrs if "overlay" not in one[0]))
        for path, entry in tree.items()
    }


def marks(top: Path) -> set[str]:
    found = set()
    for above, directories, files in os.walk(top):
        for name in (*directories, *files):
            path = Path(above, name)
            info = path.lstat()
            if name.startswith(".wh."):
                found.add(str(path.relative_to(top)))
            elif stat.S_ISCHR(info.st_mode):
                found.add(f"{path.relative_to(top)}: device")
            elif any("opaque" in key for key in os.listxattr(path)):
                found.add(f"{path.relative_to(top)}: opaque")
    return found


OF_OVERLAYFS = {"gone: device", "dir/gone: device", "covered: opaque", "deep/er/gone: device"}


def run(top: Path, source: str, target: str) -> int:
    return convert(os.fsencode(top), source, target, lambda done, count: None)


def command(*words: str) -> tuple[int, str, str]:
    """Exit code of `udbad convert`, what it says, and what it draws on its terminal."""
    ours, theirs = os.openpty()
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "udbad", "convert", *words], stdout=subprocess.PIPE, stderr=theirs,
            check=False, text=True, timeout=60,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY), "TERM": "xterm", "COLUMNS": "80"},
        )  # fmt: skip
        os.set_blocking(ours, False)
        try:
            drawn = os.read(ours, 1 << 16).decode()
        except BlockingIOError:
            drawn = ""
    finally:
        os.close(ours)
        os.close(theirs)
    return done.returncode, done.stdout, drawn


def test_the_command(aufs: Path) -> None:
    """With a progress bar: directories that are done, of how many."""
    code, said, drawn = command("aufs", "overlay", str(aufs))
    assert (code, said) == (0, f"{aufs}: 4 marks rewritten\n")
    assert "directories" in drawn
    assert "5/5" in drawn
    assert marks(aufs) == OF_OVERLAYFS
    code, said, drawn = command("overlay", "aufs", f"{aufs}/nowhere")
    assert (code, said) == (ExitCode.BRANCH, "")
    assert "No such file or directory" in drawn
    assert command("aufs", "aufs", str(aufs))[0] == ExitCode.USAGE


def test_there_and_back(aufs: Path, lower: Path) -> None:
    before = shown(aufs, lower, False)
    assert run(aufs, "aufs", "overlay") == 4
    assert marks(aufs) == OF_OVERLAYFS
    assert diff(before, shown(aufs, lower, True)) == []
    assert run(aufs, "overlay", "aufs") == 4
    assert marks(aufs) == {
        ".wh..wh.aufs", ".wh.gone", "dir/.wh.gone", "covered/.wh..wh..opq", "deep/er/.wh.gone",
    }  # fmt: skip
    assert diff(before, shown(aufs, lower, False)) == []


@pytest.mark.parametrize(("source", "target"), [("aufs", "overlay"), ("overlay", "aufs")])
def test_killed_anywhere_it_goes_on(tmp_path: Path, aufs: Path, lower: Path, source: str, target: str) -> None:
    """Before and after each system call that changes something: the tree is what it was, and another run ends it."""
    if source == "overlay":
        run(aufs, "aufs", "overlay")
    right = shown(aufs, lower, source == "overlay")
    first = tmp_path / "first"
    os.rename(aufs, first)

    def copy() -> Path:
        subprocess.run(["rm", "-rf", aufs], check=True)
        subprocess.run(["cp", "-a", first, aufs], check=True)
        return aufs

    counted = Faults()
    with counted.armed():
        run(copy(), source, target)
    assert counted.count > 10
    for at in range(1, counted.count + 1):
        for after in (False, True):
            top = copy()
            before = descriptors()
            faults = Faults(at, after)
            with faults.armed():
                try:
                    run(top, source, target)
                except Killed:
                    pass
            for fd in descriptors() - before:
                os.close(fd)  # of what was killed
            half = (top / ".wh..wh.over").is_dir()
            now_overlay = half or not (top / ".wh..wh.aufs").exists()
            assert diff(right, shown(top, lower, now_overlay), ignore=("mtime",)) == [], (at, after)
            if half or now_overlay != (target == "overlay"):
                run(top, source, target)
            assert diff(right, shown(top, lower, target == "overlay"), ignore=("mtime",)) == [], (at, after)
            assert not (top / ".wh..wh.over").exists()


def plant(name: str, make: Callable[[Path], object]) -> Callable[[Path], None]:
    return lambda top: (make(top / name), None)[1]


@pytest.mark.parametrize(
    ("prepare", "source", "code", "text"),
    [
        (plant("dir/null", lambda path: os.mknod(path, stat.S_IFCHR, 0)), "aufs", ExitCode.REFUSED, "a device 0/0"),
        (plant(".wh..wh.plnk/1.2.3", lambda path: path.write_text("a")), "aufs", ExitCode.REFUSED, "lower branches"),
        (plant(".wh..wh.udbad", lambda path: path.touch()), "aufs", ExitCode.BRANCH, "was not unmounted cleanly"),
        (lambda top: None, "overlay", ExitCode.BRANCH, "in the notation of aufs already"),
    ],
    ids=["device", "pseudo-link", "dirty", "other"],
)
def test_what_is_refused(aufs: Path, prepare: Callable[[Path], None], source: str, code: ExitCode, text: str) -> None:
    prepare(aufs)
    before = marks(aufs)
    with pytest.raises(UserError, match=text) as raised:
        run(aufs, source, "aufs" if source == "overlay" else "overlay")
    assert raised.value.code is code
    assert marks(aufs) == before


def checked(top: Path, yes: bool) -> tuple[ExitCode, list[str]]:
    lines: list[str] = []
    return run_fsck(os.fsencode(top), lambda defect: yes, lines.append), lines


def test_fsck_finds_marks_of_overlayfs_where_they_mean_nothing(aufs: Path) -> None:
    """A layer of overlayfs that was mounted rw in the notation of aufs."""
    os.mknod(aufs / "dir/kept", stat.S_IFCHR, 0)
    os.setxattr(aufs / "deep", "trusted.overlay.opaque", b"y")
    code, lines = checked(aufs, False)
    assert code is ExitCode.FSCK_DEFECTS
    assert sorted(line.split(":")[0] for line in lines[:-1]) == ["deep/.wh..wh..opq", "dir/kept"]
    assert checked(aufs, True)[0] is ExitCode.OK
    assert {"dir/.wh.kept", "deep/.wh..wh..opq"} <= marks(aufs)
    assert checked(aufs, False)[0] is ExitCode.OK


def test_fsck_of_a_layer_of_overlayfs(aufs: Path) -> None:
    """A clean one, and one that a mount did not leave in order."""
    run(aufs, "aufs", "overlay")
    assert checked(aufs, True)[0] is ExitCode.OK
    assert marks(aufs) == OF_OVERLAYFS
    (aufs / ".wh..wh.over").mkdir(0o700)
    (aufs / "dir/.wh.kept").touch()
    (aufs / "dir/made").mkdir()
    (aufs / "dir/.wh.made").touch()
    assert checked(aufs, False)[0] is ExitCode.FSCK_DEFECTS
    assert checked(aufs, True)[0] is ExitCode.OK
    assert marks(aufs) == {*OF_OVERLAYFS, "dir/kept: device", "dir/made: opaque", ".wh..wh.over"}
