"""Copying the content and the metadata of one branch object (semantics 6.8).

Runs in worker threads: descriptors, bytes and ints go in and come out; no event loop, no thread and no lock of its own.
It decides nothing about the namespace: the caller has opened the source, made an empty destination that nobody else
writes to, and removes it again when anything here raises.

Invariants: the source is only read; a copy ends however the source grows or shrinks meanwhile; an error of the disk
(ENOSPC, EDQUOT, EIO, …) reaches the caller with its errno; a destination that was made private (0600, 0700) never
grants anybody but its owner more than the source does while it gets its attributes.
"""

from __future__ import annotations

import errno
import os
import re
import stat as st_mod
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import groupby
from time import monotonic
from typing import Final, NamedTuple

from udbad.branch import capabilities, datacalls, overlayattr, redirect, syscalls
from udbad.errors import os_error
from udbad.types import CopyMethod

KERNEL_CHUNK: Final = 8 << 20  # bytes per copy_file_range(2): what passes between two looks at `cancelled`
USER_CHUNK: Final = 1 << 20  # bytes per pread(2)
RANGE_CHUNK: Final = 64 << 20  # bytes per copy_file_range(2) of `copy_range`: a moment for a disk, none for a reflink
RANGE_SECONDS: Final = 0.5
SMALL: Final = 128 << 10  # bytes that are read at once without advice (read_ahead_kb)
_ZERO_BLOCK: Final = bytes(4096)

# copy_file_range(2) refuses this pair of files, which says nothing about reading and writing them: two file systems
# (EXDEV, EINVAL, EOPNOTSUPP), a seccomp filter (ENOSYS, EPERM, EACCES), a swap file (ETXTBSY), some network file
# systems (EBADF). Whatever is really wrong comes back from pread(2) or pwrite(2).
_REFUSED: Final = frozenset(
    {
        errno.EXDEV,
        errno.EINVAL,
        errno.EOPNOTSUPP,
        errno.ENOSYS,
        errno.EPERM,
        errno.EACCES,
        errno.ETXTBSY,
        errno.EBADF,
    }
)

_ACLS: Final = ("system.posix_acl_access", "system.posix_acl_default")
_NEVER_COPIED: Final = ("trusted.overlay.", "trusted.SGI_ACL_")
_NOT_TO_OVERLAY: Final = tuple(map(os.fsdecode, overlayattr.PREFIXES))
_ESCAPED: Final = tuple(map(os.fsdecode, overlayattr.ESCAPED))
_NEVER_IGNORED: Final = frozenset({errno.ENOMEM, errno.EDQUOT, errno.ENOSPC})
_ICEX_OF: Final = {"security": "icexsec", "system": "icexsys", "trusted": "icextr", "user": "icexusr"}

_PINNED: Final = rb"/proc/self/fd/\d+"
_NAMED: Final = rb"(?s)/proc/self/fd/\d+/[^/]+"

Place = bytes | int
"""Of an object whose metadata is copied: a path of the forms above, or a descriptor of it that is not an O_PATH one."""


class CopyResult(NamedTuple):
    """What copy_contents did.

    method: the least efficient one that was needed; NONE when there was no data. bytes_copied: bytes that were written,
    without holes and without shared blocks (0 for REFLINK). size: st_size of the destination in bytes.
    """

    method: CopyMethod
    bytes_copied: int
    size: int


# -- content ----------------------------------------------------------------------------------


