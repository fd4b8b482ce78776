"""A branch that stops answering: the mount goes on without it, and with it as soon as it answers.

Five branches, one of them on a file system of the test (tests/helpers/stalling.py). What has to wait for the branch is
told by an error, so that no test hangs with it.
"""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.helpers.mount import Mount, MountFailed, UnionFactory
from tests.helpers.offline import number_of, offline
from tests.helpers.stalling import HALF, HALF_AT, STUCK, Server, stalling
from tests.t5_daemon.daemon import Daemon, until
from udbad.branch.branches import Branch, BranchSet
from udbad.errors import ExitCode
from udbad.mount import keeper
from udbad.mount.offline import Offline
from udbad.types import Perm

pytestmark = [
    pytest.mark.fuse,
    pytest.mark.skipif(keeper.why_not() is not None, reason=str(keeper.why_not())),
]

MODES = ("none", "reval", "notify")
LOG = "another one takes over|has not answered for|answers again"
LAYERS = {"a": "rw", "b": "rw", "hung": "rw", "c": "rw", "d": "rw"}
SECONDS = 60.0


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    for path in ("a/all", "b/all", "real/all", "c/all", "real/only", "c/apart", "d/apart"):
        (tmp_path / path).mkdir(parents=True)
    for path in ("a/all/in_a", "real/all/in_hung", "d/in_d", "real/only/f", "c/apart/f"):
        (tmp_path / path).write_text(Path(path).name)
    with stalling(tmp_path / "real", tmp_path / "hung") as server:
        yield server


@pytest.fixture(params=MODES)
def mount(request: pytest.FixtureRequest, server: Server, union: UnionFactory) -> Mount:
    return union(LAYERS, request.param, "survive=on,branch_timeout=1,create=rr", allow_log=LOG)


def test_the_others_go_on(mount: Mount, server: Server) -> None:
    path = mount.path
    known = {name: os.stat(path / name).st_ino for name in ("all", "all/in_a", "apart", "apart/f", "in_d", "only/f")}
    here = os.open(path / "apart", os.O_PATH)  # the kernel does not forget it
    reader = os.open(path / "only/f", os.O_RDONLY)
    writer = os.open(path / "only/f", os.O_WRONLY)
    server.stall()
    assert number_of(os.stat, path / "only/new") == errno.EIO, "it was asked, and has waited"
    assert offline(mount) == [str(mount["hung"])]
    for name in ("all", "all/in_a", "apart", "apart/f", "in_d"):
        assert os.stat(path / name).st_ino == known[name], name
    assert (path / "in_d").read_text() == "in_d"
    for name in ("only", "only/f", "all/in_hung", "new", "all/new"):
        assert number_of(os.stat, path / name) == errno.EIO, name
    for name in ("", "all"):
        assert number_of(os.listdir, path / name) == errno.EIO, name
    assert number_of(os.pwrite, writer, b"F", 0) == errno.EIO
    assert os.listdir(path / "apart") == ["f"]
    for number in range(5):
        (path / f"apart/new{number}").write_text("new")
        (path / f"apart/dir{number}").mkdir()
    (path / "apart/new0").rename(path / "apart/dir0/new")
    (path / "apart/new1").unlink()
    assert number_of(os.unlink, path / "in_d") == errno.EIO
    assert number_of(os.close, writer) == errno.EIO, "what was written before may be lost"
    server.go_on()
    until(lambda: offline(mount) == [], "its return", SECONDS)
    assert {name: os.stat(path / name).st_ino for name in known} == known
    assert sorted(os.listdir(path / "all")) == ["in_a", "in_hung"]
    assert sorted(os.listdir(path)) == ["all", "apart", "in_d", "only"]
    assert os.pread(reader, 10, 0) == b"f"
    assert not (path / "new").exists()
    (mount["hung"] / "only/f").write_text("direct")
    assert (path / "only/f").read_text() == "direct"
    if mount.udba != "none":
        (mount["hung"] / "only/direct").touch()
        assert (path / "only/direct").exists()
    os.close(reader)
    os.close(here)


