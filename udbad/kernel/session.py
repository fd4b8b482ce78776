"""One FUSE session: our own /dev/fuse descriptor, the mount, INIT, and the fixed order of the end.

pyfuse3 keeps one global session per process, so a process serves one mount. We open /dev/fuse and call
mount(2) ourselves: the descriptor is then ours to write notifications to, and the mount ours to take
away. The kernel's INIT is answered by us (protocol.py); libfuse is given a copy of it over a socket
pair, through which it later gets every request that kernel/fast.py leaves to pyfuse3.

A session that did not end cleanly leaves the mount point dead (ENOTCONN): it must never look like an
empty directory that a mirror job takes for the truth.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import socket
import stat as st_mod

import pyfuse3

from udbad.errors import ExitCode, UserError
from udbad.kernel import reader
from udbad.kernel.fast import FastPath
from udbad.kernel.mounts import FS_TYPE, unions, unmount
from udbad.kernel.protocol import EPOCH_MINOR, InitRequest
from udbad.kernel.replace import replace_mount

_libc = ctypes.CDLL(None, use_errno=True)

_SO_SNDBUFFORCE = 32  # asm-generic/socket.h
_SOCKET_BUFFER = 8 << 20
"""Bytes: the largest request, or many answers that wait for their turn."""

MOUNT_FLAGS = {
    "ro": 1, "nosuid": 2, "nodev": 4, "noexec": 8, "sync": 16, "dirsync": 128, "noatime": 1024,
    "nodiratime": 2048, "relatime": 1 << 21, "strictatime": 1 << 24, "lazytime": 1 << 25,
}  # fmt: skip
"""Names of mount options to MS_* of mount(2)."""


class Session:
    """The mount from mount(2) to its end. `connection` is the number under /sys/fs/fuse/connections.

    aborted: somebody has ended the connection there; the mount point is dead.
    """

    def __init__(self, mount_point: bytes, fsname: str, flags: frozenset[str], acl: bool, dead: int = 0) -> None:
        """Mount and answer INIT. dead: number of dead mounts on the mount point, which this one replaces.

        Raises UserError without /dev/fuse or permission.
        """
        self.mount_point = mount_point
        try:
            self.fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise UserError(f"cannot open /dev/fuse: {error.strerror}", ExitCode.NO_FUSE) from error
        options = f"fd={self.fd},rootmode=40000,user_id=0,group_id=0,allow_other,default_permissions"
        try:
            _mount(os.fsencode(fsname), mount_point, flags, options, dead)
        except OSError as error:
            os.close(self.fd)
            code = ExitCode.NOT_ROOT if error.errno == errno.EPERM else ExitCode.MOUNT_POINT
            raise UserError(f"cannot mount on {os.fsdecode(mount_point)}: {error.strerror}", code) from error
        self.mounted = True
        self.aborted = False
        request = InitRequest(os.read(self.fd, 1 << 16 | 1 << 20))
        os.write(self.fd, request.reply(acl))
        self.has_epochs = request.minor >= EPOCH_MINOR
        self.connection = next((m.connection for m in reversed(unions()) if m.path == mount_point), 0)
        os.set_blocking(self.fd, False)
        self.pyfuse3s, self._theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (self.pyfuse3s, self._theirs):
            end.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, _SOCKET_BUFFER)
            end.setblocking(False)
        self.pyfuse3s.send(request.for_libfuse())

    def attach(self, operations: pyfuse3.Operations) -> None:
        """Give the session to pyfuse3."""
        logging.getLogger("pyfuse3").addFilter(_worth_telling)
        pyfuse3.init(operations, f"/dev/fd/{self._theirs.fileno()}", set())

    def _end(self) -> None:
        """Have pyfuse3 meet the end of the connection itself: it knows what that means."""
        os.dup2(self.fd, self._theirs.fileno(), inheritable=False)

    def notify(self, message: bytes) -> None:
        """Write a notification. May block while a request it concerns is being served: never on the event
        loop, never in a handler. Raises OSError; ENOENT means the kernel has nothing of the kind."""
        os.write(self.fd, message)

    def unmount(self, lazy: bool = False) -> None:
        """Take the mount away. In a thread: it may wait for requests that the event loop has to serve."""
        unmount(self.mount_point, lazy)
        self.mounted = False

    async def serve(self, fast: FastPath) -> None:
        """pyfuse3's loop: returns when the mount is gone, `terminate` was called, or the connection was aborted."""
        reader.install(self.fd, self.pyfuse3s, fast, self._end)
        try:
            await pyfuse3.main()
        except* ConnectionAbortedError:  # FUSE_ABORT_ERROR
            self.aborted = True

    def terminate(self) -> None:
        """End `serve` after the requests under way; event loop only."""
        pyfuse3.terminate()

    def close(self) -> None:
        """After pyfuse3.main() has returned and every notifying thread was joined."""
        pyfuse3.close(unmount=False)
        self._theirs.detach()
        self.pyfuse3s.close()
        os.close(self.fd)


def _worth_telling(record: logging.LogRecord) -> bool:
    """False for a reply that met ENOENT: the request was taken back meanwhile, by a signal to the caller or by
    the unmount (RELEASE is sent in the background, fuse_dev_do_write()). That is nobody's error."""
    return not record.getMessage().endswith(f"fuse_reply_* failed with {os.strerror(errno.ENOENT)}")


def _mount(source: bytes, mount_point: bytes, flags: frozenset[str], options: str, dead: int) -> None:
    """Raises OSError."""
    while dead > 1:
        unmount(mount_point, lazy=True)
        dead -= 1
    if dead:
        if replace_mount(source, options, flags, mount_point):
            return
        unmount(mount_point, lazy=True)
    bits = 0
    for flag in flags:
        bits |= MOUNT_FLAGS[flag]
    if _libc.mount(source, mount_point, FS_TYPE, ctypes.c_ulong(bits), options.encode()) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def check_mount_point(path: bytes) -> bool:
    """Raises UserError unless `path` is a directory; True when it is not empty."""
    try:
        st = os.stat(path)
    except OSError as error:
        raise UserError(f"mount point {os.fsdecode(path)}: {error.strerror}", ExitCode.MOUNT_POINT) from error
    if not st_mod.S_ISDIR(st.st_mode):
        raise UserError(f"mount point {os.fsdecode(path)}: not a directory", ExitCode.MOUNT_POINT)
    with os.scandir(path) as entries:
        return next(entries, None) is not None
