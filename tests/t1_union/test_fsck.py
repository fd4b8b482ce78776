"""fsck of a branch: each defect is made, found, repaired, and nothing else changes."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from udbad.branch import dirtymark, spec, sweep, syscalls
from udbad.branch.accept import open_branches
from udbad.branch.branches import BranchSpec
from udbad.errors import ExitCode, UserError
from udbad.tools import fsck
from udbad.tools.fsck import Defect, DefectKind
from udbad.types import Perm

Record = tuple[object, ...]
Snapshot = dict[bytes, Record]

OLD_NS = 1_000_000_000_123_456_789
"""A time in the past that every object is given, so that any write shows."""


def record(path: bytes) -> Record:
    st = os.lstat(path)
    if stat.S_ISREG(st.st_mode):
        data: object = Path(os.fsdecode(path)).read_bytes()
    else:
        data = os.readlink(path) if stat.S_ISLNK(st.st_mode) else None
    return (st.st_ino, st.st_mode, st.st_uid, st.st_gid, st.st_rdev, st.st_mtime_ns, data)


def snapshot(root: Path) -> Snapshot:
    """Everything in the branch, the root included: path -> identity, attributes, mtime, content."""
    found = {b"": record(os.fsencode(root))}
    for directory, directories, files in os.walk(os.fsencode(root)):
        for name in directories + files:
            path = os.path.join(directory, name)
            found[os.path.relpath(path, os.fsencode(root))] = record(path)
    return found


def age(root: Path) -> None:
    """Give everything the old time, children first."""
    for directory, directories, files in os.walk(os.fsencode(root), topdown=False):
        for name in directories + files:
            os.utime(os.path.join(directory, name), ns=(OLD_NS, OLD_NS), follow_symlinks=False)
    os.utime(root, ns=(OLD_NS, OLD_NS))


@pytest.fixture
def branch(tmp_path: Path) -> Path:
    """A healthy branch with everything that fsck must leave alone."""
    root = tmp_path / "branch"
    (root / "dir" / "sub").mkdir(parents=True)
    (root / "dir" / "file").write_text("content")
    (root / "dir" / "link").symlink_to("file")
    (root / "dir" / "sub" / ".wh.gone").touch(0o444)
    (root / "dir" / "sub" / ".wh..wh..opq").touch(0o444)
    (root / ".wh..wh.aufs").touch(0o444)
    os.link(root / ".wh..wh.aufs", root / ".wh.hidden")
    (root / ".wh..wh.plnk").mkdir(0o700)
    (root / ".wh..wh.orph").mkdir(0o700)
    (root / ".wh..wh.hino").touch()
    (root / ".wh.").touch()  # the bare prefix is an ordinary name
    (root / "name.beef").touch()
    (root / ".wh.name.dead").touch()  # a whiteout, no temporary
    (root / ".wh..wh.short.abc").touch()  # three digits
    (root / ".wh..wh.long.0123456789a").touch()  # eleven
    (root / ".wh..wh.word.wxyz").touch()  # no hexadecimal digits
    (root / os.fsdecode(b"bytes \xff\n")).touch()
    os.mkfifo(root / "fifo")
    return root


@pytest.fixture
def root_fd(branch: Path) -> Iterator[int]:
    fd = os.open(branch, os.O_PATH | os.O_DIRECTORY)
    yield fd
    os.close(fd)


def never(defect: Defect) -> bool:
    raise AssertionError(f"asked about {defect}")


def yes(_defect: Defect) -> bool:
    return True


def no(_defect: Defect) -> bool:
    return False


def ignore(_line: str) -> None:
    pass


def find(root: Path) -> list[tuple[DefectKind, bytes]]:
    fd = os.open(root, os.O_PATH | os.O_DIRECTORY)
    try:
        return sorted(((d.kind, d.path) for d in fsck.find_defects(fd)), key=lambda item: item[1])
    finally:
        os.close(fd)


def test_a_healthy_branch_is_clean_and_untouched(branch: Path) -> None:
    age(branch)
    before = snapshot(branch)
    lines: list[str] = []
    assert fsck.run_fsck(os.fsencode(branch), never, lines.append) is ExitCode.OK
    assert lines == [f"{branch}: clean"]
    assert snapshot(branch) == before


# -- one defect each ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """make: puts the defect into a healthy branch. path: where it is found."""

    kind: DefectKind
    path: bytes
    make: Callable[[Path], object]


def _tree(root: Path) -> None:
    """A directory that a removed directory left: whiteouts, files, an outside symlink, subdirectories."""
    (root / "a" / "b" / "c").mkdir(parents=True)
    (root / "a" / "1").mkdir()
    (root / "0").mkdir()  # the names the removal itself uses
    (root / "1").write_text("")
    (root / "a" / "b" / ".wh.x").touch()
    (root / "a" / "b" / "c" / "file").write_text("data")
    (root / "a" / "out").symlink_to("/")
    os.mkfifo(root / "a" / "b" / "fifo")


def _replace(path: Path, make: Callable[[Path], object]) -> None:
    path.rmdir() if path.is_dir() else path.unlink()
    make(path)


def _whited_symlink(root: Path) -> None:
    (root / "dangling").symlink_to("nowhere")
    (root / ".wh.dangling").touch()


def _plink_shared(root: Path) -> None:
    os.link(root / "dir" / "file", root / ".wh..wh.plnk" / "12.345")
    os.link(root / "dir" / "file", root / "dir" / "sub" / "second")


CASES = {
    "whiteout beside a file": Case(
        DefectKind.WHITEOUT_PAIR, b"dir/.wh.file", lambda r: (r / "dir" / ".wh.file").touch()
    ),
    "whiteout beside a directory": Case(DefectKind.WHITEOUT_PAIR, b".wh.dir", lambda r: (r / ".wh.dir").touch()),
    "whiteout beside a dangling symlink": Case(
        DefectKind.WHITEOUT_PAIR,
        b".wh.dangling",
        _whited_symlink,
    ),
    "whiteout is a directory": Case(DefectKind.BAD_WHITEOUT, b"dir/.wh.d", lambda r: _tree(r / "dir" / ".wh.d")),
    "whiteout is a symlink": Case(
        DefectKind.BAD_WHITEOUT, b"dir/.wh.l", lambda r: (r / "dir" / ".wh.l").symlink_to("file")
    ),
    "whiteout is a fifo beside its name": Case(
        DefectKind.BAD_WHITEOUT, b"dir/.wh.file", lambda r: os.mkfifo(r / "dir" / ".wh.file")
    ),
    "opaque mark is a directory": Case(
        DefectKind.BAD_WHITEOUT, b"dir/.wh..wh..opq", lambda r: (r / "dir" / ".wh..wh..opq").mkdir()
    ),
    "base is a directory": Case(
        DefectKind.BAD_BASE, b".wh..wh.aufs", lambda r: _replace(r / ".wh..wh.aufs", lambda p: p.mkdir())
    ),
    "base is a symlink": Case(
        DefectKind.BAD_BASE, b".wh..wh.aufs", lambda r: _replace(r / ".wh..wh.aufs", lambda p: p.symlink_to("dir/file"))
    ),
    "plink directory is a file": Case(
        DefectKind.BAD_BASE, b".wh..wh.plnk", lambda r: _replace(r / ".wh..wh.plnk", lambda p: p.touch())
    ),
    "orphan directory is a symlink": Case(
        DefectKind.BAD_BASE, b".wh..wh.orph", lambda r: _replace(r / ".wh..wh.orph", lambda p: p.symlink_to("dir"))
    ),
    "among the pseudo-links, without another name, and none itself": Case(
        DefectKind.PLINK_LEFTOVER, b".wh..wh.plnk/12.x", lambda r: (r / ".wh..wh.plnk" / "12.x").write_text("x")
    ),
    "directory among the pseudo-links": Case(
        DefectKind.PLINK_LEFTOVER, b".wh..wh.plnk/odd", lambda r: _tree(r / ".wh..wh.plnk" / "odd")
    ),
    "orphaned file": Case(
        DefectKind.ORPHAN, b".wh..wh.orph/77", lambda r: (r / ".wh..wh.orph" / "77").write_text("deleted")
    ),
    "orphaned directory": Case(DefectKind.ORPHAN, b".wh..wh.orph/d", lambda r: _tree(r / ".wh..wh.orph" / "d")),
    "temporary file": Case(
        DefectKind.TEMPORARY, b"dir/.wh..wh.file.0aF9", lambda r: (r / "dir" / ".wh..wh.file.0aF9").write_text("half")
    ),
    "temporary among the pseudo-links": Case(
        DefectKind.TEMPORARY,
        b".wh..wh.plnk/.wh..wh.plink.0123456789ab",
        lambda r: (r / ".wh..wh.plnk" / ".wh..wh.plink.0123456789ab").write_text("half"),
    ),
    "temporary tree": Case(
        DefectKind.TEMPORARY, b"dir/sub/.wh..wh.d.beef", lambda r: _tree(r / "dir" / "sub" / ".wh..wh.d.beef")
    ),
    "temporary of ours": Case(
        DefectKind.TEMPORARY,
        b"dir/.wh..wh.file.0123456789ab",
        lambda r: (r / "dir" / ".wh..wh.file.0123456789ab").write_text("half"),
    ),
    "temporary with a newline and the longest name": Case(
        DefectKind.TEMPORARY,
        b".wh..wh." + b"n\n" * 121 + b".0000",
        lambda r: (r / (".wh..wh." + "n\n" * 121 + ".0000")).touch(),
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_each_defect_is_found_and_repaired_and_nothing_else_changes(branch: Path, case: Case) -> None:
    case.make(branch)
    age(branch)
    before = snapshot(branch)
    assert find(branch) == [(case.kind, case.path)]

    lines: list[str] = []
    assert fsck.run_fsck(os.fsencode(branch), no, lines.append) is ExitCode.FSCK_DEFECTS
    assert lines[0].startswith(spec.printable(case.path))
    assert lines[-1] == f"{branch}: 1 defects, 0 repaired"
    assert snapshot(branch) == before

    assert fsck.run_fsck(os.fsencode(branch), yes, ignore) is ExitCode.OK
    doomed = {path for path in before if path == case.path or path.startswith(case.path + b"/")}
    assert doomed
    assert snapshot(branch) == {path: what for path, what in before.items() if path not in doomed}
    assert fsck.run_fsck(os.fsencode(branch), never, ignore) is ExitCode.OK


def test_every_defect_at_once_each_is_asked_for(branch: Path) -> None:
    (branch / "dir" / ".wh.file").touch()
    (branch / ".wh.odd").symlink_to("dir")
    (branch / ".wh..wh.plnk" / "1.odd").touch()
    (branch / ".wh..wh.orph" / "3").touch()
    (branch / "dir" / ".wh..wh.t.1234").touch()
    asked: list[DefectKind] = []

    def only_orphans(defect: Defect) -> bool:
        asked.append(defect.kind)
        return defect.kind is DefectKind.ORPHAN

    assert fsck.run_fsck(os.fsencode(branch), only_orphans, ignore) is ExitCode.FSCK_DEFECTS
    assert sorted(kind.name for kind in asked) == [
        "BAD_WHITEOUT",
        "ORPHAN",
        "PLINK_LEFTOVER",
        "TEMPORARY",
        "WHITEOUT_PAIR",
    ]
    assert not (branch / ".wh..wh.orph" / "3").exists()
    assert len(find(branch)) == 4


def test_a_shared_pseudo_link_names_the_other_names(branch: Path, root_fd: int) -> None:
    _plink_shared(branch)
    age(branch)
    before = snapshot(branch)
    (defect,) = fsck.find_defects(root_fd)
    assert (defect.kind, defect.path) == (DefectKind.PLINK_SHARED, b".wh..wh.plnk/12.345")
    assert defect.detail.startswith("3 links")
    assert "dir/file" in defect.detail
    assert "dir/sub/second" in defect.detail
    lines: list[str] = []
    assert fsck.run_fsck(os.fsencode(branch), never, lines.append) is ExitCode.OK
    assert lines == [str(defect), f"{branch}: clean"]
    with pytest.raises(ValueError, match="no remedy"):
        fsck.repair(root_fd, defect)
    assert snapshot(branch) == before


def test_pseudo_links_that_are_each_others_only_names_are_kept(branch: Path) -> None:
    plinks = branch / ".wh..wh.plnk"
    (plinks / "1.9").write_text("precious")
    os.link(plinks / "1.9", plinks / "2.9")
    lines: list[str] = []
    assert fsck.run_fsck(os.fsencode(branch), yes, lines.append) is ExitCode.OK
    assert all("not found in the branch" in line for line in lines[:2])
    assert len(list(plinks.iterdir())) == 2


@pytest.fixture
def lower(tmp_path: Path) -> Path:
    """A branch below, with a file of two names that is not the one with the name `else`."""
    root = tmp_path / "lower"
    (root / "dir").mkdir(parents=True)
    (root / "dir" / "one").write_text("old")
    os.link(root / "dir" / "one", root / "two")
    (root / "else").write_text("old")
    return root


def home(branch: Path, source: Path, life: str = "") -> Path:
    """The only name of what was copied up from `source`; life: "" its own, else what its name says, if anything."""
    st = source.stat()
    fd = os.open(source, os.O_PATH)
    birth = syscalls.birth_ns(fd, b"", st.st_ino)
    os.close(fd)
    assert birth
    path = branch / ".wh..wh.plnk" / (f"{st.st_ino}.{st.st_ino}" + (life or f".{birth}").removesuffix("-"))
    path.write_text("precious")
    return path


def test_a_pseudo_link_alone_is_told_and_kept(branch: Path, lower: Path) -> None:
    """What lies in other branches may show its data: one branch alone does not tell (semantics 10.3)."""
    alone = home(branch, lower / "two")
    age(branch)
    before = snapshot(branch)
    assert find(branch) == [(DefectKind.PLINK_ALONE, b".wh..wh.plnk/" + os.fsencode(alone.name))]
    lines: list[str] = []
    assert fsck.run_fsck(os.fsencode(branch), never, lines.append) is ExitCode.OK
    assert "8 bytes, shown by names on lower branches, if there are any" in lines[0]
    assert snapshot(branch) == before


SHOWN = "two names", "one name whited out", "earlier version", "changed since", "from a branch between"


@pytest.mark.parametrize("case", SHOWN)
def test_a_pseudo_link_that_a_lower_branch_shows_is_kept(branch: Path, lower: Path, tmp_path: Path, case: str) -> None:
    between = tmp_path / "between"
    (between / ".wh..wh.plnk").mkdir(parents=True)
    match case:
        case "two names" | "one name whited out":
            alone = home(branch, lower / "two")
            if case == "one name whited out":
                (branch / ".wh.two").touch()
        case "earlier version":
            alone = home(branch, lower / "two", "-")
        case "changed since":
            alone = home(branch, lower / "two", ".5-3")
        case _:  # whose own home, without a name there either, it was copied from
            alone = home(branch, home(between, lower / "two"))
    lines: list[str] = []
    lowers = [os.fsencode(between), os.fsencode(lower)]
    assert fsck.run_fsck(os.fsencode(branch), never, lines.append, lowers) is ExitCode.OK
    assert "of a lower branch" in lines[0]
    assert alone.read_text() == "precious"


def test_a_lower_branch_that_cannot_be_read_shows_everything(
    branch: Path, lower: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = home(branch, lower / "two", ".1234567890123456789")
    real_open = os.open

    def refusing(path: object, *args: int, dir_fd: int | None = None) -> int:
        if path == b"dir" and os.path.samestat(os.stat(b"dir", dir_fd=dir_fd), (lower / "dir").stat()):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real_open(path, *args, dir_fd=dir_fd)  # type: ignore[arg-type]  # as it was called

    monkeypatch.setattr(os, "open", refusing)
    lines: list[str] = []
    assert fsck.run_fsck(os.fsencode(branch), never, lines.append, [os.fsencode(lower)]) is ExitCode.OK
    assert f"perhaps: dir of a lower branch: {os.strerror(errno.EIO)}" in lines[0]
    assert alone.exists()


GONE = "another life of the number", "all names hidden", "all names covered", "below an opaque directory", "no number"


@pytest.mark.parametrize("case", GONE)
def test_a_pseudo_link_that_no_lower_branch_shows_is_a_leftover(branch: Path, lower: Path, case: str) -> None:
    alone = home(branch, lower / "two", ".1234567890123456789" if case == "another life of the number" else "")
    match case:
        case "all names hidden":
            (branch / ".wh.two").touch()
            (branch / "dir" / ".wh.one").touch()
        case "all names covered":
            (branch / "two").touch()
            (branch / "dir" / "one").mkdir()
        case "below an opaque directory":
            (branch / ".wh.two").touch()
            (branch / "dir" / ".wh..wh..opq").touch()
        case "no number":
            alone = alone.rename(alone.with_name(f"1.{(1 << 60) + 7}.1234567890123456789"))
    lines: list[str] = []
    assert fsck.run_fsck(os.fsencode(branch), yes, lines.append, [os.fsencode(lower)]) is ExitCode.OK
    assert "lost with it" in lines[0]
    assert not alone.exists()


def test_a_pseudo_link_that_got_another_name_is_not_removed(branch: Path, root_fd: int) -> None:
    (branch / ".wh..wh.plnk" / "1.9").touch()
    (defect,) = fsck.find_defects(root_fd, [root_fd])
    os.link(branch / ".wh..wh.plnk" / "1.9", branch / "new")
    fsck.repair(root_fd, defect)
    assert (branch / ".wh..wh.plnk" / "1.9").exists()


# -- what repair refuses ------------------------------------------------------------------------


def test_repair_looks_again(branch: Path, root_fd: int) -> None:
    """Between question and answer the name beside the whiteout went away: the whiteout counts again."""
    (branch / "dir" / ".wh.file").touch()
    (branch / "dir" / "sub" / ".wh.bad").mkdir()
    defects = list(fsck.find_defects(root_fd))
    (branch / "dir" / "file").unlink()
    (branch / "dir" / "sub" / ".wh.bad").rmdir()
    (branch / "dir" / "sub" / ".wh.bad").touch()
    assert len(defects) == 2
    for defect in defects:
        fsck.repair(root_fd, defect)
    assert (branch / "dir" / ".wh.file").exists()
    assert (branch / "dir" / "sub" / ".wh.bad").is_file()


def test_repair_of_what_is_gone_is_done(branch: Path, root_fd: int) -> None:
    (branch / "dir" / "sub" / ".wh..wh.t.1234").touch()
    (defect,) = fsck.find_defects(root_fd)
    fsck.repair(root_fd, defect)
    fsck.repair(root_fd, defect)
    shutil.rmtree(branch / "dir")
    fsck.repair(root_fd, defect)
    assert list(fsck.find_defects(root_fd)) == []


def test_repair_follows_no_symlink(branch: Path, root_fd: int, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / ".wh..wh.t.1234").write_text("not ours")
    (branch / "dir" / "sub" / ".wh..wh.t.1234").touch()
    (defect,) = fsck.find_defects(root_fd)
    shutil.rmtree(branch / "dir" / "sub")
    (branch / "dir" / "sub").symlink_to(outside)
    fsck.repair(root_fd, defect)
    assert list(fsck.find_defects(root_fd)) == []
    assert sweep.sweep_temporaries(root_fd) == 0
    assert (outside / ".wh..wh.t.1234").read_text() == "not ours"


def test_a_directory_that_cannot_be_read_is_reported(
    branch: Path, root_fd: int, monkeypatch: pytest.MonkeyPatch, expect_log: Callable[[str], None]
) -> None:
    """Root may read everything, so the error of a failing disk is injected into open(2)."""
    (branch / "dir" / "sub" / ".wh..wh.t.1234").touch()
    (branch / "name.beef").unlink()
    real_open = os.open

    def failing(path: bytes, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        if path == b"sub":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real_open(path, flags, mode, dir_fd=dir_fd)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", failing)
        (defect,) = fsck.find_defects(root_fd)
        expect_log(f"sweep: dir/sub: {os.strerror(errno.EIO)}")
        assert sweep.sweep_temporaries(root_fd) == 0
        assert fsck.run_fsck(os.fsencode(branch), never, ignore) is ExitCode.FSCK_DEFECTS
    assert (defect.kind, defect.path) == (DefectKind.UNREADABLE, b"dir/sub")
    with pytest.raises(ValueError, match="no remedy"):
        fsck.repair(root_fd, defect)


def test_a_repair_that_fails_is_reported(branch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (branch / "dir" / ".wh..wh.t.1234").touch()

    def refuse(dirfd: int, name: bytes) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(syscalls, "unlink_at", refuse)
    lines: list[str] = []
    assert fsck.run_fsck(os.fsencode(branch), yes, lines.append) is ExitCode.FSCK_DEFECTS
    assert f"dir/.wh..wh.t.1234: not repaired: {os.strerror(errno.EROFS)}" in lines


# -- the command's input and output -------------------------------------------------------------


@pytest.mark.parametrize("what", ["missing", "file", "missing/below", "file/below", "n" * 5000])
def test_a_bad_path_is_named(tmp_path: Path, what: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError) as caught:
        fsck.run_fsck(os.fsencode(tmp_path / what), never, ignore)
    assert caught.value.code is ExitCode.BRANCH
    assert caught.value.message.startswith(str(tmp_path / what))


def test_without_the_privilege_it_says_so(branch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: bytes) -> int:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(syscalls, "clone_mount", refuse)
    with pytest.raises(UserError) as caught:
        fsck.run_fsck(os.fsencode(branch), never, ignore)
    assert caught.value.code is ExitCode.NOT_ROOT


def test_names_cannot_write_to_the_terminal() -> None:
    assert spec.printable(b"a\x1b[31m\n\xffb/\xc3\xa4") == "a\\x1b[31m\\n\\xffb/ä"


def test_what_is_mounted_below_the_branch_is_not_part_of_it(tmp_path: Path) -> None:
    """In a mount namespace of its own, so that a failing test leaves no mount behind."""
    (tmp_path / "branch" / "mounted").mkdir(parents=True)
    script = """
