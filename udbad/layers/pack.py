"""A layer as a tar archive: what it changes, in the notation of OCI image layers, which is that of aufs (semantics 13).

Python's tarfile writes the format (POSIX.1-2001, "pax"); what is in the archive is decided here. Extended attributes
are SCHILY.xattr.* records, as GNU tar, star, Docker and podman have them; times have nanoseconds. Holes are written as
zeros, because many readers know no other form; unpack.py makes them holes again. Sockets are left out, as by Docker.
"""

from __future__ import annotations

import errno
import io
import os
import stat as st_mod
import tarfile
from contextlib import closing
from typing import IO, Final

from udbad.branch import copydata, overlayattr, redirect, syscalls, whiteout
from udbad.branch.walk import Entries, give_up, join, walk
from udbad.errors import GONE

XATTR: Final = "SCHILY.xattr."
_LOCAL: Final = ("security.selinux", "security.evm", "security.ima", "trusted.")
"""Beginnings of attributes that mean something on the machine they were set on only."""


def text(name: bytes) -> str:
    """A name or a value as tarfile wants it: what is no UTF-8 is written as the bytes it is."""
    return name.decode("utf-8", "surrogateescape")


def pack(root_fd: int, stream: IO[bytes]) -> None:
    """Write the archive of a layer. root_fd: its branch. A directory comes before what is in it, names are in order.
    Times of access are not touched where that is allowed.

    Raises OSError: of the file system, or of the stream. What is removed meanwhile is not in it.
    """
    with tarfile.open(
        mode="w|", fileobj=stream, format=tarfile.PAX_FORMAT, encoding="utf-8", errors="surrogateescape"
    ) as archive:
        overlay = whiteout.unmarked(root_fd)
        packer = _Packer(archive, redirect.may_have(root_fd) or overlay, overlay)
        with closing(walk(root_fd, give_up)) as directories:
            for path, fd, entries in directories:
                packer.directory(path, fd, whiteout.told_apart(_read_as_aufs(fd, entries) if overlay else entries))


def _read_as_aufs(dirfd: int, entries: Entries) -> list[bytes]:
    """What is in a branch directory where marks of overlayfs count."""
    devices = (name for name, entry in entries.items() if not entry.is_file(follow_symlinks=False))
    hidden = {name for name in devices if whiteout.is_device_at(dirfd, name)}
    names = [whiteout.PREFIX + name if name in hidden else name for name in entries]
    return [*names, whiteout.OPAQUE] if whiteout.overlay_opaque(dirfd) else names


class _Packer:
    """One archive being written; `linked`: the first name of each file that has several."""

    def __init__(self, archive: tarfile.TarFile, renamed: bool, overlay: bool) -> None:
        """renamed: whether directories may have been renamed (branch/redirect.py). overlay: marks of overlayfs
        count."""
        self.archive = archive
        self.renamed = renamed
        self.overlay = overlay
        self.linked: dict[tuple[int, int], str] = {}

    def directory(self, path: bytes, fd: int, names: whiteout.Names) -> None:
        if path:
            if self.renamed and redirect.read(fd, redirect.key()) is not None:
                raise OSError(
                    errno.EOPNOTSUPP, "a renamed directory, which an archive of a layer has no words for", path
                )
            info = _info(path, os.fstat(fd), tarfile.DIRTYPE)
            self._add_xattrs(info, fd, follow_symlinks=True)
            self.archive.addfile(info)
        marks = [whiteout.PREFIX + name for name in names.hidden]
        for mark in [whiteout.OPAQUE, *marks] if names.opaque else marks:
            info = tarfile.TarInfo(text(join(path, mark)))
            info.mode = 0o444
            self.archive.addfile(info)
        for name in names.objects:
            try:
                self._object(path, fd, name)
            except OSError as error:
                if error.errno not in GONE:
                    raise OSError(error.errno, error.strerror, join(path, name)) from error

    def _object(self, parent: bytes, dirfd: int, name: bytes) -> None:
        st = syscalls.stat_at(dirfd, name)
        path = join(parent, name)
        if st_mod.S_ISDIR(st.st_mode) or st_mod.S_ISSOCK(st.st_mode):
            return
        if st.st_nlink > 1:
            first = self.linked.setdefault((st.st_dev, st.st_ino), text(path))
            if first != text(path):
                info = _info(path, st, tarfile.LNKTYPE)
                info.linkname = first
                self.archive.addfile(info)
                return
        if st_mod.S_ISREG(st.st_mode):
            self._file(path, dirfd, name)
            return
        info = _info(path, st, _TYPES[st_mod.S_IFMT(st.st_mode)])
        if st_mod.S_ISLNK(st.st_mode):
            info.linkname = text(syscalls.readlink_at(dirfd, name))
        info.devmajor, info.devminor = os.major(st.st_rdev), os.minor(st.st_rdev)
        self._add_xattrs(info, syscalls.xattr_path(dirfd, name), follow_symlinks=False)
        self.archive.addfile(info)

    def _file(self, path: bytes, dirfd: int, name: bytes) -> None:
        try:
            fd, st = syscalls.open_file_at(dirfd, name, os.O_RDONLY | os.O_NOATIME)
        except PermissionError:  # somebody else's file, and we are not root
            fd, st = syscalls.open_file_at(dirfd, name, os.O_RDONLY)
        with open(fd, "rb") as file:
            info = _info(path, st, tarfile.REGTYPE)
            info.size = st.st_size
            self._add_xattrs(info, fd, follow_symlinks=True)
            self.archive.addfile(info, _Padded(file, st.st_size))

    def _add_xattrs(self, info: tarfile.TarInfo, place: copydata.Place, *, follow_symlinks: bool) -> None:
        for name in copydata.copied_names(place, follow_symlinks=follow_symlinks):
            set_as = os.fsdecode(overlayattr.shown_as(os.fsencode(name))) if self.overlay else name
            if set_as and not set_as.startswith(_LOCAL):
                value = os.getxattr(place, name, follow_symlinks=follow_symlinks)
                info.pax_headers = {**info.pax_headers, XATTR + set_as: text(value)}


_TYPES: Final = {
    st_mod.S_IFLNK: tarfile.SYMTYPE, st_mod.S_IFCHR: tarfile.CHRTYPE, st_mod.S_IFBLK: tarfile.BLKTYPE,
    st_mod.S_IFIFO: tarfile.FIFOTYPE,
}  # fmt: skip


class _Padded(io.RawIOBase):
    """A file as long as it was when its size was written down: one that has shrunk since ends with zeros."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        self._file = file
        self._left = size

    def read(self, size: int = -1) -> bytes:
        size = self._left if size < 0 else min(size, self._left)
        data = self._file.read(size)
        self._left -= size
        return data + bytes(size - len(data))


def _info(path: bytes, st: os.stat_result, kind: bytes) -> tarfile.TarInfo:
    info = tarfile.TarInfo(text(path))
    info.type = kind
    info.mode = st_mod.S_IMODE(st.st_mode)
    info.uid, info.gid = st.st_uid, st.st_gid
    seconds, rest = divmod(st.st_mtime_ns, 1_000_000_000)
    info.mtime = max(seconds, 0)
    if rest or seconds < 0:
        info.pax_headers = {"mtime": _decimal(st.st_mtime_ns)}
    return info


def _decimal(nanoseconds: int) -> str:
    """Seconds, as POSIX.1 pax has them; one before 1970 is negative as a whole."""
    seconds, rest = divmod(abs(nanoseconds), 1_000_000_000)
    return f"{'-' * (nanoseconds < 0)}{seconds}.{rest:09}"
