"""A FUSE connection number is given to the next mount as soon as it is free: it must never stand for a mount alone."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest

from tests.helpers.mount import REPOSITORY
from tests.t5_daemon.daemon import DEADLINE, Daemon
from udbad import __version__
from udbad.control import registry
from udbad.control.protocol import bind, server_pid
from udbad.control.registry import Claim, Entry, Registration
from udbad.mount import kernelside
from udbad.settings.file import DaemonSettings, MountSettings, load
from udbad.settings.options import parse_mount_options
from udbad.supervisor.configwatch import signature
from udbad.supervisor.runner import Runner, Shared
from udbad.supervisor.supervisor import Supervisor
from udbad.supervisor.workers import Pool, Worker

NO_PROCESS = 1 << 30
"""Above any pid_max."""


def living(run_dir: Path, place: str, connection: int, pid: int = NO_PROCESS, namespace: int = 0) -> Registration:
    """What a mount process has written, with a directory in `run_dir`, and holds on to."""
    registration = Registration(str(run_dir), place.encode())
    registration.write(
        Entry(
            name="", mount_point=place, asked=place, options="br=/x=ro", configured="br=/x=ro", pid=pid,
            connection=connection, supervised=True, version=__version__, started=0.0, directory=str(registration.path),
            namespace=namespace,
        )
    )  # fmt: skip
    return registration


def entry(run_dir: Path, place: str, connection: int, pid: int = NO_PROCESS) -> Entry:
    """What a mount process has left that was killed."""
    registration = living(run_dir, place, connection, pid)
    registration.release()
    written = registry.read(registration.path)
    assert written is not None
    return written


def test_sweep_goes_by_mount_point_and_number(tmp_path: Path) -> None:
    entry(tmp_path, "/gone", 7)
    entry(tmp_path, "/dead", 8)
    entry(tmp_path, "/number used again", 9, pid=1)
    alive = living(tmp_path, "/alive", 10)
    registry.sweep(str(tmp_path), {("/other", 7), ("/dead", 8)})
    assert {one.mount_point for one in registry.entries(str(tmp_path))} == {"/dead", "/alive"}
    alive.release()


def test_sweep_of_what_a_version_left_that_locked_nothing(tmp_path: Path) -> None:
    for place, pid in (("/gone", NO_PROCESS), ("/alive", 1)):
        (Path(entry(tmp_path, place, 7, pid).directory) / registry.ALIVE).unlink()
    registry.sweep(str(tmp_path), set())
    assert [one.mount_point for one in registry.entries(str(tmp_path))] == ["/alive"]


def test_sweep_leaves_whoever_is_just_being_started(tmp_path: Path) -> None:
    entry(tmp_path, "/mnt", 7)
    claim = Claim(str(tmp_path), b"/mnt")
    registry.sweep(str(tmp_path), set())
    assert len(registry.entries(str(tmp_path))) == 1
    claim.release()
    registry.sweep(str(tmp_path), set())
    assert os.listdir(tmp_path) == []


def test_a_union_of_other_namespaces_that_shares_the_run_directory(tmp_path: Path) -> None:
    """There, our mount is in no mountinfo, and the number of its process is that of nobody."""
    mine, gone = living(tmp_path, "/mnt", 7), entry(tmp_path, "/gone", 8)
    code = f"from udbad.control import registry; registry.sweep({str(tmp_path)!r}, set())"
    namespaces = ["unshare", "-m", "-p", "-f", "--mount-proc", "--propagation", "private"]
    subprocess.run([*namespaces, sys.executable, "-c", code], check=True, timeout=DEADLINE, cwd=REPOSITORY)
    assert os.path.exists(mine.path)
    assert not Path(gone.directory).exists()
    mine.remove()
    assert os.listdir(tmp_path) == []


def test_the_same_mount_point_in_another_mount_namespace(tmp_path: Path) -> None:
    """The one that came first stays registered; the other one serves without."""
    there = living(tmp_path, "/mnt", 7, namespace=registry.mount_namespace() + 1)
    with pytest.raises(OSError, match="another mount namespace") as caught:
        Registration(str(tmp_path), b"/mnt")
    assert caught.value.errno == errno.EBUSY
    there.release()
    Registration(str(tmp_path), b"/mnt").remove()  # it is dead: the directory is used again
    assert os.listdir(tmp_path) == []


def test_who_ends_late_leaves_the_entry_of_the_next_process(tmp_path: Path) -> None:
    """After umount(8) the next mount may be there before the process of the last one has ended."""
    mine = Registration(str(tmp_path), b"/mnt")
    # Even with the same number, as processes of two containers have.
    other = living(tmp_path, "/mnt", 7, pid=os.getpid())
    mine.remove()
    assert [one.connection for one in registry.entries(str(tmp_path))] == [7]
    other.remove()
    assert os.listdir(tmp_path) == []
    other = Registration(str(tmp_path), b"/mnt")
    shutil.rmtree(other.path)
    other.remove()  # somebody has cleared the run directory


@pytest.mark.asyncio
async def test_only_who_listens_is_adopted(tmp_path: Path) -> None:
    """A process of another pid namespace may have written a number that here is somebody else's."""
    run_dir = tmp_path / "run"
    configuration = tmp_path / "udbad.toml"
    configuration.write_text(f'[daemon]\nrun_dir = "{run_dir}"\n')
    supervisor = Supervisor(configuration, load(configuration), signature(configuration), Pool())
    written = entry(run_dir, "/mnt", 7, pid=os.getppid())
    with bind(written.control):
        assert server_pid(written.control) == os.getpid()
        assert supervisor._adopt() == {}
        written = entry(run_dir, "/mnt", 7, pid=os.getpid())
        adopted = supervisor._adopt()["/mnt"].worker
        assert adopted is not None
        assert adopted.pid == os.getpid()
        adopted.forget()
    assert supervisor._adopt() == {}


