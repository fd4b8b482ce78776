"""The machine that is measured on: what it is, and that it is awake.

A virtual machine halts a processor that has nothing to do, and it takes its host 15 to 25 us to wake it. A request on
FUSE is two changes from one process to another, so that this is more than all that any of the file systems does for it.
So Linux lets a guest look for work for a while before it halts (Documentation/virt/guest-halt-polling.rst), unless it
was told not to. Here it does, on all systems alike: they are what is measured, not the host. A machine that is none, or
whose host does the same for it, has nothing of this.
"""

import contextlib
import os
import platform
from collections.abc import Iterator
from pathlib import Path

import udbad
from tests.bench import process
from tests.bench.process import Failed
from udbad import compiled

HALT_POLL = Path("/sys/module/haltpoll/parameters/guest_halt_poll_ns")
HALT_POLL_NS = 200_000
"""What Linux has it at if nobody says anything else (guest_halt_poll_ns in drivers/cpuidle/governors/haltpoll.c)."""


@contextlib.contextmanager
def awake() -> Iterator[None]:
    """Poll before halting meanwhile, where the machine can and does not."""
    try:
        before = int(HALT_POLL.read_text())
        if before:
            raise ValueError("it does")
        HALT_POLL.write_text(str(HALT_POLL_NS))
    except (OSError, ValueError):
        yield
        return
    try:
        yield
    finally:
        HALT_POLL.write_text(str(before))


def versions(scratch: Path) -> dict[str, str]:
    """What was measured, on what."""
    found = {"udbad": f"{udbad.__version__} ({compiled.why_not() or 'compiled'})"}
    found |= {"kernel": platform.release(), "python": platform.python_version()}
    for name, argv in {
        "fuse-overlayfs": ["fuse-overlayfs", "--version"],
        "mergerfs": ["mergerfs", "--version"],
        "unionfs-fuse": ["unionfs", "--version"],
        "fio": ["fio", "--version"],
        "file system": ["stat", "-f", "-c", "%T", str(scratch)],
        "git": ["git", "--version"],
        "gcc": ["gcc", "-dumpfullversion"],
    }.items():
        with contextlib.suppress(Failed, OSError):
            lines = process.run(argv, deadline=10)[1].strip().splitlines()
            found[name] = next((line for line in lines if line.startswith(name)), lines[0])  # not libfuse's version
    with contextlib.suppress(OSError):
        found["guest_halt_poll_ns"] = HALT_POLL.read_text().strip()
    with contextlib.suppress(OSError, IndexError):
        cpu = Path("/proc/cpuinfo").read_text().split("model name\t: ")[1].splitlines()[0]
        found["cpu"] = cpu
    found["cpus"] = str(os.cpu_count())
    found["load average"] = " ".join(f"{value:.1f}" for value in os.getloadavg())  # a busy machine shows here
    found["memory"] = Path("/proc/meminfo").read_text().splitlines()[0].partition(":")[2].strip()
    return found
