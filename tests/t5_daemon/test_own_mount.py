"""A mount is taken away and changed by what it is, not by its path: others mount over it, and detach it."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.helpers.leaks import mount_on
from tests.helpers.mount import DEADLINE, Mount, UnionFactory
from tests.t5_daemon.daemon import Daemon, until
from udbad.kernel import mounts

pytestmark = pytest.mark.fuse


@contextmanager
def mounted_over(path: Path) -> Iterator[None]:
    """A tmpfs over whatever is at `path`, with a file `theirs` in it, which must be there to the end."""
    subprocess.run(["mount", "-t", "tmpfs", "none", path], check=True, timeout=DEADLINE)
    try:
        (path / "theirs").touch()
        yield
        assert (path / "theirs").exists()
    finally:
        subprocess.run(["umount", "-i", "-c", "-l", path], check=True, timeout=DEADLINE)


def options_of(mount: Mount) -> frozenset[str]:
    """Flags of the mount in mountinfo."""
    return mount_on(mount.path).options


def ended_in_order(mount: Mount) -> None:
    """The process has ended with code 0, without a traceback, and its branch is marked clean."""
    assert mount.process.wait(DEADLINE) == 0, mount.log()
    assert "Traceback" not in mount.log()
    assert not (mount["top"] / ".wh..wh.udbad").exists()


def test_what_lies_over_it_stays(union: UnionFactory) -> None:
    """umount and stop refuse; SIGTERM ends the process in order. The union below stays, dead, and is no obstacle."""
    mount = union(allow_log="WARNING.*(something else is mounted over)")
    path = os.fsencode(mount.path)
    with mounted_over(mount.path):
        with pytest.raises(OSError, match="something else is mounted over"):
            mounts.unmount_top(path)
        with pytest.raises(OSError, match="something else is mounted over"):
            mounts.lying(path)
        for lazy in (False, True):
            (ours,) = (entry for entry in mounts.unions() if entry.connection == mount.connection)
            with pytest.raises(OSError, match="something else is mounted over"):
                mounts.unmount(path, ours.id, lazy)
        answer = mount.control({"op": "stop"})
        assert (answer["ok"], answer["error"]) == (
            False, f"{mount.path}: something else is mounted over the union there",
        )  # fmt: skip
        mount.process.send_signal(signal.SIGTERM)
        ended_in_order(mount)
    mounts.unmount_top(path)
    with pytest.raises(OSError, match="not mounted there any more"):
        mounts.unmount(path, ours.id)


@pytest.mark.parametrize("covered", [False, True])
def test_sigterm_after_it_was_detached(union: UnionFactory, covered: bool) -> None:
    mount = union(allow_log="WARNING.*not mounted there any more")
    (mount.path / "file").touch()
    with (mount.path / "file").open():
        subprocess.run(["umount", "-i", "-c", "-l", mount.path], check=True, timeout=DEADLINE)
        answer = mount.control({"op": "stop"})
        assert (answer["ok"], answer["error"]) == (
            False, f"{mount.path}: the union is not mounted there any more",
        )  # fmt: skip
        if covered:  # by a mount of somebody else, which is not ours to take away
            with mounted_over(mount.path):
                mount.process.send_signal(signal.SIGTERM)
                ended_in_order(mount)
        else:
            mount.process.send_signal(signal.SIGTERM)
            ended_in_order(mount)


def test_flags(union: UnionFactory) -> None:
    """Exactly the flags named, on the mount of that id; the way access times are handled stays unless named."""
    mount = union()
    path = os.fsencode(mount.path)
    (ours,) = mounts.lying(path)
    before = options_of(mount)
    with mounts.opened(path, ours.id) as fd:
        mounts.set_flags(fd, {"nosuid", "nodev", "noexec", "ro"})
        assert options_of(mount) == before - {"rw"} | {"ro", "nosuid", "nodev", "noexec"}
        mounts.set_flags(fd, {"nodev", "noatime"})
        assert options_of(mount) == before - {"relatime"} | {"nodev", "noatime"}
        mounts.set_flags(fd, ())
        assert options_of(mount) == before - {"relatime"} | {"noatime"}
    with (mount.path / "file").open("w"), mounts.opened(path, ours.id) as fd, pytest.raises(OSError, match="busy"):
        mounts.set_flags(fd, {"ro"})
    with mounted_over(mount.path), pytest.raises(OSError, match="mounted over"), mounts.opened(path, ours.id):
        pytest.fail("the mount over it was opened")


def test_a_dead_union_below_something_else(daemon: Daemon) -> None:
    """After a crash the next process neither takes that away nor covers it; it comes up when that has gone."""
    point = daemon.add("a")
    daemon.settings.update(restart_delay=0.1, restart_delay_max=0.2)
    daemon.start()
    pid = daemon.state("a")["pid"]
    with mounted_over(point):
        os.kill(pid, signal.SIGKILL)
        until(lambda: "something else is mounted over" in daemon.state("a")["reason"], "the reason")
        assert "something else is mounted over" in daemon.command("umount", str(point), code=1)
    daemon.wait_for("a", not_pid=pid)
    daemon.stop()