def test_several_at_once(server: Server, union: UnionFactory, tmp_path: Path) -> None:
    """Who waits for one of them is not told by one process after the other: it is taken over once."""
    (tmp_path / "other/there").mkdir(parents=True)
    with stalling(tmp_path / "other", tmp_path / "d") as second:
        mount = union(LAYERS, "notify", "survive=on,branch_timeout=1,create=rr", allow_log=LOG)
        os.stat(mount.path / "there")
        server.stall()
        second.stall()
        assert number_of(os.stat, mount.path / "only/new") == errno.EIO
        assert sorted(offline(mount)) == [str(mount["d"]), str(mount["hung"])]
        assert mount.control({"op": "status"})["restarts"] == 1
        assert (mount.path / "apart/f").read_text() == "f"
        second.go_on()
        until(lambda: offline(mount) == [str(mount["hung"])], "the return of one", SECONDS)
        assert (mount.path / "there").is_dir()
        server.go_on()
        until(lambda: not offline(mount), "the return of the other", SECONDS)
        mount.unmount()


def test_a_call_that_no_signal_ends(mount: Mount, server: Server) -> None:
    """The process that waits for the branch cannot be killed, and another one goes on all the same."""
    assert number_of(os.stat, mount.path / f"only/{STUCK}") == errno.EIO
    assert offline(mount) == [str(mount["hung"])]
    assert (mount.path / "in_d").read_text() == "in_d"
    server.go_on()
    until(lambda: offline(mount) == [], "its return", SECONDS)
    assert (mount.path / "only/f").read_text() == "f"


@pytest.fixture
def notified(server: Server, union: UnionFactory) -> Mount:
    """Where the mode makes no difference."""
    return union(LAYERS, "notify", "survive=on,branch_timeout=1,create=rr", allow_log=LOG)


def test_calls_that_are_given_to_threads(notified: Mount, server: Server, tmp_path: Path) -> None:
    """READ and FSYNC wait in threads, and so does nobody else; after an fsync the branch is asked as well."""
    (tmp_path / "real/only/g").write_bytes(b"g" * 100_000)
    path = notified.path
    file, other = os.open(path / "only/f", os.O_RDWR), os.open(path / "only/g", os.O_RDONLY)
    os.pwrite(file, b"F", 0)
    server.stall()
    with ThreadPoolExecutor(2) as threads:
        waiting = threads.submit(number_of, os.fsync, file), threads.submit(number_of, os.pread, other, 10, 50_000)
        assert (path / "in_d").read_text() == "in_d"
        assert [one.result(SECONDS) for one in waiting] == [errno.EIO, errno.EIO]
    server.go_on()
    until(lambda: offline(notified) == [], "its return", SECONDS)
    os.fsync(file)
    assert os.pread(file, 10, 0) == b"F"
    assert os.pread(other, 3, 50_000) == b"ggg"
    os.close(file)
    os.close(other)


def test_what_happens_to_the_mount_meanwhile(notified: Mount, server: Server) -> None:
    """Its process is killed, and it is unmounted."""
    writer = os.open(notified.path / "only/f", os.O_WRONLY)
    os.pwrite(writer, b"F", 0)
    server.stall()
    assert number_of(os.stat, notified.path / "only/new") == errno.EIO
    os.kill(notified.control({"op": "status"})["pid"], signal.SIGKILL)
    assert (notified.path / "in_d").read_text() == "in_d"
    assert number_of(os.stat, notified.path / "only") == errno.EIO
    assert offline(notified) == [str(notified["hung"])]
    hung, other = str(notified["hung"]), str(notified["c"])
    up = notified.control({"op": "metrics"})["metrics"]["udbad_branch_up"]
    assert {branch: value for (branch,), value in up} == {str(notified[name]): name != "hung" for name in LAYERS}

    def options(*names: str, first: str = "rw") -> str:
        listed = ":".join(f"{notified[name]}={'rw' if at else first}" for at, name in enumerate(names))
        return f"survive=on,branch_timeout=1,create=rr,udba=notify,br={listed}"

    for request in (
        {"op": "where", "path": "/in_d"},
        {"op": "why", "path": "/in_d"},
        {"op": "mvdown", "path": "/all/in_a", "source": hung},
        {"op": "sync", "source": hung, "target": other, "mode": "copy"},
        {"op": "branches", "edits": [["mod", f"{hung}=ro"]]},
        {"op": "branches", "edits": [["del", other]]},
        {"op": "branches", "edits": [["del", hung], ["del", other]]},
        {"op": "branches", "edits": [["append", f"{other}/all=ro"]]},
        {"op": "remount", "options": "ro"},
        {"op": "remount", "options": f"mod={hung}=ro"},
        {"op": "reconfigure", "options": options("a", "b", "d")},
        {"op": "reconfigure", "options": options("b", "a", "c", "d")},
        {"op": "reconfigure", "options": f"{options('a', 'b', 'c', 'd')}:{other}/all=ro"},
        {"op": "reconfigure", "options": options("a", "b", "c", "d", first="ro")},
    ):
        assert "does not answer" in notified.control(request)["error"], request
    number_of(os.close, writer)
    notified.unmount()


