"""Reload: every key has a verdict, nothing is half applied, and a broken file changes nothing."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.t5_daemon.daemon import DEADLINE, Daemon, until
from udbad.config import MountOptions
from udbad.configfile import DaemonSettings
from udbad.daemon.mountcommands import LIVE
from udbad.daemon.reload import OWN_KEYS

pytestmark = pytest.mark.fuse

LIVE_VALUES: dict[str, object] = {
    "udba": "notify", "create": "mfs", "cpup": "bu", "dirwh": 7, "diropq": "always", "sum": True,
    "fsync_copyup": True, "verbose": True, "warn_perm": False, "rdcache": 3,
}  # fmt: skip
FIXED_VALUES: dict[str, object] = {
    "plink": False, "xino": False, "shwh": True, "dirperm1": True, "acl": False, "dio": False, "ro": True,
    "kernel_flags": ["noexec"], "fsname": "other",
}  # fmt: skip


def test_every_mount_key_is_tried_below() -> None:
    keys = MountOptions.model_fields.keys() - {"branches", "notices", "control", "metrics", "allow_other"}
    assert keys == LIVE_VALUES.keys() | FIXED_VALUES.keys()
    assert set(LIVE_VALUES) == LIVE - {"branches"}
    assert OWN_KEYS == ("mount_point", "missing_branch", "enabled")


def reload(daemon: Daemon) -> dict[str, str]:
    """Write the configuration and have it read; key to outcome."""
    daemon.write()
    answer = daemon.ask("reload")
    assert answer["ok"], answer
    return {f"{one['table']}.{one['key']}".rstrip("."): one["outcome"] for one in answer["verdicts"]}


def test_every_key_of_a_mount(daemon: Daemon) -> None:
    daemon.settings["watch"] = False
    daemon.add("a")
    daemon.start()
    pid = daemon.state("a")["pid"]
    assert reload(daemon) == {}
    for key, value in LIVE_VALUES.items():
        daemon.mounts["a"][key] = value
        assert reload(daemon) == {f"mounts.a.{key}": "applied"}, key
    for key, value in FIXED_VALUES.items():
        daemon.mounts["a"][key] = value
        expected = {f"mounts.a.{name}": "needs remount" for name in [*FIXED_VALUES][: [*FIXED_VALUES].index(key) + 1]}
        assert reload(daemon) == expected, key
    state = daemon.state("a")
    assert (state["pid"], set(state["pending"])) == (pid, set(FIXED_VALUES))
    assert daemon.command("status").splitlines()[-1] == f"a: at the next mount: {', '.join(sorted(FIXED_VALUES))}"
    daemon.mounts["a"]["missing_branch"] = "fail"
    assert reload(daemon)["mounts.a.missing_branch"] == "applied"
    # What was pending is taken up by the next mount, and then nothing is left.
    daemon.command("restart", "a")
    state = daemon.wait_for("a", not_pid=pid)
    assert (state["pending"], state["process"]["udba"]) == ([], "notify")
    assert reload(daemon) == {}
    daemon.stop()


def test_every_key_of_the_daemon(daemon: Daemon) -> None:
    daemon.settings["watch"] = False
    daemon.start()
    values: dict[str, object] = {
        "log_level": "debug", "log_format": "json", "heartbeat": 1, "wedged_after": 50, "start_timeout": 200,
        "stop_timeout": 20, "restart_delay": 1, "restart_delay_max": 30, "healthy_after": 5, "retry_missing": 1,
        "watch": True, "run_dir": f"{daemon.run_dir}/other",
    }  # fmt: skip
    assert values.keys() == DaemonSettings.model_fields.keys()
    run_dir = daemon.settings["run_dir"]
    for key, value in values.items():
        daemon.settings[key] = value
        outcome = "needs restart of the daemon" if key == "run_dir" else "applied"
        assert reload(daemon) == {f"daemon.{key}": outcome}, key
    daemon.settings["run_dir"] = run_dir
    daemon.stop()


def test_branches_come_and_go_with_the_file(daemon: Daemon) -> None:
    daemon.settings["watch"] = False
    point = daemon.add("a")
    extra = daemon.branch("a", "extra")
    extra.mkdir()
    (extra / "more").write_text("more")
    daemon.start()
    before: list[Any] = list(daemon.mounts["a"]["branches"])  # type: ignore[call-overload]  # a list, see add()
    daemon.mounts["a"]["branches"] = [before[0], f"{extra}=ro", before[1]]
    assert reload(daemon) == {"mounts.a.branches": "applied"}
    assert (point / "more").read_text() == "more"
    daemon.mounts["a"].update(branches=before, dirwh=9)
    with (point / "more").open():
        daemon.write()
        output = daemon.command("reload", code=10)
        assert "mounts.a.branches: rejected: branch" in output
        assert f"is in use: open file /more of process {os.getpid()}" in output
        # Nothing is half applied: the key that could have been was not either.
        assert "mounts.a.dirwh: rejected" in output
        assert f"{os.getpid()}" in daemon.command("busy", "a", str(extra), code=1)
    until(lambda: not daemon.command("busy", "a", str(extra), code=None), "released")
    assert reload(daemon) == {"mounts.a.branches": "applied", "mounts.a.dirwh": "applied"}
    assert not (point / "more").exists()
    daemon.stop()


def test_mounts_come_and_go_with_the_file(daemon: Daemon) -> None:
    daemon.settings["watch"] = False
    a = daemon.add("a")
    daemon.start()
    b = daemon.add("b")
    assert reload(daemon) == {"mounts.b": "applied"}
    daemon.wait_for("b")
    removed = daemon.mounts.pop("a")
    with (a / "open").open("w"):
        assert reload(daemon) == {"mounts.a": "rejected"}
        assert daemon.state("a")["state"] == "serving"
    until(lambda: reload(daemon) == {"mounts.a": "applied"}, "unmounted once nobody uses it")
    assert daemon.state("a")["state"] == "unknown"
    daemon.mounts["a"] = {**removed, "enabled": False}
    daemon.mounts["b"]["enabled"] = False
    assert reload(daemon) == {"mounts.b": "applied"}
    daemon.mounts["a"]["enabled"] = True
    assert reload(daemon) == {"mounts.a": "applied"}
    daemon.wait_for("a")
    assert os.listdir(b) == []
    # Another mount point is another mount.
    moved = daemon.tmp_path / "moved"
    moved.mkdir()
    daemon.mounts["a"]["mount_point"] = str(moved)
    assert reload(daemon) == {"mounts.a.mount_point": "needs remount"}
    pid = daemon.state("a")["pid"]
    daemon.command("restart", "a")
    assert daemon.wait_for("a", not_pid=pid)["mount_point"] == str(moved)
    assert os.listdir(moved) == ["open"]
    daemon.stop()


def test_a_broken_file_changes_nothing(daemon: Daemon) -> None:
    point = daemon.add("a")
    daemon.start()
    pid = daemon.state("a")["pid"]
    daemon.config.write_text(f'[daemon]\nrun_dir = "{daemon.run_dir}"\nx = 1\n[mounts.b]\n')
    output = daemon.command("reload", code=10)
    assert [line.rpartition(".toml: ")[2].split(":")[0] for line in output.splitlines()] == [
        "daemon.x", "mounts.b.mount_point", "mounts.b.branches",
    ]  # fmt: skip
    assert daemon.process is not None
    daemon.process.send_signal(signal.SIGHUP)
    until(lambda: "nothing is changed, the configuration has 3 problems" in daemon.log(), "said in the log")
    assert (daemon.state("a")["pid"], daemon.ask("status")["reload_succeeded"]) == (pid, False)
    assert os.listdir(point) == []
    daemon.stop()


def test_a_changed_file_is_noticed(daemon: Daemon) -> None:
    daemon.add("a")
    daemon.start()
    daemon.mounts["a"]["udba"] = "none"
    daemon.write()
    until(lambda: daemon.state("a").get("process", {}).get("udba") == "none", "the new mode")
    (daemon.tmp_path / "conf.d").mkdir()
    point = daemon.tmp_path / "c.mnt"
    point.mkdir()
    text = f'[mounts.c]\nmount_point = "{point}"\nbranches = "{daemon.tmp_path}/c.top"\n'
    (daemon.tmp_path / "c.top").mkdir()
    (daemon.tmp_path / "conf.d" / "c.toml").write_text(text)
    until(lambda: daemon.state("c")["state"] == "serving", "the new mount", DEADLINE)
    (daemon.tmp_path / "conf.d" / "c.toml").unlink()
    until(lambda: daemon.state("c")["state"] == "unknown", "the mount gone")
    daemon.stop()


def test_sighup(daemon: Daemon) -> None:
    daemon.settings["watch"] = False
    daemon.add("a")
    daemon.start()
    daemon.mounts["a"]["dirwh"] = 5
    daemon.write()
    assert daemon.process is not None
    daemon.process.send_signal(signal.SIGHUP)
    until(lambda: "mounts.a.dirwh: applied" in daemon.log(), "verdict in the log")
    daemon.stop()


def test_a_changed_log_level_reaches_the_mounts(daemon: Daemon, tmp_path: Path) -> None:
    daemon.add("a")
    daemon.start()
    daemon.command("log-level", "error")
    os.kill(daemon.state("a")["pid"], signal.SIGKILL)
    until(lambda: daemon.state("a")["restarts"] == 1 and daemon.state("a")["state"] == "serving", "restarted")
    assert "starting another" not in daemon.log()
    daemon.command("log-level", "info", "a")
    daemon.command("udba", "a", "none")
    assert "coherence mode changes from reval to none" in daemon.log()
    daemon.stop()
