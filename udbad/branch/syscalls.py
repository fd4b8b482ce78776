"""System calls on branch objects, each by (directory descriptor, name).

The only module with mutating os.* calls on branches; the content of open files is datacalls.py's. A name is one
component, never a path, and is never followed when it is a symbolic link: whoever swaps a symlink into a branch must
not lead the (root) daemon out of it. Where Linux has no *at() form that refuses links, the object is pinned with
O_PATH|O_NOFOLLOW and reached through /proc/self/fd. All calls raise OSError.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import signal
import stat as st_mod
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import ClassVar, Final, Literal

from udbad import compiled
from udbad.errors import ABSENT, enoent, estale

_libc: Final = ctypes.CDLL(None, use_errno=True)

RENAME_NOREPLACE: Final = 1
RENAME_EXCHANGE: Final = 2
RENAME_WHITEOUT: Final = 4

_AT_EMPTY_PATH: Final = 0x1000
_AT_FDCWD: Final = -100
_AT_SYMLINK_FOLLOW: Final = 0x400
_UTIME_NOW: Final = (1 << 30) - 1
_UTIME_OMIT: Final = (1 << 30) - 2
_AT_SYMLINK_NOFOLLOW: Final = 0x100
_STATX_BTIME: Final = 0x800
_STATX_BASIC_STATS: Final = 0x7FF
_AT_STATX_FORCE_SYNC: Final = 0x2000
_OPEN_TREE_CLONE: Final = 1
_SYS_OPEN_TREE: Final = 428  # one number on every architecture (linux/unistd.h, generic table)
_SYS_MOUNT_SETATTR: Final = 442
SMALL_COPY: Final = 4096
"""Bytes that `copy_small` copies at most."""

_O_DIR: Final = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_O_PIN: Final = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


def _timespec(time: int | Literal["now"] | None) -> _Timespec:
    if time is None:
        return _Timespec(0, _UTIME_OMIT)
    return _Timespec(0, _UTIME_NOW) if time == "now" else _Timespec(*divmod(time, 1_000_000_000))


def check(result: int) -> int:
    """What a function of the C library has returned. Raises OSError, of errno, when that is negative."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


# -- looking ----------------------------------------------------------------------------------


def stat_at(dirfd: int, name: bytes) -> os.stat_result:
    """fstatat(2) without following; ENOENT when absent."""
    return os.stat(name, dir_fd=dirfd, follow_symlinks=False)


def fstat(fd: int) -> os.stat_result:
    """fstat(2)."""
    return os.fstat(fd)


def find_at(dirfd: int, name: bytes) -> os.stat_result | None:
    """`stat_at`; None when nothing has the name, which a name too long for the file system is."""
    try:
        return os.stat(name, dir_fd=dirfd, follow_symlinks=False)
    except OSError as error:
        if error.errno in ABSENT:
            return None
        raise


def mode_at(dirfd: int, name: bytes) -> int:
    """st_mode of a name, not followed; 0 when nothing has it, which a name too long for the file system is."""
    try:
        return os.stat(name, dir_fd=dirfd, follow_symlinks=False).st_mode
    except OSError as error:
        if error.errno in ABSENT:
            return 0
        raise


def exists_at(dirfd: int, name: bytes) -> bool:
    """Whether anything has this name; a name too long for the file system does not exist."""
    try:
        return mode_at(dirfd, name) != 0
    except NotADirectoryError:
        return False


def is_entry(dirfd: int, name: bytes, parent: tuple[int, int]) -> bool:
    """Whether the directory behind `dirfd` is the entry `name` of the directory `parent` (device, inode) now.

    Only looked at: a directory that was moved out of the branch leads out of it here.
    """
    above = os.stat(b"..", dir_fd=dirfd)
    if (above.st_dev, above.st_ino) != parent:
        return False
    try:
        return os.path.samestat(os.fstat(dirfd), os.stat(b"../" + name, dir_fd=dirfd, follow_symlinks=False))
    except FileNotFoundError:
        return False


class _Statx(ctypes.Structure):
    """struct statx (statx(2)), as far as its birth time is asked for."""

    _fields_: ClassVar = [
        ("mask", ctypes.c_uint32),
        ("_to_ino", ctypes.c_uint8 * 28),
        ("ino", ctypes.c_uint64),
        ("_to_btime", ctypes.c_uint8 * 40),
        ("seconds", ctypes.c_int64),
        ("nanoseconds", ctypes.c_uint32),
        ("_rest", ctypes.c_uint8 * 164),
    ]


