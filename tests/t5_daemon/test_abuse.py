"""What users and machines do to a daemon: each gets a clear message, and everything else goes on."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.leaks import read_mountinfo
from tests.t5_daemon.daemon import DEADLINE, Daemon, until

pytestmark = pytest.mark.fuse


@pytest.fixture
def other(daemon: Daemon) -> Iterator[Path]:
    """The mount point of a mount `other`, to be started by the test, that must serve to the end."""
    point = daemon.add("other")
    (daemon.branch("other", "base") / "file").write_text("served")
    daemon.settings.update(restart_delay=0.1, retry_missing=0.2)
    yield point
    assert (point / "file").read_text() == "served"
    assert daemon.state("other")["restarts"] == 0
    daemon.stop()
    assert "Traceback" not in daemon.log()


def refused(daemon: Daemon, name: str, reason: str) -> None:
    """The mount does not come up, and says why."""
    # It is tried again and again; in between it is starting, without a reason.
    state = until(
        lambda: (now := daemon.state(name))["state"] in ("restarting", "failed", "waiting") and now, f"{name} refused"
    )
    assert reason in state["reason"], state
    until(lambda: f"{name}: {state['reason']}" in daemon.command("status", code=1), "the reason in the table")
    assert state["reason"].count("\n") == 0


def test_a_start_that_fails_says_why_once(daemon: Daemon, other: Path) -> None:
    """However often it is tried; and nothing is said of the processes that try."""
    daemon.add("a")
    daemon.branch("a", "base").rmdir()
    daemon.branch("a", "base").symlink_to(daemon.branch("a", "top"))
    daemon.settings.update(restart_delay=0.1, restart_delay_max=0.1)
    daemon.start()
    reason = f"branch {daemon.branch('a', 'base')} is given twice, it is the same directory as"
    refused(daemon, "a", reason)
    assert reason in daemon.command("check-config", "-c", str(daemon.config), code=10)
    pids = [until(lambda: daemon.state("a")["pid"], "a try")]
    pids.append(until(lambda: daemon.state("a")["pid"] not in (None, *pids) and daemon.state("a")["pid"], "another"))
    said = [line for line in daemon.log().splitlines() if "INFO" not in line]
    assert [reason in line for line in said] == [True], said


# -- configuration --------------------------------------------------------------------------------


def test_run_with_a_broken_configuration(daemon: Daemon) -> None:
    daemon.write()
    daemon.config.write_text(daemon.config.read_text() + 'heartbeat = "often"\n[mounts.a]\nmount_point = 3\n')
    output = daemon.command("run", "-c", str(daemon.config), code=10)
    assert [line.partition(".toml: ")[2].partition(":")[0] for line in output.splitlines()] == [
        "daemon.heartbeat", "mounts.a.mount_point", "mounts.a.branches",
    ]  # fmt: skip
    assert not (Path(daemon.run_dir) / "udbad.sock").exists()


def test_what_cannot_be_read_in_conf_d(daemon: Daemon, other: Path) -> None:
    more = daemon.tmp_path / "conf.d"
    more.mkdir()
    daemon.start()
    for make, error in (
        (os.mkfifo, "not a regular file"),
        (os.mkdir, "Is a directory"),
        (lambda path: os.symlink("gone", path), "No such file or directory"),
    ):
        make(more / "x.toml")
        output = daemon.command("reload", code=10)
        assert output == f"udbad: {more}/x.toml: {error}\n"
        (more / "x.toml").rename(daemon.tmp_path / f"was-{error}")
    assert daemon.command("reload") == "nothing has changed\n"


def test_two_mounts_on_one_mount_point_behind_a_link(daemon: Daemon) -> None:
    """The configuration is compared as text; where links lead shows when it is mounted, by both at the same time."""
    point = daemon.add("a")
    names = ["a", *(f"b{number}" for number in range(4))]
    for name in names[1:]:
        daemon.add(name)
        link = daemon.tmp_path / f"link-{name}"
        link.symlink_to(daemon.tmp_path)
        daemon.mounts[name]["mount_point"] = str(link / "a.mnt")
    daemon.settings.update(restart_delay=0.1)
    daemon.start()
    states = {name: daemon.state(name) for name in names}
    (winner,) = (name for name, state in states.items() if state["state"] == "serving")
    for name in set(names) - {winner}:
        refused(daemon, name, f"{point} is mounted already, by process {states[winner]['pid']}")
        del daemon.mounts[name]
    assert len([mount for mount in read_mountinfo() if mount.path == point]) == 1
    daemon.write()
    daemon.ask("reload")
    assert daemon.wait_for(winner)["pid"] == states[winner]["pid"]
    assert os.listdir(point) == []
    daemon.stop()


def test_mounts_inside_branches_of_one_another_behind_links(daemon: Daemon, other: Path) -> None:
    """a's branch is in b, b's is in a: neither text shows it, so each waits for what can never come."""
    (daemon.tmp_path / "link").symlink_to(daemon.tmp_path)
    for name, inside in (("a", "b"), ("b", "a")):
        daemon.add(name, ["top=rw"])
        branches = daemon.mounts[name]["branches"]
        assert isinstance(branches, list)
        branches.append(f"{daemon.tmp_path}/link/{inside}.mnt/sub=ro")
    daemon.start()
    for name, inside in (("a", "b"), ("b", "a")):
        refused(daemon, name, f"{daemon.tmp_path}/link/{inside}.mnt/sub does not exist")
    # Even when there is one: a union is no branch.
    (daemon.branch("b", "top") / "sub").mkdir()
    del daemon.mounts["b"]["branches"][1]  # type: ignore[attr-defined]  # a list, as above
    daemon.write()
    daemon.ask("reload")
    daemon.wait_for("b")
    until(lambda: "is in a udbad mount itself" in daemon.state("a")["reason"], "the other reason")


@pytest.mark.parametrize("path", ["other.mnt", "other.mnt/sub"])
def test_a_branch_inside_a_union_mounted_by_hand(daemon: Daemon, other: Path, path: str) -> None:
    (daemon.branch("other", "base") / "sub").mkdir()
    point = daemon.tmp_path / "hand.mnt"
    point.mkdir()
    daemon.start()
    answer = daemon.ask("mount", mount_point=str(point), options=f"br={daemon.tmp_path}/{path}=ro")
    assert (answer["ok"], "is in a udbad mount itself" in answer["error"]) == (False, True), answer
    assert daemon.state(str(point))["state"] == "unknown", "what mount(8) was refused is not tried again"


def test_a_writable_branch_of_another_mount(daemon: Daemon, other: Path) -> None:
    """Refused in the configuration, as a whole; and to mount(8)."""
    point = daemon.tmp_path / "second.mnt"
    point.mkdir()
    daemon.start()
    taken = daemon.branch("other", "top")
    message = f"{taken}/sub is writable here and {taken} in other; two mounts may not write to one tree"
    (taken / "sub").mkdir()
    daemon.mounts["second"] = {"mount_point": str(point), "branches": [f"{taken}/sub=rw"]}
    daemon.write()
    assert message in daemon.command("reload", code=10)
    del daemon.mounts["second"]
    daemon.write()
    answer = daemon.ask("mount", mount_point=str(point), options=f"br={taken}/sub=rw")
    assert (answer["ok"], answer["error"]) == (False, message)
    answer = daemon.ask("mount", mount_point=str(point), options=f"br={taken}/sub=ro")
    assert answer["ok"], answer
    subprocess.run(["umount", point], check=True, timeout=DEADLINE)


# -- sockets and the run directory ----------------------------------------------------------------


def test_the_socket_is_in_use_by_something_else(daemon: Daemon) -> None:
    daemon.add("a")
    daemon.write()
    path = f"{daemon.run_dir}/udbad.sock"
    with socket.socket(socket.AF_UNIX) as foreign:
        foreign.bind(path)
        foreign.listen()
        output = daemon.command("run", "-c", str(daemon.config), code=1)
        assert output == f"udbad: {daemon.run_dir}: another process answers on {path}\n"
        assert not [mount for mount in read_mountinfo() if mount.path == daemon.tmp_path / "a.mnt"]
    daemon.start()  # now the socket is a stale one
    daemon.stop()


def test_the_run_directory_is_full_from_the_start(daemon: Daemon) -> None:
    """No room for what is known about mounts: they serve, the supervisor watches them, others cannot ask them."""
    point = daemon.add("a")
    (daemon.branch("a", "base") / "file").write_text("served")
    command = ["mount", "-t", "tmpfs", "-o", "mode=755,size=64k,nr_inodes=9", "none", daemon.run_dir]
    subprocess.run(command, check=True, timeout=DEADLINE)
    try:
        filler = Path(daemon.run_dir) / "filler"
        filler.mkdir()
        for number in range(5):  # the root, the directory, these, and two left for the lock and the socket
            (filler / str(number)).touch()
        daemon.start()
        assert f"not registered in {daemon.run_dir}: No space left on device" in daemon.log()
        assert (point / "file").read_text() == "served"
        state = daemon.state("a")
        assert state["state"] == "serving"
        assert "cannot be asked" in state["reason"]
        shutil.rmtree(filler)
        # With room again the next process is known like any other.
        os.kill(state["pid"], signal.SIGKILL)
        after = daemon.wait_for("a", not_pid=state["pid"])
        assert after["process"]["mount_point"] == str(point)
        assert (point / "file").read_text() == "served"
        daemon.stop()
    finally:
        subprocess.run(["umount", "-l", daemon.run_dir], check=True, timeout=DEADLINE)


def test_no_room_for_the_socket(daemon: Daemon) -> None:
    command = ["mount", "-t", "tmpfs", "-o", "mode=755,size=64k,nr_inodes=2", "none", daemon.run_dir]
    subprocess.run(command, check=True, timeout=DEADLINE)
    try:
        daemon.write()
        output = daemon.command("run", "-c", str(daemon.config), code=1)
        assert output == f"udbad: {daemon.run_dir}: No space left on device\n"
    finally:
        subprocess.run(["umount", "-l", daemon.run_dir], check=True, timeout=DEADLINE)


def test_the_run_directory_is_removed(daemon: Daemon, tmp_path: Path) -> None:
    point = daemon.add("a")
    (daemon.branch("a", "base") / "file").write_text("served")
    daemon.start()
    pid = daemon.state("a")["pid"]
    shutil.rmtree(daemon.run_dir)
    assert "no daemon runs here" in daemon.command("reload", code=11)
    assert (point / "file").read_text() == "served"
    os.kill(pid, signal.SIGKILL)
    until(lambda: f"process {pid} ended; starting another" in daemon.log(), "the end is noticed")
    # The next process makes its part of it anew.
    until(lambda: list(Path(daemon.run_dir).glob("si_*/mount.json")), "the next process")
    assert (point / "file").read_text() == "served"
    daemon.stop()
    assert "Traceback" not in daemon.log()


# -- mount points ---------------------------------------------------------------------------------


def test_a_mount_point_that_vanished(daemon: Daemon, other: Path) -> None:
    point = daemon.add("a")
    daemon.start()
    subprocess.run(["umount", point], check=True, timeout=DEADLINE)
    daemon.wait_for("a", "unmounted")
    point.rmdir()
    daemon.command("restart", "a")
    until(lambda: daemon.state("a")["reason"], "the reason")
    until(lambda: daemon.state("a")["state"] == "restarting", "tried")
    refused(daemon, "a", f"mount point {point}: No such file or directory")
    point.write_text("a file")
    until(lambda: "not a directory" in daemon.state("a")["reason"], "the other reason")
    point.unlink()
    point.mkdir()
    daemon.wait_for("a")


def test_a_mount_point_below_one_that_vanished(daemon: Daemon, other: Path) -> None:
    """The directory of the inner mount is removed from a branch of the outer one while both are mounted."""
    outer = daemon.add("outer")
    sub = daemon.branch("outer", "top") / "sub"
    sub.mkdir()
    daemon.add("inner")
    daemon.mounts["inner"]["mount_point"] = str(outer / "sub")
    daemon.start()
    pid = daemon.state("inner")["pid"]
    sub.rmdir()
    # Looked at through the outer mount, the name is gone, and what was mounted on it is detached with it.
    until(lambda: "sub" not in os.listdir(outer) and not (outer / "sub").exists(), "gone from the outer mount")
    until(lambda: daemon.state("inner")["state"] in ("unmounted", "serving"), "noticed")
    sub.mkdir()
    if daemon.state("inner")["state"] == "unmounted":
        daemon.command("restart", "inner")
        daemon.wait_for("inner", not_pid=pid)
    assert os.listdir(outer / "sub") == []
