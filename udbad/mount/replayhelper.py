"""The process that shows direct changes to watchers of the union, by doing them there once more (`replay`).

The mount process must not: it would wait for itself. It sends what to do (edge/replay.py), one thing at a time, and
answers the requests that come of it without performing them; they are told apart by the user id that this process
makes them as. A program of its own, without the rest of udbad, that ends with the mount process: python has the text of
this file as standard input, and the arguments of `main`.

The union is reached through a copy of its mount that nobody else sees (open_tree(2)), for as long as there is
something to do: so it is never busy because of us.
"""

from __future__ import annotations

import ctypes
import errno
import os
import select
import signal
import socket
import struct
import sys
from collections.abc import Callable
from contextlib import suppress

_libc = ctypes.CDLL(None, use_errno=True)
_PR_SET_PDEATHSIG, _PR_SET_SECUREBITS = 1, 28
_SECBIT_NO_SETUID_FIXUP = 1 << 2
_NOBODY = ctypes.c_uint(-1)
_AT_FDCWD, _AT_EMPTY_PATH, _AT_SYMLINK_NOFOLLOW = -100, 0x1000, 0x100
_SYS_OPEN_TREE, _SYS_OPENAT2 = 428, 437
_OPEN_TREE_CLONE = 1
_RESOLVE = 0x01 | 0x04 | 0x08
"""RESOLVE_NO_XDEV: what is mounted inside is none of the union's. RESOLVE_NO_SYMLINKS, RESOLVE_BENEATH."""
_UTIME_NOW, _UTIME_OMIT = (1 << 30) - 1, (1 << 30) - 2
_IDLE_SECONDS = 0.05
"""How long the union is held after the last thing that was to be done."""
_MOST_USES = 32
"""How often a copy is used, so that one of a mount that is gone does not stay."""
_MOST_BYTES = 1 << 16


def _checked(result: int) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def be_marked(uid: int) -> None:
    """Make requests as this user from now on, with all capabilities. Raises OSError where there is no such user."""
    _checked(_libc.prctl(_PR_SET_SECUREBITS, _SECBIT_NO_SETUID_FIXUP, 0, 0, 0))
    _libc.setfsuid(ctypes.c_uint(uid))
    if ctypes.c_uint(_libc.setfsuid(_NOBODY)).value != uid:  # setfsuid(2) reports no error
        raise OSError(errno.EPERM, "no such user id here")


def copy_of_mount(mount_point: bytes, mount_id: int) -> int:
    """The root of a copy of this mount. Raises OSError: ENODEV when another one is there, or none."""
    fd = os.open(mount_point, os.O_PATH | os.O_CLOEXEC)
    try:
        with open(f"/proc/self/fdinfo/{fd}") as lines:
            if f"mnt_id:\t{mount_id}\n" not in lines:
                raise OSError(errno.ENODEV, "")
        flags = _OPEN_TREE_CLONE | os.O_CLOEXEC | _AT_EMPTY_PATH
        return _checked(_libc.syscall(_SYS_OPEN_TREE, fd, b"", flags))
    finally:
        os.close(fd)


def _directory(root: int, path: bytes) -> int:
    how = struct.pack("=QQQ", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC, 0, _RESOLVE)
    return _checked(_libc.syscall(_SYS_OPENAT2, root, path, how, len(how)))


def _touch(dirfd: int, name: bytes, atime: int) -> None:
    times = struct.pack("=qqqq", 0, atime, 0, _UTIME_NOW)
    _checked(_libc.utimensat(dirfd, name, times, _AT_SYMLINK_NOFOLLOW))


def _write(dirfd: int, name: bytes, modify: bool) -> None:
    fd = os.open(name, os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC, dir_fd=dirfd)
    try:
        if modify:
            _modify(dirfd, name)
    finally:
        os.close(fd)


def _modify(dirfd: int, name: bytes) -> None:
    """A change of mtime alone is told as IN_MODIFY (fsnotify_change())."""
    _touch(dirfd, name, _UTIME_OMIT)


_ACTIONS: dict[bytes, Callable[[int, bytes], object]] = {
    b"mkdir": lambda fd, name: os.mkdir(name, dir_fd=fd),
    b"symlink": lambda fd, name: os.symlink(b".", name, dir_fd=fd),
    b"unlink": lambda fd, name: os.unlink(name, dir_fd=fd),
    b"rmdir": lambda fd, name: os.rmdir(name, dir_fd=fd),
    b"attributes": lambda fd, name: _touch(fd, name, _UTIME_NOW),
    b"modify": _modify,
    b"close": lambda fd, name: _write(fd, name, False),
    b"write": lambda fd, name: _write(fd, name, True),
}


def act(root: int, message: bytes) -> None:
    """What a message asks for: word, directory, name and, for some, more; zero bytes in between. Raises OSError."""
    word, path, name, *more = message.split(b"\0")
    fd = _directory(root, path)
    try:
        if word == b"mknod":
            os.mknod(name, int(more[0]), 1, dir_fd=fd)
        elif word in (b"rename", b"link"):
            other = _directory(root, more[0])
            try:
                if word == b"rename":
                    os.rename(name, more[1], src_dir_fd=fd, dst_dir_fd=other)
                else:
                    os.link(more[1], name, src_dir_fd=other, dst_dir_fd=fd, follow_symlinks=False)
            finally:
                os.close(other)
        else:
            _ACTIONS[word](fd, name)
    finally:
        os.close(fd)


def main(_: str, mount_point: str, number: str, mount_id: str, parent: str, uid: str) -> None:
    """number: a socket of our own. parent: the mount process. uid: as whom to ask."""
    os.umask(0)
    with socket.socket(fileno=int(number)) as channel, suppress(ConnectionError):  # it has ended
        try:
            be_marked(int(uid))
            _checked(_libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0))  # which another user id takes back
        except OSError as error:
            channel.send(b"%d" % (error.errno or errno.EPERM))
            return
        if os.getppid() == int(parent):
            channel.send(b"0")
            _serve(channel, os.fsencode(mount_point), int(mount_id))


def _serve(channel: socket.socket, mount_point: bytes, mount_id: int) -> None:
    root, used = -1, 0
    while True:
        if root >= 0 and (used >= _MOST_USES or not select.select([channel], [], [], _IDLE_SECONDS)[0]):
            os.close(root)
            root, used = -1, 0
        message = channel.recv(_MOST_BYTES)
        if not message:
            return
        failed = 0
        try:
            if root < 0:
                root = copy_of_mount(mount_point, mount_id)
            used += 1
            act(root, message)
        except OSError as error:
            failed = error.errno or errno.EIO
        channel.send(b"%d" % failed)


if __name__ == "__main__":
    main(*sys.argv[1:])