import os, sys
from udbad.tools import fsck
from udbad.branch import walk
branch = os.fsencode(sys.argv[1])
open(branch + b"/mounted/.wh..wh.t.1234", "w").close()
sys.exit(fsck.run_fsck(branch, lambda defect: True, print) or not os.path.exists(branch + b"/mounted/.wh..wh.t.1234"))
"""
    shell = 'mount -t tmpfs none "$0/mounted" && exec "$1" -c "$2" "$0"'
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", shell, tmp_path / "branch", sys.executable, script],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert (done.returncode, done.stdout) == (0, f"{tmp_path}/branch: clean\n"), done.stderr


# -- depth --------------------------------------------------------------------------------------

LEVELS = 3000


def _make_deep(root: Path, name: bytes) -> None:
    """A chain of directories far beyond PATH_MAX, some with a second child, few of these with a defect."""
    fd = os.open(root, os.O_PATH)
    for level in range(LEVELS):
        os.mkdir(name, dir_fd=fd)
        if level % 5 == 0:
            # Wherever this one is visited after the chain, the walk has to come back to its level.
            os.mkdir(b"side", dir_fd=fd)
            if level % 1000 == 500:
                os.close(os.open(b"side/.wh..wh.t.1234", os.O_CREAT | os.O_WRONLY, dir_fd=fd))
        child = os.open(name, os.O_PATH, dir_fd=fd)
        os.close(fd)
        fd = child
    os.close(os.open(b".wh..wh.bottom.abcd", os.O_CREAT | os.O_WRONLY, dir_fd=fd))
    os.close(fd)


@pytest.fixture
def deep_root(tmp_path: Path) -> Iterator[Path]:
    """A directory that is removed by rm(1) afterwards: shutil.rmtree recurses and would fail."""
    root = tmp_path / "deep"
    root.mkdir()
    yield root
    subprocess.run(["rm", "-rf", root], check=True, timeout=120)


@pytest.fixture
def few_descriptors() -> Iterator[None]:
    """At most 200 more descriptors than are open now."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(name) for name in os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 200, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.usefixtures("few_descriptors")
