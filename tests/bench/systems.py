"""How each system is mounted, aborted and unmounted.

A system is one entry of SYSTEMS: a name, a kind, and a function that gives the command line. Adding a competitor is one
entry. May not know what is measured. Invariant: whatever was mounted is unmounted by Mounted.close, if need be
by force.
"""

import contextlib
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Literal

from tests.bench import process
from tests.bench.process import Failed
from tests.helpers.leaks import read_mountinfo
from udbad.settings import options

Kind = Literal["native", "kernel", "peer", "udbad"]
FUSECTL = Path("/sys/fs/fuse/connections")
REPOSITORY = Path(__file__).resolve().parents[2]
START_DEADLINE = 60.0  # seconds: 500 branches and a cold Python


@dataclass(frozen=True)
class Place:
    """Where one system works: lowers (highest first) are read-only, upper, work and mnt are its own."""

    lowers: tuple[Path, ...]
    upper: Path
    work: Path
    mnt: Path

    def make(self) -> None:
        for path in (self.upper, self.work, self.mnt):
            path.mkdir(parents=True, exist_ok=True)

    def wipe(self) -> None:
        for path in (self.upper, self.work):
            shutil.rmtree(path, ignore_errors=True)


@dataclass(frozen=True)
class System:
    """One way to unite directories. argv makes the command of a daemon that stays in the foreground (FUSE) or of a
    mount(8) that returns (kernel); ready_fd is appended to by the caller where the daemon tells when it serves."""

    name: str
    kind: Kind
    argv: Callable[[Place], list[str]]
    program: str = ""
    tells_ready: bool = False
    io: str = ""  # udbad's io= when it is not requests; the table has no column for it but lines

    @property
    def column(self) -> str:
        """Where the table shows it: the systems of an io mode in the columns of those of `requests`."""
        return self.name.removesuffix(f"-{self.io}") if self.io else self.name


def _native(place: Place) -> list[str]:
    """Native needs no command: Mounted.open binds the lower tree's directories into the upper one."""
    return []


def _overlay(place: Place) -> list[str]:
    # mount(2) takes one page of options: names relative to the lowers' directory leave room for 500 of them.
    lower = ":".join(path.name for path in place.lowers)
    options = f"lowerdir={lower},upperdir={place.upper},workdir={place.work}"
    return ["env", "-C", str(place.lowers[0].parent), "mount", "-t", "overlay", "-o", options, "bench", str(place.mnt)]


def _fuse_overlayfs(place: Place) -> list[str]:
    lower = ":".join(map(str, place.lowers))
    return [
        "fuse-overlayfs",
        "-f",
        "-o",
        f"lowerdir={lower},upperdir={place.upper},workdir={place.work}",
        str(place.mnt),
    ]


def _mergerfs(extra: str) -> Callable[[Place], list[str]]:
    def argv(place: Place) -> list[str]:
        branches = ":".join([f"{place.upper}=RW", *(f"{lower}=RO" for lower in place.lowers)])
        # Two defaults cannot stay: the create policy (epmfs creates nothing where only a read-only branch has the
        # directory) and the free space asked of a branch (4 GiB, more than the loop devices have).
        options = f"allow_other,use_ino,fsname=bench,minfreespace=0,category.create=ff{extra}"
        return ["mergerfs", "-f", "-o", options, branches, str(place.mnt)]

    return argv


MERGERFS_CACHES = (
    ",cache.entry=3600,cache.attr=3600,cache.negative_entry=3600,cache.readdir=true,cache.files=full"
    ",cache.symlinks=true,cache.statfs=3600"
)


def _unionfs(place: Place) -> list[str]:
    branches = ":".join([f"{place.upper}=RW", *(f"{lower}=RO" for lower in place.lowers)])
    return ["unionfs", "-f", "-o", "cow,allow_other,use_ino", branches, str(place.mnt)]


UDBAD = (sys.executable, "-m", "udbad")


