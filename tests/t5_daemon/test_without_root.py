"""An ordinary user's union: mounted through fusermount3, on branches of his own, for him alone.

The mount process is forked and becomes the user (tests/helpers/forked.py), as the interpreter may be out of his reach;
where it has to be started by exec, what it needs is bound into the tree.
"""

from __future__ import annotations

import errno
import json
import os
import pwd
import signal
import site
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.helpers import forked
from tests.helpers.leaks import abort_connection, mounts_under, read_mountinfo, remove_mount
from tests.helpers.mount import DEADLINE, REPOSITORY, MountFailed, mounted
from udbad.errors import ExitCode

pytestmark = pytest.mark.fuse

USER = pwd.getpwnam("nobody").pw_uid
"""fusermount3 wants to know the name of who mounts."""


@pytest.fixture(scope="module", autouse=True)
def _dev_fuse(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A /dev/fuse for everybody, as udev makes it; fusermount3 opens it as the user."""
    if os.stat("/dev/fuse").st_mode & 0o006 == 0o006:
        yield
        return
    device = tmp_path_factory.mktemp("dev") / "fuse"
    os.mknod(device, stat.S_IFCHR | 0o666, os.stat("/dev/fuse").st_rdev)
    device.chmod(0o666)
    subprocess.run(["mount", "--bind", str(device), "/dev/fuse"], check=True, timeout=DEADLINE)
    yield
    subprocess.run(["umount", "/dev/fuse"], check=True, timeout=DEADLINE)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in ("top", "base", "mnt"):
        (tmp_path / name).mkdir()
    (tmp_path / "base/low").write_text("low")
    (tmp_path / "base/gone").write_text("gone")
    (tmp_path / "base/dir").mkdir()
    for path in (tmp_path, *tmp_path.rglob("*")):
        os.chown(path, USER, USER)
    return tmp_path


def as_user(work: Callable[[], object]) -> None:
    """Run `work` as the user, in a child; it has to return."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            forked.become(USER)
            os.umask(0o022)
            work()
            code = 0
        except BaseException as error:  # reported by the code; the text is for whoever looks
            sys.stderr.write(f"{type(error).__name__}: {error}\n")
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0


def udbad(*words: str, user: int = USER) -> tuple[int, str]:
    """`udbad WORDS` as the user: exit code and output."""
    with tempfile.TemporaryFile() as output:
        code = forked.start(words, output.fileno(), user=user).wait(DEADLINE)
        output.seek(0)
        return code, output.read().decode()


def wait_until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + DEADLINE
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("udba", ["none", "reval", "notify"])
def test_what_a_user_does_in_his_union(tree: Path, udba: str) -> None:
    mnt, top = tree / "mnt", tree / "top"

    def work() -> None:
        assert (mnt / "low").read_text() == "low"
        with (mnt / "low").open("a") as file:
            file.write(" and more")
        (mnt / "new").write_text("new")
        (mnt / "new").chmod(0o640)
        os.setxattr(mnt / "new", "user.key", b"value")
        os.utime(mnt / "new", ns=(1, 2))
        (mnt / "gone").unlink()
        (mnt / "dir" / "inner").mkdir()
        os.link(mnt / "new", mnt / "linked")
        (mnt / "new").rename(mnt / "moved")
        os.symlink("moved", mnt / "link")
        os.mkfifo(mnt / "fifo")
        os.truncate(mnt / "low", 5)
        with (mnt / "low").open("rb") as file:
            os.fsync(file.fileno())
        assert sorted(os.listdir(mnt)) == ["dir", "fifo", "link", "linked", "low", "moved"]
        assert os.statvfs(mnt).f_namemax < 255

    with mounted([f"{top}=rw", f"{tree}/base=ro"], mnt, udba, user=USER) as mount:
        as_user(work)
        assert mount.process.poll() is None
        assert mount.control({"op": "status"})["edge"] == "pyfuse3"
    assert (top / "low").read_text() == "low a"
    assert (tree / "base/low").read_text() == "low"
    assert (top / ".wh.gone").exists()
    assert os.getxattr(top / "moved", "user.key") == b"value"
    st = (top / "moved").stat()
    assert (st.st_nlink, st.st_mtime_ns, stat.S_IMODE(st.st_mode)) == (2, 2, 0o640)
    assert {path.lstat().st_uid for path in top.rglob("*")} == {USER}
    assert not (top / ".wh..wh.udbad").exists(), "it was unmounted in order"


def test_a_direct_change_is_seen_and_nothing_is_asked_twice(tree: Path) -> None:
    mnt = tree / "mnt"

    def look() -> None:
        for name in ("low", "gone", "dir", "missing"):
            try:
                os.stat(mnt / name)
            except FileNotFoundError:
                assert name == "missing"

    with mounted([f"{tree}/top=rw", f"{tree}/base=ro"], mnt, "notify", user=USER) as mount:
        as_user(look)
        before = mount.requests()
        as_user(look)
        after = mount.requests()
        asked = {name: after[name] - before.get(name, 0) for name in after}
        assert (asked.get("lookup", 0), asked.get("getattr", 0)) == (0, 0)
        (tree / "base/missing").write_text("there now")
        (tree / "base/low").write_text("changed")
        (tree / "base/gone").unlink()
        mount.flush()

        def see() -> None:
            assert (mnt / "missing").read_text() == "there now"
            assert (mnt / "low").read_text() == "changed"
            assert not (mnt / "gone").exists()

        as_user(see)


def test_an_overflow_is_told_name_by_name(tree: Path) -> None:
    """There are no epochs through pyfuse3: all that is known is asked again."""
    mnt = tree / "mnt"
    with mounted([f"{tree}/top=rw", f"{tree}/base=ro"], mnt, "none", user=USER) as mount:
        as_user(lambda: (mnt / "low").stat())
        (tree / "base/low").unlink()
        as_user(lambda: (mnt / "low").stat())  # as none has it
        assert mount.control({"op": "udba", "mode": "reval"})["ok"]
        as_user(lambda: not_there(mnt / "low"))


def not_there(path: Path) -> None:
    assert not path.exists()


def test_nobody_else_comes_in(tree: Path) -> None:
    with mounted([f"{tree}/top=rw", f"{tree}/base=ro"], tree / "mnt", user=USER), pytest.raises(PermissionError):
        os.listdir(tree / "mnt")


def test_what_is_somebody_else_s_on_a_lower_branch(tree: Path) -> None:
    """A copy of it is his, and setuid to nobody."""
    low = tree / "base/low"
    os.chown(low, 0, 0)
    low.chmod(0o6777)
    with mounted([f"{tree}/top=rw", f"{tree}/base=ro"], tree / "mnt", user=USER):
        as_user(lambda: os.setxattr(tree / "mnt/low", "user.key", b"value"))
    st = (tree / "top/low").stat()
    assert (st.st_uid, st.st_gid, stat.S_IMODE(st.st_mode)) == (USER, USER, 0o777)


def refusal(tree: Path, branch: str, options: str = "") -> MountFailed:
    with (
        pytest.raises(MountFailed) as refused,
        mounted([f"{tree}/{branch}"], tree / "mnt", options=options, user=USER),
    ):
        pass
    return refused.value


def test_what_he_cannot_mount(tree: Path) -> None:
    os.chown(tree / "mnt", 0, 0)
    refused = refusal(tree, "top=rw")
    assert refused.code == ExitCode.MOUNT_POINT
    assert "no write access to mountpoint" in str(refused)
    os.chown(tree / "mnt", USER, USER)
    os.chown(tree / "top", 0, 0)
    assert refusal(tree, "top=rw").code == ExitCode.BRANCH
    assert refusal(tree, "base=ro", "edge=native").code in (ExitCode.NO_FUSE, ExitCode.NOT_ROOT)


def test_a_branch_that_root_s_mount_has_written_to(tree: Path) -> None:
    """Its whiteouts are links to a file that is not his to link (proc(5), fs.protected_hardlinks)."""
    (tree / "top/.wh..wh.aufs").touch(0o444)
    refused = refusal(tree, "top=rw")
    assert refused.code == ExitCode.BRANCH
    assert ".wh..wh.aufs belongs to uid 0" in str(refused)
    os.chown(tree / "top/.wh..wh.aufs", USER, USER)
    with mounted([f"{tree}/top=rw", f"{tree}/base=ro"], tree / "mnt", user=USER):
        as_user(lambda: (tree / "mnt/gone").unlink())


@pytest.fixture
def begin(tree: Path) -> Iterator[Callable[[], tuple[forked.Process, Callable[[], str]]]]:
    """Mount as the user, with a run directory of his; the mount process, and what it has logged."""
    with tempfile.TemporaryDirectory() as run_dir, ExitStack() as stack:
        os.chown(run_dir, USER, USER)

        def begin() -> tuple[forked.Process, Callable[[], str]]:
            log = tree / "log"
            words = ["-o", f"br={tree}/top:{tree}/base", "--run-dir", run_dir, "none", str(tree / "mnt")]
            reader, writer = os.pipe()
            with log.open("wb") as output, os.fdopen(reader, "rb") as ready:
                words = ["mount", "-f", "--ready-fd", forked.READY, *words]
                process = forked.start(words, output.fileno(), ready=writer, user=USER)
                stack.callback(process.wait, DEADLINE)
                stack.callback(process.kill)
                os.close(writer)
                assert ready.read(6) == b"READY\n", log.read_text()
            return process, log.read_text

        stack.callback(lambda: [remove_mount(one) for one in mounts_under(tree)])
        yield begin


def test_a_crash_leaves_it_dead_until_it_is_unmounted(
    tree: Path, begin: Callable[[], tuple[forked.Process, Callable[[], str]]]
) -> None:
    process, _ = begin()
    process.kill()
    process.wait(DEADLINE)
    as_user(lambda: is_dead(tree / "mnt"))
    assert udbad("umount", str(tree / "mnt")) == (0, "")
    assert not mounts_under(tree)
    process, log = begin()
    assert udbad("umount", str(tree / "mnt")) == (0, "")
    assert process.wait(DEADLINE) == 0
    assert "was not unmounted cleanly" in log()


def is_dead(path: Path) -> None:
    with pytest.raises(OSError, match=os.strerror(errno.ENOTCONN)):
        os.listdir(path)


def test_a_dead_union_is_replaced(tree: Path, begin: Callable[[], tuple[forked.Process, Callable[[], str]]]) -> None:
    """By who mounts there again: the run directory knows that it was ours."""
    process, _ = begin()
    process.kill()
    process.wait(DEADLINE)
    begin()
    assert len(mounts_under(tree)) == 1
    as_user(lambda: (tree / "mnt/low").stat())


def test_an_aborted_connection_is_said(
    tree: Path, begin: Callable[[], tuple[forked.Process, Callable[[], str]]]
) -> None:
    process, log = begin()
    abort_connection(mounts_under(tree)[0].minor)
    assert process.wait(DEADLINE) == ExitCode.FAILURE
    assert "the connection was aborted" in log()


def test_what_it_lacks_is_said(tree: Path) -> None:
    with mounted([f"{tree}/top=rw"], tree / "mnt", options="strictatime", user=USER) as mount:
        lines = [line for line in mount.log().splitlines() if "pyfuse3" in line]
        assert len(lines) == 1
        assert "other users (root, too)" in lines[0]
        status = mount.control({"op": "status"})
        assert status["edge"] == "pyfuse3"
        assert all(one in lines[0] for one in status["lacks"])
        assert "a user cannot have the mount strictatime" in mount.log()
        refused = mount.control({"op": "remount", "options": "ro"})
        assert not refused["ok"]
        assert "a user cannot change the flags of a mount" in refused["error"]


# -- started by exec ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Exec:
    """`udbad` of the user in the tree, by exec. home: his home and run-time directory."""

    tree: Path
    home: Path

    def start(self, *words: str, output: int = subprocess.PIPE) -> subprocess.Popen[str]:
        environment = {
            **{key: value for key, value in os.environ.items() if key.startswith("UDBAD_TEST")},
            "PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": str(self.home), "XDG_RUNTIME_DIR": str(self.home),
            "PYTHONPATH": f"{self.home}/repo:{self.home}/site", "LD_LIBRARY_PATH": f"{self.home}/python/lib",
            "PYTHONDONTWRITEBYTECODE": "1",
        }  # fmt: skip
        python = f"{self.home}/python/bin/python{sys.version_info.major}.{sys.version_info.minor}"
        return subprocess.Popen(
            ["setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups", python, "-P", "-m", *words],
            cwd=self.tree, env=environment, stdout=output, stderr=output, text=True,
        )  # fmt: skip

    def __call__(self, *words: str) -> tuple[int, str]:
        """Exit code, and what it has said."""
        with self.start(*words) as process:
            out, err = process.communicate(timeout=3 * DEADLINE)
            return process.returncode, out + err


@pytest.fixture
def run(tree: Path) -> Iterator[Exec]:
    with ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        places = {"python": sys.base_prefix, "site": site.getsitepackages()[0], "repo": str(REPOSITORY)}
        for name, source in places.items():
            (home / name).mkdir()
            subprocess.run(["mount", "--bind", source, str(home / name)], check=True, timeout=DEADLINE)
            stack.callback(subprocess.run, ["umount", "-l", str(home / name)], check=True, timeout=DEADLINE)
        os.chown(home, USER, USER)
        stack.callback(lambda: [remove_mount(one) for one in read_mountinfo() if one.path.is_relative_to(tree)])
        yield Exec(tree, home)


def test_by_hand_with_the_commands_of_everybody(tree: Path, run: Exec) -> None:
    code, said = run("udbad.commands.helper", "none", "mnt", "-o", "br=top:base,udba=notify")
    assert code == 0, said
    code, listed = run("udbad", "status", "--json")
    assert code == 0, listed
    (mount,) = json.loads(listed)["mounts"]
    assert (mount["state"], mount["process"]["edge"]) == ("serving", "pyfuse3")
    assert "served through pyfuse3, without" in run("udbad", "status")[1]
    assert f"{tree}/base/low" in run("udbad", "where", "mnt/low")[1]
    assert run("udbad", "umount", "mnt") == (0, "")
    wait_until(lambda: not os.path.exists(f"/proc/{mount['pid']}"))
    assert run("udbad", "fsck", "-n", "top")[0] == 0


def test_a_daemon_of_his_own(tree: Path, run: Exec) -> None:
    """It finds its configuration in his home, and puts a mount that was killed back."""
    config = run.home / ".config/udbad/udbad.toml"
    config.parent.mkdir(parents=True)
    config.write_text(
        f'[metrics]\nlisten = "off"\n[mounts.his]\nmount_point = "{tree}/mnt"\n'
        f'branches = ["{tree}/top=rw", "{tree}/base=ro"]\nudba = "notify"\n'
    )

    def serving() -> int:
        """The process that serves the mount, 0 for none."""
        code, said = run("udbad", "status", "--json")
        mounts = json.loads(said)["mounts"] if code == 0 else []
        return int(mounts[0]["pid"]) if mounts else 0

    with (tree / "log").open("wb") as log, run.start("udbad", "run", output=log.fileno()) as daemon:
        try:
            wait_until(lambda: serving() != 0)
            first = serving()
            os.kill(first, signal.SIGKILL)
            wait_until(lambda: serving() not in (0, first))
            as_user(lambda: (tree / "mnt/low").stat())
            assert run("udbad", "stop") == (0, "")
            assert daemon.wait(DEADLINE) == 0, (tree / "log").read_text()
        finally:
            daemon.kill()
    assert mounts_under(tree) == []