def birth_ns(dirfd: int, name: bytes, ino: int) -> int:
    """When the object was made, ns since the epoch; name b"": the object behind `dirfd` itself.

    0 where the file system does not tell, and when the name is gone, or has another inode number than `ino`, by now.
    Python 3.11's os.stat has no birth time.
    """
    buffer = _Statx()
    flags = _AT_SYMLINK_NOFOLLOW if name else _AT_EMPTY_PATH
    failed = _libc.statx(dirfd, name, flags, _STATX_BTIME, ctypes.byref(buffer))
    if failed or not buffer.mask & _STATX_BTIME or buffer.ino != ino:
        return 0
    return int(buffer.seconds) * 10**9 + int(buffer.nanoseconds)


def ask_server(dirfd: int, name: bytes = b"") -> None:
    """Have a file system ask its server or disk what an object is now, whatever it has cached; name as of `birth_ns`.
    What comes of it is nothing here (statx(2), AT_STATX_FORCE_SYNC)."""
    flags = _AT_SYMLINK_NOFOLLOW if name else _AT_EMPTY_PATH
    _libc.statx(dirfd, name, flags | _AT_STATX_FORCE_SYNC, _STATX_BASIC_STATS, ctypes.byref(_Statx()))


def open_dir_at(dirfd: int, name: bytes) -> int:
    """A search-only (O_PATH) descriptor of a directory; ENOTDIR for anything else."""
    return os.open(name, _O_DIR, dir_fd=dirfd)


def open_listing(dirfd: int) -> int:
    """A readable descriptor of the directory that the O_PATH descriptor `dirfd` names."""
    return os.open(b".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=dirfd)


def open_listing_at(dirfd: int, name: bytes) -> int:
    """A readable descriptor of a directory by name; ENOTDIR for anything else."""
    return os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=dirfd)


def open_at(dirfd: int, name: bytes, flags: int) -> int:
    """openat(2) of something that exists."""
    return os.open(name, flags, dir_fd=dirfd)


_OPEN_FILE: Final = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
"""O_NONBLOCK keeps a FIFO that somebody put there from stopping the daemon."""


def open_regular(dirfd: int, name: bytes, flags: int) -> tuple[int, os.stat_result] | None:
    """Open a regular file, with its status; None where it is none, or cannot be opened, for whatever reason."""
    try:
        fd = open_at(dirfd, name, flags | _OPEN_FILE)
    except OSError:
        return None
    try:
        st = fstat(fd)
    except OSError:
        os.close(fd)
        return None
    if not st_mod.S_ISREG(st.st_mode):
        os.close(fd)
        return None
    return fd, st


def open_file_at(dirfd: int, name: bytes, flags: int) -> tuple[int, os.stat_result]:
    """Open an existing regular file, with its status; ESTALE when the name turned into something else.

    A device is not even opened, which may do something: our mounts of the branches are nodev (accept.py), and then it
    is EACCES.
    """
    found = open_regular(dirfd, name, flags)
    if found is not None:
        return found
    try:
        fd = open_at(dirfd, name, flags | _OPEN_FILE)  # once more, to see why not
    except PermissionError:
        pin = pin_at(dirfd, name)  # whether it was a device: the name may stand for yet another object by now
        try:
            if not st_mod.S_ISREG(os.fstat(pin).st_mode):
                raise estale() from None
            fd = reopen(pin, flags)
        finally:
            os.close(pin)
    except OSError as error:
        if error.errno in _NO_FILE:
            raise estale() from error
        raise
    st = fstat(fd)
    if not st_mod.S_ISREG(st.st_mode):
        os.close(fd)
        raise estale()
    return fd, st


_NO_FILE = frozenset({errno.ELOOP, errno.EISDIR, errno.ENXIO})
"""open(2) with O_NOFOLLOW of a symlink, for writing of a directory, and of a FIFO without a reader, a socket."""


def reopen(fd: int, flags: int) -> int:
    """A second open file description of the file behind `fd` (works for unlinked files too).

    O_NONBLOCK as in `open_file_at`: the file's owner may have a lease on it (fcntl(2), F_SETLEASE), which would hold
    everybody up for /proc/sys/fs/lease-break-time. It is EAGAIN, and the lease is being broken.
    """
    return os.open(proc_path(fd), flags & ~(os.O_CREAT | os.O_EXCL) | os.O_NONBLOCK | os.O_CLOEXEC)


def pin_at(dirfd: int, name: bytes) -> int:
    """An O_PATH descriptor of the object itself, also of a symlink, device or FIFO."""
    return os.open(name, _O_PIN, dir_fd=dirfd)


