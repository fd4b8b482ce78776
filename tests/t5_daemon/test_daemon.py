"""The supervisor and its mount processes, on real mounts: starting, dying, being killed, adopted, stopped."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
from pathlib import Path

import pytest

from tests.helpers.leaks import read_mountinfo
from tests.t5_daemon.daemon import DEADLINE, Daemon, until
from udbad.control import registry

pytestmark = pytest.mark.fuse


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def test_three_mounts_from_start_to_stop(daemon: Daemon) -> None:
    points = {name: daemon.add(name) for name in "abc"}
    for name in points:
        (daemon.branch(name, "base") / "file").write_text(f"base of {name}")
    daemon.start()
    for name, point in points.items():
        assert (point / "file").read_text() == f"base of {name}"
        (point / "file").write_text("changed")
        assert (daemon.branch(name, "top") / "file").read_text() == "changed"
    status = json.loads(daemon.command("status", "--json"))
    assert [mount["label"] for mount in status["mounts"]] == ["a", "b", "c"]
    assert {mount["state"] for mount in status["mounts"]} == {"serving"}
    assert len({mount["pid"] for mount in status["mounts"]}) == 3
    table = daemon.command("status")
    assert all(str(point) in table for point in points.values())
    daemon.stop()
    assert os.listdir(points["a"]) == []


def test_every_command_as_the_program_that_it_is(daemon: Daemon) -> None:
    """Other tests have them forked from a process that has imported everything; here each one imports what it needs."""
    point = daemon.add("a", ["top=rw", "pool=rw", "base=ro"])
    (daemon.branch("a", "base") / "file").write_text("base")
    daemon.executed = True
    daemon.start()
    top, pool = str(daemon.branch("a", "top")), str(daemon.branch("a", "pool"))
    (point / "made").write_text("made")
    path = str(point / "file")
    for words in (
        ("check-config", "-c", str(daemon.config)),
        ("where", path), ("why", path), ("invalidate", path), ("flush", "a"), ("busy", "a", pool), ("diff", "a"),
        ("status",), ("status", "--json"), ("top", "-n", "1"), ("branch", "list", "a"), ("udba", "a", "reval"),
        ("mvdown", str(point / "made")), ("sync", "copy", "a", top, pool), ("log-level", "debug"), ("reload",),
        ("restart", "a"),
    ):  # fmt: skip
        daemon.command(*words)
    daemon.wait_for("a")
    daemon.command("umount", str(point))
    daemon.command("fsck", "-n", top)
    daemon.command("stop")
    assert daemon.process is not None
    assert daemon.process.wait(DEADLINE) == 0
    assert (daemon.branch("a", "pool") / "made").read_text() == "made"


def findmnt(column: str, *words: str) -> str:
    command = ["findmnt", "-nro", column, *words]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=DEADLINE).stdout.strip()


def test_the_names_of_a_mount(daemon: Daemon) -> None:
    """In /proc/mounts the one it was given, for findmnt -S and umount; under the run directory its si."""
    named, point = daemon.add("b", fsname="given name"), daemon.add("a", ["top=rw", "base=ro+wh"])
    daemon.start()
    assert findmnt("SOURCE", str(named)) == "given\\x20name"
    assert findmnt("TARGET", "-S", "given name") == str(named)
    assert findmnt("SOURCE", str(point)) == "a"
    assert findmnt("TARGET", "-S", "a") == str(point)
    (si,) = (mount["si"] for mount in json.loads(daemon.command("status", "--json"))["mounts"] if mount["name"] == "a")
    directory = Path(daemon.run_dir) / f"si_{si}"
    lines = [(directory / name).read_text() for name in ("br0", "br1")]
    assert lines == [f"{daemon.branch('a', 'top')}=rw\n", f"{daemon.branch('a', 'base')}=ro+wh\n"]
    assert oct((directory / "control").stat().st_mode & 0o777) == "0o600"
    extra = daemon.branch("a", "extra")
    extra.mkdir()
    daemon.command("branch", "add", "--index", "1", "a", f"{extra}=ro")
    assert (directory / "br1").read_text() == f"{extra}=ro\n"
    assert sorted(path.name for path in directory.glob("br*")) == ["br0", "br1", "br2"]
    daemon.command("branch", "del", "a", str(extra))
    assert sorted(path.name for path in directory.glob("br*")) == ["br0", "br1"]
    for name in ("a", "given name"):
        subprocess.run(["umount", name], check=True, cwd="/", timeout=DEADLINE)
    until(lambda: not directory.exists(), "the end of the process")
    daemon.stop()


def test_a_killed_mount_process_is_replaced_and_the_others_go_on(daemon: Daemon) -> None:
    point, other = daemon.add("a"), daemon.add("b")
    (daemon.branch("a", "base") / "file").write_text("here")
    daemon.start()
    pid, other_pid = daemon.state("a")["pid"], daemon.state("b")["pid"]
    kill(pid)
    state = daemon.wait_for("a", not_pid=pid)
    assert state["restarts"] == 1
    assert (point / "file").read_text() == "here"
    assert daemon.state("b")["pid"] == other_pid
    assert os.listdir(other) == []
    assert len([mount for mount in read_mountinfo() if mount.path == point]) == 1
    daemon.stop()


def test_a_dead_mount_point_is_not_an_empty_directory(daemon: Daemon) -> None:
    """What is killed and cannot come back stays visible as dead."""
    point = daemon.add("a")
    (daemon.branch("a", "base") / "file").write_text("here")
    daemon.start()
    missing = daemon.branch("a", "base").rename(daemon.tmp_path / "elsewhere")
    kill(daemon.state("a")["pid"])
    waiting = daemon.wait_for("a", "waiting")
    assert "does not exist" in waiting["reason"]
    with pytest.raises(OSError, match=os.strerror(errno.ENOTCONN)):
        os.listdir(point)
    missing.rename(daemon.branch("a", "base"))
    daemon.wait_for("a")
    assert os.listdir(point) == ["file"]
    daemon.stop()


def test_what_was_changed_by_hand_survives_a_crash(daemon: Daemon) -> None:
    point = daemon.add("a")
    extra = daemon.branch("a", "extra")
    extra.mkdir()
    (extra / "more").write_text("more")
    daemon.start()
    daemon.command("branch", "add", "a", f"{extra}=ro")
    daemon.command("udba", "a", "notify")
    pid = daemon.state("a")["pid"]
    kill(pid)
    state = daemon.wait_for("a", not_pid=pid)
    assert (point / "more").read_text() == "more"
    assert state["process"]["udba"] == "notify"
    assert state["process"]["branches"][2] == f"{extra}=ro"
    daemon.stop()


def test_a_wedged_mount_process_is_found_and_aborted(daemon: Daemon) -> None:
    point = daemon.add("a")
    (daemon.branch("a", "base") / "file").write_text("here")
    daemon.settings.update(heartbeat=0.2, wedged_after=3)
    daemon.start()
    pid = daemon.state("a")["pid"]
    os.kill(pid, signal.SIGSTOP)
    # Whoever waits for the stopped process is freed by the abort and told so.
    reader = subprocess.run(["ls", str(point / "unknown")], check=False, capture_output=True, timeout=DEADLINE)
    assert reader.returncode != 0
    daemon.wait_for("a", not_pid=pid)
    assert "no sign of life for 3 s; aborted" in daemon.log()
    assert "was killed by" not in daemon.log(), "that was us, and it is said already"
    assert (point / "file").read_text() == "here"
    daemon.stop()


def test_a_stopped_process_is_not_serving(daemon: Daemon) -> None:
    """Nor does `top` stop at it; into a pipe it prints plain lines. One mount of the daemon, one by hand."""
    daemon.add("a")
    hand = daemon.add("hand", ["top=rw"])
    daemon.mounts.pop("hand")
    daemon.start()
    daemon.command("mount", "-o", f"br={daemon.branch('hand', 'top')}", "none", str(hand))
    pids = [mount["pid"] for mount in json.loads(daemon.command("status", "--json"))["mounts"]]
    assert len(pids) == 2
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        mounts = json.loads(daemon.command("status", "--json", code=1))["mounts"]
        assert [(mount["state"], "has not answered" in mount["reason"]) for mount in mounts] == [
            ("not answering", True)
        ] * 2
        assert "serving" not in daemon.command("status", code=1)
        lines = daemon.command("top", "-n", "2", "-d", "0.1").splitlines()
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
    assert sorted(line.split()[0] for line in lines) == sorted(["MOUNT", "a", str(hand)] * 2)
    assert all(line.endswith("not answering") for line in lines if not line.startswith("MOUNT"))
    daemon.command("status")
    daemon.command("umount", str(hand))
    daemon.stop()


def test_an_aborted_connection_is_mounted_anew(daemon: Daemon) -> None:
    point = daemon.add("a")
    daemon.start()
    before = daemon.state("a")
    Path(f"/sys/fs/fuse/connections/{before['connection']}/abort").write_text("1")
    daemon.wait_for("a", not_pid=before["pid"])
    assert os.listdir(point) == []
    assert len([mount for mount in read_mountinfo() if mount.path == point]) == 1
    daemon.stop()


def test_umount_by_hand_is_respected_and_restart_brings_it_back(daemon: Daemon) -> None:
    point = daemon.add("a")
    daemon.start()
    subprocess.run(["umount", str(point)], check=True, timeout=DEADLINE)
    daemon.wait_for("a", "unmounted")
    assert not [mount for mount in read_mountinfo() if mount.path == point]
    daemon.command("status", code=1)
    daemon.command("restart", "a")
    daemon.wait_for("a")
    daemon.stop()


def test_restart_of_a_mount_in_use_needs_force(daemon: Daemon) -> None:
    point = daemon.add("a")
    daemon.start()
    pid = daemon.state("a")["pid"]
    with (point / "open").open("w"):
        expected = f"udbad: {point} is busy: open file /open of process {os.getpid()}\n"
        assert daemon.command("restart", "a", code=1) == expected
        assert daemon.state("a")["pid"] == pid
        daemon.command("restart", "--force", "a")
        daemon.wait_for("a", not_pid=pid)
    daemon.stop()


def test_a_forced_restart_ends_a_process_that_does_not_answer(daemon: Daemon) -> None:
    point = daemon.add("a")
    (daemon.branch("a", "base") / "file").write_text("here")
    daemon.settings.update(stop_timeout=1)
    daemon.start()
    pid = daemon.state("a")["pid"]
    os.kill(pid, signal.SIGSTOP)
    daemon.command("restart", "--force", "a")
    daemon.wait_for("a", not_pid=pid)
    assert "did not stop: no answer; aborted" in daemon.log()
    assert (point / "file").read_text() == "here"
    assert daemon.state("a")["restarts"] == 0, "wanted, and no crash"
    daemon.stop()


def test_restart_of_a_mount_that_somebody_is_in(daemon: Daemon) -> None:
    point = daemon.add("a")
    (daemon.branch("a", "base") / "sub").mkdir()
    daemon.start()
    with subprocess.Popen(["cat"], cwd=point / "sub", stdin=subprocess.PIPE) as sitter:
        expected = f"udbad: {point} is busy: somebody is in it, or something is mounted in it\n"
        assert daemon.command("restart", "a", code=1) == expected
        assert sitter.stdin is not None
        sitter.stdin.close()
    daemon.command("restart", "a")
    daemon.wait_for("a")
    daemon.stop()


def test_a_missing_branch_is_waited_for_or_fails(daemon: Daemon) -> None:
    daemon.settings["retry_missing"] = 0.2
    waits = daemon.add("waits")
    daemon.add("fails", missing_branch="fail")
    fine = daemon.add("fine")
    for name in ("waits", "fails"):
        daemon.branch(name, "base").rmdir()
    daemon.start()
    assert (daemon.state("waits")["state"], daemon.state("fails")["state"]) == ("waiting", "failed")
    assert os.listdir(fine) == []
    assert not [mount for mount in read_mountinfo() if mount.path == waits]
    daemon.branch("waits", "base").mkdir()
    daemon.wait_for("waits")
    daemon.branch("fails", "base").mkdir()
    assert daemon.state("fails")["state"] == "failed"
    daemon.command("restart", "fails")
    daemon.wait_for("fails")
    daemon.stop()


def test_a_missing_mount_point_is_one_mounts_problem(daemon: Daemon) -> None:
    point = daemon.add("a")
    daemon.add("b")
    point.rmdir()
    daemon.settings["restart_delay"] = 0.1
    daemon.start()
    assert daemon.state("b")["state"] == "serving"
    state = daemon.state("a")
    assert (state["state"], "No such file" in state["reason"]) == ("restarting", True)
    point.mkdir()
    daemon.wait_for("a")
    daemon.stop()


def test_a_mount_inside_another_comes_later_and_goes_first(daemon: Daemon) -> None:
    outer = daemon.add("outer")
    (daemon.branch("outer", "base") / "sub").mkdir()
    daemon.add("inner")
    daemon.mounts["inner"]["mount_point"] = str(outer / "sub")
    (daemon.branch("inner", "base") / "file").write_text("inside")
    daemon.mounts = {"inner": daemon.mounts["inner"], "outer": daemon.mounts["outer"]}
    daemon.start()
    assert (outer / "sub" / "file").read_text() == "inside"
    daemon.stop()
    assert "in use" not in daemon.log()


def test_a_new_supervisor_adopts_the_mounts_of_a_killed_one(daemon: Daemon) -> None:
    point = daemon.add("a")
    daemon.add("b")
    extra = daemon.branch("a", "extra")
    extra.mkdir()
    daemon.start()
    daemon.command("branch", "add", "a", f"{extra}=ro")
    pids = {name: daemon.state(name)["pid"] for name in "ab"}
    with (point / "open").open("w") as file:
        daemon.kill()
        file.write("still served")
        file.flush()
        assert (daemon.branch("a", "top") / "open").read_text() == "still served"
        # Its state is known without a daemon, too.
        assert "daemon: none runs" in daemon.command("status")
        daemon.command("flush", "a")
        daemon.start()
        assert {name: daemon.state(name)["pid"] for name in "ab"} == pids
        assert daemon.state("a")["process"]["branches"][2] == f"{extra}=ro"
        file.write(", as before")
    assert (point / "open").read_text() == "still served, as before"
    # An adopted process is looked after like any other.
    kill(pids["a"])
    daemon.wait_for("a", not_pid=pids["a"])
    daemon.stop()


def test_a_mount_that_died_with_its_supervisor_comes_back(daemon: Daemon) -> None:
    point = daemon.add("a")
    (daemon.branch("a", "base") / "file").write_text("here")
    daemon.start()
    pid = daemon.state("a")["pid"]
    daemon.kill()
    kill(pid)
    daemon.start()
    assert daemon.state("a")["state"] == "serving"
    assert (point / "file").read_text() == "here"
    assert len([mount for mount in read_mountinfo() if mount.path == point]) == 1
    daemon.stop()


def test_what_a_killed_and_unmounted_mount_left_is_swept(daemon: Daemon) -> None:
    point = daemon.add("a")
    daemon.start()
    pid = daemon.state("a")["pid"]
    daemon.kill()
    kill(pid)
    until(lambda: not Path(f"/proc/{pid}").exists(), "the end of the process")
    subprocess.run(["umount", "-l", str(point)], check=True, timeout=DEADLINE)
    assert [entry.label for entry in registry.entries(daemon.run_dir)] == ["a"]
    del daemon.mounts["a"]
    daemon.add("b")
    daemon.start()
    assert [entry.label for entry in registry.entries(daemon.run_dir)] == ["b"]
    daemon.stop()


def test_mounts_can_be_kept_for_the_next_daemon(daemon: Daemon) -> None:
    point = daemon.add("a")
    daemon.start()
    pid = daemon.state("a")["pid"]
    daemon.command("stop", "--keep-mounts")
    assert daemon.process is not None
    assert daemon.process.wait(DEADLINE) == 0
    assert os.listdir(point) == []
    daemon.start()
    assert daemon.state("a")["pid"] == pid
    daemon.stop()


def test_two_supervisors_and_stale_sockets(daemon: Daemon) -> None:
    daemon.add("a")
    daemon.start()
    assert f"another supervisor uses {daemon.run_dir}" in daemon.command("run", "-c", str(daemon.config), code=1)
    daemon.kill()
    assert (Path(daemon.run_dir) / "udbad.sock").exists()
    daemon.start()
    daemon.stop()


def test_something_else_in_the_place_of_the_socket_is_left_alone(daemon: Daemon) -> None:
    path = Path(daemon.run_dir) / "udbad.sock"
    path.write_text("mine")
    daemon.write()
    assert "exists and is not a socket" in daemon.command("run", "-c", str(daemon.config), code=1)
    assert path.read_text() == "mine"


def test_systemd_is_told(daemon: Daemon, tmp_path: Path) -> None:
    path = f"{daemon.run_dir}/notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(path)
        sock.settimeout(DEADLINE)
        daemon.environment.update(NOTIFY_SOCKET=path, WATCHDOG_USEC="400000")
        daemon.add("a")
        daemon.start()

        def told(word: bytes) -> bytes:
            said: bytes = until(lambda: (text := sock.recv(4096)).startswith(word) and text, repr(word))
            return said

        assert b"1 of 1 mounts serve" in told(b"READY=1")
        told(b"WATCHDOG=1")
        assert daemon.process is not None
        daemon.process.send_signal(signal.SIGHUP)
        assert b"MONOTONIC_USEC=" in told(b"RELOADING=1")
        told(b"READY=1")
        daemon.stop()
        told(b"STOPPING=1")


def test_json_log(daemon: Daemon) -> None:
    daemon.settings["log_format"] = "json"
    daemon.add("a")
    daemon.start()
    kill(daemon.state("a")["pid"])
    until(lambda: '"starting another"' in daemon.log() or "starting another" in daemon.log(), "restart in the log")
    daemon.wait_for("a")
    daemon.stop()
    lines = [json.loads(line) for line in daemon.log().splitlines()]
    assert all({"time", "level", "logger", "message"} <= line.keys() for line in lines)
    assert {line.get("mount") for line in lines} == {None, "a"}


def test_a_full_run_directory_keeps_no_mount_from_serving(daemon: Daemon, tmp_path: Path) -> None:
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "mode=755,size=64k", "none", daemon.run_dir], check=True, timeout=DEADLINE
    )
    try:
        point = daemon.add("a")
        daemon.start()
        pid = daemon.state("a")["pid"]
        with pytest.raises(OSError, match="No space left"):
            (Path(daemon.run_dir) / "fill").write_bytes(b"x" * 100_000)
        kill(pid)
        daemon.wait_for("a", not_pid=pid)
        assert os.listdir(point) == []
        daemon.stop()
    finally:
        subprocess.run(["umount", "-l", daemon.run_dir], check=True, timeout=DEADLINE)