def test_depth_is_not_limited(deep_root: Path) -> None:
    _make_deep(deep_root, b"ten-bytes-")
    before = len(os.listdir("/proc/self/fd"))
    found = find(deep_root)
    assert [kind for kind, _ in found] == [DefectKind.TEMPORARY] * 4
    assert sorted(path.count(b"/") for _, path in found) == [501, 1501, 2501, 3000]
    assert max(len(path) for _, path in found) > 30000
    assert fsck.run_fsck(os.fsencode(deep_root), yes, ignore) is ExitCode.OK
    assert find(deep_root) == []
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.usefixtures("few_descriptors")
def test_a_deep_temporary_tree_is_removed(deep_root: Path) -> None:
    temporary = deep_root / ".wh..wh.deep.0001"
    temporary.mkdir()
    _make_deep(temporary, b"ten-bytes-")
    fd = os.open(deep_root, os.O_PATH)
    try:
        assert sweep.sweep_temporaries(fd) == 1
    finally:
        os.close(fd)
    assert list(deep_root.iterdir()) == []


def test_a_walk_that_is_given_up_closes_everything(branch: Path, root_fd: int) -> None:
    (branch / "dir" / "sub" / ".wh..wh.t.1234").touch()
    before = len(os.listdir("/proc/self/fd"))
    defects = fsck.find_defects(root_fd)
    assert next(defects).kind is DefectKind.TEMPORARY
    defects.close()
    assert len(os.listdir("/proc/self/fd")) == before


