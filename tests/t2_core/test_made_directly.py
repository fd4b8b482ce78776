"""What somebody has made directly under a name that we believe free, or made while we looked: in `none` nobody tells.

The answer may be an error, but never the same one for ever: what was found out is not forgotten.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.helpers.posix import NOREPLACE
from tests.t2_core.core import STRATEGIES, Core, core
from tests.t2_core.test_fs import error_of
from udbad.branch import syscalls
from udbad.branch.branches import Branch
from udbad.branch.policy import parse_create
from udbad.inodes.node import Dir
from udbad.types import ROOT_ID, Trigger
from udbad.union import copydirs, copyup, remove, resolve
from udbad.union.fs import SetAttr
from udbad.union.superblock import NeedCopyUp, Superblock

ROUNDS = 200

modes = pytest.mark.parametrize("udba", list(STRATEGIES))


def chmod(union: Core, node: int) -> None:
    union.run(lambda: union.fs.setattr(node, SetAttr(mode=0o640), None, union.caller))


def create(union: Core, directory: int, name: bytes) -> None:
    """As the kernel does, which keeps what it knows of the way there."""
    handle, _ = union.run(lambda: union.fs.create(directory, name, os.O_RDWR, 0o644, union.caller))
    union.took(handle.node)


@modes
@pytest.mark.parametrize("change", ["create", "chmod", "chmod of the directory"])
def test_a_directory_that_a_copy_up_needs(tmp_path: Path, udba: str, change: str) -> None:
    (tmp_path / "base/d/e").mkdir(parents=True)
    (tmp_path / "base/d/e/f").write_text("f")
    with core(tmp_path, udba=udba) as union:
        assert union.names("d") == ["e"]
        directory, file = union.find("d/e").id, union.find("d/e/f").id
        (union["top"] / "d/e").mkdir(parents=True)
        (union["top"] / "d/e/direct").touch()
        if change == "create":
            create(union, directory, b"new")
        else:
            chmod(union, file if change == "chmod" else directory)
        assert (union["top"] / "d/e/direct").exists()
        assert {"f", "direct"} <= set(union.names("d/e"))
        assert union.find("d/e").id == directory


@modes
@pytest.mark.parametrize("below", ["d", "d/e"])
def test_a_branch_in_between_that_has_something_else_of_that_name(tmp_path: Path, udba: str, below: str) -> None:
    """It is not shown, as a branch above has a directory of that name, and nothing can be made below it."""
    (tmp_path / "top/d").mkdir(parents=True)
    (tmp_path / "mid").mkdir()
    (tmp_path / "base/d/e/s").mkdir(parents=True)
    for name in ("f", "g", "h"):
        (tmp_path / "base/d/e" / name).write_text(name)
    if below == "d":
        (tmp_path / "mid/d").write_text("a file")
    else:
        (tmp_path / "mid/d").mkdir()
        (tmp_path / "top/d/e").mkdir()
        (tmp_path / "mid/d/e").write_text("a file")
    with core(tmp_path, {"top": "rw", "mid": "rw", "base": "ro"}, udba=udba) as union:
        directory = union.find("d/e").id
        union.run(lambda: union.fs.mkdir(directory, b"new", 0o755, union.caller))
        create(union, directory, b"made")
        chmod(union, union.find("d/e/f").id)
        union.unlink("d/e/g")
        union.run(lambda: union.fs.rename(directory, b"h", directory, b"i", 0))
        (union["mid"] / "x").write_text("x")
        assert union.names("") == ["d", "x"]
        file = union.find("x").id
        assert error_of(lambda: union.run(lambda: union.fs.rename(ROOT_ID, b"x", directory, b"x", 0))) == "EXDEV"
        assert error_of(lambda: union.run(lambda: union.fs.link(file, directory, b"x"))) == "EXDEV"
        assert set(union.names("d/e")) == {"f", "i", "made", "new", "s"}
        assert (union["top"] / "d/e/f").read_text() == "f"
        assert (union["mid"] / below).read_text() == "a file"


@modes
def test_something_else_where_a_copy_up_needs_a_directory(tmp_path: Path, udba: str) -> None:
    (tmp_path / "base/d").mkdir(parents=True)
    with core(tmp_path, udba=udba) as union:
        directory = union.find("d").id
        (union["top"] / "d").write_text("a file")
        assert error_of(lambda: union.fs.create(directory, b"new", os.O_RDWR, 0o644, union.caller)) in (
            "ESTALE",
            "EEXIST",
        )
        assert union.content("d") == b"a file"


@modes
@pytest.mark.parametrize("fails", ["udbad.branch.whiteout.remove", "udbad.union.copydirs.restore_times"])
def test_what_fails_after_a_directory_has_its_name(
    tmp_path: Path, udba: str, fails: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "top/d").mkdir(parents=True)
    (tmp_path / "mid").mkdir()
    (tmp_path / "mid/.wh.d").touch()
    (tmp_path / "base/d/hidden").mkdir(parents=True)

    def fail(*words: object) -> None:
        raise PermissionError(1, "")

    with core(tmp_path, {"top": "ro", "mid": "rw", "base": "ro"}, udba, create=parse_create("rr")) as union:
        directory = union.find("d").id
        with monkeypatch.context() as patch:
            patch.setattr(fails, fail)
            assert error_of(lambda: create(union, directory, b"new")) == "EPERM"
        assert (union["mid"] / "d").is_dir()
        create(union, directory, b"new")
        assert union.names("d") == ["new"]


@modes
@pytest.mark.parametrize("kind", ["file", "symlink"])
def test_the_name_of_what_is_to_be_copied_up(tmp_path: Path, udba: str, kind: str) -> None:
    (tmp_path / "base").mkdir()
    if kind == "file":
        (tmp_path / "base/f").write_text("lower")
    else:
        (tmp_path / "base/f").symlink_to("lower")
    with core(tmp_path, udba=udba) as union:
        node = union.find("f")
        union.names()
        (union["top"] / "f").write_text("direct")
        change = SetAttr(uid=1234)
        assert error_of(lambda: union.run(lambda: union.fs.setattr(node.id, change, None, union.caller))) == "ESTALE"
        assert union.content("f") == b"direct", "which the kernel finds when it looks again"
        assert union.find("f").id != node.id
        union.run(lambda: union.fs.setattr(union.find("f").id, change, None, union.caller))
        assert (union["top"] / "f").stat().st_uid == 1234


@modes
def test_the_name_while_the_bytes_travel(tmp_path: Path, udba: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base/f").write_text("lower")
    check = copyup._check_unmoved
    with core(tmp_path, udba=udba) as union:
        union.names()
        union.find("f")

        def late(*words: object) -> None:
            check(*words)  # type: ignore[arg-type]  # handed on as they came
            (union["top"] / "f").write_text("direct")

        with monkeypatch.context() as patch:
            patch.setattr(copyup, "_check_unmoved", late)
            assert error_of(lambda: chmod(union, union.find("f").id)) == "ESTALE"
        assert union.content("f") == b"direct"
        assert [path.name for path in union["top"].iterdir() if not path.name.startswith(".wh")] == ["f"]


@modes
def test_the_new_name_of_a_link(tmp_path: Path, udba: str) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base/f").write_text("lower")
    with core(tmp_path, udba=udba) as union:
        assert union.names() == ["f"]
        (union["top"] / "g").write_text("direct")
        assert error_of(lambda: union.link("f", "g")) == "EEXIST"
        assert union.content("g") == b"direct"
        assert sorted(union.names()) == ["f", "g"]


@modes
def test_the_new_name_of_a_rename(tmp_path: Path, udba: str) -> None:
    with core(tmp_path, {"top": "rw"}, udba=udba) as union:
        union.create("f", b"content")
        union.mkdir("d")
        assert sorted(union.names()) == ["d", "f"]
        (union["top"] / "g").write_text("direct")
        assert error_of(lambda: union.rename("f", "g", NOREPLACE)) == "EEXIST"
        assert (union.content("f"), union.content("g")) == (b"content", b"direct")
        (union["top"] / "full/x").mkdir(parents=True)
        assert error_of(lambda: union.rename("d", "full")) in ("ENOTEMPTY", "EEXIST")
        assert union.names("full") == ["x"]
        assert sorted(union.names()) == ["d", "f", "full", "g"]


def test_a_directory_that_vanishes_while_it_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The search begins again where it began: below a branch, if that was asked."""
    for branch in ("top", "base"):
        (tmp_path / branch / "d").mkdir(parents=True)
    opened = syscalls.open_dir_at
    with core(tmp_path, udba="reval") as union:

        def too_late(dirfd: int, name: bytes) -> int:
            (union["base"] / "d").rmdir()
            return opened(dirfd, name)

        with monkeypatch.context() as patch:
            patch.setattr(syscalls, "open_dir_at", too_late)
            assert resolve.resolve(union.sb, union.sb.root, b"d", below=0).answer is resolve.Answer.NEGATIVE


