"""Operations on ranges of an open file that may take long: fallocate(2), copy_file_range(2), and lseek(2) to a hole.

What changes content goes in three steps, as a copy-up does, so that the mount is served meanwhile:

    fallocate, copy   event loop: EBADF, NeedCopyUp, or a `Change`; nothing has happened yet
    Change.run        any thread: the system calls, as whoever opened the file
    end               event loop: whatever came of it, own changes are recorded as such

In between, the kernel holds the lock of the inode, so no other request of the mount changes the file, and it is on a
writable branch, so no copy-up moves it. Branch events that come in between are taken for those of the change. A direct
one that was among them shows all the same, as the kernel asks for attributes after the answer, and drops its pages
when the times are not those it has itself given the file (fuse_change_attributes_i()).
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import NamedTuple

from udbad.branch import copydata, datacalls
from udbad.branch.credentials import Credentials
from udbad.errors import os_error
from udbad.inodes.handles import ID_BITS, OpenFile, note_id_bits
from udbad.inodes.node import Node
from udbad.types import Trigger
from udbad.union.superblock import NeedCopyUp, Superblock


class Change(NamedTuple):
    """A change of an open file's content, about to be made by `call`, which returns a number of bytes."""

    handle: OpenFile
    creds: Credentials
    call: Callable[[], int]

    def run(self) -> int:
        """Make it, as whoever opened the file, so that suid and sgid go, and quota counts, as natively.

        Any thread, once. Raises OSError; something may have changed all the same.
        """
        handle = self.handle
        with self.creds.writing(handle.uid, handle.gid, handle.group):
            return self.call()


def require_writable(handle: OpenFile) -> None:
    """Have the descriptor of a handle lead to a file that may be changed.

    Raises EBADF when it was not opened for writing, NeedCopyUp when its data is on no writable branch.
    """
    if handle.writable:
        return
    if handle.flags & os.O_ACCMODE == os.O_RDONLY:
        raise os_error(errno.EBADF)
    if not handle.node.branch.writable:
        raise NeedCopyUp(handle.node, Trigger.WRITE)
    handle.reopen(handle.fd, True)  # its branch was not writable when it was opened


def fallocate(sb: Superblock, creds: Credentials, handle: OpenFile, mode: int, offset: int, length: int) -> Change:
    """fallocate(2). The kernel asks for KEEP_SIZE, PUNCH_HOLE and ZERO_RANGE only, and has looked at RLIMIT_FSIZE
    (fuse_file_fallocate()). Raises as `require_writable`."""
    _begin(sb, handle)

    def call() -> int:
        datacalls.fallocate(handle.fd, mode, offset, length)
        return length

    return Change(handle, creds, call)


def copy(
    sb: Superblock, creds: Credentials, source: OpenFile, src_offset: int, target: OpenFile, offset: int, length: int
) -> Change:
    """copy_file_range(2), from a file on whatever branch. The kernel has seen to it that both are regular files, that
    ranges of one file do not overlap, and looked at RLIMIT_FSIZE (generic_copy_file_checks()). Raises as
    `require_writable`, of the target."""
    _begin(sb, target)
    return Change(target, creds, lambda: copydata.copy_range(source.fd, src_offset, target.fd, offset, length))


def _begin(sb: Superblock, handle: OpenFile) -> None:
    require_writable(handle)
    sb.changes.before_data(handle.node, handle.fd)
    sb.changing.add(handle.node)


def end(sb: Superblock, change: Change, failed: bool) -> None:
    """After `Change.run`. failed: it raised, and the kernel goes on with the attributes that it has."""
    handle = change.handle
    sb.changing.discard(handle.node)
    if failed:
        sb.changes.behind(handle.node, True)  # as a disk that is full may have taken a part
    else:
        sb.changes.data(handle.node, True, None, handle.fd)
    if handle.id_bits:
        look_at_id_bits(sb, handle)


def look_at_id_bits(sb: Superblock, handle: OpenFile) -> None:
    """After new content, where the file had setuid or setgid when it was last looked at."""
    st = os.fstat(handle.fd)
    if st.st_mode & ID_BITS != handle.id_bits:
        id_bits_went(sb, handle.node, st)


def id_bits_went(sb: Superblock, node: Node, st: os.stat_result) -> None:
    """The branch took setuid or setgid away with new content (file_remove_privs()).

    The kernel does not ask for the mode after a WRITE, a FALLOCATE, a COPY_FILE_RANGE or an OPEN that truncates
    (fuse_write_update_attr(), fuse_truncate_update_attr()), as it leaves taking the bits away to us
    (FUSE_HANDLE_KILLPRIV).
    """
    note_id_bits(node, st)
    sb.changes.attributes(node)


def seeker(handle: OpenFile, whence: int) -> Callable[[int, int, int], int]:
    """What answers lseek(2) with SEEK_DATA or SEEK_HOLE of a handle, in any thread: by descriptor, offset and whence.

    A file that somebody can map shared and writable is all data: what was stored into a hole may still be in pages of
    the kernel, of which the branch knows nothing, and the kernel does not write them first (fuse_lseek()). Not so where
    the kernel maps the branch's file itself.
    """
    if whence not in (os.SEEK_DATA, os.SEEK_HOLE):
        raise os_error(errno.EINVAL)
    mapped = any(
        other.flags & os.O_ACCMODE == os.O_RDWR and not other.backing_id for other in handle.node.handles or ()
    )
    return datacalls.all_data if mapped else datacalls.seek_data
