"""Scenarios of tests/helpers/scenarios.py about ranges of files, and about files without a name."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable

from tests.helpers.posix import (
    COLLAPSE_RANGE,
    KEEP_SIZE,
    PUNCH_HOLE,
    ZERO_RANGE,
    Probe,
    Scenario,
    birth_ns,
    cached_mode,
    fallocate,
    link_fd,
)

PUNCH = KEEP_SIZE | PUNCH_HOLE
WITH_PRIVILEGES = ("suid", "sgid", "both", "lock", "cap")
FAR = 1 << 62


def xattrs(path: str) -> list[tuple[str, bytes]]:
    return [(name, os.getxattr(path, name)) for name in sorted(os.listxattr(path))]


def _drops(p: Probe, use: Callable[..., object], *arguments: tuple[object, ...]) -> None:
    """Each file with privileges, changed with other arguments."""
    for number, name in enumerate(WITH_PRIVILEGES):
        p.fd(f"open/{name}", os.O_WRONLY, use, *arguments[number % len(arguments)])
        p.do(cached_mode, f"open/{name}")
        p.stat(f"open/{name}")
        p.do(xattrs, f"open/{name}")


# -- fallocate ------------------------------------------------------------------------------------


def fallocate_drops_privileges(p: Probe) -> None:
    _drops(p, fallocate, (0, 0, 100), (PUNCH, 0, 2), (ZERO_RANGE, 1, 9), (KEEP_SIZE, 0, 9999))


def fallocate_drops_privileges_otherwise(p: Probe) -> None:
    _drops(p, fallocate, (KEEP_SIZE, 0, 9999), (ZERO_RANGE, 1, 9), (0, 0, 100), (PUNCH, 0, 2), (PUNCH, 0, 2))


def fallocate_ranges(p: Probe) -> None:
    for path, flags in (
        ("open/file", os.O_RDWR),
        ("open/team", os.O_RDWR | os.O_APPEND),
        ("open/other", os.O_RDWR),
        ("links/target", os.O_RDWR),
        ("own/file", os.O_RDWR),
        ("own/readonly", os.O_RDWR),
        ("group/file", os.O_RDWR),
    ):
        for mode, offset, length in (
            (0, 2, 10000),
            (PUNCH, 1, 2),
            (PUNCH, 0, 8192),
            (PUNCH, 20000, 10),
            (ZERO_RANGE, 9000, 3000),
            (ZERO_RANGE | KEEP_SIZE, 11999, 3000),
            (KEEP_SIZE, 0, 100000),
        ):
            p.fd(path, flags, fallocate, mode, offset, length)
            p.fd(path, os.O_RDONLY, os.pread, 20000, 0)
            p.stat(path)
    p.stat("links/hard")


def fallocate_errors(p: Probe) -> None:
    for path, flags in (
        ("open/file", os.O_WRONLY),
        ("open/file", os.O_RDONLY),
        ("open/dir", os.O_RDONLY),
        ("own/fifo", os.O_RDWR),
        ("own/null", os.O_RDWR),
    ):
        for mode, offset, length in (
            (0, 0, 0),
            (0, -1, 1),
            (0, 0, -1),
            (0, FAR, FAR),
            (KEEP_SIZE, FAR, 1),
            (PUNCH_HOLE, 0, 1),
            (PUNCH | ZERO_RANGE, 0, 1),
            (0x4000, 0, 1),
            (COLLAPSE_RANGE | KEEP_SIZE, 0, 4096),
        ):
            p.fd(path, flags | os.O_NONBLOCK, fallocate, mode, offset, length)
    p.stat("open/file")


def limited_size(p: Probe) -> None:
    """RLIMIT_FSIZE; Python ignores SIGXFSZ."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))
    try:
        p.fd("open/file", os.O_WRONLY, fallocate, 0, 4000, 1001)
        p.fd("open/file", os.O_WRONLY, fallocate, ZERO_RANGE, 4000, 1001)
        p.fd("open/file", os.O_WRONLY, fallocate, KEEP_SIZE, 4000, 1001)
        p.fd("open/file", os.O_WRONLY, fallocate, 0, 4000, 1000)
        p.fd("open/team", os.O_WRONLY, copy, "open/file", 0, 1000, 5000)
        p.fd("open/team", os.O_WRONLY, copy, "open/file", 0, 5000, 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    p.stat("open/file")
    p.stat("open/team")


# -- copy_file_range --------------------------------------------------------------------------------


def copy(fd: int, path: str, at: int, to: int, count: int, flags: int = os.O_RDONLY) -> int:
    """copy_file_range(2) from the file `path`."""
    source = os.open(path, flags | os.O_NONBLOCK)
    try:
        return os.copy_file_range(source, fd, count, at, to)
    finally:
        os.close(source)


def copy_drops_privileges(p: Probe) -> None:
    _drops(p, copy, ("open/file", 0, 0, 3), ("open/file", 0, 9000, 3), ("open/file", 1, 1, 1))


def copy_ranges(p: Probe) -> None:
    for path, source in (
        ("open/file", "search/file"),
        ("open/new", "open/file"),
        ("open/team", "open/new"),
        ("links/target", "links/hard"),
        ("own/readonly", "own/file"),
        ("own/file", "own/secret"),
        ("open/new2", "links/soft"),
    ):
        for at, to, count in ((0, 0, 2), (1, 5000, 100), (2, 4, 2), (9999, 0, 1), (0, 6, 0), (0, 6000, 1 << 40)):
            p.fd(path, os.O_WRONLY | os.O_CREAT, copy, source, at, to, count)
            p.fd(path, os.O_RDONLY, os.pread, 20000, 0)
            p.stat(path)
    p.stat("links/hard")


def copy_errors(p: Probe) -> None:
    for path, flags, source in (
        ("open/file", os.O_WRONLY, "open/file"),
        ("open/file", os.O_RDONLY, "open/team"),
        ("open/file", os.O_WRONLY | os.O_APPEND, "open/team"),
        ("open/file", os.O_WRONLY, "open/dir"),
        ("open/dir", os.O_RDONLY, "open/file"),
        ("open/file", os.O_WRONLY, "own/fifo"),
        ("own/fifo", os.O_RDWR, "open/file"),
        ("own/null", os.O_RDWR, "open/file"),
        ("open/file", os.O_WRONLY, "own/null"),
    ):
        for at, to, count in ((0, 0, 2), (0, 1, 2), (0, 2, 2), (0, FAR, 2), (9999, 0, 1)):
            p.fd(path, flags | os.O_NONBLOCK, copy, source, at, to, count)
    p.fd("open/file", os.O_WRONLY, copy, "open/team", 0, 0, 1, os.O_WRONLY)
    p.stat("open/file")


# -- holes ------------------------------------------------------------------------------------------


def make_sparse(fd: int) -> None:
    os.pwrite(fd, b"x" * 5000, 1 << 20)
    os.ftruncate(fd, 3 << 20)
    os.pwrite(fd, b"y", (3 << 20) - 1)


def extents(fd: int) -> list[tuple[int, int]]:
    """Ranges that are data."""
    found = []
    position = 0
    while position < os.fstat(fd).st_size:
        start = os.lseek(fd, position, os.SEEK_DATA)
        position = os.lseek(fd, start, os.SEEK_HOLE)
        found.append((start, position))
    return found


def holes(p: Probe) -> None:
    for path in ("open/file", "open/new"):
        p.fd(path, os.O_WRONLY | os.O_CREAT, make_sparse)
        p.fd(path, os.O_RDONLY, extents)
        p.fd(path, os.O_WRONLY, fallocate, PUNCH, (1 << 20) - 10, 4106)
        p.fd(path, os.O_WRONLY, extents)
        p.fd(path, os.O_WRONLY, fallocate, ZERO_RANGE, 2 << 20, 4096)
        p.fd(path, os.O_RDONLY, extents)
        for offset in (0, 1 << 20, (1 << 20) + 5000, (3 << 20) - 1, 3 << 20, FAR, -1):
            for whence in (os.SEEK_DATA, os.SEEK_HOLE):
                p.fd(path, os.O_RDONLY, os.lseek, offset, whence)
        p.stat(path)
    p.fd("open/dir", os.O_RDONLY, os.lseek, 0, os.SEEK_DATA)
    p.fd("own/fifo", os.O_RDONLY | os.O_NONBLOCK, os.lseek, 0, os.SEEK_DATA)


# -- files without a name ---------------------------------------------------------------------------


def nameless(directory: str, mode: int, flags: int = os.O_RDWR) -> tuple[object, ...]:
    """open(2) with O_TMPFILE; what it is like while it has no name."""
    fd = os.open(directory, os.O_TMPFILE | flags, mode)
    try:
        st = os.fstat(fd)
        return oct(st.st_mode), st.st_uid, st.st_gid, st.st_nlink, os.write(fd, b"content"), os.fstat(fd).st_size
    finally:
        os.close(fd)


def published(directory: str, mode: int, name: str, by_proc: bool = True, flags: int = os.O_RDWR) -> tuple[int, ...]:
    """The same, which then gets a name, and another one, which goes again; the link counts."""
    fd = os.open(directory, os.O_TMPFILE | flags, mode)
    try:
        os.write(fd, b"content")
        links = [os.fstat(fd).st_nlink]
        for call in (
            lambda: link_fd(fd, name, by_proc),
            lambda: os.link(name, f"{name}.second"),
            lambda: os.unlink(name),
            lambda: os.write(fd, b" more"),
            lambda: os.rename(f"{name}.second", name),
        ):
            call()
            links.append(os.fstat(fd).st_nlink)
            links.append(os.fstat(fd).st_size)
        return tuple(links)
    finally:
        os.close(fd)


def files_without_a_name(p: Probe) -> None:
    for directory in ("own", "open", "group", "group/sub", "sticky", "acl", "closed", "search", "open/dir2"):
        for mode in (0o666, 0o7777, 0o2755, 0o2745, 0o600, 0o000):
            p.do(nameless, directory, mode)
            p.do(published, directory, mode, f"{directory}/t{mode:o}")
            p.stat(f"{directory}/t{mode:o}")
    for flags in (os.O_RDONLY, os.O_WRONLY, os.O_RDWR | os.O_EXCL, os.O_RDWR | os.O_CREAT, os.O_WRONLY | os.O_APPEND):
        p.do(nameless, "open", 0o644, flags)
        p.do(published, "open", 0o644, f"open/flags{flags:o}", flags=flags)
    p.do(published, "open", 0o644, "open/empty-path", by_proc=False)
    for name in (
        "open/file",
        "open/dir",
        "links/dangling",
        "open/file/x",
        "missing/x",
        "closed/x",
        "group/new",
        "acl/new",
    ):
        p.do(published, "open", 0o644, name)
    for directory in ("open/file", "missing", "links/dir", "own/fifo", "links/dangling"):
        p.do(nameless, directory, 0o644)


def made_and_written(directory: str, mode: int) -> list[str]:
    """The modes of a new file before and after the first write by whoever made it."""
    path = f"{directory}/w{mode:o}"
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        modes = [oct(os.fstat(fd).st_mode)]
        os.write(fd, b"content")
        return [*modes, cached_mode(path), oct(os.fstat(fd).st_mode)]
    finally:
        os.close(fd)


def writing_to_new_files(p: Probe) -> None:
    for directory in ("own", "open", "group", "group/sub", "sticky", "acl"):
        for mode in (0o666, 0o7777, 0o2755, 0o2745, 0o4711):
            p.do(made_and_written, directory, mode)


# -- when something was made ------------------------------------------------------------------------


def has_birth(path: str) -> bool:
    return birth_ns(path) > 0


def birth_times(p: Probe) -> None:
    for path in ("own/file", "open/file", "open", "links/soft", "own/fifo", "own/null", "closed/file", "missing"):
        p.do(has_birth, path)
    p.do(os.mkdir, "open/made")
    p.do(has_birth, "open/made")
    p.do(os.chmod, "own/file", 0o640)
    p.do(has_birth, "own/file")


SCENARIOS: tuple[Scenario, ...] = (
    fallocate_drops_privileges,
    fallocate_drops_privileges_otherwise,
    fallocate_ranges,
    fallocate_errors,
    limited_size,
    copy_drops_privileges,
    copy_ranges,
    copy_errors,
    holes,
    files_without_a_name,
    writing_to_new_files,
    birth_times,
)