def test_it_is_removed(mount: Mount, server: Server) -> None:
    """Without being asked: the rest is a union of its own at once, which other processes take over later, too."""
    path, hung = mount.path, str(mount["hung"])
    os.listdir(path / "all")
    writer = os.open(path / "only/f", os.O_WRONLY)
    os.pwrite(writer, b"F", 0)
    deleted = os.open(path / "all/in_hung", os.O_RDONLY)
    os.unlink(path / "all/in_hung")
    inside = os.open(path / "only", os.O_RDONLY)
    server.stall()
    assert number_of(os.stat, path / "only/new") == errno.EIO
    answer = mount.control({"op": "branches", "edits": [["del", hung]]})
    assert answer["branches"] == [f"{mount[name]}=rw" for name in ("a", "b", "c", "d")]
    for _ in range(2):
        assert sorted(os.listdir(path)) == ["all", "apart", "in_d"]
        assert os.listdir(path / "all") == ["in_a"]
        assert number_of(os.stat, path / "only") == errno.ENOENT
        assert (path / "in_d").read_text() == "in_d"
        (path / "new").write_text("new")
        (path / "new").unlink()
        assert number_of(os.pwrite, writer, b"F", 0) == errno.EIO
        assert number_of(os.pread, deleted, 1, 0) == errno.EIO
        status = mount.control({"op": "status"})
        assert status["offline"] == {}
        assert status["branches"] == answer["branches"]
        os.kill(status["pid"], signal.SIGKILL)
    number_of(os.close, writer)
    os.close(deleted)
    os.close(inside)
    server.go_on()
    mount.control({"op": "branches", "edits": [["append", f"{hung}=rw"]]})
    assert (path / "only/f").read_text() == "F"


def test_a_branch_that_does_not_answer_at_the_mount(server: Server, tmp_path: Path) -> None:
    server.stall()
    branches = [f"{tmp_path / name}={permission}" for name, permission in LAYERS.items()]
    mount = Mount(branches, tmp_path / "mnt", options="branch_timeout=1")
    try:
        with pytest.raises(MountFailed, match="hung has not answered for 1 s") as failed:
            mount.start()
    finally:
        mount.destroy()
    assert failed.value.code == ExitCode.BRANCH


def test_a_mount_of_the_daemon(daemon: Daemon, tmp_path: Path) -> None:
    """It does not answer when the daemon starts; then it does, and then once more not."""
    (tmp_path / "real").mkdir()
    (tmp_path / "real/of_hung").touch()
    (tmp_path / "pool.a/apart").mkdir(parents=True)
    with stalling(tmp_path / "real", tmp_path / "pool.hung") as server:
        path = daemon.add("pool", survive=True, branch_timeout=1)
        daemon.mounts["pool"]["branches"] = [f"{tmp_path}/pool.{name}=rw" for name in ("a", "hung")]
        daemon.settings["retry_missing"] = 0.1
        server.stall()
        daemon.start()
        assert "has not answered for 1 s" in daemon.wait_for("pool", "waiting")["reason"]
        server.go_on()
        first = daemon.wait_for("pool")["pid"]
        assert sorted(os.listdir(path)) == ["apart", "of_hung"]
        server.stall()
        assert number_of(os.stat, path / "new") == errno.EIO
        second = daemon.wait_for("pool", not_pid=first)["pid"]
        assert f"pool: {tmp_path}/pool.hung has not answered for " in daemon.command("status", code=None)
        assert (path / "apart").is_dir()
        server.go_on()
        daemon.wait_for("pool", not_pid=second)
        assert sorted(os.listdir(path)) == ["apart", "of_hung"]
        assert "has not answered" not in daemon.command("status")
        server.stall()
        assert number_of(os.stat, path / "new") == errno.EIO
        left = daemon.command("branch", "del", "--save", "pool", f"{tmp_path}/pool.hung")
        assert left.splitlines()[0] == f"{tmp_path}/pool.a=rw"
        assert os.listdir(path) == ["apart"]
        assert "pool.hung" not in daemon.config.read_text()
        daemon.stop()


