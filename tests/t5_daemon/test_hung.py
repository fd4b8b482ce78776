"""A branch that stops answering: the mount goes on without it, and with it as soon as it answers.

Five branches, one of them on a file system of the test (tests/helpers/stalling.py). What has to wait for the branch is
told by an error, so that no test hangs with it.
"""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.helpers.mount import Mount, MountFailed, UnionFactory
from tests.helpers.offline import number_of, offline
from tests.helpers.stalling import STUCK, Server, stalling
from tests.t5_daemon.daemon import Daemon, until
from udbad.errors import ExitCode
from udbad.mount import keeper

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