# -- what a mount does --------------------------------------------------------------------------


def test_sweep_removes_temporaries_and_orphans_only(branch: Path, root_fd: int) -> None:
    (branch / "dir" / ".wh.file").touch()
    (branch / ".wh..wh.plnk" / "1.2").touch()
    _tree(branch / "dir" / "sub" / "stays")
    age(branch)
    before = snapshot(branch)
    (branch / ".wh..wh.t.1234").touch()
    (branch / "dir" / "sub" / ".wh..wh.t.cdef").symlink_to("/")
    _tree(branch / "dir" / "sub" / "stays" / "a" / ".wh..wh.t.0000")
    (branch / ".wh..wh.orph" / "5").touch()
    (branch / ".wh..wh.plnk" / ".wh..wh.plink.0123456789ab").touch()
    _tree(branch / ".wh..wh.orph" / "6")
    age(branch)
    assert sweep.sweep_temporaries(root_fd) == 6
    assert snapshot(branch) == before
    assert sweep.sweep_temporaries(root_fd) == 0


def test_sweep_goes_on_after_an_error(
    branch: Path, root_fd: int, monkeypatch: pytest.MonkeyPatch, expect_log: Callable[[str], None]
) -> None:
    (branch / ".wh..wh.stuck.1234").touch()
    (branch / ".wh..wh.vanished.1234").touch()
    (branch / "dir" / ".wh..wh.free.1234").touch()
    real_unlink = syscalls.unlink_at

    def stubborn(dirfd: int, name: bytes) -> None:
        if b"stuck" in name:
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))
        real_unlink(dirfd, name)
        if b"vanished" in name:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))

    monkeypatch.setattr(syscalls, "unlink_at", stubborn)
    expect_log(f"sweep: .wh..wh.stuck.1234: {os.strerror(errno.EPERM)}")
    assert sweep.sweep_temporaries(root_fd) == 1
    assert find(branch) == [(DefectKind.TEMPORARY, b".wh..wh.stuck.1234")]


