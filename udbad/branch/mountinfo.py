"""The mount table of a process, as proc_pid_mountinfo(5) has it, and which mount a descriptor leads to.

Asks the kernel's own tables only, never a file system: one that is mounted may be dead or wedged.
"""

from __future__ import annotations

import errno
import os
import re
from typing import Final, NamedTuple

FS_TYPE: Final = b"fuse.udba"
"""The type of a mount of ours."""

_ESCAPED: Final = rb"\\([0-7]{3})"


class Mount(NamedTuple):
    """One line: a mount, and the file system it shows."""

    id: int
    parent: int
    """Id of the mount it lies on; of one that is not listed at the root of the namespace, or outside of a chroot(2)."""
    device: tuple[int, int]
    """Major and minor of the superblock (st_dev)."""
    root: bytes
    """The directory of the file system that is mounted, as a path in that."""
    point: bytes
    """Path of the mount point."""
    options: bytes
    """Flags of the mount, with commas."""
    fs_type: bytes
    source: bytes
    super_options: bytes
    """Options of the superblock, with commas; as the file system gives them, escapes included."""

    @property
    def connection(self) -> int:
        """Of a FUSE mount: its number under /sys/fs/fuse/connections."""
        return self.device[1]


def parse(data: bytes) -> list[Mount]:
    """Every line, oldest mount first: a later one covers an earlier one on the same point.

    Fields are separated by one space and nothing else: one may be empty (the source), and what separates words or
    lines elsewhere (carriage return, form feed) the kernel does not escape. In front of the hyphen are any number of
    optional fields.
    """
    mounts = []
    for line in data.split(b"\n"):
        if not line:
            continue
        before, _, after = line.partition(b" - ")
        number, parent, device, root, point, options = before.split(b" ")[:6]
        fs_type, source, super_options = after.split(b" ", 2)
        major, _, minor = device.partition(b":")
        mounts.append(
            Mount(
                int(number), int(parent), (int(major), int(minor)), _plain(root), _plain(point), options,
                _plain(fs_type), _plain(source), super_options,
            )
        )  # fmt: skip
    return mounts


def _plain(field: bytes) -> bytes:
    r"""Undo the kernel's mangle_path(): space, tab, newline, backslash (and # in a source) are written as \ooo."""
    if b"\\" not in field:
        return field
    return re.sub(_ESCAPED, lambda match: bytes([int(match[1], 8) & 0xFF]), field)


def read(path: str | os.PathLike[str] = "/proc/self/mountinfo") -> list[Mount]:
    """The mounts that a process sees. Raises OSError: ENOENT, ESRCH, EINVAL when it has ended, EACCES."""
    with open(path, "rb") as file:
        return parse(file.read())


def mount_id(fd: int) -> int:
    """The id of the mount that a descriptor leads to (proc_pid_fdinfo(5), Linux 3.15). Raises OSError."""
    with open(f"/proc/self/fdinfo/{fd}", "rb") as file:
        for line in file:
            if line.startswith(b"mnt_id:"):
                return int(line[7:])
    raise OSError(errno.ENOSYS, "no mnt_id in /proc/self/fdinfo")
