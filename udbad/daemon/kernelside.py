"""What the supervisor may know of the kernel: /proc and fusectl. Never a path inside or at a mount point."""

from __future__ import annotations

import os
from pathlib import Path

FUSECTL = Path("/sys/fs/fuse/connections")
_FS_TYPE = b"fuse.udba"


def connections() -> set[int]:
    """Numbers of the FUSE connections of all unions in this mount namespace, proc_pid_mountinfo(5)."""
    found = set()
    for line in Path("/proc/self/mountinfo").read_bytes().splitlines():
        fields, _, rest = line.partition(b" - ")
        if rest.split(b" ")[0] == _FS_TYPE:
            found.add(int(fields.split(b" ")[2].split(b":")[1]))
    return found


def abort(connection: int) -> str | None:
    """Abort a FUSE connection: every request in it fails, which frees whoever waits. What went wrong, if anything."""
    path = FUSECTL / str(connection) / "abort"
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, b"1")
        finally:
            os.close(fd)
    except OSError as error:
        return f"{path}: {error.strerror}"
    return None
