"""Errors that are part of the interface, and helpers for the errno values the union answers.

The core raises OSError with an errno; only kernel/ turns it into a FUSE reply. `UserError` is a
mistake of the person at the command line: one line on stderr and a documented exit code.
"""

from __future__ import annotations

import errno
import os
from enum import IntEnum


class ExitCode(IntEnum):
    """Exit codes of every udbad command; numbers are never reused."""

    OK = 0
    FAILURE = 1
    USAGE = 2
    OPTION = 3
    BRANCH = 4
    MOUNT_POINT = 5
    NO_FUSE = 6
    NOT_ROOT = 7
    NOT_MOUNTED = 8
    FSCK_DEFECTS = 9
    CONFIG = 10
    NO_DAEMON = 11
    REFUSED = 12


class UserError(Exception):
    """Bad input: `message` names the offender in one line, `code` is the exit code."""

    def __init__(self, message: str, code: ExitCode = ExitCode.USAGE) -> None:
        super().__init__(message)
        self.message = message
        self.code = code


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
