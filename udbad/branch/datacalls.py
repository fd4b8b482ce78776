"""System calls on the content of open branch files: reading, sharing, allocating, and getting it to the disk.

All by a descriptor; what finds, makes and changes the objects themselves is in syscalls.py. All calls raise OSError.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from udbad import compiled
from udbad.branch import syscalls
from udbad.branch.syscalls import check

_libc: Final = ctypes.CDLL(None, use_errno=True)

_FICLONE: Final = 0x40049409
_NO_REFLINK: Final = frozenset(
    getattr(errno, name)
    for name in ("EOPNOTSUPP", "EXDEV", "EINVAL", "ENOTTY", "ENOSYS", "EPERM", "ETXTBSY", "EBADF", "EACCES")
)
_SYNC_WAIT_BEFORE: Final = 1
_SYNC_WRITE: Final = 2
_SYNC_WAIT: Final = 4


def read_ready(fd: int, most: int) -> bytes:
    """read(2) of a descriptor that does not wait (O_NONBLOCK); nothing when there is nothing to read."""
    try:
        return os.read(fd, most)
    except BlockingIOError:
        return b""


def read_cached(fd: int, size: int, offset: int) -> bytes | bytearray | bool:
    """pread of what is in the page cache already (RWF_NOWAIT); else whether the disk has been asked for it, so that
    the same call may have it soon (page_cache_sync_ra() in filemap_get_pages(), mm/filemap.c)."""
    buffer = bytearray(size)
    try:
        count = os.preadv(fd, [buffer], offset, os.RWF_NOWAIT)
    except BlockingIOError:
        return True
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise
        if not _is_in_memory(fd, size, offset):
            return False
        count = os.preadv(fd, [buffer], offset)
    if count < size:
        # "The rest is not cached" looks the same as the end of the file; only the latter is final.
        if offset + count < os.fstat(fd).st_size:
            return True
        del buffer[count:]
    return buffer


def start_reading(fd: int) -> None:
    """Have the disk asked for the beginning of a file, as a read does whose pages are not in memory, without waiting
    for it. Nothing where that cannot be, or is not known."""
    try:
        os.preadv(fd, [bytearray(1)], 0, os.RWF_NOWAIT)
    except OSError:
        pass  # EAGAIN, where it has done what it is for


_MEMORY: Final = frozenset({0x01021994, 0x858458F6})
"""statfs(2): types of file systems that are memory: tmpfs, ramfs."""
_IMAGES: Final = frozenset({0x73717368, 0xE0F5E1E2, 0x9660, 0x28CD3D45, 0x7275, 0x4D44, 0x2011BAB0})
"""Local ones without RWF_NOWAIT, whose pages nobody else can make old: squashfs, erofs, iso9660, cramfs, romfs, vfat,
exfat."""
_FEW: Final = 128 << 10
"""Bytes of a read up to which finding out costs less than a thread, and nobody is reading ahead just now."""
_SYS_CACHESTAT: Final = 451
_PAGE: Final = os.sysconf("SC_PAGESIZE")


def _is_in_memory(fd: int, size: int, offset: int) -> bool:
    """Whether a read will not wait, on a file system that does not know RWF_NOWAIT (cachestat(2), Linux 6.5)."""
    statfs = (ctypes.c_long * 32)()
    if _libc.fstatfs(fd, statfs):
        return False
    if statfs[0] in _MEMORY:
        return True
    end = min(offset + size, os.fstat(fd).st_size)
    if statfs[0] not in _IMAGES or size > _FEW or end <= offset:
        return False
    cached = (ctypes.c_uint64 * 5)()
    if _libc.syscall(_SYS_CACHESTAT, fd, (ctypes.c_uint64 * 2)(offset, end - offset), cached, 0):
        return False
    return bool(cached[0] >= (end - 1) // _PAGE - offset // _PAGE + 1)


def read_and_close(fd: int, size: int, offset: int) -> bytes:
    """pread(2) of a descriptor that is for this only."""
    try:
        return os.pread(fd, size, offset)
    finally:
        os.close(fd)


def reflink(src_fd: int, dst_fd: int) -> bool:
    """Share all data blocks (FICLONE, ioctl_ficlone(2)); False where the file systems cannot."""
    try:
        fcntl.ioctl(dst_fd, _FICLONE, src_fd)
    except OSError as error:
        if error.errno in _NO_REFLINK:
            return False
        raise
    return True


_fallocate: Final = getattr(_libc, "fallocate64", _libc.fallocate)  # 64 bits on every machine, where there is a choice
_fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2). mode: FALLOC_FL_*. Raises OSError: EOPNOTSUPP where the file system has no such mode."""
    check(_fallocate(fd, mode, offset, length))