def test_a_mount_point_is_claimed_by_one_process_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "CLAIM_SECONDS", 0)
    run_dir = str(tmp_path / "run")
    first, other = Claim(run_dir, b"/mnt"), Claim(run_dir, b"/other")
    with pytest.raises(OSError, match="busy"):
        Claim(run_dir, b"/mnt")
    # What is locked may be removed by whoever unmounts; then the lock is on nothing.
    shutil.rmtree(registry.directory(run_dir, b"/mnt"))
    second = Claim(run_dir, b"/mnt")
    with pytest.raises(OSError, match="busy"):
        Claim(run_dir, b"/mnt")
    for claim in (first, second, other):
        claim.release()
    Claim(run_dir, b"/mnt").release()


@pytest.mark.fuse
def test_the_number_of_a_dead_mount_in_use_by_another(daemon: Daemon) -> None:
    daemon.settings["watch"] = False
    daemon.add("a")
    daemon.start()
    number = daemon.state("a")["connection"]
    assert number
    entry(Path(daemon.run_dir), "/gone", number)
    daemon.add("b")
    daemon.write()
    daemon.ask("reload")
    daemon.wait_for("b")
    assert sorted(one.label for one in registry.entries(daemon.run_dir)) == ["a", "b"]
    daemon.stop()


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Pretend these mounts, (place, number, type): returns the directory in the place of fusectl."""
    monkeypatch.setattr(kernelside, "FUSECTL", tmp_path)
    monkeypatch.setattr(kernelside, "MOUNTINFO", tmp_path / "mountinfo")

    def mounts(*there: tuple[str, int, str]) -> Path:
        lines = [
            f"{31 + number} 29 0:{number} / {place} rw,relatime shared:1 - {kind} si=1 rw,user_id=0\n"
            for place, number, kind in there
        ]
        (tmp_path / "mountinfo").write_text("".join(lines))
        for _, number, _ in there:
            (tmp_path / str(number)).mkdir(exist_ok=True)
            (tmp_path / str(number) / "abort").write_text("")
        return tmp_path

    return mounts


def test_is_mounted(kernel: Callable[..., Path]) -> None:
    kernel(("/mnt/a\\040b", 40, "fuse.udba"), ("/mnt/c", 41, "fuse.sshfs"), ("/mnt/c", 42, "fuse.udba"))
    assert kernelside.is_mounted("/mnt/a b", 40)
    assert kernelside.is_mounted("/mnt/c", 42)
    assert not kernelside.is_mounted("/mnt/a b", 42)
    assert not kernelside.is_mounted("/mnt/c", 40)
    assert not kernelside.is_mounted("/mnt/c", 41)


class _Wedged:
    """A mount process that only a signal ends."""

    pid = NO_PROCESS

    def __init__(self) -> None:
        self.signals: list[signal.Signals] = []

    def send_signal(self, number: signal.Signals) -> None:
        self.signals.append(number)

    async def ended(self) -> None:
        assert self.signals

    async def ends(self) -> bool:
        await self.ended()
        return True


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("there", "aborted"),
    [
        (("/mnt/a", 40, "fuse.udba"), True),
        (("/mnt/b", 40, "fuse.udba"), False),
        (("/mnt/a", 40, "fuse.sshfs"), False),
    ],
)
async def test_a_wedged_process_never_costs_somebody_else_his_mount(
    kernel: Callable[..., Path], expect_log: Callable[[str], None], there: tuple[str, int, str], aborted: bool
) -> None:
    """Its mount was unmounted meanwhile, and the number has gone to another."""
    fusectl = kernel(there)
    shared = Shared(DaemonSettings(), Pool(), lambda _: None, lambda: None)
    runner = Runner(MountSettings("a", "/link/a", parse_mount_options("br=/x")), shared)
    runner.place, runner.connection = "/mnt/a", 40
    process = _Wedged()
    if not aborted:
        expect_log("a: /mnt/a is not mounted any more")
    await runner._abort(cast("Worker", process))
    assert (fusectl / "40" / "abort").read_text() == ("1" if aborted else "")
    assert process.signals == [signal.SIGKILL]


@pytest.mark.fuse
def test_a_mount_point_behind_a_link_is_known_by_its_real_path(daemon: Daemon) -> None:
    """The kernel shows the real path: a mount that died must be told from one that was unmounted."""
    daemon.add("a")
    link = daemon.tmp_path / "link"
    link.symlink_to(daemon.tmp_path)
    daemon.mounts["a"]["mount_point"] = str(link / "a.mnt")
    daemon.start()
    pid = daemon.state("a")["pid"]
    os.kill(pid, signal.SIGKILL)
    assert daemon.wait_for("a", not_pid=pid)["restarts"] == 1
    daemon.kill()
    daemon.start()
    pid = daemon.state("a")["pid"]
    os.kill(pid, signal.SIGKILL)
    daemon.wait_for("a", not_pid=pid)
    assert json.loads(daemon.command("status", "--json"))["mounts"][0]["state"] == "serving"
    daemon.stop()
