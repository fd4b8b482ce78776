"""The command line on real mounts: the walk-through of the README, and every mistake a user can make.

A mistake is one line on stderr that names the offender, a documented exit code and no traceback.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.helpers.leaks import FS_TYPE, read_mountinfo
from tests.helpers.mount import DEADLINE, REPOSITORY, mounted
from tests.t3_fuse.live import errno_of, file_system, names
from udbad.errors import ExitCode

pytestmark = pytest.mark.fuse

UDBAD = (sys.executable, "-m", "udbad")
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(REPOSITORY)}


@dataclass(frozen=True)
class Done:
    """A command that has ended. lines: what it wrote to stderr."""

    code: int
    out: str
    lines: list[str]


def run(words: Sequence[str], cwd: Path, answers: str = "", before: Sequence[str] = ()) -> Done:
    """`udbad WORDS` in `cwd`, with `answers` on stdin; before: a command that starts it."""
    return _run([*before, *UDBAD, *words], cwd, answers)


def _run(command: Sequence[str], cwd: Path, answers: str = "") -> Done:
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:  # a daemon may keep a pipe open
        done = subprocess.run(
            command, cwd=cwd, env=ENVIRONMENT, input=answers, stdout=out, stderr=err, text=True, timeout=60
        )
        out.seek(0)
        err.seek(0)
        return Done(done.returncode, out.read(), err.read().splitlines())


def is_mounted(path: Path) -> bool:
    return any(mount.path == path and mount.fs_type == FS_TYPE for mount in read_mountinfo())


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """The tree of the walk-through, as the README has it."""
    for directory in ("base", "top", "mnt"):
        (tmp_path / directory).mkdir()
    (tmp_path / "base/hello.txt").write_text("hello from base\n")
    (tmp_path / "base/common.txt").write_text("common from base\n")
    (tmp_path / "top/foo.txt").write_text("foo from top\n")
    (tmp_path / "top/common.txt").write_text("common from top\n")
    return tmp_path


@contextmanager
def foreground(tree: Path, branches: str) -> Iterator[None]:
    """`udbad mount -f`: waits until it serves; Ctrl-C at the end, after which the mount must be gone.

    It is a service, too (udbad@.service): by then the service manager has been told.
    """
    read_end, write_end = os.pipe()
    manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    manager.bind(f"\0udbad-cli-{os.getpid()}")
    environment = {**ENVIRONMENT, "NOTIFY_SOCKET": f"@udbad-cli-{os.getpid()}"}
    words = ["mount", "-f", "--ready-fd", str(write_end), "-o", f"br={branches}", "none", "./mnt"]
    with manager, subprocess.Popen([*UDBAD, *words], cwd=tree, env=environment, pass_fds=[write_end]) as process:
        os.close(write_end)
        with os.fdopen(read_end, "rb") as ready:
            assert ready.read(6) == b"READY\n"
        assert manager.recv(4096) == f"READY=1\nSTATUS=serves {tree}/mnt".encode()
        yield
        process.send_signal(signal.SIGINT)
        assert process.wait(DEADLINE) == 0
    assert not is_mounted(tree / "mnt")


@contextmanager
def background(tree: Path, branches: str) -> Iterator[None]:
    """`udbad mount`, which returns when the mount serves; `udbad umount` at the end."""
    done = run(["mount", "-o", f"br={branches}", "none", "./mnt"], tree)
    assert done == Done(0, "", [])
    assert is_mounted(tree / "mnt")
    yield
    assert run(["umount", "./mnt"], tree) == Done(0, "", [])
    assert not is_mounted(tree / "mnt")


ways = pytest.mark.parametrize("way", [foreground, background])


@ways
def test_walk_through(tree: Path, way: type) -> None:
    with way(tree, "./top:./base"):
        mnt, top, base = tree / "mnt", tree / "top", tree / "base"
        assert sorted(os.listdir(mnt)) == ["common.txt", "foo.txt", "hello.txt"]
        assert (mnt / "common.txt").read_text() == "common from top\n"
        (mnt / "common.txt").write_text("changed\n")
        assert (top / "common.txt").read_text() == "changed\n"
        assert (base / "common.txt").read_text() == "common from base\n"
        (mnt / "hello.txt").write_text("changed\n")
        assert (base / "hello.txt").read_text() == "hello from base\n"
        assert (top / "hello.txt").read_text() == "changed\n"
        (mnt / "hello.txt").unlink()
        assert names(top) == [".wh.hello.txt", "common.txt", "foo.txt"]
        assert sorted(os.listdir(mnt)) == ["common.txt", "foo.txt"]
        assert sorted(os.listdir(base)) == ["common.txt", "hello.txt"]


@ways
def test_walk_through_with_both_branches_writable(tree: Path, way: type) -> None:
    with way(tree, "./top=rw:./base=rw"):
        (tree / "mnt/hello.txt").write_text("changed\n")
        assert (tree / "base/hello.txt").read_text() == "changed\n"
        assert names(tree / "top") == ["common.txt", "foo.txt"]


def test_modules_in_the_current_directory_are_not_ours(tree: Path) -> None:
    """Root may mount while in a directory of somebody else, who has put his own `udbad` or `click` there."""
    for name in ("udbad", "click"):
        (tree / name).mkdir()
        (tree / name / "__init__.py").write_text(f"open({str(tree / 'run')!r}, 'w')\n")
    program = [sys.executable, "-P", "-m", "udbad"]  # as the installed one, which does not look here either
    assert _run([*program, "mount", "-o", "br=./top:./base", "none", "./mnt"], tree) == Done(0, "", [])
    assert _run([*program, "umount", "./mnt"], tree) == Done(0, "", [])
    assert not (tree / "run").exists()


def test_what_the_mount_process_says_is_not_waited_for(tree: Path) -> None:
    """A pipe on the output of `udbad mount` is not held open by the mount (as in `text=$(udbad mount ...)`)."""
    started = subprocess.run(
        [*UDBAD, "mount", "-o", "br=top:base", "none", "mnt"],
        cwd=tree,
        env=ENVIRONMENT,
        capture_output=True,
        timeout=30,
    )
    assert started.returncode == 0
    assert run(["umount", "mnt"], tree).code == 0


# -- mistakes ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mistake:
    """options: the value of -o. says: what the one line must contain. prepare: shell run in the tree before."""

    id: str
    options: str
    code: ExitCode
    says: tuple[str, ...]
    prepare: str = ""
    mount_point: str = "mnt"


MISTAKES = (
    Mistake("missing branch", "br=top:absent", ExitCode.BRANCH, ("absent", "does not exist")),
    Mistake("branch is a file", "br=top:base/hello.txt", ExitCode.BRANCH, ("base/hello.txt", "not a directory")),
    Mistake("same branch twice", "br=top:base:./top", ExitCode.BRANCH, ("./top", "twice")),
    Mistake("same branch by a symlink", "br=top:alias", ExitCode.BRANCH, ("alias", "twice"), "ln -s top alias"),
    Mistake("overlap", "br=top:top/sub", ExitCode.BRANCH, ("top/sub", "overlap", "top"), "mkdir top/sub"),
    Mistake("overlap, outer below", "br=top/sub:top", ExitCode.BRANCH, ("top/sub", "overlap"), "mkdir top/sub"),
    Mistake("branch in the mount point", "br=top:mnt/in", ExitCode.BRANCH, ("mnt/in", "inside the mount point"),
            "mkdir mnt/in"),
    Mistake("mount point in a branch", "br=top:base", ExitCode.BRANCH, ("top/in", "inside branch top"),
            "mkdir top/in", "top/in"),
    Mistake("branch is the mount point", "br=top:mnt", ExitCode.BRANCH, ("mnt", "is the mount point")),
    Mistake("branch on proc", "br=top:/proc/self", ExitCode.BRANCH, ("/proc/self", "proc")),
    Mistake("unknown permission", "br=top=rx:base", ExitCode.OPTION, ("top", "'rx'", "rw, ro, rr")),
    Mistake("unknown attribute", "br=top=rw+wj:base", ExitCode.OPTION, ("top", "'wj'", "'wh'")),
    Mistake("bad create policy", "br=top:base,create=mfz", ExitCode.OPTION, ("create=mfz", "'mfs'")),
    Mistake("policy argument missing", "br=top:base,create=tdmfs", ExitCode.OPTION, ("create=tdmfs", "LOW")),
    Mistake("policy argument too big", "br=top:base,create=mfs:3601", ExitCode.OPTION, ("'3601'", "3600")),
    Mistake("policy argument no number", "br=top:base,create=tdmfs:10X", ExitCode.OPTION, ("'10X'", "bytes")),
    Mistake("bad copy-up policy", "br=top:base,cpup=bop", ExitCode.OPTION, ("cpup=bop", "'bup'")),
    Mistake("bad mode", "br=top:base,udba=revel", ExitCode.OPTION, ("udba=revel", "none, reval or notify")),
    Mistake("unknown option", "br=top:base,shwhh", ExitCode.OPTION, ("'shwhh'", "'shwh'")),
    Mistake("no branch", "udba=none", ExitCode.OPTION, ("no branch", "br=")),
    Mistake("empty value", "br=", ExitCode.OPTION, ("br", "value")),
    Mistake("number out of range", "br=top:base,rdcache=3601", ExitCode.OPTION, ("rdcache=3601", "3600")),
    Mistake("mount point missing", "br=top:base", ExitCode.MOUNT_POINT, ("nowhere", "No such file"), "", "nowhere"),
    Mistake("mount point is a file", "br=top:base", ExitCode.MOUNT_POINT, ("top/foo.txt", "not a directory"), "",
            "top/foo.txt"),
)  # fmt: skip


def says_one_line(done: Done, code: ExitCode, said: Sequence[str]) -> None:
    lines = [line for line in done.lines if not line.startswith("udbad: INFO: ")]  # notices are no part of the mistake
    assert len(lines) == 1, done
    assert lines[0].startswith("udbad: ")
    for text in said:
        assert text in lines[0]
    assert (done.code, done.out) == (int(code), "")


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.id)
def test_mistake(tree: Path, mistake: Mistake) -> None:
    if mistake.prepare:
        subprocess.run(["sh", "-ec", mistake.prepare], cwd=tree, check=True, timeout=20)
    before = [sorted(os.listdir(tree / name)) for name in ("base", "top")]
    done = run(["mount", "-f", "-o", mistake.options, "none", mistake.mount_point], tree)
    says_one_line(done, mistake.code, mistake.says)
    assert [sorted(os.listdir(tree / name)) for name in ("base", "top")] == before, "a refused branch is not written to"


@pytest.mark.parametrize("mistake", [m for m in MISTAKES if not m.prepare][::4], ids=lambda mistake: mistake.id)
def test_mistake_in_the_background(tree: Path, mistake: Mistake) -> None:
    done = run(["mount", "-o", mistake.options, "none", mistake.mount_point], tree)
    says_one_line(done, mistake.code, mistake.says)


def test_rw_on_a_read_only_file_system(tree: Path) -> None:
    with file_system(tree / "medium", "tmpfs", "ro"):
        done = run(["mount", "-f", "-o", "br=medium=rw:base", "none", "mnt"], tree)
        says_one_line(done, ExitCode.BRANCH, ("medium", "read-only"))


def test_branch_inside_a_union(tree: Path) -> None:
    (tree / "base/sub").mkdir()
    with mounted([f"{tree}/top=rw", f"{tree}/base=ro"], tree / "mnt"):
        (tree / "mnt2").mkdir()
        done = run(["mount", "-f", "-o", "br=mnt/sub", "none", "mnt2"], tree)
        says_one_line(done, ExitCode.BRANCH, ("mnt/sub", "udbad mount"))


def test_mount_point_that_is_not_empty_is_allowed_with_a_notice(tree: Path) -> None:
    (tree / "mnt/hidden").write_text("x")
    with mounted([f"{tree}/top=rw", f"{tree}/base=ro"], tree / "mnt") as mount:
        assert any("mnt is not empty" in line for line in mount.log().splitlines())
        assert sorted(os.listdir(tree / "mnt")) == ["common.txt", "foo.txt", "hello.txt"]
    assert os.listdir(tree / "mnt") == ["hidden"]


def test_no_dev_fuse(tree: Path) -> None:
    enter = (
        "unshare",
        "--mount",
        "--propagation",
        "private",
        "sh",
        "-c",
        'mount -t tmpfs none /dev && exec "$@"',
        "sh",
    )
    done = run(["mount", "-f", "-o", "br=top:base", "none", "mnt"], tree, before=enter)
    says_one_line(done, ExitCode.NO_FUSE, ("/dev/fuse", "No such file"))


def test_no_access_to_dev_fuse(tree: Path) -> None:
    """The module is missing but its device node is there: ENODEV or ENXIO."""
    enter = ("unshare", "--mount", "--propagation", "private", "sh", "-c",
             'mount -t tmpfs none /dev && mknod /dev/fuse c 10 254 && exec "$@"', "sh")  # fmt: skip
    done = run(["mount", "-f", "-o", "br=top:base", "none", "mnt"], tree, before=enter)
    says_one_line(done, ExitCode.NO_FUSE, ("/dev/fuse", "No such device"))


AS_NOBODY = """
import difflib, hashlib, os, shutil, udbad.cli, udbad.kernel.mounts, udbad.mount.beside, udbad.tools.fsck
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
udbad.cli.main()
"""


def as_nobody(words: Sequence[str], tree: Path) -> Done:
    """Run the command line as nobody; it is loaded before, as the repository may be root's alone."""
    return _run([sys.executable, "-c", AS_NOBODY, *words], tree)


