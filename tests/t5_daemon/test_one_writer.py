"""A branch is written to by one mount, however the other one names it and whenever it comes."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.t5_daemon.daemon import DEADLINE, Daemon, until
from udbad.control import registry
from udbad.control.protocol import ask

pytestmark = pytest.mark.fuse

OTHER = "is written to by another mount"
IMPATIENT = """
from udbad.branch import writelock
writelock.PATIENCE = 0.5
writelock.WriteLocks.take.__defaults__ = (0.5,)
"""
"""For tests that are refused again and again, each time after a while that is for mounts just about to end."""


@contextmanager
def other_name(directory: Path, way: str) -> Iterator[Path]:
    """The same directory by another path."""
    place = directory.with_name(f"{way}.{directory.name}")
    if way == "link":
        place.symlink_to(directory)
        yield place
        return
    place.mkdir()
    subprocess.run(["mount", "--bind", directory, place], check=True, timeout=DEADLINE)
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", place], check=True, timeout=DEADLINE)


def refusal(path: Path, pid: int) -> str:
    return f"branch {path} {OTHER} (process {pid}); two mounts may not write to one branch"


def locks(pid: int) -> list[str]:
    """Descriptors of a process that hold the flock of a branch, proc_pid_fdinfo(5). No child may inherit them."""
    found = []
    for info in Path(f"/proc/{pid}/fdinfo").iterdir():
        try:
            text = info.read_text()
        except FileNotFoundError:  # closed meanwhile
            continue
        place = os.readlink(f"/proc/{pid}/fd/{info.name}")
        if re.search(r"^lock:.*FLOCK", text, re.MULTILINE) and os.path.basename(place) == ".wh..wh.orph":
            flags = re.search(r"^flags:\s*([0-7]+)", text, re.MULTILINE)
            assert flags is not None
            assert int(flags[1], 8) & os.O_CLOEXEC, text
            found.append(info.name)
    return found


@pytest.mark.parametrize("way", ["link", "bind"])
def test_in_the_configuration(daemon: Daemon, way: str) -> None:
    """The texts differ, so the configuration is fine; the second mount waits until the branch is free."""
    daemon.patch = IMPATIENT
    first = daemon.add("first")
    daemon.settings.update(restart_delay=0.1, restart_delay_max=0.5, watch=False)
    with other_name(daemon.branch("first", "top"), way) as place:
        daemon.start()
        second = daemon.add("second", ["own=rw"])
        daemon.mounts["second"]["branches"] = [f"{place}=rw"]
        daemon.write()
        daemon.command("reload")
        reason = until(lambda: daemon.state("second")["reason"], "the reason")
        assert reason == refusal(place.resolve(), daemon.state("first")["pid"])
        (first / "file").write_text("goes on")
        daemon.command("branch", "mod", "first", f"{daemon.branch('first', 'top')}=ro")
        daemon.wait_for("second")
        assert (second / "file").read_text() == "goes on"
        # A running mount that would begin to write there keeps what it has.
        daemon.add("first", ["top=rw", "base=ro", "more=ro"])
        daemon.write()
        assert refusal(daemon.branch("first", "top"), daemon.state("second")["pid"]) in (
            daemon.command("reload", code=10)
        )
        assert daemon.state("first")["state"] == "serving"
        daemon.stop()


@pytest.mark.parametrize("way", ["link", "bind"])
def test_while_mounted(daemon: Daemon, way: str) -> None:
    """add and mod are refused and change nothing; del and mod to ro make the branch free for others."""
    daemon.patch = IMPATIENT
    daemon.add("first", ["top=rw", "pool=rw"])
    second = daemon.add("second", ["own=rw"])
    daemon.start()
    pool = daemon.branch("first", "pool")
    pids = {name: daemon.state(name)["pid"] for name in ("first", "second")}
    with other_name(pool, way) as place:
        before = daemon.command("branch", "list", "second")
        message = f"udbad: {refusal(place, pids['first'])}\n"
        assert (
            daemon.command("branch", "add", "second", f"{place}=rw", code=4).replace(str(pool), str(place)) == message
        )
        assert daemon.command("branch", "list", "second") == before
        assert len(locks(pids["second"])) == 1
        # To read it is nobody's harm, to begin to write to what was read is.
        daemon.command("branch", "add", "second", f"{place}=ro")
        now = daemon.command("branch", "list", "second")
        path = str(place.resolve())
        assert OTHER in daemon.command("branch", "mod", "second", f"{path}=rw", code=4)
        assert daemon.command("branch", "list", "second") == now
        # In one step with another change: neither happens.
        (daemon.branch("second", "own") / "file").touch()
        edits = [["del", str(daemon.branch("second", "own"))], ["mod", f"{path}=rw"]]
        (entry,) = (entry for entry in registry.entries(daemon.run_dir) if entry.name == "second")
        answer = ask(entry.control, {"op": "branches", "edits": edits}, DEADLINE)
        assert not answer["ok"]
        assert OTHER in answer["error"]
        assert os.listdir(second) == ["file"]
        for free in (["mod", "first", f"{pool}=ro"], ["del", "first", str(pool)]):
            daemon.command("branch", *free)
            assert len(locks(pids["first"])) == 1
            daemon.command("branch", "mod", "second", f"{path}=rw")
            assert len(locks(pids["second"])) == 2
            daemon.command("branch", "mod", "second", f"{path}=ro")
        daemon.command("branch", "add", "first", f"{pool}=rw")
        assert len(locks(pids["first"])) == 2
        daemon.command("branch", "del", "second", path)
    daemon.stop()


def test_mounts_without_the_daemon(daemon: Daemon) -> None:
    """A standalone mount, of the same run directory or of another, beside those of the daemon; fsck, too."""
    daemon.patch = IMPATIENT
    daemon.add("a", ["top=rw", "base=ro"])
    daemon.start()
    top, base = daemon.branch("a", "top"), daemon.branch("a", "base")
    (daemon.tmp_path / "link").symlink_to(top)
    point = daemon.tmp_path / "hand"
    point.mkdir()
    pid = daemon.state("a")["pid"]
    mount = ["mount", "--run-dir"]
    for run_dir in (daemon.run_dir, str(daemon.tmp_path / "other")):
        options = ["-o", f"br={daemon.tmp_path}/link=rw", "none", str(point)]
        output = daemon.command(*mount, run_dir, *options, code=4)
        assert output.splitlines()[-1] == f"udbad: {refusal(top, pid)}"
    for words in (["fsck", "-n", str(top)], ["fsck", "-y", f"{daemon.tmp_path}/link"]):
        assert daemon.command(*words, code=4) == (
            f"udbad: branch {words[2]} is written to by a mount (process {pid}); unmount it first\n"
        )
    assert daemon.command("fsck", str(base)).endswith(": clean\n")
    # Shared by readers, and by a mount that is read-only as a whole.
    for text in (f"br={base}=ro:{top}=ro", f"ro,br={top}=rw"):
        daemon.command(*mount, daemon.run_dir, "-o", text, "none", str(point))
        daemon.command("umount", str(point))
    daemon.stop()
    assert daemon.command("fsck", str(top)).endswith(": clean\n")


def test_one_after_the_other(daemon: Daemon) -> None:
    """umount returns before the process has ended; the next mount waits for it. A dead process holds nothing."""
    daemon.add("a", ["top=rw"])
    daemon.start()
    top = daemon.branch("a", "top")
    for _ in range(3):
        pid = daemon.state("a")["pid"]
        os.kill(pid, signal.SIGKILL)
        daemon.wait_for("a", not_pid=pid)
        pid = daemon.state("a")["pid"]
        daemon.command("restart", "a")
        pid = daemon.wait_for("a", not_pid=pid)["pid"]
        assert len(locks(pid)) == 1
    daemon.kill()  # the mount goes on, and is adopted with its lock
    assert locks(pid)
    daemon.start()
    assert daemon.wait_for("a")["pid"] == pid
    daemon.stop()
    point = daemon.tmp_path / "hand"
    point.mkdir()
    for _ in range(5):
        daemon.command("mount", "-o", f"br={top}=rw", "none", str(point))
        (point / "file").touch()
        daemon.command("umount", str(point))
        assert daemon.command("fsck", str(top)).endswith(": clean\n")
