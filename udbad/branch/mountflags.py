"""What the private mounts of the branches let us do (mount_setattr(2), Linux 5.12).

Every branch is reached through a clone of its mount that nobody else has. That of a branch which is not written to is
read-only, so nothing of ours can change it, access times included (touch_atime in fs/inode.c). That of a writable one
treats access times as the mount options say, else as the branch's own mount does.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Final

from udbad.branch import syscalls
from udbad.branch.branches import Branch

log = logging.getLogger(__name__)

_RDONLY: Final = 0x1
_ATIME: Final = 0x70
"""MOUNT_ATTR__ATIME: a field, of which one value can be set, after all of it was cleared."""
_NOATIME: Final = 0x10
_NODIRATIME: Final = 0x80
_OPTIONS: Final = {"relatime": 0x0, "noatime": _NOATIME, "strictatime": 0x20}
_ST_NOATIME, _ST_NODIRATIME, _ST_RELATIME = 1024, 2048, 4096  # statvfs(3); Python has names for some only


def settle(branches: Iterable[Branch], written: Collection[Branch], options: Collection[str]) -> None:
    """Have the mount of each branch be as it is used now. written: those that are written to. options: of mount(8).

    Where the kernel does not let us, one notice says what follows. Raises nothing.
    """
    ids = {branch.id for branch in written}
    refused = [branch for branch in branches if not _settle(branch, branch.id in ids, options) and branch.id not in ids]
    if refused:
        names = ", ".join(os.fsdecode(branch.path) for branch in refused)
        log.info("reading changes access times on %s: mount_setattr(2) is refused, or not there (Linux 5.12)", names)


def _settle(branch: Branch, written: bool, options: Collection[str]) -> bool:
    if not written:
        # A file that is still open for writing (EBUSY) keeps it writable, not its access times.
        return _set(branch, _RDONLY | _NOATIME, _ATIME) or _set(branch, _NOATIME, _ATIME)
    return _set(branch, _times(branch, options), _RDONLY | _ATIME | _NODIRATIME)


def _times(branch: Branch, options: Collection[str]) -> int:
    own = os.fstatvfs(branch.anchor_fd).f_flag
    nodiratime = _NODIRATIME if "nodiratime" in options or own & _ST_NODIRATIME else 0
    for option, value in _OPTIONS.items():
        if option in options:
            return value | nodiratime
    if own & _ST_NOATIME:
        return _NOATIME | nodiratime
    return _OPTIONS["relatime" if own & _ST_RELATIME else "strictatime"] | nodiratime


def _set(branch: Branch, on: int, off: int) -> bool:
    """False where that is refused. In a user namespace access times may be locked (EPERM), and the rest is not."""
    if not branch.private:
        return False  # the mount that everybody uses
    for mask in (~0, _RDONLY):
        try:
            syscalls.set_mount_attributes(branch.root_fd, on & mask, off & mask)
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.EBUSY, errno.ENOSYS, errno.EINVAL):
                raise
            if error.errno != errno.EPERM:
                return False
        else:
            return True
    return False


@contextmanager
def writing_to(*branches: Branch) -> Iterator[None]:
    """Write to branches of a union that are not writable in it, on somebody's express wish (udbad mvdown)."""
    lifted = [branch for branch in branches if not branch.writable and _set(branch, 0, _RDONLY)]
    try:
        yield
    finally:
        for branch in lifted:
            _set(branch, _RDONLY, 0)