def test_mount_as_nobody(tree: Path) -> None:
    """What is not his he can neither write to nor mount over; what a user can: test_without_root.py."""
    done = as_nobody(["mount", "-f", "-o", "br=top:base", "none", "mnt"], tree)
    says_one_line(done, ExitCode.BRANCH, ("top", "Permission denied"))


def test_mount_as_root_without_the_capability(tree: Path) -> None:
    drop = ("setpriv", "--bounding-set", "-sys_admin", "--inh-caps", "-sys_admin")
    done = run(["mount", "-f", "-o", "br=top:base", "none", "mnt"], tree, before=drop)
    says_one_line(done, ExitCode.NOT_ROOT, ("mnt", "not permitted"))


def test_umount_and_fsck_as_nobody(tree: Path) -> None:
    with mounted([f"{tree}/top=rw", f"{tree}/base=ro"], tree / "mnt"):
        done = as_nobody(["umount", "mnt"], tree)
        says_one_line(done, ExitCode.NOT_ROOT, ("mnt",))
        assert is_mounted(tree / "mnt")
    assert as_nobody(["fsck", "-n", "base"], tree) == Done(0, "base: clean\n", [])  # he can read all of it


def test_umount_by_name(tree: Path) -> None:
    (tree / "mnt2").mkdir()
    for branch, place in (("top", "mnt"), ("base", "mnt2")):
        assert run(["mount", "-o", f"br={branch}=ro", "a pool", place], tree).code == 0
    says_one_line(run(["umount", "a pool"], tree), ExitCode.NOT_MOUNTED, (f"{tree}/mnt, {tree}/mnt2",))
    assert run(["umount", "mnt2"], tree) == Done(0, "", [])
    assert run(["umount", "a pool"], tree) == Done(0, "", [])
    assert not is_mounted(tree / "mnt")


