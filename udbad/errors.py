"""Errors that are part of the interface, and helpers for the errno values the union answers.

The core raises OSError with an errno; only kernel/ turns it into a FUSE reply. `UserError` is a
mistake of the person at the command line: one line on stderr and a documented exit code.
"""

from __future__ import annotations

import errno
import os
from enum import IntEnum
from typing import Final


class ExitCode(IntEnum):
    """Exit codes of every udbad command; numbers are never reused."""

    OK = 0
    """Fine."""
    FAILURE = 1
    """A failure that is nobody's mistake."""
    USAGE = 2
    """Wrong usage."""
    OPTION = 3
    """A bad mount option."""
    BRANCH = 4
    """A bad branch."""
    MOUNT_POINT = 5
    """A bad mount point."""
    NO_FUSE = 6
    """There is no /dev/fuse."""
    NOT_ROOT = 7
    """Not root where it matters."""
    NOT_MOUNTED = 8
    """Not mounted."""
    FSCK_DEFECTS = 9
    """fsck: defects remain."""
    CONFIG = 10
    """A bad configuration file."""
    NO_DAEMON = 11
    """No daemon answers."""
    REFUSED = 12
    """A rule forbids it, or something had to stay (mvdown, sync)."""


class UserError(Exception):
    """Bad input: `message` names the offender in one line, `code` is the exit code."""

    def __init__(self, message: str, code: ExitCode = ExitCode.USAGE) -> None:
        super().__init__(message)
        self.message = message
        self.code = code


# -- "not there": which errno values of a branch mean what -------------------------------------------

ABSENT: Final = (errno.ENOENT, errno.ENAMETOOLONG)
"""A branch directory has no such name; the second one where its file system has shorter names than others. No other
error makes a negative entry, which a view or the kernel may keep."""

GONE: Final = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ESTALE})
"""A known object is not where it was: removed or moved, it or a directory above it. Its name has to be asked anew."""

REPLACED: Final = GONE | {errno.ELOOP}
"""GONE, or its name turned into something that cannot be opened as the object was, a symbolic link for instance."""

NO_DIRECTORY: Final = (FileNotFoundError, NotADirectoryError)
"""Raised by opening a directory by name where there is nothing, or something else."""


def os_error(number: int) -> OSError:
    """An OSError for `number` with the usual text."""
    return OSError(number, os.strerror(number))


def eio() -> OSError:
    return os_error(errno.EIO)


def enoent() -> OSError:
    return os_error(errno.ENOENT)


def erofs() -> OSError:
    return os_error(errno.EROFS)


def estale() -> OSError:
    return os_error(errno.ESTALE)