def test_the_file_alone_removes_it(daemon: Daemon, tmp_path: Path) -> None:
    """With what else it says; it is in use, and the next process knows of no such branch, either."""
    (tmp_path / "real/of_hung").mkdir(parents=True)
    (tmp_path / "pool.a/apart").mkdir(parents=True)
    with stalling(tmp_path / "real", tmp_path / "pool.hung") as server:
        path = daemon.add("pool", survive=True, branch_timeout=1)
        a, hung, b = (f"{tmp_path}/pool.{name}=rw" for name in ("a", "hung", "b"))
        daemon.mounts["pool"]["branches"] = [a, hung, b]
        (tmp_path / "pool.b").mkdir()
        daemon.start()
        inside = os.open(path / "of_hung", os.O_RDONLY)
        server.stall()
        assert number_of(os.stat, path / "of_hung/new") == errno.EIO
        second = daemon.wait_for("pool")["pid"]
        daemon.mounts["pool"]["branches"] = [a, b]
        daemon.mounts["pool"]["dirwh"] = 7
        daemon.write()
        daemon.command("reload")  # or the file is seen to have changed
        daemon.wait_for("pool", not_pid=second)
        assert daemon.command("branch", "list", "pool").split() == [a, b]
        assert os.listdir(path) == ["apart"]
        assert daemon.command("reload") == "nothing has changed\n"
        os.close(inside)
        daemon.stop()


def kill_while_it_waits(server: Server, process: int, path: Path) -> None:
    """Stop the branch, and kill the mount process that waits for it with somebody's stat(2) of `path`, who gets EIO."""
    server.stall()
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(number_of, os.stat, path)
        until(lambda: server.waiting > 0, "request to the branch", SECONDS)
        os.kill(process, signal.SIGKILL)
        assert waiting.result(SECONDS) == errno.EIO


def test_its_process_is_killed_while_it_waits(server: Server, union: UnionFactory) -> None:
    """Before anybody could find out what for: the next one waits for the branch, too, and is found out in its turn."""
    mount = union(LAYERS, "notify", "survive=on,branch_timeout=2,create=rr", allow_log=LOG)
    path = mount.path
    first = mount.control({"op": "status"})["pid"]
    kill_while_it_waits(server, first, path / "only/new")
    assert offline(mount) == [str(mount["hung"])]
    assert (path / "in_d").read_text() == "in_d"
    server.go_on()
    until(lambda: offline(mount) == [], "its return", SECONDS)
    assert (path / "only/f").read_text() == "f"


def test_a_mount_of_the_daemon_is_killed_while_it_waits(daemon: Daemon, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "pool.a/apart").mkdir(parents=True)
    with stalling(tmp_path / "real", tmp_path / "pool.hung") as server:
        path = daemon.add("pool", survive=True, branch_timeout=2)
        daemon.mounts["pool"]["branches"] = [f"{tmp_path}/pool.{name}=rw" for name in ("a", "hung")]
        daemon.start()
        first = daemon.wait_for("pool")["pid"]
        kill_while_it_waits(server, first, path / "new")
        second = daemon.wait_for("pool", not_pid=first)["pid"]
        assert (path / "apart").is_dir()
        server.go_on()
        daemon.wait_for("pool", not_pid=second)
        assert os.listdir(path) == ["apart"]
        daemon.stop()


def test_nothing_is_asked_of_it(mount: Mount, server: Server) -> None:
    """What a server that stands still was sent stays in its queue, and can be counted: who works on the other four
    branches waits for nothing of the fifth."""
    path = mount.path
    os.stat(path / "apart/f")
    here = os.open(path / "apart", os.O_PATH)  # the kernel does not forget it
    server.stall()
    assert number_of(os.stat, path / "only/new") == errno.EIO
    until(lambda: server.waiting == 1, "prober that asks, alone", SECONDS)
    for number in range(20):
        new, directory = path / f"apart/new{number}", path / f"apart/dir{number}"
        new.write_text("new")
        directory.mkdir()
        os.chmod(new, 0o600)
        os.truncate(new, 1)
        os.setxattr(new, "user.x", b"x")
        os.link(new, directory / "link")
        os.symlink("new", directory / "symlink")
        os.rename(new, directory / "renamed")
        with open(directory / "renamed", "r+b") as stream:
            stream.write(b"N")
            os.fsync(stream.fileno())
        assert sorted(os.listdir(directory)) == ["link", "renamed", "symlink"]
        assert os.statvfs(path).f_blocks
        for name in ("link", "symlink", "renamed"):
            os.unlink(directory / name)
        directory.rmdir()
        assert (path / "in_d").read_text() == "in_d"
        for name in ("in_hung", "new"):
            assert number_of(os.stat, path / "all" / name) == errno.EIO
        for name in ("", "all", "only"):
            assert number_of(os.listdir, path / name) == errno.EIO
        assert number_of(os.unlink, path / "all/in_a") == errno.EIO
        assert number_of(os.mkdir, path / "all/new") == errno.EIO
        for source, target in (("all/in_a", "apart/in_a"), ("apart/f", "all/f"), ("only", "apart/only")):
            assert number_of(os.rename, path / source, path / target) == errno.EIO
    assert server.waiting == 1
    server.go_on()
    until(lambda: offline(mount) == [], "its return", SECONDS)
    assert sorted(os.listdir(path / "all")) == ["in_a", "in_hung"]
    assert os.listdir(path / "apart") == ["f"]
    os.close(here)


