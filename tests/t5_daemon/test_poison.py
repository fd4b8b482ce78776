"""A request that nobody survives is answered EIO; a mount that nobody can take over gives errors, and does not hang."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.helpers.mount import DEADLINE, Mount, UnionFactory
from tests.t5_daemon.daemon import Daemon, until
from tests.t5_daemon.test_survive import client, kill
from udbad.mount import keeper

pytestmark = [
    pytest.mark.fuse,
    pytest.mark.skipif(keeper.why_not() is not None, reason=str(keeper.why_not())),
]

POISON = """
import os, signal, threading, time
from udbad.branch import datacalls, syscalls
from udbad.kernel import protocol
from udbad.union import create

def is_connection(fd):
    try:
        return os.readlink(f"/proc/self/fd/{fd}") == "/dev/fuse"
    except FileNotFoundError:
        return False

def waits(thread):  # uninterruptibly
    with open(f"/proc/self/task/{thread}/stat") as stat:
        return " D " in stat.read()

def end(what):
    if b"beside" in what:
        connection = next(fd for fd in range(1000) if is_connection(fd))
        waiting = threading.Thread(target=os.write, args=(connection, protocol.inval_entry(1, b"x")), daemon=True)
        waiting.start()
        while not waits(waiting.native_id):
            time.sleep(0.001)
    if b"crash" in what:
        os.kill(os.getpid(), signal.SIGSEGV)
    elif b"kill" in what:
        os.kill(os.getpid(), signal.SIGKILL)

def mkdir(sb, creds, parent, name, *rest, make=create.mkdir):
    end(name)
    return make(sb, creds, parent, name, *rest)

def sync_file(fd, *rest, sync=datacalls.sync_file):
    what = os.readlink(os.fsencode(f"/proc/self/fd/{fd}"))
    if b"crash" in what:
        import ctypes
        ctypes.string_at(0)  # in this thread
    end(what)
    return sync(fd, *rest)

create.mkdir, datacalls.sync_file = mkdir, sync_file
"""
"""Directories and files to be synced by whose names a mount process dies."""
LOG = "another one takes over|has crashed|died of a request|starting another|was killed by"


def test_a_crash_while_a_thread_waits_for_the_request(union: UnionFactory, patch_daemon: Callable[[str], None]) -> None:
    """One that tells the kernel what to forget of the directory needs the lock that the request has, and cannot be
    killed meanwhile. What has crashed must not wait for it."""
    patch_daemon(POISON)
    mount = union(options="survive=on", allow_log=LOG)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        os.mkdir(mount.path / "crash beside")
    assert mount.control({"op": "status"})["restarts"] == 5


@pytest.mark.parametrize("name", ["crash", "kill"])
def test_a_request(union: UnionFactory, patch_daemon: Callable[[str], None], name: str) -> None:
    """What else is under way is done."""
    patch_daemon(POISON)
    mount = union(options="survive=on", allow_log=LOG)
    fd = os.open(mount.path / "open", os.O_RDWR | os.O_CREAT)

    def others() -> None:
        for number in range(500):
            os.mkdir(mount.path / f"directory {number}")
            os.pwrite(fd, b"%04d" % number, 4 * number)

    with client(others), pytest.raises(OSError, match=os.strerror(errno.EIO)):
        os.mkdir(mount.path / name)
    assert mount.control({"op": "status"})["restarts"] == 5
    assert f"mkdir of /{name} (node 1) by process {os.getpid()}; it is answered EIO" in mount.log()
    assert ("in mkdir" in mount.log()) == (name == "crash")
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):  # by no further death
        os.mkdir(mount.path / name)
    kill(mount)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        os.mkdir(mount.path / name)
    assert mount.control({"op": "status"})["restarts"] == 6
    numbers = mount.control({"op": "metrics"})["metrics"]
    assert numbers["udbad_requests_refused_total"] == [[[], 3]]
    assert numbers["udbad_requests_resent_total"][0][1] >= 5
    assert numbers["udbad_state_bytes"][0][1] >= 4096
    assert len(os.listdir(mount.path)) == 501
    assert os.pread(fd, 4, 4 * 499) == b"0499"
    os.close(fd)


def test_a_request_in_a_thread(union: UnionFactory, patch_daemon: Callable[[str], None]) -> None:
    """The thread that has crashed tells."""
    patch_daemon(POISON)
    mount = union(options="survive=on", allow_log=LOG)
    fd = os.open(mount.path / "crash", os.O_RDWR | os.O_CREAT)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        os.fsync(fd)
    assert mount.control({"op": "status"})["restarts"] == 5
    assert "fsync of /crash" in mount.log()
    assert os.pwrite(fd, b"goes on", 0) == 7
    os.close(fd)


def test_one_of_the_daemon(daemon: Daemon) -> None:
    daemon.patch = POISON
    point = daemon.add("a", survive=True)
    daemon.start()
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        os.mkdir(point / "crash")
    assert "mkdir of /crash (node 1)" in daemon.log()
    assert daemon.state("a")["restarts"] == 5
    os.mkdir(point / "directory")
    daemon.stop()


NOBODY = """
import os, time
from udbad.union import recall

def recall_(*arguments):
    if {raises}:
        raise OSError(5, "nobody can")
    if os.fork() == 0:
        while os.path.exists({flag!r}):
            time.sleep(0.02)
        os._exit(0)
    time.sleep(1000)

recall.recall = recall_
"""
"""What a successor does: it fails, or waits for ever, and something else has the connection as well."""


@pytest.fixture(params=["fails", "hangs"])
def nobody(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    flag = tmp_path / "flag"
    flag.touch()
    yield NOBODY.format(raises=request.param == "fails", flag=str(flag))
    flag.unlink(missing_ok=True)


def _gets_errors(path: Path) -> None:
    with pytest.raises(OSError, match=os.strerror(errno.ECONNABORTED)):  # of what waits
        os.listdir(path)
    with pytest.raises(OSError, match=os.strerror(errno.ENOTCONN)):
        os.listdir(path)


def _ended(mount: Mount) -> bool:
    return mount.process.poll() is not None


def test_nobody_can_take_over(union: UnionFactory, nobody: str, patch_daemon: Callable[[str], None]) -> None:
    patch_daemon(nobody)
    mount = union(options="survive=on,restart_timeout=1", allow_log=f"{LOG}|nobody c")
    kill(mount)
    _gets_errors(mount.path)
    until(lambda: _ended(mount), "the end of the guardian", DEADLINE)
    assert mount.process.returncode == 1
    assert "nobody could take the mount over; its users get errors" in mount.log()
    mount.kill()


def test_nobody_can_take_over_from_the_daemon(daemon: Daemon, nobody: str, tmp_path: Path) -> None:
    """It mounts anew then."""
    daemon.patch = nobody
    point = daemon.add("a", survive=True, restart_timeout=1)
    daemon.start()
    pid = daemon.state("a")["pid"]
    fd = os.open(point / "file", os.O_RDWR | os.O_CREAT)
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(OSError, match=os.strerror(errno.ECONNABORTED)):
        os.stat(point / "new")
    (tmp_path / "flag").unlink()  # what else has the connection has the branches, too
    daemon.wait_for("a", not_pid=pid)
    with pytest.raises(OSError, match=os.strerror(errno.ENOTCONN)):
        os.pread(fd, 1, 0)
    with pytest.raises(OSError, match=os.strerror(errno.ENOTCONN)):
        os.close(fd)
    assert os.listdir(point) == ["file"]
    assert "a: given up; its users get errors" in daemon.log()
    daemon.stop()
