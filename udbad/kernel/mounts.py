"""Finding, changing and taking away our mounts: which one is meant follows from mountinfo and its id, never from
asking the mount itself, and never from the path alone, over which something else may be mounted by now.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Final

from udbad.branch import capabilities, mountinfo
from udbad.branch.mountinfo import FS_TYPE, Mount, mount_id
from udbad.errors import ExitCode, UserError

_libc: Final = ctypes.CDLL(None, use_errno=True)
_MNT_DETACH: Final = 2
_MS_REMOUNT: Final = 32
_MS_BIND: Final = 4096
_SUPERBLOCK_FLAGS: Final = {"ro": 1, "sync": 16, "lazytime": 1 << 25}
"""Those of the superblock that a remount can change (MS_RMT_MASK); `ro` is one of the mount, too."""

MOUNT_FLAGS: Final = {
    "ro": 1, "nosuid": 2, "nodev": 4, "noexec": 8, "noatime": 1024, "nodiratime": 2048, "relatime": 1 << 21,
    "strictatime": 1 << 24,
}  # fmt: skip
"""Flags of a mount, by their names in mount(8): MS_* of mount(2)."""


def unions() -> list[Mount]:
    """Every udbad mount of this mount namespace, oldest first."""
    return [mount for mount in mountinfo.read() if mount.fs_type == FS_TYPE]


def lying(path: bytes) -> list[Mount]:
    """The unions that whoever follows `path` meets, topmost first; none where they are out of reach, below a mount
    on a directory above. Raises OSError (EBUSY) when something else lies over them."""
    there = {mount.id: mount for mount in mountinfo.read() if mount.point == path}
    if not any(mount.fs_type == FS_TYPE for mount in there.values()):
        return []
    with _top(path) as fd:
        top = mount_id(fd)
    found = []
    while top in there and there[top].fs_type == FS_TYPE:
        found.append(there[top])
        top = found[-1].parent
    if not found and top in there:
        raise _covered(path)
    return found


def mounts_inside(connection: int) -> bool:
    """Whether something is mounted on a directory or file of the union with this number, by whatever process.

    Looks into the mount namespace of every process (containers have their own), and never at a mount itself.
    """
    device = b" 0:%d " % connection
    seen = set()
    for pid in os.listdir("/proc"):
        if not pid.isdigit():
            continue
        try:
            namespace = os.readlink(f"/proc/{pid}/ns/mnt")
            if namespace in seen:
                continue
            with open(f"/proc/{pid}/mountinfo", "rb", buffering=0) as file:
                table = file.read()
        except OSError:
            continue  # ended meanwhile, or a thread of the kernel
        seen.add(namespace)
        if device not in table:
            continue  # a successor waits for this, and there may be hundreds of containers
        mounts = mountinfo.parse(table)
        ours = {mount.id for mount in mounts if mount.device == (0, connection)}
        if any(mount.parent in ours for mount in mounts):
            return True
    return False


def find_mount(path: bytes, name: bytes = b"none") -> bytes:
    """The mount point as the kernel has it: of the union on `path`, else of the one of this name (its source).

    Raises UserError when there is none, or when several have the name.
    """
    wanted = {path, os.path.normpath(path)}
    parent = os.path.realpath(os.path.dirname(path))
    wanted.add(os.path.join(parent, os.path.basename(path)))
    for mount in unions():
        if mount.point in wanted:
            return mount.point
    places = {mount.point for mount in unions() if mount.source == name != b"none"}
    if len(places) > 1:
        known = ", ".join(sorted(map(os.fsdecode, places)))
        raise UserError(f"several unions have the name {os.fsdecode(name)}: {known}", ExitCode.NOT_MOUNTED)
    if places:
        return places.pop()
    raise UserError(f"no union is mounted on {os.fsdecode(path)}", ExitCode.NOT_MOUNTED)


# -- one mount, by its id --------------------------------------------------------------------------


@contextmanager
def opened(path: bytes, wanted: int) -> Iterator[int]:
    """The root of the mount with the id `wanted` on `path`, as an O_PATH descriptor: for as short as can be,
    since the mount is busy by it.

    Raises OSError: EINVAL when it is not mounted any more, EBUSY when something else is mounted over it.
    """
    if not any(mount.id == wanted for mount in unions()):
        raise _gone(path)
    with _top(path) as fd:
        if mount_id(fd) != wanted:
            raise _covered(path)
        yield fd


@contextmanager
def _top(path: bytes) -> Iterator[int]:
    # O_PATH sends no request to the file system that is mounted there, not even to a dead one.
    fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def _gone(path: bytes) -> OSError:
    return OSError(errno.EINVAL, "the union is not mounted there any more", os.fsdecode(path))


def _covered(path: bytes) -> OSError:
    return OSError(errno.EBUSY, "something else is mounted over the union there", os.fsdecode(path))


def set_flags(fd: int, flags: Iterable[str]) -> None:
    """Make these the flags of a mount (names in MOUNT_FLAGS), all others are off; without one for access times those
    stay as they are.

    fd: O_PATH, of its root (`opened`). Of this mount only: copies of it in other mount namespaces stay as they are.
    Raises OSError: EBUSY for ro while a file is open for writing.
    """
    _remount(fd, _MS_BIND | sum(MOUNT_FLAGS[flag] for flag in flags))


def set_all_flags(fd: int, flags: frozenset[str]) -> None:
    """As `set_flags` and those of the superblock in the same step, which hold in other mount namespaces, too.

    Without a flag for access times it is relatime. Writes back what is dirty: never on the event loop. Raises OSError:
    EBUSY for ro while a file is open for writing, or open and removed, wherever the union is mounted.
    """
    known = MOUNT_FLAGS | _SUPERBLOCK_FLAGS
    times = {"noatime", "strictatime", "relatime"}
    _remount(fd, sum(known[flag] for flag in (flags if flags & times else flags | {"relatime"}) & known.keys()))


def _remount(fd: int, bits: int) -> None:
    bits |= _MS_REMOUNT
    if _libc.mount(None, b"/proc/self/fd/%d" % fd, None, ctypes.c_ulong(bits), None) != 0:
        raise _error(b"")


def unmount(path: bytes, wanted: int, lazy: bool = False) -> None:
    """Take away the mount with the id `wanted`, and nothing that lies over it: umount2(2).

    May wait for the file system's own requests: never on the event loop. Raises OSError as `opened`; EBUSY when it
    is in use, unless lazy.
    """
    with opened(path, wanted) as fd:
        if lazy:
            _take_away(path, b"/proc/self/fd/%d" % fd, _MNT_DETACH)
            return
    # By path now: a descriptor of the mount would be its user.
    _take_away(path, path, 0)


def unmount_top(path: bytes, lazy: bool = False) -> None:
    """Take away the union that is topmost on `path`; as `unmount`."""
    there = lying(path)
    if not there:
        raise _gone(path)
    unmount(path, there[0].id, lazy)


def _take_away(path: bytes, target: bytes, flags: int) -> None:
    """umount2(2) of `target`; where that is not for us, what lies on `path` through the helper that has mounted it."""
    try:
        _umount(target, flags)
    except PermissionError:
        if capabilities.may_mount():
            raise
        _ask_helper(path, flags)


FUSERMOUNT: Final = "fusermount3"
"""Of the package fuse3; setuid root, mounts and unmounts for users."""


def _ask_helper(path: bytes, flags: int) -> None:
    """Raises OSError: EPERM without the helper, or when the mount is not ours."""
    import shutil
    import subprocess  # root unmounts without

    helper = shutil.which(FUSERMOUNT)
    if helper is None:
        raise OSError(errno.EPERM, f"a user needs {FUSERMOUNT} to unmount", os.fsdecode(path))
    words = [helper, "-u", *(["-z"] if flags & _MNT_DETACH else []), "--", os.fsdecode(path)]
    done = subprocess.run(words, check=False, capture_output=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise helper_error(done.stderr, path)


def helper_error(said: bytes, path: bytes) -> OSError:
    """What the helper wrote to stderr, as the error that it met: EPERM for what is a rule of its own."""
    lines = os.fsdecode(said).strip().splitlines() or [os.strerror(errno.EPERM)]
    line = lines[-1].removeprefix(f"{FUSERMOUNT}: ")
    known = (errno.EBUSY, errno.EINVAL, errno.EACCES, errno.ENOENT, errno.ENOTCONN, errno.ENOTDIR)
    number = next((one for one in known if line.endswith(os.strerror(one))), errno.EPERM)
    return OSError(number, line, os.fsdecode(path))


def _umount(path: bytes, flags: int) -> None:
    if _libc.umount2(path, flags) != 0:
        raise _error(path)


def _error(path: bytes) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number), os.fsdecode(path) or None)
