"""How many requests the kernel sends to one FUSE connection: counted by the kernel, the same for every system.

The tracepoint fuse:fuse_request_send (fs/fuse/fuse_trace.h, Linux 6.10) in a tracing instance of our own, so that
nobody else's tracing is touched. Where there is no tracefs, or an older kernel, nothing is counted.
"""

import contextlib
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

TRACING = Path("/sys/kernel/tracing")


def _available() -> bool:
    if TRACING.is_dir() and not (TRACING / "instances").is_dir():
        subprocess.run(["mount", "-t", "tracefs", "none", TRACING], check=False, timeout=10, stderr=subprocess.DEVNULL)
    return (TRACING / "events/fuse/fuse_request_send").is_dir()


def entries(stats: str) -> int:
    """Events of one CPU, from its per_cpu/cpuN/stats: those still in the ring and those written over."""
    lines = (line.split(": ") for line in stats.splitlines())
    return sum(int(value) for key, value in lines if key in ("entries", "overrun"))


@contextlib.contextmanager
def requests(connection: int) -> Iterator[Callable[[], int] | None]:
    """While the context lasts: a function that tells how many requests were sent to the connection (its number in
    /sys/fs/fuse/connections) since it began; None where that cannot be known."""
    if not _available():
        yield None
        return
    instance = TRACING / f"instances/udbad-bench-{os.getpid()}"
    instance.mkdir()
    try:
        event = instance / "events/fuse/fuse_request_send"
        (event / "filter").write_text(f"connection == {connection}")
        (event / "enable").write_text("1")
        yield lambda: sum(entries(path.read_text()) for path in instance.glob("per_cpu/cpu*/stats"))
        (event / "enable").write_text("0")
    finally:
        instance.rmdir()