def test_a_name_that_never_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "top/d").mkdir(parents=True)
    asked = 0

    def too_late(dirfd: int, name: bytes) -> int:
        nonlocal asked
        asked += 1
        raise FileNotFoundError

    with core(tmp_path, udba="reval") as union, monkeypatch.context() as patch:
        patch.setattr(syscalls, "open_dir_at", too_late)
        assert error_of(lambda: resolve.resolve(union.sb, union.sb.root, b"d")) == "ESTALE"
        assert 1 < asked < 100


@modes
@pytest.mark.parametrize(("opened", "expected"), [(False, "ESTALE"), (True, "ENOENT")])
def test_a_link_to_what_was_replaced_directly(tmp_path: Path, udba: str, opened: bool, expected: str) -> None:
    """The path leads to what is there now: after ESTALE the kernel walks it once more (do_linkat). An open file has no
    name any more, which is ENOENT (vfs_link)."""
    (tmp_path / "top").mkdir()
    (tmp_path / "top/f").write_text("old")
    (tmp_path / "top/new").write_text("new")
    with core(tmp_path, udba=udba) as union:
        old = union.open("f").node if opened else union.find("f")
        (tmp_path / "top/new").rename(tmp_path / "top/f")
        if udba == "none":
            union.sb.root.doubt(b"f")
        new = union.find("f")
        assert new.id != old.id
        assert error_of(lambda: union.run(lambda: union.fs.link(old.id, ROOT_ID, b"link"))) == expected
        union.run(lambda: union.fs.link(new.id, ROOT_ID, b"link"))
        assert union.content("link") == b"new"


