"""io=passthrough: files that the kernel reads, writes and maps without asking (FOPEN_PASSTHROUGH, Linux 6.9).

The kernel then uses the branch's file itself: at its speed, with its page cache alone, and what is changed directly is
seen at once. It cannot be taken back while the file is open, so it is given only to files whose data stays where it is
(`UnionFs.stays`). All open files of an inode must be of one kind, and of one backing id (fuse_file_io_open() in
fs/fuse/iomode.c, which says EIO otherwise): the first open decides, and the id lives as long as one of them.

The kernel acts on the branch with the credentials that the backing id was made with. They are the first opener's
without CAP_FSETID, so that new content costs setuid and setgid bits as it does natively.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import struct

from udbad.branch import syscalls
from udbad.branch.branches import Branch
from udbad.inodes.handles import OpenFile
from udbad.union.fs import UnionFs

log = logging.getLogger(__name__)

_BACKING_OPEN = 1 << 30 | 16 << 16 | 229 << 8 | 1
"""FUSE_DEV_IOC_BACKING_OPEN, of struct fuse_backing_map: descriptor, flags, padding."""
_BACKING_CLOSE = 1 << 30 | 4 << 16 | 229 << 8 | 2
_MAP = struct.Struct("<iIQ")
_ID = struct.Struct("<I")


class Passthrough:
    """The backing ids of one connection. Event loop only."""

    def __init__(self, fd: int, fs: UnionFs) -> None:
        """fd: /dev/fuse, of a connection with which FUSE_PASSTHROUGH was agreed on."""
        self._fd = fd
        self._fs = fs
        self.opens = 0
        """Files given to the kernel so far."""
        self.in_use = len({handle.backing_id for handle in fs.handles.files.values() if handle.backing_id})
        """Backing ids that the kernel has."""
        self.fallbacks: list[str] = []
        """Where it cannot be, and why: a line each."""
        self._refused: set[int] = set()
        """Ids of branches whose file system the kernel does not take."""
        fs.on_unused_backing = self._close

    def give(self, handle: OpenFile, flags: int, st: os.stat_result) -> int:
        """Have the kernel use the branch's file; the backing id for the reply, 0 when it is to ask for all it does.

        handle: just opened, with `flags`. st: the file's status. Raises EINVAL for O_DIRECT where the branch has none.
        """
        node = handle.node
        handles = node.handles
        assert handles is not None
        shared = handles[0].backing_id
        if len(handles) > 1 and not shared:
            return 0
        if not shared and (node.branch.id in self._refused or not self._fs.stays(node, st)):
            return 0
        if flags & os.O_DIRECT and not _has_direct(handle.fd):
            if shared:
                syscalls.reopen(handle.fd, os.O_RDONLY | os.O_DIRECT)  # raises what open(2) on the branch says
            return 0
        backing = shared or self._open(handle)
        if backing:
            handle.backing_id = backing
            self.opens += 1
        return backing

    def _open(self, handle: OpenFile) -> int:
        branch = handle.node.branch
        try:
            with self._fs.creds.passing(handle.uid, handle.gid):
                number: int = fcntl.ioctl(self._fd, _BACKING_OPEN, bytearray(_MAP.pack(handle.fd, 0, 0)))
                self.in_use += 1
                return number
        except OSError as error:
            if error.errno in (errno.ENFILE, errno.EMFILE, errno.ENOMEM, errno.ENOSPC):
                return 0  # this time
            self._refused.add(branch.id)
            self._tell(branch, error)
            return 0

    def _tell(self, branch: Branch, error: OSError) -> None:
        """Once: what holds for the branch holds for all of its files, and EPERM for all branches."""
        if error.errno == errno.EPERM:
            line = "no passthrough: it takes CAP_SYS_ADMIN in the first user namespace"
        elif error.errno == errno.ELOOP:
            line = f"no passthrough on branch {branch.describe()}: {branch.fs_type} lies on other file systems itself"
        else:
            line = f"no passthrough on branch {branch.describe()}: {error.strerror}"
        if line not in self.fallbacks:
            self.fallbacks.append(line)
            log.info("%s", line)

    def _close(self, backing_id: int) -> None:
        self.in_use -= 1
        try:
            fcntl.ioctl(self._fd, _BACKING_CLOSE, _ID.pack(backing_id))
        except OSError as error:
            log.error("cannot give back a backing id: %s", error.strerror)


def _has_direct(fd: int) -> bool:
    """Whether the file system of an open file has O_DIRECT; with it, the kernel opens the branch's file so, too."""
    try:
        os.close(syscalls.reopen(fd, os.O_RDONLY | os.O_DIRECT))
    except OSError:
        return False
    return True