def test_closing_is_what_hangs(notified: Mount, server: Server) -> None:
    """close(2) asks the server. It has no descriptor any more that would say which branch that is of."""
    path = notified.path
    writer = os.open(path / "only/f", os.O_WRONLY)
    os.pwrite(writer, b"F", 0)
    server.stall()
    with ThreadPoolExecutor(1) as threads:
        closing = threads.submit(number_of, os.close, writer)
        until(lambda: server.waiting > 0, "request to the branch", SECONDS)
        assert closing.result(SECONDS) == errno.EIO, "what was written may be lost"
    assert offline(notified) == [str(notified["hung"])]
    assert (path / "in_d").read_text() == "in_d"
    server.go_on()
    until(lambda: offline(notified) == [], "its return", SECONDS)
    assert (path / "only/f").read_text() == "F"


def test_a_copy_up_is_under_way(server: Server, union: UnionFactory, tmp_path: Path) -> None:
    """It has read some of the file when the branch stops answering. Nobody else waits, and nothing of it is left."""
    size = 3 * HALF_AT
    (tmp_path / f"real/only/{HALF}").write_bytes(b"h" * size)
    (tmp_path / "a/only").mkdir()
    layers = LAYERS | {"hung": "ro"}
    mount = union(layers, "notify", "survive=on,branch_timeout=1,io=requests", allow_log=LOG)
    path, copied = mount.path, mount["a"] / "only"
    file = os.open(path / f"only/{HALF}", os.O_RDWR)
    with ThreadPoolExecutor(1) as threads:
        for result in (errno.EIO, None):
            writing = threads.submit(number_of, os.pwrite, file, b"H", 0)
            server.wait_for_half()
            if result is None:
                server.go_on()
            else:
                server.stall()
            assert (path / "in_d").read_text() == "in_d"
            assert writing.result(SECONDS) == result
            if result is not None:
                assert offline(mount) == [str(mount["hung"])]
                assert os.listdir(copied) == []
                assert number_of(os.stat, path / f"only/{HALF}") == errno.EIO
                assert number_of(os.chmod, path / f"only/{HALF}", 0o600) == errno.EIO
                server.go_on()
                until(lambda: offline(mount) == [], "its return", SECONDS)
                assert os.listdir(copied) == []
    os.close(file)
    assert (copied / HALF).read_bytes() == b"H" + b"h" * (size - 1)


def test_it_is_asked_later_each_time(mount: Mount, server: Server) -> None:
    for times in (1, 2):
        server.stall()
        assert number_of(os.stat, mount.path / "only/new") == errno.EIO
        server.go_on()
        until(lambda: offline(mount) == [], f"its return, {times}", SECONDS)
        assert (mount.path / "only/f").read_text() == "f"


@pytest.mark.parametrize(
    ("before", "ended", "delay"),
    [(0, 0.0, 0.0), (1, 10.0, 40.0), (3, 10.0, 160.0), (20, 10.0, 3600.0), (3, 4000.0, 0.0)],
    ids=["first", "second", "fourth", "longest", "long-ago"],
)
def test_how_much_later(
    before: int,
    ended: float,
    delay: float,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """before: how often it was away already; ended: seconds since it was the last time."""
    asked: list[float] = []

    def probe(branch: Branch, delay: float, killed: Sequence[int]) -> int:
        asked.append(delay)
        return -1

    monkeypatch.setattr("udbad.mount.offline._probe", probe)
    branch = Branch(7, 0, bytes(tmp_path), Perm.RW, frozenset(), None, -1, -1, 0, "nfs", offline=True)
    outages = {"7": {"since": 0.0, "times": before, "ended": time.monotonic() - ended}} if before else {}
    left = SimpleNamespace(facts={"outages": outages}, killed=[])
    caplog.set_level("CRITICAL", "udbad.mount.offline")
    Offline(BranchSet((branch,), 1), left, 20)  # type: ignore[arg-type]  # as much of one as it looks at
    assert asked == [delay]