def _udbad(mode: str, extra: str = "", module: str = "udbad") -> Callable[[Place], list[str]]:
    def argv(place: Place) -> list[str]:
        branches = ":".join([f"{place.upper}=rw", *(f"{lower}=ro" for lower in place.lowers)])
        options = f"br={branches},udba={mode}{extra}"
        return [sys.executable, "-m", module, "mount", "-f", "-o", options, "none", str(place.mnt)]

    return argv


def _udbad_system(mode: str, io: str = "") -> System:
    name = f"udbad-{mode}-{io}" if io else f"udbad-{mode}"
    return System(name, "udbad", _udbad(mode, f",io={io or 'requests'}"), tells_ready=True, io=io)


# The io= modes that are measured beside requests, of those that there are.
IO_MODES = tuple(mode for mode in ("cached", "passthrough") if mode in options.IO_MODES)
SYSTEMS = {
    system.name: system
    for system in (
        System("native", "native", _native),
        System("overlayfs", "kernel", _overlay),
        System("fuse-overlayfs", "peer", _fuse_overlayfs, "fuse-overlayfs"),
        System("mergerfs", "peer", _mergerfs(""), "mergerfs"),
        System("mergerfs-cache", "peer", _mergerfs(MERGERFS_CACHES), "mergerfs"),
        System("unionfs-fuse", "peer", _unionfs, "unionfs"),
        *(_udbad_system(mode) for mode in ("none", "reval", "notify")),
        *(_udbad_system(mode, io) for io in IO_MODES for mode in ("none", "notify")),
    )
}


METRICS_ADDRESS = "127.0.0.1:29723"
# What the cost of metrics is taken from; no competitors, so not in the table.
METERED = System("udbad-notify", "udbad", _udbad("notify", f",metrics={METRICS_ADDRESS}"), tells_ready=True)
UNMETERED = System("udbad-notify", "udbad", _udbad("notify", module="tests.bench.unmetered"), tells_ready=True)
# What the cost of survive=on is taken from.
SURVIVING = System("udbad-notify", "udbad", _udbad("notify", ",survive=on"), tells_ready=True)
MORTAL = System("udbad-notify", "udbad", _udbad("notify", ",survive=off"), tells_ready=True)


def mount_minor(mnt: Path) -> int | None:
    """Minor device number of what is mounted on mnt, which is the FUSE connection's number; None when nothing is.
    Asks no file system."""
    return next((mount.minor for mount in reversed(read_mountinfo()) if mount.path == mnt), None)


def mount_fusectl() -> None:
    """Make /sys/fs/fuse/connections usable in this mount namespace."""
    if mount_minor(FUSECTL) is None and FUSECTL.is_dir():
        subprocess.run(["mount", "-t", "fusectl", "none", str(FUSECTL)], check=False, timeout=10)