def test_sweep_of_a_branch_without_an_orphan_directory(tmp_path: Path) -> None:
    fd = os.open(tmp_path, os.O_PATH)
    try:
        assert sweep.sweep_temporaries(fd) == 0
    finally:
        os.close(fd)


def test_dirty_mark(branch: Path, root_fd: int) -> None:
    assert not dirtymark.was_dirty(root_fd)
    dirtymark.mark_dirty(root_fd)
    dirtymark.mark_dirty(root_fd)
    assert dirtymark.was_dirty(root_fd)
    assert stat.S_IMODE((branch / ".wh..wh.udbad").stat().st_mode) & 0o222 == 0
    lines: list[str] = []
    assert fsck.run_fsck(os.fsencode(branch), never, lines.append) is ExitCode.OK
    assert "not unmounted cleanly" in lines[0]
    assert dirtymark.was_dirty(root_fd)
    dirtymark.mark_clean(root_fd)
    dirtymark.mark_clean(root_fd)
    assert not dirtymark.was_dirty(root_fd)


KINDS: dict[str, Callable[[Path], object]] = {
    "directory": os.mkdir,
    "full-directory": lambda path: (path / "sub").mkdir(parents=True),
    "link": lambda path: path.symlink_to("dir"),
    "fifo": os.mkfifo,
    "socket": lambda path: os.mknod(path, stat.S_IFSOCK | 0o600),
    "device": lambda path: os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 3)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_something_else_has_the_name_of_the_dirty_mark(
    branch: Path, root_fd: int, kind: str, expect_log: Callable[[str], None]
) -> None:
    """Refused to whoever wants to write, told to fsck; come while it was written to, it is one line."""
    mark = branch / ".wh..wh.udbad"
    (opened,) = open_branches([BranchSpec(os.fsencode(branch), Perm.RW)], False, b"/proc").branches
    try:
        assert not dirtymark.begin_writing(opened)
        mark.unlink()
        KINDS[kind](mark)
        is_directory = stat.S_ISDIR(mark.lstat().st_mode)
        if is_directory:
            expect_log(f"branch {branch}: .wh..wh.udbad cannot be removed: Is a directory")
        dirtymark.end_writing(opened)
        assert mark.is_symlink() or mark.exists() == is_directory
        if not is_directory:
            KINDS[kind](mark)
        with pytest.raises(UserError) as caught:
            dirtymark.begin_writing(opened)
        assert caught.value.message.endswith(
            "/branch cannot be made writable: .wh..wh.udbad exists and is not a regular file"
        )
        assert find(branch) == [(DefectKind.BAD_BASE, b".wh..wh.udbad")]
        assert fsck.run_fsck(os.fsencode(branch), lambda defect: True, lambda line: None) is ExitCode.OK
        assert not dirtymark.begin_writing(opened)
        assert dirtymark.begin_writing(opened)
    finally:
        opened.close()


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was synced, as it comes."""
    found: list[str] = []
    real_fsync = os.fsync

    def spy(fd: int) -> None:
        found.append("directory" if stat.S_ISDIR(os.fstat(fd).st_mode) else "file")
        real_fsync(fd)

    monkeypatch.setattr(os, "fsync", spy)
    return found


def test_dirty_mark_is_durable(root_fd: int, synced: list[str]) -> None:
    """The file and its directory are synced when the mark is made, the directory when it goes."""
    dirtymark.mark_dirty(root_fd)
    assert synced == ["file", "directory"]
    dirtymark.mark_clean(root_fd)
    assert synced == ["file", "directory", "directory"]


def test_a_mark_that_is_durable_is_not_waited_for(branch: Path, synced: list[str]) -> None:
    """When a process goes on with a mount, its users wait; a mark that somebody has taken away is made again."""
    (opened,) = open_branches([BranchSpec(os.fsencode(branch), Perm.RW)], False, b"/proc").branches
    try:
        dirtymark.begin_writing(opened)
        synced.clear()
        assert dirtymark.begin_writing(opened, durable=True)
        assert synced == []
        (branch / ".wh..wh.udbad").unlink()
        assert not dirtymark.begin_writing(opened, durable=True)
        assert synced == ["file", "directory"]
    finally:
        opened.close()


@pytest.mark.parametrize(("number", "raises"), [(errno.EINVAL, False), (errno.EIO, True)])
def test_a_directory_that_cannot_be_synced(
    root_fd: int, monkeypatch: pytest.MonkeyPatch, number: int, raises: bool
) -> None:
    def fail(fd: int) -> None:
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    if raises:
        with pytest.raises(OSError, match=os.strerror(number)):
            dirtymark.mark_dirty(root_fd)
    else:
        dirtymark.mark_dirty(root_fd)
    assert dirtymark.was_dirty(root_fd)
