"""Walking through one branch, as it lies there: what its checker and the tools that merge branches look at.

Invariants: depth is not limited by PATH_MAX (every step is one name from an open directory), by the
number of descriptors (`_WINDOW` of them at most), or by Python's stack (nothing recurses). Directories
whose name starts with `.wh.` are no part of the merged tree and are never descended into.
"""

from __future__ import annotations

import errno
import os
import stat as st_mod
from collections.abc import Callable, Generator
from typing import Final

from udbad.branch import capabilities, syscalls, whiteout
from udbad.branch.spec import printable
from udbad.errors import NO_DIRECTORY, ExitCode, UserError

READ_DIR: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_WINDOW: Final = 100  # open directories of a walk; deeper ones are reached again name by name

Entries = dict[bytes, os.DirEntry[str]]


class _Level:
    """A directory on the way to the current one. fd is -1 while closed; todo: children still to visit."""

    __slots__ = ("fd", "name", "todo")

    def __init__(self, name: bytes, fd: int, todo: list[bytes]) -> None:
        self.name = name
        self.fd = fd
        self.todo = todo


def entries_of(dirfd: int) -> Entries:
    """All entries by name; their methods need `dirfd` open."""
    with os.scandir(dirfd) as entries:
        # scandir(fd) gives str, in the file system encoding with surrogateescape.
        return {os.fsencode(entry.name): entry for entry in entries}


def give_up(path: bytes, error: OSError) -> None:
    """For `walk`: what cannot be read ends it. Raises the error with the path."""
    raise OSError(error.errno, error.strerror, path) from error


def walk(root_fd: int, on_error: Callable[[bytes, OSError], None]) -> Generator[tuple[bytes, int, Entries], None, None]:
    """Every directory of the merged part of a branch, parents first: (path, descriptor, entries).

    The descriptor is valid until the generator is resumed. A directory that vanishes meanwhile is
    left out; one that cannot be read is reported to `on_error`.
    """
    levels: list[_Level] = []
    path = b""

    def enter(parent_fd: int, name: bytes) -> Entries | None:
        try:
            fd = os.open(name, READ_DIR, dir_fd=parent_fd)
        except NO_DIRECTORY:
            return None
        except OSError as error:
            on_error(join(path, name), error)
            return None
        levels.append(_Level(name, fd, []))
        try:
            return entries_of(fd)
        except OSError as error:
            on_error(join(path, name), error)
            return {}

    try:
        entries = enter(root_fd, b".")
        while levels:
            level = levels[-1]
            if entries is not None:
                yield path, level.fd, entries
                level.todo = [name for name, entry in entries.items() if _merged_directory(name, entry)]
            if not level.todo:
                _leave(levels.pop())
                path = path[: -len(level.name) - 1] if len(levels) > 1 else b""
                entries = None
                continue
            if level.fd < 0:
                try:
                    _reopen(root_fd, levels)
                except OSError as error:
                    on_error(path, error)
                    level.todo.clear()
                    entries = None
                    continue
            name = level.todo.pop()
            entries = enter(level.fd, name)
            if entries is not None:
                path = join(path, name)
                if not level.todo:
                    _leave(level)
                if len(levels) > _WINDOW:
                    _leave(levels[-1 - _WINDOW])
    finally:
        for level in levels:
            _leave(level)


def _leave(level: _Level) -> None:
    if level.fd >= 0:
        os.close(level.fd)
        level.fd = -1


def _merged_directory(name: bytes, entry: os.DirEntry[str]) -> bool:
    try:
        return not name.startswith(whiteout.PREFIX) and entry.is_dir(follow_symlinks=False)
    except OSError:
        return True  # a file system that tells no types, and an object that cannot be read: opening it reports that


def _reopen(root_fd: int, levels: list[_Level]) -> None:
    """Open the deepest of `levels` again, and half a window above it.

    Goes down by name from the root: ".." of a directory somebody moved would lead elsewhere.
    """
    keep = len(levels) - _WINDOW // 2
    parent_fd = root_fd
    try:
        for depth, level in enumerate(levels):
            fd = os.open(level.name, READ_DIR, dir_fd=parent_fd)
            if depth and levels[depth - 1].fd != parent_fd:
                os.close(parent_fd)
            parent_fd = fd
            if depth >= keep:
                _leave(level)
                level.fd = fd
    except OSError:
        if parent_fd != root_fd and all(level.fd != parent_fd for level in levels):
            os.close(parent_fd)
        raise


_KINDS: Final = {
    st_mod.S_IFREG: "file", st_mod.S_IFDIR: "directory", st_mod.S_IFLNK: "symlink", st_mod.S_IFIFO: "fifo",
    st_mod.S_IFSOCK: "socket", st_mod.S_IFCHR: "character device", st_mod.S_IFBLK: "block device",
}  # fmt: skip


def kind_name(mode: int) -> str:
    """What an object is, in words, by its st_mode or the type in it."""
    return _KINDS.get(st_mod.S_IFMT(mode), "unknown")


def join(parent: bytes, name: bytes) -> bytes:
    return parent + b"/" + name if parent else name


def objects_in(
    root_fd: int, directory: bytes, on_error: Callable[[bytes, OSError], None]
) -> list[tuple[bytes, os.stat_result]]:
    """What one of the two administrative directories holds; nothing if it is absent or no directory."""
    try:
        fd = os.open(directory, READ_DIR, dir_fd=root_fd)
        try:
            found = [(name, stat_or_none(fd, name)) for name in sorted(entries_of(fd))]
        finally:
            os.close(fd)
    except NO_DIRECTORY:
        return []
    except OSError as error:
        on_error(directory, error)
        return []
    return [(name, st) for name, st in found if st is not None]


def stat_or_none(dirfd: int, name: bytes) -> os.stat_result | None:
    try:
        return syscalls.stat_at(dirfd, name)
    except FileNotFoundError:
        return None


def descend(root_fd: int, names: list[bytes]) -> int:
    """A descriptor of the directory reached from the root by `names`, one at a time, following nothing."""
    fd = syscalls.open_dir_at(root_fd, b".")
    for name in names:
        try:
            child = syscalls.open_dir_at(fd, name)
        finally:
            os.close(fd)
        fd = child
    return fd


def open_branch(path: bytes) -> int:
    """A private clone of the branch's mount: what is mounted below is no part of it (semantics 4.2 note 0).

    An ordinary user gets the directory itself, with what is mounted below it.
    """
    try:
        try:
            fd = syscalls.clone_mount(path)
        except PermissionError as error:
            if error.errno != errno.EPERM:
                raise
            if capabilities.acts_for_others():
                raise UserError(f"{printable(path)}: checking a branch needs root", ExitCode.NOT_ROOT) from error
            fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError as error:
        raise UserError(f"{printable(path)}: {error.strerror}", ExitCode.BRANCH) from error
    if not st_mod.S_ISDIR(os.fstat(fd).st_mode):
        os.close(fd)
        raise UserError(f"{printable(path)}: not a directory", ExitCode.BRANCH)
    return fd