@dataclass
class Mounted:
    """One system mounted on one place."""

    system: System
    place: Place
    daemon: "subprocess.Popen[str] | None" = None
    binds: list[Path] = field(default_factory=list)
    minor: int | None = None
    log: "IO[str] | None" = None
    aborted: bool = False

    @property
    def root(self) -> Path:
        """Where clients go. Native has no mount point: it is the upper directory with the data bound into it."""
        return self.place.upper if self.system.kind == "native" else self.place.mnt

    @property
    def pid(self) -> int:
        if self.daemon is None:
            raise Failed("no daemon")
        return self.daemon.pid

    def open(self, copies: tuple[str, ...], environment: dict[str, str]) -> None:
        """Mount. copies: directories of the data that a workload writes into, which native gets as a copy.

        Raises Failed with what the program said.
        """
        self.place.make()
        if self.system.kind == "native":
            self._bind(copies)
        elif self.system.kind == "kernel":
            process.run(self.system.argv(self.place), deadline=START_DEADLINE)
        else:
            self._start(environment)

    def open_in_background(self, deadline: float) -> float:
        """Mount by a command that returns when the mount serves and leaves a daemon behind (Mounted.close does not
        wait for that one's end); returns seconds. Raises Failed."""
        self.place.make()
        if self.system.program and shutil.which(self.system.program) is None:
            raise Failed(f"{self.system.program} is not installed")
        argv = [word for word in self.system.argv(self.place) if word != "-f"]
        seconds, _ = process.run(argv, deadline, cwd=REPOSITORY)
        if mount_minor(self.place.mnt) is None:
            raise Failed("returned, but nothing is mounted")
        return seconds

    def _bind(self, copies: tuple[str, ...]) -> None:
        for source in sorted(self.place.lowers[-1].iterdir()):
            target = self.place.upper / source.name
            if source.name in copies:
                if not target.exists():  # a second mount goes on with what the first one left
                    process.run(["cp", "-a", source, target], deadline=300)
            elif source.is_dir():
                target.mkdir(exist_ok=True)
                process.run(["mount", "--bind", source, target], deadline=30)
                self.binds.append(target)

    def _start(self, environment: dict[str, str]) -> None:
        if self.system.program and shutil.which(self.system.program) is None:
            raise Failed(f"{self.system.program} is not installed")
        argv = self.system.argv(self.place)
        log = self.log = open(self.place.work.with_suffix(".log"), "w+")  # noqa: SIM115  # lives as long as the mount
        receive, send = os.pipe()
        try:
            if self.system.tells_ready:
                argv[argv.index("-f") + 1 : argv.index("-f") + 1] = ["--ready-fd", str(send)]
            self.daemon = process.start(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=(send,) if self.system.tells_ready else (),
                cwd=REPOSITORY,
                env=os.environ | environment,
            )
            os.close(send)
            send = -1
            self._wait_ready(receive)
        finally:
            os.close(receive)
            if send >= 0:
                os.close(send)
        self.minor = mount_minor(self.place.mnt)
        if self.minor is None:
            raise Failed("said it is ready, but nothing is mounted")

    def _wait_ready(self, receive: int) -> None:
        assert self.daemon is not None
        end = time.monotonic() + START_DEADLINE
        while time.monotonic() < end:
            if self.daemon.poll() is not None:
                raise Failed(f"did not mount: {self.said()}")
            if self.system.tells_ready:
                if select.select([receive], [], [], 0.2)[0] and os.read(receive, 64):
                    return
            elif mount_minor(self.place.mnt) is not None:
                return
            else:
                time.sleep(0.005)  # these programs tell nobody when they serve
        raise Failed(f"did not mount within {START_DEADLINE:.0f} s: {self.said()}")

    def said(self) -> str:
        """The last line the daemon wrote."""
        if self.log is None:
            return "no message"
        self.log.flush()
        self.log.seek(0)
        return process.reason(self.log.read())

    def abort(self) -> None:
        """End a FUSE connection by force: every request in it fails, every process stuck in it is freed."""
        if self.minor is not None:
            self.aborted = True
            with contextlib.suppress(OSError):
                (FUSECTL / str(self.minor) / "abort").write_text("1")

    def close(self) -> None:
        """Unmount and wait for the daemon's end; what does not end by itself is ended by force. Never raises Failed."""
        for bind in self.binds:
            _umount(bind)
        self.binds.clear()
        if self.minor is None:
            self.minor = mount_minor(self.place.mnt)
        if mount_minor(self.place.mnt) is not None and not _umount(self.place.mnt):
            self.abort()
            _umount(self.place.mnt, "-l")
        if self.daemon is not None:
            try:
                self.daemon.wait(timeout=2 if self.aborted else 20)
            except subprocess.TimeoutExpired:
                self.abort()
                for pid in reversed(process.tree(self.daemon.pid)):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, 9)
                self.daemon.wait()
            self.daemon = None
        if self.log is not None:
            self.log.close()
            self.log = None


def _umount(path: Path, *options: str) -> bool:
    try:
        process.run(["umount", *options, path], deadline=30)
    except Failed:
        return False
    return True
