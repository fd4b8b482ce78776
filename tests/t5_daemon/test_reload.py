"""Reload: every key has a verdict, nothing is half applied, and a broken file changes nothing."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.t5_daemon.daemon import DEADLINE, Daemon, toml, until
from udbad.control import registry
from udbad.control.registry import Entry
from udbad.mount.commands import LIVE
from udbad.mount.mountproc import _union_options
from udbad.settings.file import DaemonSettings, MetricsSettings, load
from udbad.settings.options import FIELDS, parse_mount_options
from udbad.supervisor.configwatch import signature
from udbad.supervisor.reload import OWN_KEYS, Outcome
from udbad.supervisor.supervisor import Supervisor
from udbad.supervisor.workers import Pool

pytestmark = pytest.mark.fuse

LIVE_VALUES: dict[str, Any] = {
    "udba": "none", "create": "rr", "cpup": "bu", "dirwh": 7, "diropq": "always", "sum": True,
    "fsync_copyup": False, "verbose": True, "warn_perm": False, "rdcache": 3, "ro": True,
    "kernel_flags": ["noexec"], "watch_reserve": 20, "dirren": "on", "labels": True,
}  # fmt: skip
FIXED_VALUES: dict[str, object] = {
    "plink": False, "xino": False, "shwh": True, "dirperm1": True, "acl": False, "xattrs": False, "dio": False,
    "fsname": "other", "io": "cached", "edge": "native",
    "survive": True, "restart_timeout": 5, "branch_timeout": 5, "watch": "fanotify", "whiteouts": "aufs",
    "replay": ["/in/**"], "volatile": True, "allow_idmap": True, "squash_to_uid": 7, "squash_to_gid": 8,
    "uidmapping": "0:1000:10", "gidmapping": "0:1000:10",
}  # fmt: skip
DAEMON_VALUES: dict[str, object] = {
    "log_level": "debug", "log_format": "json", "heartbeat": 1, "wedged_after": 50, "start_timeout": 200,
    "stop_timeout": 20, "restart_delay": 1, "restart_delay_max": 30, "healthy_after": 5, "retry_missing": 1,
    "watch": False, "run_dir": "/run/elsewhere",
}  # fmt: skip
METRICS_VALUES: dict[str, object] = {"listen": "127.0.0.1:9999", "tls_certificate": "/c", "tls_key": "/k"}
# `source` takes the place of the branches: test_layers.py.
MOUNT_KEYS = FIELDS.keys() - {"branches", "source", "notices", "control", "metrics", "allow_other"}


def test_every_mount_key_is_tried_below() -> None:
    assert LIVE_VALUES.keys() | FIXED_VALUES.keys() == MOUNT_KEYS
    assert set(LIVE_VALUES) == LIVE - {"branches"}
    assert OWN_KEYS == ("mount_point", "missing_branch", "enabled", "published", "publish")


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
    assert (state["pending"], state["process"]["udba"]) == ([], "none")
    assert reload(daemon) == {}
    daemon.stop()


class Union:
    """One mount of a running daemon, top=rw over middle=rw (another file system) over base=ro; what it does."""

    def __init__(self, daemon: Daemon) -> None:
        self.daemon = daemon
        self.point = daemon.add("a", ["top=rw", "middle=rw", "base=ro"])
        self.branches = [daemon.branch("a", name) for name in ("top", "middle", "base")]
        self.turn = 0

    def new_name(self) -> str:
        self.turn += 1
        return f"name{self.turn}"

    def homes(self, names: Iterable[str]) -> set[str]:
        return {branch.suffix for name in names for branch in self.branches if (branch / name).exists()}

    def entry(self) -> Entry:
        return registry.entries(self.daemon.run_dir)[0]

    # What can be seen of each option; the value must differ before and after the change.

    def udba(self) -> object:
        """Whether a direct change is seen."""
        name = self.new_name()
        (self.branches[2] / name).write_text("short")
        with (self.point / name).open() as file:
            os.fstat(file.fileno())
            (self.branches[2] / name).write_text("much longer")
            return os.stat(self.point / name).st_size == len("much longer")

    def create(self) -> object:
        """Where new files go."""
        names = [self.new_name() for _ in range(4)]
        for name in names:
            (self.point / name).touch()
        return self.homes(names)

    def cpup(self) -> object:
        """Where a copy-up goes."""
        name = self.new_name()
        (self.branches[2] / name).write_text("base")
        (self.point / name).write_text("changed")
        return self.homes([name])

    def diropq(self) -> object:
        name = self.new_name()
        (self.point / name).mkdir()
        return (self.branches[0] / name / ".wh..wh..opq").exists()

    def sum(self) -> object:
        space = os.statvfs(self.point)
        first = os.statvfs(self.branches[0])
        return space.f_blocks * space.f_frsize > first.f_blocks * first.f_frsize

    def ro(self) -> object:
        try:
            (self.point / self.new_name()).touch()
        except OSError as error:
            return error.errno
        return 0

    def shwh(self) -> object:
        (self.branches[0] / ".wh.hidden").touch()
        return ".wh.hidden" in os.listdir(self.point)

    def labels(self) -> object:
        try:
            return os.getxattr(self.point, "security.selinux")
        except OSError as error:
            return error.errno

    def dio(self) -> object:
        name = self.new_name()
        (self.point / name).touch()
        try:
            os.close(os.open(self.point / name, os.O_RDONLY | os.O_DIRECT))
        except OSError as error:
            return error.errno
        return 0

    def kernel_flags(self) -> object:
        return bool(os.statvfs(self.point).f_flag & os.ST_NOEXEC)

    def fsname(self) -> object:
        return [
            line.split()[0] for line in Path("/proc/self/mounts").read_text().splitlines() if str(self.point) in line
        ]

    def told(self) -> object:
        """For what has no effect that one can see from outside: what the mount process says it works with."""
        return self.entry().options


@pytest.fixture
def here(daemon: Daemon) -> Iterator[Union]:
    union = Union(daemon)
    daemon.settings["watch"] = False
    subprocess.run(["mount", "-t", "tmpfs", "none", union.branches[1]], check=True, timeout=DEADLINE)
    try:
        daemon.start()
        yield union
        daemon.stop()
    finally:
        subprocess.run(["umount", "-l", union.branches[1]], check=True, timeout=DEADLINE)


@pytest.mark.parametrize("key", sorted(LIVE_VALUES))
def test_what_is_applied_is_in_force(daemon: Daemon, here: Union, key: str) -> None:
    look = getattr(here, key, here.told)
    before, pid = look(), daemon.state("a")["pid"]
    daemon.mounts["a"][key] = LIVE_VALUES[key]
    assert reload(daemon) == {f"mounts.a.{key}": "applied"}
    assert look() != before
    assert here.entry().options == here.entry().configured
    assert (daemon.state("a")["pid"], daemon.state("a")["pending"]) == (pid, [])


@pytest.mark.parametrize("key", sorted(FIXED_VALUES))
def test_what_needs_a_remount_is_in_force_after_it(daemon: Daemon, here: Union, key: str) -> None:
    look = getattr(here, key, here.told)
    before, pid = look(), daemon.state("a")["pid"]
    daemon.mounts["a"][key] = FIXED_VALUES[key]
    assert reload(daemon) == {f"mounts.a.{key}": "needs remount"}
    assert look() == before, "pending, and in force all the same"
    daemon.command("restart", "a")
    daemon.wait_for("a", not_pid=pid)
    assert look() != before
    assert here.entry().options == here.entry().configured
    assert reload(daemon) == {}


@pytest.mark.parametrize("key", sorted({"dirwh", "fsync_copyup"}))
def test_the_union_is_told(key: str, tmp_path: Path) -> None:
    """What `told` shows above is what the operations look at."""
    plain = parse_mount_options(f"br={tmp_path}")
    changed = plain.but(**{key: LIVE_VALUES[key]})
    assert getattr(_union_options(changed), key) == LIVE_VALUES[key]
    assert _union_options(changed) != _union_options(plain)


# -- the other tables, in a supervisor that runs nothing ------------------------------------------


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("table", "key"),
    [("daemon", key) for key in DaemonSettings.model_fields]
    + [("metrics", key) for key in MetricsSettings.model_fields],
)
async def test_every_key_of_the_daemon(tmp_path: Path, table: str, key: str) -> None:
    value = {"daemon": DAEMON_VALUES, "metrics": METRICS_VALUES}[table][key]
    path = tmp_path / "udbad.toml"
    tls = {"tls_certificate": "/first", "tls_key": "/first"}  # they come together
    others = {name: first for name, first in tls.items() if key in tls and name != key}
    level = logging.getLogger().level

    def write(values: Mapping[str, object]) -> None:
        path.write_text("\n".join([f"[{table}]", *(f"{name} = {toml(one)}" for name, one in values.items())]))

    write(tls if key in tls else {})
    supervisor = Supervisor(path, load(path), signature(path), Pool())
    before = supervisor.shared.daemon
    write({**others, key: value})
    try:
        found = [(verdict.table, verdict.key, verdict.outcome) for verdict in await supervisor.reload()]
    finally:
        logging.getLogger().setLevel(level)
    applied = table == "daemon" and key != "run_dir"
    assert found == [(table, key, Outcome.APPLIED if applied else Outcome.NEEDS_RESTART)]
    assert getattr(getattr(supervisor.config, table), key) == value
    if applied:
        # This is where everybody looks, each time anew.
        assert supervisor.shared.daemon == before.model_copy(update={key: value})
    else:
        assert supervisor.shared.daemon == before
    assert await supervisor.reload() == []


@pytest.mark.asyncio
async def test_watch_can_be_turned_off_and_on(tmp_path: Path) -> None:
    path = tmp_path / "udbad.toml"
    path.write_text("[daemon]\nwatch = false\n")
    supervisor = Supervisor(path, load(path), signature(path), Pool())
    noticed: asyncio.Queue[asyncio.Event] = asyncio.Queue()

    async def changed() -> None:
        (await noticed.get()).set()

    async def notice() -> None:
        for _ in range(2):  # the second is waited for when the first has been dealt with
            event = asyncio.Event()
            noticed.put_nowait(event)
            await asyncio.wait_for(event.wait(), DEADLINE)

    supervisor._watch.changed = changed  # type: ignore[method-assign]
    task = asyncio.create_task(supervisor._watch_files())
    path.write_text("[daemon]\nwatch = false\nheartbeat = 9\n")
    await notice()
    assert supervisor.shared.daemon.heartbeat == 5
    path.write_text("[daemon]\nwatch = true\nheartbeat = 10\n")
    await supervisor.reload()
    path.write_text("[daemon]\nwatch = true\nheartbeat = 11\n")
    await notice()
    assert supervisor.shared.daemon.heartbeat == 11
    task.cancel()


def test_a_new_heartbeat_is_used_for_what_runs(daemon: Daemon) -> None:
    daemon.settings.update(watch=False, heartbeat=1)
    daemon.add("a")
    daemon.start()
    pid = daemon.state("a")["pid"]
    daemon.settings.update(heartbeat=0.2, wedged_after=2)
    assert reload(daemon) == {"daemon.heartbeat": "applied", "daemon.wedged_after": "applied"}
    os.kill(pid, signal.SIGSTOP)
    daemon.wait_for("a", not_pid=pid)
    assert "no sign of life for 2 s; aborted" in daemon.log()
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
    until(lambda: not daemon.command("busy", "a", str(extra)[1:], code=None), "released")
    assert reload(daemon) == {"mounts.a.branches": "applied", "mounts.a.dirwh": "applied"}
    assert not (point / "more").exists()
    daemon.mounts["a"].update(branches=[before[0], f"{before[1]}+watch=fanotify"], udba="notify")
    assert reload(daemon) == {"mounts.a.branches": "applied", "mounts.a.udba": "applied"}
    os.listdir(point)
    found = daemon.state("a")["process"]["coherence"]
    assert (found["watches"], found["handles"]) == (1, 1)
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
