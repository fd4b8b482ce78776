"""One FUSE session: our own /dev/fuse descriptor, the mount, INIT, and the fixed order of the end.

pyfuse3 keeps one global session per process, so a process serves one mount. We open /dev/fuse and make the
mount ourselves: the descriptor is then ours to write notifications to, and the mount ours to take
away. The kernel's INIT is answered by us (protocol.py); libfuse is given a copy of it over a socket
pair, through which it later gets every request that kernel/fast.py leaves to pyfuse3. Only a session that is
complete is put where others can see it (`mount`): one that could not begin leaves nothing.

A session that did not end cleanly leaves the mount point dead (ENOTCONN): it must never look like an
empty directory that a mirror job takes for the truth.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import stat as st_mod
from contextlib import ExitStack

import pyfuse3

from udbad.branch.mountinfo import mount_id
from udbad.errors import ExitCode, UserError
from udbad.kernel import mounts, newmount, reader
from udbad.kernel.fast import FastPath
from udbad.kernel.protocol import EPOCH_MINOR, MAX_REQUEST, InitRequest

_SO_SNDBUFFORCE = 32  # asm-generic/socket.h
_SOCKET_BUFFER = 8 << 20
"""Bytes: the largest request, or many answers that wait for their turn."""
_PAGE = 4096


class Session:
    """A mount from its beginning to its end. `connection` is the number under /sys/fs/fuse/connections.

    mounted: whether it is on its mount point, as far as we know. aborted: somebody has ended the connection in
    fusectl; the mount point is dead.
    """

    def __init__(self, mount_point: bytes, fsname: str, flags: frozenset[str], acl: bool) -> None:
        """Begin a connection and answer INIT; nobody can see it yet. flags: names as in mount(8).

        Raises UserError without /dev/fuse or permission.
        """
        self.mount_point = mount_point
        self.mounted = False
        self.aborted = False
        self.connection = 0
        self.flags = flags
        self._attached = False
        self._id = 0
        with ExitStack() as undo:
            try:
                self.fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
            except OSError as error:
                raise UserError(f"cannot open /dev/fuse: {error.strerror}", ExitCode.NO_FUSE) from error
            undo.callback(os.close, self.fd)
            options = f"fd={self.fd},rootmode=40000,user_id=0,group_id=0,allow_other,default_permissions"
            try:
                self._mount_fd = newmount.create(os.fsencode(fsname), options, flags)
            except OSError as error:
                raise self._refused(error) from error
            undo.callback(os.close, self._mount_fd)
            self.pyfuse3s, self._theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            undo.enter_context(self.pyfuse3s)
            undo.enter_context(self._theirs)
            room = min(map(_enlarge, (self.pyfuse3s, self._theirs)))
            request = InitRequest(os.read(self.fd, 1 << 16 | 1 << 20))
            # A quarter: a message may have to wait for some others.
            os.write(self.fd, request.reply(acl, min(MAX_REQUEST, room // 4 // _PAGE * _PAGE)))
            self.has_epochs = request.minor >= EPOCH_MINOR
            self.setxattr_ext = request.setxattr_ext
            os.set_blocking(self.fd, False)
            self.pyfuse3s.send(request.for_libfuse())
            undo.pop_all()

    def attach(self, operations: pyfuse3.Operations) -> None:
        """Give the session to pyfuse3."""
        logging.getLogger("pyfuse3").addFilter(_worth_telling)
        pyfuse3.init(operations, f"/dev/fd/{self._theirs.fileno()}", set())
        self._attached = True

    def mount(self, dead: int = 0) -> None:
        """Let everybody see it. dead: number of dead unions that lie on the mount point, which this one replaces.

        Raises UserError.
        """
        self._id = mount_id(self._mount_fd)
        try:
            newmount.attach(self._mount_fd, self.mount_point, dead)
        except OSError as error:
            raise self._refused(error) from error
        self.mounted = True
        self._close_mount_fd()  # it would keep the mount busy
        self.connection = next((mount.connection for mount in mounts.unions() if mount.id == self._id), 0)

    def _refused(self, error: OSError) -> UserError:
        code = ExitCode.NOT_ROOT if error.errno == errno.EPERM else ExitCode.MOUNT_POINT
        return UserError(f"cannot mount on {os.fsdecode(self.mount_point)}: {error.strerror}", code)

    def _close_mount_fd(self) -> None:
        if self._mount_fd >= 0:
            os.close(self._mount_fd)
            self._mount_fd = -1

    def _end(self, aborted: bool) -> None:
        """The connection has ended: unmounted, or aborted through fusectl.

        pyfuse3 does not read it itself: each of its tasks would tell the world on stderr that it was aborted.
        """
        self.aborted = aborted
        pyfuse3.terminate()

    def notify(self, message: bytes) -> None:
        """Write a notification. May block while a request it concerns is being served: never on the event
        loop, never in a handler. Raises OSError; ENOENT means the kernel has nothing of the kind."""
        os.write(self.fd, message)

    def unmount(self, lazy: bool = False) -> None:
        """Take the mount away. In a thread: it may wait for requests that the event loop has to serve.

        Raises OSError: EBUSY when it is in use (unless lazy) or something else is mounted over it, EINVAL when
        somebody has taken it away already.
        """
        mounts.unmount(self.mount_point, self._id, lazy)
        self.mounted = False

    def set_flags(self, flags: frozenset[str]) -> None:
        """Change the flags of the mount and its superblock, all but dirsync. In a thread: the way there may be slow.

        Raises OSError as `mounts.opened` and `mounts.set_all_flags`.
        """
        with mounts.opened(self.mount_point, self._id) as fd:
            mounts.set_all_flags(fd, flags)
        self.flags = flags

    async def serve(self, fast: FastPath) -> None:
        """pyfuse3's loop: returns when the mount is gone, `terminate` was called, or the connection was aborted."""
        reader.install(self.fd, self.pyfuse3s, fast, self._end)
        await pyfuse3.main()

    def terminate(self) -> None:
        """End `serve` after the requests under way; event loop only."""
        pyfuse3.terminate()

    def close(self) -> None:
        """After pyfuse3.main() has returned, or was never called, and every notifying thread was joined."""
        self._close_mount_fd()
        if self._attached:
            pyfuse3.close(unmount=False)
            self._theirs.detach()
        else:
            self._theirs.close()
        self.pyfuse3s.close()
        os.close(self.fd)


def _enlarge(end: socket.socket) -> int:
    """Give a socket a large buffer and have it never block; the size it got, in bytes."""
    end.setblocking(False)
    try:
        end.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, _SOCKET_BUFFER)
    except PermissionError:  # no CAP_NET_ADMIN: as much as net.core.wmem_max allows
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BUFFER)
    return end.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)


def _worth_telling(record: logging.LogRecord) -> bool:
    """False for a reply that met ENOENT: the request was taken back meanwhile, by a signal to the caller or by
    the unmount (RELEASE is sent in the background, fuse_dev_do_write()). That is nobody's error."""
    return not record.getMessage().endswith(f"fuse_reply_* failed with {os.strerror(errno.ENOENT)}")


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