def test_umount_mistakes(tree: Path) -> None:
    says_one_line(run(["umount", "mnt"], tree), ExitCode.NOT_MOUNTED, ("mnt",))
    says_one_line(run(["umount", "/proc"], tree), ExitCode.NOT_MOUNTED, ("/proc",))
    with mounted([f"{tree}/top=rw", f"{tree}/base=ro"], tree / "mnt") as mount:
        fd = os.open(mount.path / "foo.txt", os.O_RDONLY)
        try:
            says_one_line(run(["umount", "mnt"], tree), ExitCode.FAILURE, ("mnt", "busy"))
        finally:
            os.close(fd)


def test_lazy_umount_of_a_mount_in_use(tree: Path) -> None:
    with mounted([f"{tree}/top=rw", f"{tree}/base=ro"], tree / "mnt") as mount:
        fd = os.open(mount.path / "foo.txt", os.O_RDONLY)
        try:
            assert run(["umount", "-l", "mnt"], tree) == Done(0, "", [])
            assert not is_mounted(tree / "mnt")
            assert os.read(fd, 100) == b"foo from top\n"
        finally:
            os.close(fd)


def test_signal_ends_a_mount_that_is_in_use(tree: Path) -> None:
    """Detached with a warning; what is open gets errors, and the daemon ends with code 0."""
    with mounted([f"{tree}/top=rw", f"{tree}/base=ro"], tree / "mnt", allow_log="in use; detached") as mount:
        fd = os.open(mount.path / "foo.txt", os.O_RDONLY)
        mount.process.send_signal(signal.SIGTERM)
        assert mount.process.wait(DEADLINE) == 0
        assert not is_mounted(tree / "mnt")
        assert errno_of(lambda: os.fstat(fd)) == "ENOTCONN"
        with suppress(OSError):  # FLUSH of a dead connection; the descriptor is closed all the same, close(2)
            os.close(fd)
    assert not (tree / "top/.wh..wh.udbad").exists()