def unpin(fd: int) -> None:
    """Close a descriptor of `pin_at`, which nothing waits for."""
    os.close(fd)


@contextmanager
def pinned(dirfd: int, name: bytes) -> Iterator[bytes]:
    """The /proc/self/fd path of a pinned object, for calls that know only paths."""
    fd = pin_at(dirfd, name)
    try:
        yield proc_path(fd)
    finally:
        os.close(fd)


def proc_path(fd: int) -> bytes:
    return b"/proc/self/fd/%d" % fd


def readlink_at(dirfd: int, name: bytes) -> bytes:
    """Target of a symlink; ESTALE when the name turned into something else."""
    try:
        return os.readlink(name, dir_fd=dirfd)
    except OSError as error:
        if error.errno == errno.EINVAL:
            raise estale() from error
        raise


def readlink_fd(fd: int) -> bytes:
    """Target of the symlink that an O_PATH descriptor names (readlinkat(2), empty path)."""
    return os.readlink(b"", dir_fd=fd)


def is_being_written(dirfd: int, name: bytes) -> bool:
    """Whether any process has a regular file open for writing, or mapped so; False where that cannot be known.

    A read lease is only given when nobody has (fcntl(2), F_SETLEASE), and is given back at once. Whoever
    opens the file in that instant waits for it; the signal about it is one that nobody minds.
    """
    try:
        fd, _ = open_file_at(dirfd, name, os.O_RDONLY)
    except BlockingIOError:  # somebody has a lease for writing
        return True
    try:
        fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    except OSError as error:
        return error.errno == errno.EAGAIN  # else: a file system without leases
    finally:
        os.close(fd)
    return False


# -- making and removing ----------------------------------------------------------------------


def create_file_at(dirfd: int, name: bytes, flags: int, mode: int) -> int:
    """open(2) with O_CREAT|O_EXCL; `mode` is subject to the process umask."""
    return os.open(name, flags | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode, dir_fd=dirfd)


def open_tmpfile(dirfd: int, mode: int, flags: int = os.O_RDWR) -> int:
    """An unnamed regular file in the directory (O_TMPFILE, open(2)), which `link_fd` can give a name; EOPNOTSUPP where
    unsupported. flags: for writing, at least; `mode` is subject to the process umask.

    ENOENT in a directory that has been removed, as for any other new file: vfs_tmpfile() in fs/namei.c leaves that to
    the file systems, of which ext4 says EPERM (__ext4_new_inode()), and most say nothing.
    """
    try:
        return os.open(b".", os.O_TMPFILE | flags | os.O_CLOEXEC, mode, dir_fd=dirfd)
    except PermissionError as error:
        if error.errno == errno.EPERM and not os.fstat(dirfd).st_nlink:
            raise enoent() from None
        raise


def mkdir_at(dirfd: int, name: bytes, mode: int) -> None:
    os.mkdir(name, mode, dir_fd=dirfd)


def mknod_at(dirfd: int, name: bytes, mode: int, rdev: int) -> None:
    os.mknod(name, mode, rdev, dir_fd=dirfd)


def symlink_at(target: bytes, dirfd: int, name: bytes) -> None:
    os.symlink(target, name, dir_fd=dirfd)


def link_at(src_dirfd: int, src: bytes, dst_dirfd: int, dst: bytes) -> None:
    os.link(src, dst, src_dir_fd=src_dirfd, dst_dir_fd=dst_dirfd, follow_symlinks=False)


def link_fd(fd: int, dirfd: int, name: bytes) -> None:
    """Give the file behind `fd` (an O_TMPFILE one too) a name: linkat(2). ENOENT where AT_EMPTY_PATH is not for an
    ordinary user: then by AT_SYMLINK_FOLLOW on /proc."""
    if _libc.linkat(fd, b"", dirfd, name, _AT_EMPTY_PATH):
        if ctypes.get_errno() != errno.ENOENT:
            check(-1)
        check(_libc.linkat(_AT_FDCWD, proc_path(fd), dirfd, name, _AT_SYMLINK_FOLLOW))


def unlink_at(dirfd: int, name: bytes) -> None:
    os.unlink(name, dir_fd=dirfd)


def rmdir_at(dirfd: int, name: bytes) -> None:
    os.rmdir(name, dir_fd=dirfd)


def rename_at(src_dirfd: int, src: bytes, dst_dirfd: int, dst: bytes, flags: int = 0) -> None:
    """renameat2(2)."""
    if not flags:
        os.rename(src, dst, src_dir_fd=src_dirfd, dst_dir_fd=dst_dirfd)
        return
    check(_libc.renameat2(src_dirfd, src, dst_dirfd, dst, flags))