def seek_data(fd: int, offset: int, whence: int) -> int:
    """lseek(2) with SEEK_DATA or SEEK_HOLE. ENXIO: nothing of the kind from `offset` on. Moves the descriptor's own
    position, which nobody goes by. All is data where the file system cannot tell (generic_file_llseek())."""
    try:
        return os.lseek(fd, offset, whence)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
    return all_data(fd, offset, whence)


def all_data(fd: int, offset: int, whence: int) -> int:
    """What `seek_data` says of a file without holes."""
    size = os.fstat(fd).st_size
    if not 0 <= offset < size:
        raise OSError(errno.ENXIO, os.strerror(errno.ENXIO))
    return offset if whence == os.SEEK_DATA else size


def copy_in_turns(src_fd: int, dst_fd: int, count: int, src_at: int, dst_at: int) -> int:
    """copy_file_range(2) of two files that share no blocks; returns how many bytes were copied, perhaps fewer than
    `count`, 0 at the end of the source.

    In C a thread of short turns (kernel/scheduling.py) gives way to others again and again. Not here: it would wait for
    the interpreter's lock each time, for milliseconds where requests are served."""
    return os.copy_file_range(src_fd, dst_fd, count, src_at, dst_at)


def start_writing(fd: int, offset: int, count: int) -> None:
    """Have these bytes of a file written to its disk, without waiting for it (sync_file_range(2)); count 0: all from
    `offset` on. Never fails: what is wrong is told to who waits for it."""
    _libc.sync_file_range(fd, ctypes.c_int64(offset), ctypes.c_int64(count), _SYNC_WRITE)


def write_out(fd: int) -> None:
    """Wait until a file's content is written, not until it can be found after a power failure: see ordering.py."""
    check(_libc.sync_file_range(fd, ctypes.c_int64(0), ctypes.c_int64(0), _SYNC_WAIT_BEFORE | _SYNC_WRITE | _SYNC_WAIT))


@contextmanager
def syncing(dirfd: int) -> Iterator[int]:
    """A descriptor for `sync_fs` of the file system that a directory is on, an O_PATH one will do. It has to be opened
    before what is to be synced is written: an error that others were told of is not told to who opens later (errseq.h).
    """
    fd = syscalls.open_listing(dirfd)
    try:
        yield fd
    finally:
        os.close(fd)


def sync_fs(fd: int) -> None:
    """syncfs(2) through a descriptor of `syncing`. Raises OSError for all that could not be written since that was
    opened (Linux 5.8). Does not reach a FUSE server (docs/modes.md): files there need an fsync each."""
    check(_libc.syncfs(fd))


def sync_file(fd: int, data_only: bool) -> None:
    """fsync(2) or fdatasync(2). EINVAL is success: a file system without fsync (squashfs, erofs, iso9660) has nothing
    to write."""
    try:
        (os.fdatasync if data_only else os.fsync)(fd)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise


def flush(fd: int) -> None:
    """What close(2) of a file would report now (filp_flush), without closing it: ENOSPC, EDQUOT, EIO, … of file
    systems that write only then, as NFS, CIFS and FUSE do. May wait for a server. Raises OSError."""
    os.close(os.dup(fd))


def close_quietly(fd: int) -> None:
    """close(2) where nobody is left to hear of its error. The descriptor is free all the same (close(2), "Dealing with
    error returns"): to keep its number would be to use somebody else's file under it soon."""
    try:
        os.close(fd)
    except OSError as error:
        if error.errno == errno.EBADF:  # not an error of the file, but a bug
            raise


if not compiled.why_not():
    # The same without Python between.
    from udbad.branch.ccalls import (  # noqa: F401  # names of this module
        close_quietly,
        copy_in_turns,
        read_cached,
        read_ready,
        start_reading,
        start_writing,
        write_out,
    )