# -- fsck -------------------------------------------------------------------------------------


@pytest.fixture
def defective(tree: Path) -> Path:
    (tree / "top/.wh.foo.txt").touch()
    (tree / "top/.wh..wh.common.txt.0a1b").write_text("half a copy")
    return tree


def test_fsck_that_only_reports(defective: Path) -> None:
    before = sorted(os.listdir(defective / "top"))
    done = run(["fsck", "-n", "top"], defective)
    assert done.code == ExitCode.FSCK_DEFECTS
    assert done.lines == []
    assert ".wh.foo.txt" in done.out
    assert ".wh..wh.common.txt.0a1b" in done.out
    assert "2 defects, 0 repaired" in done.out
    assert sorted(os.listdir(defective / "top")) == before


def test_fsck_that_repairs(defective: Path) -> None:
    done = run(["fsck", "-y", "top"], defective)
    assert (done.code, done.lines) == (0, [])
    assert "2 defects, 2 repaired" in done.out
    assert sorted(os.listdir(defective / "top")) == ["common.txt", "foo.txt"]
    done = run(["fsck", "top"], defective)
    assert (done.code, done.lines) == (0, [])
    assert "clean" in done.out


def test_fsck_that_knows_the_lower_branches(tree: Path) -> None:
    (tree / "top/.wh..wh.plnk").mkdir()
    alone = tree / "top/.wh..wh.plnk/7.7.1234567890123456789"
    alone.write_text("of a file that is gone")
    done = run(["fsck", "-y", "top"], tree)
    assert (done.code, alone.exists()) == (0, True)
    assert "name those branches" in done.out
    says_one_line(run(["fsck", "-y", "top", "absent"], tree), ExitCode.BRANCH, ("absent",))
    assert alone.exists()
    done = run(["fsck", "-y", "top", "base"], tree)
    assert (done.code, alone.exists()) == (0, False)


