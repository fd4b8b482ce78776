"""A mount process that comes to its end between its mount and its word "ready": no mount stays without a process."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.leaks import mounts_under
from tests.t5_daemon.daemon import Daemon, until

pytestmark = pytest.mark.fuse

HANGING = """
import os, time
from udbad.mount import mountproc
write_entry = mountproc.MountProcess.write_entry
def hang(process):
    while os.path.exists({trigger!r}):
        with open({reached!r}, "w") as file:
            file.write(str(os.getpid()))
        time.sleep(0.05)
    write_entry(process)
mountproc.MountProcess.write_entry = hang
"""


class Hanging:
    """A daemon with one mount `a`, whose processes mount and then say nothing while `trigger` exists."""

    def __init__(self, daemon: Daemon, tmp_path: Path) -> None:
        self.daemon = daemon
        self.trigger, self.reached = tmp_path / "trigger", tmp_path / "reached"
        self.trigger.touch()
        daemon.patch = HANGING.format(trigger=str(self.trigger), reached=str(self.reached))
        self.point = daemon.add("a")
        self._root = tmp_path
        (daemon.branch("a", "base") / "file").write_text("served")

    def mounts(self) -> list[int]:
        """Connections of the unions, dead or served."""
        return [mount.minor for mount in mounts_under(self._root) if mount.fs_type == "fuse.udba"]

    def hangs(self) -> int:
        """The process that has mounted and says nothing."""
        pid = int(until(lambda: self.reached.exists() and self.reached.read_text(), "it hangs"))
        assert len(self.mounts()) == 1
        return pid


@pytest.fixture
def hanging(daemon: Daemon, tmp_path: Path) -> Iterator[Hanging]:
    made = Hanging(daemon, tmp_path)
    try:
        yield made
    finally:
        made.trigger.unlink(missing_ok=True)


@pytest.mark.parametrize("linked", [False, True], ids=["", "linked"])
def test_one_that_is_not_ready_in_time(hanging: Hanging, tmp_path: Path, linked: bool) -> None:
    """linked: the configuration has another path of the mount point than the kernel."""
    daemon = hanging.daemon
    daemon.settings |= {"start_timeout": 1, "restart_delay": 60}
    if linked:
        (tmp_path / "link").symlink_to(tmp_path)
        daemon.mounts["a"]["mount_point"] = str(tmp_path / "link" / hanging.point.name)
    daemon.start(ready=False)
    hanging.hangs()
    until(lambda: daemon.state("a")["reason"] == "not ready after 1 s", "it is given up")
    assert len(hanging.mounts()) == 1, "the next process is to replace it, without the bare directory in between"
    daemon.stop()


def test_one_that_is_killed_is_replaced(hanging: Hanging) -> None:
    daemon = hanging.daemon
    daemon.start(ready=False)
    pid = hanging.hangs()
    (dead,) = hanging.mounts()
    hanging.trigger.unlink()
    os.kill(pid, signal.SIGKILL)
    daemon.wait_for("a", not_pid=pid)
    assert (hanging.point / "file").read_text() == "served"
    (served,) = hanging.mounts()
    assert served != dead
    daemon.stop()


def test_one_that_is_killed_while_the_daemon_stops(hanging: Hanging) -> None:
    daemon = hanging.daemon
    daemon.settings |= {"restart_delay": 60}
    daemon.start(ready=False)
    os.kill(pid := hanging.hangs(), signal.SIGKILL)
    until(lambda: daemon.state("a")["reason"] == f"process {pid} ended before it was ready", "it is noticed")
    assert len(hanging.mounts()) == 1
    daemon.stop()
