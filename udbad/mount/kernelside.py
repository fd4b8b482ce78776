"""What whoever starts mount processes may know of the kernel: /proc and fusectl. Never a path at a mount point."""

from __future__ import annotations

import os

from udbad.branch import mountinfo
from udbad.branch.mountinfo import FS_TYPE

FUSECTL = "/sys/fs/fuse/connections"
MOUNTINFO = "/proc/self/mountinfo"


def unions() -> set[tuple[str, int]]:
    """(mount point as the kernel has it, FUSE connection) of every union."""
    return {
        (os.fsdecode(mount.point), mount.connection) for mount in mountinfo.read(MOUNTINFO) if mount.fs_type == FS_TYPE
    }


def is_mounted(place: str, connection: int) -> bool:
    """Whether a union is on the mount point `place`, as the kernel has it, with this FUSE connection.

    Both count: a number is given to the next mount as soon as it is free, of whatever FUSE file system that is.
    """
    return (place, connection) in unions()


def abort(place: str, connection: int) -> str | None:
    """Abort the FUSE connection of the union on `place`: every request in it fails, which frees whoever waits.

    Nobody else's: the file is opened first, which binds it to one connection whatever becomes of the number.
    Returns what went wrong, if anything.
    """
    path = f"{FUSECTL}/{connection}/abort"
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            if not is_mounted(place, connection):
                return f"{place} is not mounted any more"
            os.write(fd, b"1")
        finally:
            os.close(fd)
    except OSError as error:
        return f"{path}: {error.strerror}"
    return None