@pytest.fixture
def tmpfs(tmp_path: Path) -> Iterator[Path]:
    subprocess.run(["mount", "-t", "tmpfs", "none", str(tmp_path)], check=True)
    try:
        yield tmp_path
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


@pytest.mark.fuse  # as root, to mount
def test_names_that_come_and_go_within_a_tick_on_tmpfs(tmpfs: Path) -> None:
    """shmem_link() and shmem_unlink() give the directory the time of the file, not a new one of its own: two of them
    within a tick leave times, size and link count of the directory as they were."""
    with core(tmpfs, {"top": "rw", "base": "ro"}, "reval") as union:
        directory = tmpfs / "base" / "d"
        directory.mkdir()
        for number in range(ROUNDS):
            (directory / f"old{number}").touch()
            (tmpfs / "base" / f"file{number}").touch()
        node = union.find("d")
        for number in range(ROUNDS):
            new = b"new%d" % number
            assert union.fs.lookup(node.id, new) is None
            os.unlink(directory / f"old{number}")
            os.link(tmpfs / "base" / f"file{number}", directory / os.fsdecode(new))
            assert union.fs.lookup(node.id, new) is not None, number


@modes
@pytest.mark.parametrize("length", [0, None], ids=["truncated", "whole"])
def test_a_directory_that_a_copy_up_needs_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, udba: str, length: int | None
) -> None:
    """After it was looked at, so that its descriptor is that of a removed one, where no file can be made: ENOENT."""
    for branch in ("base", "top"):
        (tmp_path / branch / "d").mkdir(parents=True)
    (tmp_path / "base/d/f").write_text("f")
    with core(tmp_path, udba=udba) as union:
        need = NeedCopyUp(union.find("d/f"), Trigger.TRUNCATE, length)
        original = copydirs.ensure_dir

        def ensure_dir(sb: Superblock, node: Dir, branch: Branch) -> int:
            fd = original(sb, node, branch)
            (union["top"] / "d").rmdir()
            return fd

        monkeypatch.setattr(copydirs, "ensure_dir", ensure_dir)
        assert error_of(lambda: copyup.run(union.sb, need)) == "ENOENT"
        assert not (union["top"] / "d").exists()


@pytest.mark.parametrize("taken", ["", "directory", "file"])
@modes
def test_what_is_put_into_a_directory_while_it_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expect_log: Callable[[str], None], udba: str, taken: str
) -> None:
    """By whoever had come there before it went out of sight. It stays visible, also where somebody else has the name
    by now."""
    (tmp_path / "base/d").mkdir(parents=True)
    (tmp_path / "base/d/f").write_text("f")
    with core(tmp_path, udba=udba) as union:
        union.unlink("d/f")
        directory = os.open(union["top"] / "d", os.O_PATH)
        original = remove.count_marks

        def count_marks(branch: Branch, dirfd: int, name: bytes) -> int:
            os.close(os.open("direct", os.O_CREAT | os.O_WRONLY, dir_fd=directory))
            if taken == "directory":
                (union["top"] / "d").mkdir()
                (union["top"] / "d/other").touch()
            elif taken:
                (union["top"] / "d").touch()
            return original(branch, dirfd, name)

        monkeypatch.setattr(remove, "count_marks", count_marks)
        try:
            assert error_of(lambda: union.rmdir("d")) == "ENOTEMPTY"
        finally:
            os.close(directory)
        names = {path.name for path in union["top"].iterdir()}
        if not taken:
            assert (union["top"] / "d/direct").exists()
            return
        expect_log("something was put into b'd' while it was removed")
        beside = [name for name in names if name.startswith("d.")]
        assert len(beside) == 1
        assert (union["top"] / beside[0] / "direct").exists()
        assert (union["top"] / "d").exists()