# -- metadata ---------------------------------------------------------------------------------


def chmod_at(dirfd: int, name: bytes, mode: int) -> None:
    """chmod without following; EOPNOTSUPP on a symlink, as fchmodat(2) with AT_SYMLINK_NOFOLLOW."""
    with pinned(dirfd, name) as path:
        os.chmod(path, mode)


def chown_fd(fd: int, uid: int, gid: int) -> None:
    """chown through any descriptor, an O_PATH one of a symlink too; -1 keeps an id."""
    os.chown(proc_path(fd), uid, gid)


def chmod_fd(fd: int, mode: int) -> None:
    """chmod through any descriptor; EOPNOTSUPP for a symlink."""
    os.chmod(proc_path(fd), mode)


def utime_fd(fd: int, atime_ns: int | Literal["now"] | None, mtime_ns: int | Literal["now"] | None) -> None:
    """utimensat(2) through any descriptor. None leaves a time as it is, "now" is the file system's own idea of it."""
    times = (_Timespec * 2)(_timespec(atime_ns), _timespec(mtime_ns))
    check(_libc.utimensat(_AT_FDCWD, proc_path(fd), times, 0))


@contextmanager
def writable(fd: int) -> Iterator[int]:
    """A descriptor of the file behind `fd` that may be written: `fd` itself, or one opened for the occasion."""
    if fcntl.fcntl(fd, fcntl.F_GETFL) & (os.O_PATH | os.O_ACCMODE) in (os.O_WRONLY, os.O_RDWR):
        yield fd
        return
    opened = os.open(proc_path(fd), os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    try:
        yield opened
    finally:
        os.close(opened)


def restore_times(dirfd: int, before: os.stat_result) -> None:
    """Give a directory the times back that it had, after a change which nobody is to see by them."""
    utime_at(dirfd, b".", before.st_atime_ns, before.st_mtime_ns)


def utime_at(dirfd: int, name: bytes, atime_ns: int, mtime_ns: int) -> None:
    os.utime(name, ns=(atime_ns, mtime_ns), dir_fd=dirfd, follow_symlinks=False)


@contextmanager
def readable(fd: int) -> Iterator[int]:
    """A descriptor of the file behind `fd` that may be read: `fd` itself, or one opened for the occasion."""
    if fcntl.fcntl(fd, fcntl.F_GETFL) & (os.O_PATH | os.O_ACCMODE) in (os.O_RDONLY, os.O_RDWR):
        yield fd
        return
    opened = reopen(fd, os.O_RDONLY)
    try:
        yield opened
    finally:
        os.close(opened)


def xattr_path(dirfd: int, name: bytes) -> bytes:
    """Where l*xattr calls find the entry `name` of a directory: only the last component is not followed."""
    return b"/proc/self/fd/%d/%s" % (dirfd, name)


Object = bytes | int
"""What a call is about: a descriptor; or the proc_path() of an O_PATH one, which *xattr calls do not take.

That leads to the object itself, a symlink too (proc_pid_fd(5)).
"""


def getxattr(target: Object, key: bytes) -> bytes | None:
    """The value of an extended attribute; None where there is none (ENODATA), as of most that are asked for."""
    try:
        return os.getxattr(target, key)
    except OSError as error:
        if error.errno != errno.ENODATA:
            raise
        return None


def get_acl(target: Object, key: bytes) -> bytes | None:
    """`getxattr` of a POSIX ACL; None also where nothing can have one (squashfs, NFS 4): for the kernel, which asks for
    it to decide on access, EOPNOTSUPP would be the answer to an open (fuse_get_acl() in fs/fuse/acl.c)."""
    try:
        return getxattr(target, key)
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise
        return None


def has_xattr(target: Object, key: bytes) -> bool:
    """False also where nothing can have it."""
    try:
        return getxattr(target, key) is not None
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise
        return False


def is_bare(fd: int, more: Sequence[str]) -> bool:
    """Whether a file is sure to have no extended attributes, nor one of `more`, which not every file system lists.

    fd: no O_PATH one.
    """
    try:
        return not os.listxattr(fd) and not any(has_xattr(fd, os.fsencode(key)) for key in more)
    except OSError:
        return False


def lists_nothing(target: Object) -> bool:
    """Whether listxattr(2) has no names for an object. Raises OSError."""
    return not os.listxattr(target)


def copy_small(
    src_fd: int, dst_fd: int, size: int, acl: str | None, uid: int, gid: int, mode: int, atime_ns: int, mtime_ns: int
) -> int:
    """Copy a whole file of at most SMALL_COPY bytes, and give the copy owner, mode and times, in this order.

    Returns 1 where copy_file_range(2) did, or there was nothing to copy, 2 where it refused. 0: not everything was
    done, as it is larger, one of the two has extended attributes or that ACL (None: it would be listed), the source has
    become shorter, or there was an error.
    """
    try:
        unlisted = () if acl is None else (acl,)
        if size > SMALL_COPY or not (is_bare(src_fd, unlisted) and is_bare(dst_fd, unlisted)):
            return 0
        how = 1
        try:
            copied = os.copy_file_range(src_fd, dst_fd, size, 0, 0) if size else 0
        except OSError:
            copied = -1
        if copied != size:
            how = 2
            data = os.pread(src_fd, size, 0)
            if len(data) != size or os.pwrite(dst_fd, data, 0) != size:
                return 0
        chown_fd(dst_fd, uid, gid)
        chmod_fd(dst_fd, mode)
        utime_fd(dst_fd, atime_ns, mtime_ns)
    except OSError:
        return 0
    return how


def listxattr(target: Object) -> list[bytes]:
    return [os.fsencode(key) for key in os.listxattr(target)]


def setxattr(target: Object, key: bytes, value: bytes, flags: int = 0) -> None:
    os.setxattr(target, key, value, flags)


def chmod(target: Object, mode: int) -> None:
    os.chmod(target, mode)


def removexattr(target: Object, key: bytes) -> None:
    os.removexattr(target, key)


# -- mounts and credentials -------------------------------------------------------------------


def clone_mount(path: bytes) -> int:
    """A descriptor of a private, non-recursive bind of `path` (open_tree(2), OPEN_TREE_CLONE).

    What is mounted below a branch is not part of it (semantics 4.2 note 0), and a mount of our
    own below a branch can never be walked into, which would deadlock. Needs CAP_SYS_ADMIN and
    Linux 5.2: EPERM or ENOSYS otherwise.
    """
    return check(_libc.syscall(_SYS_OPEN_TREE, _AT_FDCWD, path, _OPEN_TREE_CLONE | os.O_CLOEXEC))


class _MountAttr(ctypes.Structure):
    _fields_ = (
        ("set", ctypes.c_uint64), ("clear", ctypes.c_uint64), ("propagation", ctypes.c_uint64),
        ("userns_fd", ctypes.c_uint64),
    )  # fmt: skip


MOUNT_ATTR_NODEV: Final = 0x4


def set_mount_attributes(mount_fd: int, on: int, off: int) -> None:
    """mount_setattr(2) of the mount whose root `mount_fd` is; on, off: MOUNT_ATTR_*."""
    attributes = _MountAttr(on, off, 0, 0)
    size = ctypes.c_size_t(ctypes.sizeof(attributes))
    check(_libc.syscall(_SYS_MOUNT_SETATTR, mount_fd, b"", _AT_EMPTY_PATH, ctypes.byref(attributes), size))


def set_fs_ids(uid: int, gid: int) -> None:
    """setfsuid(2) and setfsgid(2) for the calling thread; they report no error."""
    _libc.setfsgid(gid)
    _libc.setfsuid(uid)


_SYS_SETGROUPS: Final = {"x86_64": 116, "aarch64": 159, "riscv64": 159}.get(os.uname().machine)


def set_groups(groups: Sequence[int]) -> None:
    """setgroups(2) for the calling thread only, unlike the C library's. Does nothing on unknown machines."""
    if _SYS_SETGROUPS is not None:
        check(_libc.syscall(_SYS_SETGROUPS, len(groups), (ctypes.c_uint32 * len(groups))(*groups)))


if not compiled.why_not():
    # The same without Python between.
    from udbad.branch.ccalls import (  # noqa: F401  # names of this module
        chmod_fd,
        chown_fd,
        copy_small,
        create_file_at,
        getxattr,
        is_bare,
        link_fd,
        lists_nothing,
        mkdir_at,
        open_at,
        open_dir_at,
        open_regular,
        open_tmpfile,
        pin_at,
        rename_at,
        rmdir_at,
        set_fs_ids,
        unlink_at,
        unpin,
        utime_at,
        utime_fd,
    )
    from udbad.branch.cstat import find_at, fstat, mode_at, stat_at  # noqa: F401

if sys.platform != "linux":  # pragma: no cover
    raise ImportError("udbad needs Linux")
