"""One FUSE session: our own /dev/fuse descriptor, the mount, INIT, and the fixed order of the end.

We open /dev/fuse and make the mount ourselves: the descriptor is then ours to read requests from and to write
notifications to, and the mount ours to take away. Only a session that is complete is put where others can see it
(`mount`): one that could not begin leaves nothing.

A session that did not end cleanly leaves the mount point dead (ENOTCONN): it must never look like an
empty directory that a mirror job takes for the truth. While a keeper has its descriptor (mount/keeper.py), it is not
dead: callers wait for the process that resumes it.
"""

from __future__ import annotations

import errno
import os
import stat as st_mod
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Any

from udbad.branch.mountinfo import mount_id
from udbad.errors import ExitCode, UserError
from udbad.kernel import device, mounts, newmount
from udbad.kernel.protocol import EPOCH_MINOR, MAX_REQUEST, NOTIFICATIONS, InitRequest, resend


class Session:
    """A mount from its beginning to its end. `connection` is the number under /sys/fs/fuse/connections.

    edge, lacks: by which way requests come, and what a union cannot do because of it.
    mounted: whether it is on its mount point, as far as we know.
    """

    edge = "native"
    lacks: tuple[str, ...] = ()

    def __init__(
        self,
        mount_point: bytes,
        fsname: str,
        flags: frozenset[str],
        acl: bool,
        io: str = "requests",
        allow_idmap: bool = False,
    ) -> None:
        """Begin a connection and answer INIT; nobody can see it yet. flags: names as in mount(8).

        io: as in the mount options, where the kernel can do that. allow_idmap: other mounts of it may be idmapped.

        Raises UserError without /dev/fuse or permission, or where the kernel has no such mounts of FUSE.
        """
        self.mount_point = mount_point
        self.mounted = False
        self.connection = 0
        self.flags = flags
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
            request = InitRequest(os.read(self.fd, MAX_REQUEST))
            self.passthrough = io == "passthrough" and request.passthrough
            self.no_open = io == "cached" and request.no_open
            if allow_idmap and not request.allow_idmap:
                raise UserError("allow_idmap needs Linux 6.12", ExitCode.OPTION)
            os.write(self.fd, request.reply(acl, self.passthrough, self.no_open, allow_idmap))
            self.has_epochs = request.minor >= EPOCH_MINOR
            self.setxattr_ext = request.setxattr_ext
            os.set_blocking(self.fd, False)
            undo.pop_all()

    @classmethod
    def resume(cls, mount_point: bytes, fd: int, facts: Mapping[str, Any]) -> Session:
        """One that another process has begun and mounted. fd: /dev/fuse of it, owned from here on; facts: of that one.

        `begin_again` is due before the first request is read.
        """
        session = cls.__new__(cls)
        session.mount_point = mount_point
        session.mounted = True
        session.flags = frozenset(facts["flags"])
        session.fd = fd
        session._id = facts["id"]
        session._mount_fd = -1
        session.connection = facts["connection"]
        session.passthrough, session.no_open = facts["passthrough"], facts["no_open"]
        session.has_epochs, session.setxattr_ext = facts["has_epochs"], facts["setxattr_ext"]
        return session

    def facts(self) -> dict[str, Any]:
        """What `resume` needs, for JSON; fd: the number of the descriptor."""
        return {
            "fd": self.fd,
            "id": self._id,
            "flags": sorted(self.flags),
            "connection": self.connection,
            "passthrough": self.passthrough,
            "no_open": self.no_open,
            "has_epochs": self.has_epochs,
            "setxattr_ext": self.setxattr_ext,
        }

    @property
    def id(self) -> int:
        """Of the mount, where it is mounted (mountinfo)."""
        return self._id

    def begin_again(self) -> None:
        """Have the kernel send once more what was read and not answered: once, before the first request is read.

        Raises OSError: EINVAL when this kernel cannot.
        """
        os.write(self.fd, resend())

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

    def tell(self, kind: str, node: int, name: bytes) -> None:
        """Have the kernel forget; kind: a key of protocol.NOTIFICATIONS. May block while a request it concerns is
        being served: never on the event loop. Raises OSError; ENOENT means the kernel has nothing of the kind."""
        os.write(self.fd, NOTIFICATIONS[kind](node, name))

    def tell_many(self, kind: str, ones: Iterable[tuple[int, bytes]]) -> tuple[int, int]:
        """`tell` for many nodes and names, all of one kind, as device.tell."""
        message = NOTIFICATIONS[kind]
        return device.tell(self.fd, b"".join([message(node, name) for node, name in ones]))

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

    def close(self) -> None:
        """After the last request was answered, and every notifying thread joined."""
        self._close_mount_fd()
        os.close(self.fd)


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
