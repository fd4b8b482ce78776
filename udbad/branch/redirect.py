"""Redirects: under which name a directory of one branch is to be looked up in the branches below it.

Renaming a directory moves what is on its own branch; what it has below stays where it is. An extended attribute on the
upper directory says where: that of overlayfs (redirect_dir=on), in both notations of whiteouts. Its value is a path
from the root of the branches, or one name, which then takes the place of the directory's own one in its parent
(Documentation/filesystems/overlayfs.rst, "redirect_dir"; ovl_check_redirect() in fs/overlayfs/namei.c).

Only what nobody but root can have written leads anywhere: `trusted.`, or `user.` for a process that serves nobody but
its own user, or its own user namespace. A branch that is written to is asked for redirects only where a file in its
root says that it has some, so that a mount without any pays nothing for them.
"""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from functools import cache

from udbad.branch import capabilities, syscalls, whiteout
from udbad.errors import os_error

MARK = whiteout.RESERVED + b"redirects"
"""In the root of a branch that has, or had, redirects."""
MAX_PATH = 4095
"""Bytes of a redirect (PATH_MAX without the NUL)."""

_NOT_HERE = frozenset(
    {errno.EOPNOTSUPP, errno.EPERM, errno.EACCES, errno.ENOSPC, errno.EDQUOT, errno.E2BIG, errno.ERANGE, errno.EROFS}
)
"""Why a file system may not take an attribute."""


class Unusable(ValueError):
    """A value that no redirect can have: what it would lead to is nothing."""


def key() -> bytes:
    """The attribute that counts for this process, as overlayfs has it without and with its option userxattr."""
    return _key(os.geteuid())


@cache
def _key(uid: int) -> bytes:
    return b"trusted.overlay.redirect" if capabilities.may_trust() else b"user.overlay.redirect"


def read(fd: int, attribute: bytes) -> bytes | None:
    """What a branch directory says, given by an O_PATH descriptor; None when it has none. Raises Unusable, OSError."""
    try:
        value = syscalls.getxattr(syscalls.proc_path(fd), attribute)
    except OSError as error:
        if error.errno == errno.EOPNOTSUPP:
            return None
        raise
    return None if value is None else checked(value)


def checked(value: bytes) -> bytes:
    """A redirect of which each part can be the name of a directory. Raises Unusable."""
    path = value[1:] if value.startswith(b"/") else value
    parts = path.split(b"/")
    if len(value) > MAX_PATH or b"\0" in value or (path is value and len(parts) > 1):
        raise Unusable(value)
    for part in parts:
        if part in (b"", b".", b"..") or len(part) > whiteout.NAME_MAX or part.startswith(whiteout.PREFIX):
            raise Unusable(value)
    return value


def write(root_fd: int | None, fd: int, attribute: bytes, path: bytes) -> None:
    """Have a directory of the branch with this root looked up under another path below. root_fd: None where redirects
    are looked for in any case. Raises EXDEV where the file system takes no such attribute, or the path is too long;
    OSError."""
    try:
        checked(path)
        if root_fd is not None:
            with suppress(FileExistsError):
                os.close(syscalls.create_file_at(root_fd, MARK, os.O_WRONLY, 0o444))
        syscalls.setxattr(syscalls.proc_path(fd), attribute, path)
    except Unusable:
        raise os_error(errno.EXDEV) from None
    except OSError as error:
        if error.errno in _NOT_HERE:
            raise os_error(errno.EXDEV) from None
        raise


def remove(fd: int, attribute: bytes) -> None:
    """Take a redirect away that was just written."""
    syscalls.removexattr(syscalls.proc_path(fd), attribute)


def may_have(root_fd: int) -> bool:
    """Whether a branch that is written to has said that there are some."""
    return syscalls.exists_at(root_fd, MARK)
