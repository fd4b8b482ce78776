"""Finding and taking away our mounts by what /proc/self/mountinfo says, never by asking the mount itself."""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass

from udbad.errors import ExitCode, UserError

_libc = ctypes.CDLL(None, use_errno=True)
_MNT_DETACH = 2
FS_TYPE = b"fuse.udba"


@dataclass(frozen=True, slots=True)
class MountEntry:
    """One mounted union: where, and its number under /sys/fs/fuse/connections."""

    path: bytes
    connection: int


def unions() -> list[MountEntry]:
    """Every udbad mount of this mount namespace, oldest first."""
    found = []
    with open("/proc/self/mountinfo", "rb") as lines:
        for line in lines:
            fields, _, rest = line.partition(b" - ")
            if rest.split(b" ")[0] != FS_TYPE:
                continue
            parts = fields.split(b" ")
            path = parts[4].decode("unicode_escape").encode("latin-1")
            found.append(MountEntry(path, int(parts[2].split(b":")[1])))
    return found


def mounts_inside(connection: int) -> bool:
    """Whether something is mounted on a directory or file of the union with this number, by whatever process.

    Looks into the mount namespace of every process (containers have their own), and never at a mount itself.
    """
    device = f"0:{connection}".encode()
    seen = set()
    for pid in os.listdir("/proc"):
        if not pid.isdigit():
            continue
        try:
            namespace = os.readlink(f"/proc/{pid}/ns/mnt")
            if namespace in seen:
                continue
            with open(f"/proc/{pid}/mountinfo", "rb") as lines:
                mounts = [line.split(b" ", 3)[:3] for line in lines]
        except OSError:
            continue  # ended meanwhile, or a thread of the kernel
        seen.add(namespace)
        ours = {mount for mount, _, dev in mounts if dev == device}
        if any(parent in ours for _, parent, _ in mounts):
            return True
    return False


def find_mount(path: bytes) -> bytes:
    """The mount point as the kernel has it. Raises UserError when no union is mounted there."""
    wanted = {path, os.path.normpath(path)}
    parent = os.path.realpath(os.path.dirname(path))
    wanted.add(os.path.join(parent, os.path.basename(path)))
    for entry in unions():
        if entry.path in wanted:
            return entry.path
    raise UserError(f"no union is mounted on {os.fsdecode(path)}", ExitCode.NOT_MOUNTED)


def unmount(path: bytes, lazy: bool = False) -> None:
    """umount2(2). May wait for the file system's own requests: never on the event loop."""
    if _libc.umount2(path, _MNT_DETACH if lazy else 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), os.fsdecode(path))
