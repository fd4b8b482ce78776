"""A mount by libfuse, through pyfuse3's public interface: for who may not mount himself, and for tests.

libfuse mounts by mount(2) as root, and for an ordinary user through fusermount3. What Session (kernel/session.py) can
do beyond that, this one cannot: nobody may set flags of a mount but root, a dead mount goes before the new one comes,
and of notifications there are the two that pyfuse3 has. `LACKS` says what follows for people.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Final

import pyfuse3

from udbad.branch import capabilities
from udbad.errors import ExitCode, UserError
from udbad.kernel import mounts

log = logging.getLogger(__name__)

LACKS: Final = (
    "cached listings and targets of symbolic links",
    "io=cached and io=passthrough",
    "fallocate, SEEK_HOLE, copy_file_range, O_TMPFILE, birth times",
    "replay",
    "safe mounts inside it",
    "copy-ups that end with who waits for them",
    "default ACLs above the umask",
)
"""What a union through pyfuse3 does less well or not at all; docs/guide.md says it in full."""
LACKS_FOR_A_USER: Final = ("other users (root, too)", "mount flags that change")

_FLAGS: Final = frozenset({"ro", "nosuid", "nodev", "noexec", "noatime", "sync", "dirsync"})
"""Flags of a mount that libfuse and fusermount3 know; the others are set afterwards, by who may."""
_FORCED: Final = frozenset({"nosuid", "nodev"})
"""What fusermount3 adds for an ordinary user."""
_NOTHING_HELD: Final = (errno.EINVAL, errno.ENOSYS)


class PortableSession:
    """A mount from its beginning to its end; as Session of the native edge, without a descriptor of our own.

    One for a process: pyfuse3 has one global session.
    """

    edge = "pyfuse3"
    has_epochs = False
    passthrough = no_open = False

    def __init__(self, mount_point: bytes, fsname: str, flags: frozenset[str], acl: bool) -> None:
        """Nothing is mounted yet. flags: names as in mount(8). Raises UserError (NO_FUSE) when nobody could mount."""
        self.mount_point = mount_point
        self.mounted = False
        self.connection = 0
        self.flags = flags
        self._fsname = fsname
        self._acl = acl
        self._handlers: pyfuse3.Operations
        self._id = 0
        self._initialised = False
        if not capabilities.may_mount() and shutil.which(mounts.FUSERMOUNT) is None:
            raise UserError(f"a user needs {mounts.FUSERMOUNT} to mount (package fuse3)", ExitCode.NO_FUSE)

    def is_mounted(self) -> bool:
        """Whether the mount is there, dead or alive, in this mount namespace."""
        return any(mount.id == self._id for mount in mounts.unions())

    @property
    def lacks(self) -> tuple[str, ...]:
        """What this edge cannot do here."""
        return LACKS if capabilities.acts_for_others() else LACKS + LACKS_FOR_A_USER

    def attach(self, handlers: pyfuse3.Operations) -> None:
        """Have these serve it: before `mount`."""
        logging.getLogger("pyfuse3").addFilter(_worth_telling)
        self._handlers = handlers
        handlers.enable_acl = self._acl

    def mount(self, dead: int = 0) -> None:
        """Mount, and let everybody see it. dead: number of dead unions that lie on the mount point, which it replaces.

        Raises UserError.
        """
        place = os.fsdecode(self.mount_point)
        try:
            for _ in range(dead):
                mounts.unmount_top(self.mount_point, lazy=True)
        except OSError as error:
            raise UserError(f"{place}: {error.strerror}", ExitCode.MOUNT_POINT) from error
        with _what_is_said() as said:
            try:
                pyfuse3.init(self._handlers, place, self._options())
            except RuntimeError as error:  # libfuse has said on stderr why
                raise self._refused(said()) from error
        self._initialised = True
        there = mounts.lying(self.mount_point)
        if there:
            self._id, self.connection = there[0].id, there[0].connection
        self.mounted = True
        more = self.flags - _FLAGS - {"relatime"}  # which is so anyway
        if not capabilities.may_mount():
            self.flags = self.flags & _FLAGS | _FORCED
            if more:
                log.info("%s: a user cannot have the mount %s", place, ",".join(sorted(more)))
        elif more:
            with mounts.opened(self.mount_point, self._id) as fd:
                mounts.set_all_flags(fd, self.flags)

    def _options(self) -> set[str]:
        name = self._fsname.encode("ascii", "replace").decode()  # pyfuse3 takes no others
        for special in "\\,":
            name = name.replace(special, "\\" + special)
        words = {f"fsname={name}", "subtype=udba", "default_permissions", *(self.flags & _FLAGS)}
        if not capabilities.acts_for_others():
            return words  # whoever else came in would make files that are ours, and not his
        # libfuse mounts nosuid and nodev unless it is told otherwise.
        return words | {"allow_other"} | {flag.removeprefix("no") for flag in _FORCED - self.flags}

    def _refused(self, said: bytes) -> UserError:
        error = mounts.helper_error(said, self.mount_point)
        denied = error.errno == errno.EPERM and os.strerror(errno.EPERM) in (error.strerror or "")
        code = ExitCode.NOT_ROOT if denied else ExitCode.MOUNT_POINT
        if "/dev/fuse" in (error.strerror or "") or "fuse device" in (error.strerror or ""):
            code = ExitCode.NO_FUSE
        return UserError(f"cannot mount on {os.fsdecode(self.mount_point)}: {error.strerror}", code)

    def tell(self, kind: str, node: int, name: bytes) -> None:
        """Have the kernel forget; as Session.tell. Raises OSError.

        May block while a request it concerns is being served: threads of the invalidator only.
        """
        if not self._initialised:
            return  # nothing has been answered yet
        try:
            if kind in ("entry", "expire"):
                pyfuse3.invalidate_entry(node, name)
            else:
                pyfuse3.invalidate_inode(node, attr_only=kind == "attributes")
        except OSError as error:
            # ENOSYS, EINVAL: of libfuse, before it has seen INIT.
            if error.errno not in _NOTHING_HELD:
                raise

    def unmount(self, lazy: bool = False) -> None:
        """Take the mount away; as Session.unmount, errors included. In a thread."""
        mounts.unmount(self.mount_point, self._id, lazy)
        self.mounted = False

    def set_flags(self, flags: frozenset[str]) -> None:
        """Change the flags of the mount. In a thread. Raises OSError: EPERM for an ordinary user, unless they are as
        they were."""
        if not capabilities.may_mount():
            if flags & _FLAGS | _FORCED == self.flags:
                return
            raise OSError(errno.EPERM, "a user cannot change the flags of a mount: umount, and mount again")
        with mounts.opened(self.mount_point, self._id) as fd:
            mounts.set_all_flags(fd, flags)
        self.flags = flags

    def close(self) -> None:
        """After pyfuse3.main() has returned, or was never called, and every notifying thread was joined."""
        if self._initialised:
            pyfuse3.close(unmount=False)
            self._initialised = False


@contextmanager
def _what_is_said() -> Iterator[Callable[[], bytes]]:
    """Catch what libfuse and fusermount3 write to stderr: it is their only way to say what is wrong."""
    with ExitStack() as stack:
        ours = os.dup(2)
        stack.callback(os.close, ours)
        caught = os.memfd_create("stderr")
        stack.callback(os.close, caught)
        os.dup2(caught, 2)
        stack.callback(os.dup2, ours, 2)
        yield lambda: os.pread(caught, 1 << 16, 0)


def _worth_telling(record: logging.LogRecord) -> bool:
    """False for a reply that met ENOENT: the request was taken back meanwhile, by a signal to the caller or by
    the unmount (RELEASE is sent in the background, fuse_dev_do_write()). That is nobody's error."""
    return not record.getMessage().endswith(f"fuse_reply_* failed with {os.strerror(errno.ENOENT)}")
