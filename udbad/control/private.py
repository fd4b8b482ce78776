"""State on disk that root acts upon: nobody else can have written what is read, whatever the umask was.

A mount process runs with umask 0, because objects of the union get exactly the mode that was asked for. So what is
its own states its mode here. Whoever reads it back believes only directories and files that belong to root or to
ourselves and that nobody else may write to; symbolic links are not followed. All functions raise OSError.
"""

from __future__ import annotations

import errno
import os
import stat as st_mod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

FOR_ALL: Final = 0o644
FOR_US: Final = 0o600
_DIRECTORY: Final = 0o755
_OTHERS_MAY_WRITE: Final = 0o022


class NotPrivate(PermissionError):
    """Somebody else may have written it; the text says why."""

    def __init__(self, name: str, why: str) -> None:
        super().__init__(errno.EPERM, why, name)


def _check(fd: int, name: str) -> None:
    st = os.fstat(fd)
    if st.st_uid not in (0, os.geteuid()):
        raise NotPrivate(name, f"belongs to uid {st.st_uid}")
    if st.st_mode & _OTHERS_MAY_WRITE:
        raise NotPrivate(name, f"can be written to by others, its mode is {st_mod.S_IMODE(st.st_mode):04o}")


@contextmanager
def directory(path: str, make: bool = False) -> Iterator[int]:
    """A descriptor of a directory, checked. make: it is made if it is missing, and those above it."""
    while True:
        try:
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            break
        except FileNotFoundError:
            if not make:
                raise
            _make(path)
        except NotADirectoryError:
            if os.path.islink(path):
                raise NotPrivate(path, "is a symbolic link") from None
            raise
    try:
        _check(fd, path)
        yield fd
    finally:
        os.close(fd)


def _make(path: str) -> None:
    above = os.path.dirname(path)
    if above and not os.path.exists(above):
        _make(above)
    try:
        os.mkdir(path, _DIRECTORY)
    except FileExistsError:
        pass  # somebody was faster


def write(dirfd: int, name: str, data: bytes, mode: int = FOR_ALL) -> None:
    """Make `data` the content of a file at once, under exactly this mode."""
    temporary = f".{name}.new"
    try:
        # Not opened: who may have it open for writing is not known of one that a killed process has left.
        os.unlink(temporary, dir_fd=dirfd)
    except FileNotFoundError:
        pass
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(temporary, flags, FOR_US, dir_fd=dirfd)
    with open(fd, "wb") as stream:
        stream.write(data)
        os.fchmod(fd, mode)
    os.rename(temporary, name, src_dir_fd=dirfd, dst_dir_fd=dirfd)


def read(dirfd: int, name: str) -> bytes:
    """The content of a file. Raises NotPrivate when somebody else may have written it."""
    try:
        # O_NONBLOCK: a FIFO does not stop us.
        fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=dirfd)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise NotPrivate(name, "is a symbolic link") from None
        raise
    with open(fd, "rb") as stream:
        _check(fd, name)
        return stream.read()


def open_lock(dirfd: int, name: str) -> int:
    """A file to be locked, made if it is missing, that nobody else can open."""
    return os.open(name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, FOR_US, dir_fd=dirfd)