def copy_contents(
    src_fd: int,
    dst_fd: int,
    length: int | None = None,
    progress: Callable[[int], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
    reflink: bool = True,
    write_out: Callable[[int, int], object] | None = None,
) -> CopyResult:
    """Copy the data of a regular file: reflink, else copy_file_range(2), else read and write; holes stay holes.

    src_fd: readable, without O_DIRECT; its file offset moves. dst_fd: writable, without O_APPEND, of an empty file.
    length: only the first `length` bytes are wanted (copy-up for truncate(2)); None: all. progress: called in this
    thread with the offset reached in bytes, never decreasing. cancelled: asked before every chunk. reflink: False where
    that is known to be impossible. write_out: called with offset and bytes of what has been copied, to have the disk
    begin with it, as somebody will wait for that.

    A source that grows meanwhile is copied up to the size it had at first; one that shrinks gives the smaller size.
    OSError: ECANCELED when `cancelled` said so; else what the file systems said. The destination is then incomplete.
    """
    status = syscalls.fstat(src_fd)
    wanted = status.st_size if length is None else min(length, status.st_size)
    if wanted == 0:
        return CopyResult(CopyMethod.NONE, 0, 0)
    copier = _Copier(src_fd, dst_fd, progress or _ignore_progress, cancelled or _never)
    copier.check_cancelled()
    if reflink and datacalls.reflink(src_fd, dst_fd):
        return _finish_reflink(dst_fd, length, copier.progress)
    if wanted <= SMALL:
        copier.copy(wanted, status)
    else:
        copier.write_out = write_out
        os.posix_fadvise(src_fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        try:
            copier.copy(wanted, status)
        finally:
            # The advice belongs to the open file, which may go on serving reads. What is cached stays so: the copy is
            # about to be used, and the source's pages may be in use through other paths.
            os.posix_fadvise(src_fd, 0, 0, os.POSIX_FADV_NORMAL)
    complete = copier.reached == wanted and not copier.skip_zeros
    size = wanted if complete else min(wanted, os.fstat(src_fd).st_size)
    if size != copier.reached or copier.skip_zeros:
        os.ftruncate(dst_fd, size)  # makes the last hole, and drops what the source has lost meanwhile
    if size > copier.reached:
        copier.progress(size)
    return CopyResult(copier.method(), copier.kernel_bytes + copier.user_bytes, size)


def copy_small(
    src: os.stat_result, src_fd: int, dst_fd: int, length: int | None, listed: bool = False
) -> CopyResult | None:
    """`copy_contents` and `copy_metadata` of what is at most one block, where data and a hole would be as much, and has
    neither extended attributes nor an ACL, at once.

    src: status of the source. length: as for copy_contents. listed: both file systems list ACLs
    (`Branch.lists_xattrs`). None where it is no such file, or anything is wrong with it: the two tell what, and begin
    anew.
    """
    size = src.st_size if length is None else min(length, src.st_size)
    if size and (src.st_size > syscalls.SMALL_COPY or not src.st_blocks):
        return None
    how = syscalls.copy_small(
        src_fd, dst_fd, size, None if listed else _ACLS[0], src.st_uid, src.st_gid, st_mod.S_IMODE(src.st_mode),
        src.st_atime_ns, src.st_mtime_ns,
    )  # fmt: skip
    if not how:
        os.ftruncate(dst_fd, 0)
        return None
    if not size:
        return CopyResult(CopyMethod.NONE, 0, 0)
    return CopyResult(CopyMethod.COPY_FILE_RANGE if how == 1 else CopyMethod.COPY, size, size)


def _finish_reflink(dst_fd: int, length: int | None, progress: Callable[[int], None]) -> CopyResult:
    """FICLONE shares whole files; cutting the rest off again costs less than copying the beginning."""
    size = os.fstat(dst_fd).st_size
    if length is not None and length < size:
        os.ftruncate(dst_fd, length)
        size = length
    progress(size)
    return CopyResult(CopyMethod.REFLINK, 0, size)


def _ignore_progress(_offset: int) -> None:
    pass


def _never() -> bool:
    return False


class _Copier:
    """One running copy: which way the bytes take now, and how many took which."""

    __slots__ = (
        "cancelled",
        "dst_fd",
        "in_kernel",
        "kernel_bytes",
        "progress",
        "reached",
        "skip_zeros",
        "src_fd",
        "user_bytes",
        "write_out",
    )

    def __init__(
        self, src_fd: int, dst_fd: int, progress: Callable[[int], None], cancelled: Callable[[], bool]
    ) -> None:
        self.src_fd = src_fd
        self.dst_fd = dst_fd
        self.progress = progress
        self.cancelled = cancelled
        self.in_kernel = True
        self.skip_zeros = False
        self.write_out: Callable[[int, int], object] | None = None
        self.kernel_bytes = 0
        self.user_bytes = 0
        self.reached = 0

    def method(self) -> CopyMethod:
        if self.user_bytes:
            return CopyMethod.COPY
        return CopyMethod.COPY_FILE_RANGE if self.kernel_bytes else CopyMethod.NONE

    def check_cancelled(self) -> None:
        if self.cancelled():
            raise os_error(errno.ECANCELED)

    def copy(self, end: int, status: os.stat_result) -> None:
        """Copy [0, end); stops early where the source ends now. status: of the source."""
        if status.st_size <= len(_ZERO_BLOCK) and status.st_blocks:
            self._copy_range(0, end)  # data and a hole would be a block each
        elif _knows_holes(self.src_fd, status):
            for start, stop in _extents(self.src_fd, end):
                if not self._copy_range(start, stop):
                    return
        else:
            # copy_file_range(2) would write the zeros that only user space can see.
            self.in_kernel = False
            self.skip_zeros = True
            self._copy_range(0, end)

    def _copy_range(self, start: int, stop: int) -> bool:
        """Copy [start, stop); False when the source ended before `stop`."""
        while start < stop:
            self.check_cancelled()
            count = self._copy_chunk(start, stop - start)
            if count == 0:
                return False
            if self.write_out is not None:
                self.write_out(start, count)
            start += count
            self.reached = start
            self.progress(start)
        return True

    def _copy_chunk(self, offset: int, left: int) -> int:
        """Copy at least one byte at `offset`; 0 only at the end of the source."""
        if self.in_kernel:
            count = self._copy_in_kernel(offset, min(left, KERNEL_CHUNK))
            if count:
                self.kernel_bytes += count
                return count
            # Refused, or 0 bytes: the end of the file, or a file system that says so of every file (the BUGS of
            # copy_file_range(2)). Reading tells which.
            self.in_kernel = False
        data = os.pread(self.src_fd, min(left, USER_CHUNK), offset)
        runs = nonzero_runs(data) if self.skip_zeros else [(0, len(data))]
        for start, stop in runs:
            self._write(memoryview(data)[start:stop], offset + start)
            self.user_bytes += stop - start
        return len(data)

    def _copy_in_kernel(self, offset: int, count: int) -> int:
        return _copy_in_kernel(datacalls.copy_in_turns, self.src_fd, offset, self.dst_fd, offset, count)

    def _write(self, data: memoryview, offset: int) -> None:
        while data:
            count = os.pwrite(self.dst_fd, data, offset)
            if count == 0:  # write(2) leaves it open for regular files; without an end it would be a loop
                raise os_error(errno.EIO)
            data = data[count:]
            offset += count


def copy_range(src_fd: int, src_offset: int, dst_fd: int, dst_offset: int, length: int) -> int:
    """copy_file_range(2), between any two files; how many bytes were copied, 0 only at the end of the source.

    Fewer than `length` after RANGE_SECONDS, since whoever waits for it cannot be killed meanwhile. Blocks are shared
    where the file systems can; else the kernel copies, or, from one file system to another, we do. src_fd: readable.
    dst_fd: writable, without O_APPEND. May be the same file, for ranges that do not overlap. Raises OSError when
    nothing was copied.
    """
    until = monotonic() + RANGE_SECONDS
    copied = 0
    in_kernel = True
    while copied < length and (not copied or monotonic() < until):
        source, target, left = src_offset + copied, dst_offset + copied, length - copied
        try:
            count = 0
            if in_kernel:
                count = _copy_in_kernel(os.copy_file_range, src_fd, source, dst_fd, target, min(left, RANGE_CHUNK))
                in_kernel = count > 0  # as in `_Copier._copy_chunk`
            if not count:
                data = os.pread(src_fd, min(left, USER_CHUNK), source)
                if not data:
                    break
                count = os.pwrite(dst_fd, data, target)
        except OSError:
            if copied:
                break  # whoever copies the rest is told
            raise
        if not count:
            raise os_error(errno.EIO)  # as in `_Copier._write`
        copied += count
    return copied


def _copy_in_kernel(
    call: Callable[[int, int, int, int, int], int],
    src_fd: int,
    src_offset: int,
    dst_fd: int,
    dst_offset: int,
    count: int,
) -> int:
    """copy_file_range(2), which `call` does; 0 when it refuses."""
    try:
        return call(src_fd, dst_fd, count, src_offset, dst_offset)
    except OSError as error:
        if error.errno in _REFUSED:
            return 0
        raise


def _knows_holes(fd: int, status: os.stat_result) -> bool:
    """Whether SEEK_HOLE finds the holes of this file.

    generic_file_llseek() of file systems without own support answers that all is data (lseek(2) allows it); fewer
    blocks than bytes show that this is not so, or that the file is compressed, where skipping zeros does no harm.
    """
    try:
        first_hole = os.lseek(fd, 0, os.SEEK_HOLE)
    except OSError as error:
        if error.errno == errno.ENXIO:  # just became empty
            return True
        if error.errno in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
            return False
        raise
    return first_hole < status.st_size or status.st_blocks * 512 >= status.st_size


def _extents(fd: int, end: int) -> Iterator[tuple[int, int]]:
    """The data of the file below `end`, as ascending ranges [start, stop)."""
    position = 0
    while position < end:
        try:
            start = os.lseek(fd, position, os.SEEK_DATA)
            stop = os.lseek(fd, start, os.SEEK_HOLE)
        except OSError as error:
            if error.errno == errno.ENXIO:  # only a hole is left, or the file shrank
                return
            raise
        if start >= end:
            return
        if stop <= start:  # punched between the two calls; calling the rest data is right and always ends
            stop = end
        yield start, min(stop, end)
        position = stop


def nonzero_runs(data: bytes) -> Iterator[tuple[int, int]]:
    """The ranges of `data` that hold blocks with something other than zeros."""
    size = len(_ZERO_BLOCK)
    blocks = range(0, len(data), size)
    for zero, run in groupby(blocks, lambda start: _ZERO_BLOCK.startswith(data[start : start + size])):
        if not zero:
            starts = list(run)
            yield starts[0], min(starts[-1] + size, len(data))


# -- metadata ---------------------------------------------------------------------------------


def copy_metadata(
    src: os.stat_result, src_path: Place, dst_path: Place, ignore: frozenset[str], *, follow_symlinks: bool
) -> None:
    """Give the destination the owner, xattrs, ACLs, mode and times of the source (semantics 6.8).

    src: status of the source from before its content was read (atime). Type of the destination: that of `src`, any.
    src_path, dst_path, ignore, follow_symlinks and errors: as for copy_xattrs.

    The order matters. chown(2) clears set-id bits and security.capability, so it is first. The mode of a file with an
    ACL has the ACL's mask where the group's bits are, so chmod(2) before the ACL would open the file to its group for a
    moment; after it, chmod(2) changes nothing but the set-id bits. Times are last because nothing may touch them again.

    An ordinary user cannot give files away: what is copied is his then, in the source's group where he is in it, and
    without the set-id bits and file capabilities that would be his, too, as by `cp -p`.
    """
    _check_form(src_path, follow_symlinks)
    _check_form(dst_path, follow_symlinks)
    mode = st_mod.S_IMODE(src.st_mode) & ~_copy_owner(src, dst_path, follow_symlinks)
    acls = _ACLS if st_mod.S_ISDIR(src.st_mode) else () if st_mod.S_ISLNK(src.st_mode) else _ACLS[:1]
    copy_xattrs(src_path, dst_path, ignore, follow_symlinks=follow_symlinks, acls=acls)
    if isinstance(dst_path, int):
        syscalls.chmod_fd(dst_path, mode)
        syscalls.utime_fd(dst_path, src.st_atime_ns, src.st_mtime_ns)
        return
    if not st_mod.S_ISLNK(src.st_mode):
        os.chmod(dst_path, mode, follow_symlinks=follow_symlinks)
    os.utime(dst_path, ns=(src.st_atime_ns, src.st_mtime_ns), follow_symlinks=follow_symlinks)


def _copy_owner(src: os.stat_result, dst_path: Place, follow_symlinks: bool) -> int:
    """Give the destination owner and group of the source; returns the mode bits that it may not have."""
    try:
        if isinstance(dst_path, int):
            syscalls.chown_fd(dst_path, src.st_uid, src.st_gid)
        else:
            os.chown(dst_path, src.st_uid, src.st_gid, follow_symlinks=follow_symlinks)
    except PermissionError:
        if capabilities.acts_for_others():
            raise
        if src.st_uid == os.geteuid():
            return st_mod.S_ISGID
        try:
            os.chown(dst_path, -1, src.st_gid, follow_symlinks=follow_symlinks)
        except PermissionError:
            return st_mod.S_ISUID | st_mod.S_ISGID
        return st_mod.S_ISUID
    return 0


def copy_special(
    src: os.stat_result, src_dirfd: int, src_name: bytes, dst_dirfd: int, dst_name: bytes, ignore: frozenset[str]
) -> int:
    """Make a symlink, device, FIFO or socket anew under another name, with all its metadata.

    src: its status. ignore: as for copy_xattrs. Returns an O_PATH descriptor of what was made, the caller's to close.
    Raises OSError, and nothing is left then: ESTALE when somebody has put something else in the place of either.

    Who may write to the directory can do that between any two calls, and must not have a file of somebody else given
    to the owner of the source. So owner and mode go to what is pinned, and only if that can be what was made.
    """
    src_fd = syscalls.pin_at(src_dirfd, src_name)
    fd = -1
    try:
        pinned = os.fstat(src_fd)
        if (pinned.st_dev, pinned.st_ino, pinned.st_mode) != (src.st_dev, src.st_ino, src.st_mode):
            raise os_error(errno.ESTALE)
        if st_mod.S_ISLNK(src.st_mode):
            syscalls.symlink_at(syscalls.readlink_fd(src_fd), dst_dirfd, dst_name)
        else:
            syscalls.mknod_at(dst_dirfd, dst_name, st_mod.S_IFMT(src.st_mode) | 0o600, src.st_rdev)
        try:
            fd = syscalls.pin_at(dst_dirfd, dst_name)
            made = os.fstat(fd)
            if made.st_nlink != 1 or _kind(made) != _kind(src):
                raise os_error(errno.ESTALE)
            copy_metadata(src, syscalls.proc_path(src_fd), syscalls.proc_path(fd), ignore, follow_symlinks=True)
        except BaseException:
            with suppress(FileNotFoundError):
                syscalls.unlink_at(dst_dirfd, dst_name)
            raise
        made_fd, fd = fd, -1
        return made_fd
    finally:
        os.close(src_fd)
        if fd >= 0:
            os.close(fd)


def _kind(st: os.stat_result) -> tuple[int, int]:
    return st_mod.S_IFMT(st.st_mode), st.st_rdev


def copied_names(path: Place, *, follow_symlinks: bool) -> list[str]:
    """Names of the extended attributes that a copy would have, without the ACLs that are not set.

    path, follow_symlinks: as for copy_xattrs.
    """
    _check_form(path, follow_symlinks)
    return [name for name in _names(path, follow_symlinks) if _value(path, name, follow_symlinks) is not None]


def copy_xattrs(
    src_path: Place, dst_path: Place, ignore: frozenset[str], *, follow_symlinks: bool, acls: Sequence[str] = _ACLS
) -> None:
    """Copy all extended attributes, POSIX ACLs included (semantics 6.8, au_cpup_xattr of aufs).

    src_path, dst_path: `/proc/self/fd/N` (a pinned object, a symlink too) with follow_symlinks true, or
    `/proc/self/fd/N/NAME` with false, or the descriptor N itself, open for reading or writing, which saves the way
    through /proc; anything else is a ValueError, because it would read the attributes of the link
    in /proc, or follow a symlink out of the branch. ignore: `Branch.copying` of the destination branch; icex, icexsec,
    icexsys, icextr, icexusr and icexoth forgive that an attribute cannot be set. acls: what such an object
    may have of them.

    ACLs that the destination inherited from its directory are removed first. Not copied are trusted.overlay.*,
    overlayfs' own record of an object in one of its layers (redirect, origin, opaque) and wrong anywhere else, and
    trusted.SGI_ACL_*, under which XFS shows its ACLs a second time (xfs_attr_list) and which is junk on any other file
    system. user.overlay.* is copied, as any user may have put it there, but for a redirect where it counts as one; with
    "overlay" among `ignore` it is not, nor is user.fuseoverlayfs.*, for there they mean something. Those of an object,
    which have another name there (overlayattr.py), are copied under that.

    OSError: any failure to set an attribute that `ignore` does not forgive, EOPNOTSUPP included; ENOMEM, EDQUOT and
    ENOSPC are never forgiven. Any failure to read one but ENODATA (removed meanwhile).
    """
    _check_form(src_path, follow_symlinks)
    _check_form(dst_path, follow_symlinks)
    if _is_bare(src_path, acls) and _is_bare(dst_path, acls):
        return  # as nearly all are
    _remove_acls(dst_path, follow_symlinks, acls)
    for name in _names(src_path, follow_symlinks, acls, _NOT_TO_OVERLAY if "overlay" in ignore else ()):
        value = _value(src_path, name, follow_symlinks)
        if value is None:
            continue
        try:
            os.setxattr(dst_path, name, value, follow_symlinks=follow_symlinks)
        except OSError as error:
            if error.errno in _NEVER_IGNORED or not (_forgiven(name, ignore) or _is_root_s(name, error)):
                raise


def _is_bare(path: Place, acls: Sequence[str]) -> bool:
    return isinstance(path, int) and syscalls.is_bare(path, acls)


def _check_form(path: Place, follow_symlinks: bool) -> None:
    if isinstance(path, int) and follow_symlinks:
        return
    form = _PINNED if follow_symlinks else _NAMED
    if isinstance(path, int) or not re.fullmatch(form, path):
        raise ValueError(f"{path!r} is not a path of this module with follow_symlinks={follow_symlinks}")


def _names(path: Place, follow_symlinks: bool, acls: Sequence[str] = _ACLS, more: tuple[str, ...] = ()) -> list[str]:
    """All names to copy; the ACLs are always asked for, as not every file system lists them. more: prefixes of what is
    not."""
    try:
        listed = os.listxattr(path, follow_symlinks=follow_symlinks)
    except OSError as error:
        if error.errno in (errno.EOPNOTSUPP, errno.ENODATA):
            return []
        raise
    never = (*_NEVER_COPIED, *more, os.fsdecode(redirect.key()))
    return [
        *acls,
        *(name for name in listed if name not in _ACLS and (name.startswith(_ESCAPED) or not name.startswith(never))),
    ]


def _value(path: Place, name: str, follow_symlinks: bool) -> bytes | None:
    """The value; None when there is none."""
    try:
        return os.getxattr(path, name, follow_symlinks=follow_symlinks)
    except OSError as error:
        if error.errno == errno.ENODATA or (error.errno == errno.EOPNOTSUPP and name in _ACLS):
            return None
        raise


def _remove_acls(path: Place, follow_symlinks: bool, acls: Sequence[str]) -> None:
    for name in acls:
        try:
            os.removexattr(path, name, follow_symlinks=follow_symlinks)
        except OSError as error:
            if error.errno not in (errno.ENODATA, errno.EOPNOTSUPP):
                raise


def _is_root_s(name: str, error: OSError) -> bool:
    """Whether an attribute, file capabilities for instance, is one that an ordinary user as we are cannot set."""
    return (
        error.errno == errno.EPERM and name.startswith(("security.", "trusted.")) and not capabilities.acts_for_others()
    )


def _forgiven(name: str, ignore: frozenset[str]) -> bool:
    return "icex" in ignore or _ICEX_OF.get(name.partition(".")[0], "icexoth") in ignore