@pytest.mark.parametrize(("answers", "repaired"), [("y\nn\n", 1), ("n\ny\n", 1), ("y\ny\n", 2), ("\n\n", 0)])
def test_fsck_that_asks(defective: Path, answers: str, repaired: int) -> None:
    done = run(["fsck", "top"], defective, answers)
    assert done.lines == []
    assert f"2 defects, {repaired} repaired" in done.out
    assert done.code == (0 if repaired == 2 else ExitCode.FSCK_DEFECTS)
    assert len(os.listdir(defective / "top")) == 4 - repaired


def test_fsck_without_an_answer_repairs_nothing(defective: Path) -> None:
    """End of file where an answer is due: nothing is repaired and no traceback is shown."""
    done = run(["fsck", "top"], defective)
    assert done.code != 0
    assert not any("Traceback" in line for line in done.lines)
    assert len(os.listdir(defective / "top")) == 4


def test_fsck_mistakes(tree: Path) -> None:
    says_one_line(run(["fsck", "absent"], tree), ExitCode.BRANCH, ("absent",))
    says_one_line(run(["fsck", "top/foo.txt"], tree), ExitCode.BRANCH, ("top/foo.txt", "not a directory"))
    assert run(["fsck", "-y", "-n", "top"], tree).code == ExitCode.USAGE
