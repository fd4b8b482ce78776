"""Children of the benchmark: clients and commands with a deadline, the CPU time and memory of daemons.

Invariant: this process itself never touches a mount point; every access is made by a child that has a deadline, so a
wedged FUSE daemon can stop a child but not the run. Children die with this process (setpriv --pdeathsig).
"""

import contextlib
import os
import select
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

CPUCLOCK_SCHED = 2  # include/linux/posix-timers_types.h: clock id = ~pid << 3 | kind
PAGE = os.sysconf("SC_PAGE_SIZE")
BOUND = ["setpriv", "--pdeathsig", "KILL"]


class Failed(Exception):
    """A system could not do what a workload asks; the text is what the table shows after "n/a:"."""


def start(argv: Sequence[str | Path], **options: object) -> "subprocess.Popen[str]":
    """Start a child that is killed when this process ends."""
    return subprocess.Popen([*BOUND, *map(str, argv)], text=True, **options)  # type: ignore[call-overload,no-any-return]  # keywords handed on


def reason(text: str) -> str:
    """The last line a program wrote, short enough for a table cell."""
    lines = [line.strip() for line in text.splitlines() if line.strip() and "dmesg(1)" not in line]
    return lines[-1][-160:] if lines else "no message"


def run(
    argv: Sequence[str | Path],
    deadline: float,
    wedged: Callable[[], None] | None = None,
    cwd: Path | None = None,
    env: dict[str, str] | None = None,
    discard: bool = False,
) -> tuple[float, str]:
    """Run a command to its end; returns (seconds, stdout, "" if it is to be discarded).

    What it writes goes into files, not pipes: a daemon that it leaves behind may keep them open. wedged is called when
    deadline seconds have passed, before the child is killed: it must free the child (abort the
    FUSE connection), since a process in uninterruptible sleep takes no SIGKILL. Raises Failed.
    """
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        began = time.perf_counter()
        target = subprocess.DEVNULL if discard else out
        child = start(argv, stdout=target, stderr=err, stdin=subprocess.DEVNULL, cwd=cwd, env=env)
        try:
            _wait(child, deadline)
        except subprocess.TimeoutExpired:
            if wedged is not None:
                wedged()
            child.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(timeout=10)
            raise Failed(f"{Path(str(argv[0])).name} not done after {deadline:.0f} s") from None
        except BaseException:
            child.kill()
            raise
        seconds = time.perf_counter() - began
        for file in (out, err):
            file.seek(0)
        said = out.read()
        if child.returncode:
            raise Failed(reason(err.read() or said or f"{argv[0]}: status {child.returncode}"))
        return seconds, said


def _wait(child: "subprocess.Popen[str]", deadline: float) -> None:
    """Wait at most deadline seconds, without a busy loop, which subprocess uses when it is given a time-out and which
    would see the end up to 50 ms late. Raises subprocess.TimeoutExpired."""
    descriptor = os.pidfd_open(child.pid)
    try:
        if not select.select([descriptor], [], [], deadline)[0]:
            raise subprocess.TimeoutExpired(child.args, deadline)
    finally:
        os.close(descriptor)
    child.wait()


def tree(pid: int) -> list[int]:
    """pid and all its descendants that still run (proc(5), /proc/PID/task/TID/children)."""
    found = [pid]
    for parent in found:
        for path in Path(f"/proc/{parent}/task").glob("*/children"):
            with contextlib.suppress(OSError):
                found.extend(int(child) for child in path.read_text().split())
    return found


def cpu_seconds(pid: int) -> float:
    """User and system time of a process and its descendants, in seconds.

    Read from their CPU-time clocks (clock_getcpuclockid(3)): the same sum as utime + stime of /proc/PID/stat, ended
    threads included, but in nanoseconds instead of ticks of 10 ms.
    """
    total = 0.0
    for each in tree(pid):
        with contextlib.suppress(OSError):
            total += time.clock_gettime((~each << 3) | CPUCLOCK_SCHED)
    return total


def rss_bytes(pid: int) -> int:
    """Resident memory of a process and its descendants, in bytes (field 2 of /proc/PID/statm)."""
    total = 0
    for each in tree(pid):
        with contextlib.suppress(OSError):
            total += int(Path(f"/proc/{each}/statm").read_text().split()[1])
    return total * PAGE


def pss_bytes(pid: int) -> int:
    """Memory of a process and its descendants, in bytes; of a page that several processes have, each one's part
    (Pss in /proc/PID/smaps_rollup, proc(5))."""
    total = 0
    for each in tree(pid):
        with contextlib.suppress(OSError):
            fields = dict(
                line.split(":", 1) for line in Path(f"/proc/{each}/smaps_rollup").read_text().splitlines()[1:]
            )
            total += int(fields["Pss"].split()[0]) * 1024
    return total


def sync(scratch: Path) -> None:
    """Write dirty data of scratch's file system to the disk; sync(1) -f, not sync(2): that would wait for every file
    system, a wedged one included."""
    run(["sync", "-f", scratch], deadline=300)


def drop_caches(scratch: Path, level: int) -> None:
    """Write scratch's dirty data out, then drop what the kernel has cached (proc(5), /proc/sys/vm/drop_caches).

    level 2: dentries and inodes; the kernel sends FORGET to FUSE daemons. level 3: the page cache too.
    """
    sync(scratch)
    Path("/proc/sys/vm/drop_caches").write_text(str(level))
