"""Filling a layer from a tar archive, whose author may mean harm: nothing outside of the layer is read or written.

Python's tarfile reads the format; unpacking is done here. A path of the archive leads from the root of the layer to
where it says, by openat2(2), which follows no symbolic link (beneath.py), and a name is made anew or not at all.
What an archive of a layer has no business to contain is refused, the whole archive with it: absolute paths, "..", ways
through a link, links to what is not in the layer, device nodes unless they are asked for, marks that hide nothing.

Whiteouts and opaque marks are made as the branch has them (branch/whiteout.py), whatever the notation there is.
"""

from __future__ import annotations

import errno
import lzma
import os
import stat as st_mod
import tarfile
import zlib
from contextlib import suppress
from dataclasses import dataclass, field
from typing import IO, Any, Final

from udbad.branch import beneath, capabilities, copydata, datacalls, notation, overlayattr, sweep, syscalls, whiteout
from udbad.branch.branches import Branch
from udbad.branch.spec import printable
from udbad.branch.whiteout import Meaning
from udbad.errors import GONE, ExitCode, UserError
from udbad.layers.pack import XATTR
from udbad.types import Perm

_LONGEST_HEADER: Final = 1 << 20
"""Bytes of an extended header (long names, attributes), which is held in memory. One attribute has 64 KiB at most."""
_CHUNK: Final = 1 << 20  # bytes
_LAST_ID: Final = (1 << 32) - 2  # of a user; the one after it means "as it is" to chown(2)
_SPECIAL: Final = {
    tarfile.CHRTYPE: st_mod.S_IFCHR, tarfile.BLKTYPE: st_mod.S_IFBLK, tarfile.FIFOTYPE: st_mod.S_IFIFO,
}  # fmt: skip
_NOT_A_TAR: Final = (tarfile.TarError, zlib.error, lzma.LZMAError, EOFError, ValueError, OverflowError, LookupError)
"""What bytes that make no archive lead to; ValueError and those after it by fields that tarfile does not check."""


class Refused(UserError):
    """Something in an archive that a layer may not have."""

    def __init__(self, name: bytes, reason: str) -> None:
        super().__init__(f"{printable(name) or '/'}: {reason}", ExitCode.REFUSED)


class _Member(tarfile.TarInfo):
    """An entry, where what is no header is an error and not the end of the archive, and headers fit into memory."""

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> Any:
        try:
            member = super().fromtarfile(tarfile_)
        except tarfile.HeaderError as error:
            # Of these only the ends of an archive are none: a block of zeros, and nothing at all.
            if type(error).__name__ in ("EOFHeaderError", "EmptyHeaderError"):
                raise
            raise tarfile.ReadError(str(error)) from None
        if member.size < 0:
            raise tarfile.ReadError("negative size")
        return member

    def _proc_member(self, tarfile_: tarfile.TarFile) -> Any:
        long = self.type in (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, *_PAX_TYPES)
        if self.size < 0 or (long and self.size > _LONGEST_HEADER):
            raise tarfile.ReadError(f"a header of {self.size} bytes")
        return super()._proc_member(tarfile_)  # type: ignore[misc]  # "can be overridden in a subclass" (tarfile.py)


_PAX_TYPES: Final = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)


@dataclass(slots=True)
class Unpacked:
    """How much there was. size: bytes of files, holes included."""

    names: int = 0
    size: int = 0


def unpack(root_fd: int, stream: IO[bytes], devices: bool = False, overlay: bool = False) -> Unpacked:
    """Fill an empty branch, whose root `root_fd` is, from an archive: plain, or compressed by gzip, bzip2 or xz.

    stream: need not be seekable. devices: make device nodes. overlay: make marks as overlayfs does.
    Raises UserError: REFUSED for what a layer may not have, FAILURE for what is no archive, or ends early; OSError for
    what the file system says, with the name. Then part of it is in the branch, and of no use. On disk when it returns.
    """
    with datacalls.syncing(root_fd) as synced:
        unpacker = _Unpacker(root_fd, devices, overlay)
        try:
            try:
                with tarfile.open(
                    mode="r|*", fileobj=stream, tarinfo=_Member, encoding="utf-8", errors="surrogateescape"
                ) as archive:
                    while (member := archive.next()) is not None:
                        unpacker.add(archive, member)
                        archive.members.clear()  # type: ignore[attr-defined]  # all of them, for random access
            except _NOT_A_TAR as error:
                text = str(error) or type(error).__name__
                raise UserError(f"not an archive of a layer: {text}", ExitCode.FAILURE) from None
            unpacker.finish()
        finally:
            unpacker.close()
        datacalls.sync_fs(synced)
    return unpacker.done


@dataclass(slots=True)
class _Unpacker:
    root_fd: int
    devices: bool
    overlay: bool
    done: Unpacked = field(default_factory=Unpacked)
    directories: dict[tuple[bytes, ...], tarfile.TarInfo] = field(default_factory=dict)
    """They get their attributes at the end, when nothing is made in them any more."""
    hidden: list[tuple[list[bytes], bytes]] = field(default_factory=list)
    """Directories, and names that they hide: these whiteouts get their last form when it is known what has the name."""
    parent: tuple[list[bytes], int] | None = None
    """The directory that was used last, as it is in an archive for most of the entries, and a descriptor of it."""

    def add(self, archive: tarfile.TarFile, member: tarfile.TarInfo) -> None:
        """Make one entry."""
        name = _bytes(member.name)
        try:
            self._add(archive, member, name)
        except OSError as error:
            raise OSError(error.errno, error.strerror, name) from error

    def _add(self, archive: tarfile.TarFile, member: tarfile.TarInfo, path: bytes) -> None:
        names = _names(path)
        if not (0 <= member.uid <= _LAST_ID and 0 <= member.gid <= _LAST_ID):
            raise Refused(path, f"an owner that there cannot be, {member.uid}:{member.gid}")
        if not names:
            if not member.isdir():
                raise Refused(path, "takes the place of the layer itself")
            self.directories[()] = member
            return
        meanings = [whiteout.meaning(name) for name in names]
        if any(kind is Meaning.INTERNAL for kind, _ in meanings):
            return  # of the union file system that it was made with
        if any(kind is not Meaning.OBJECT for kind, _ in meanings[:-1]):
            raise Refused(path, "is in what would be a whiteout")
        self.done.names += 1
        dirfd = self._open_parent(path, names[:-1])
        kind, hidden = meanings[-1]
        if kind is not Meaning.OBJECT:
            self._mark(dirfd, path, names[:-1], member, kind, hidden)
        else:
            self._make(dirfd, path, names, archive, member)

    def _mark(
        self, dirfd: int, path: bytes, above: list[bytes], member: tarfile.TarInfo, kind: Meaning, hidden: bytes
    ) -> None:
        if not member.isreg():
            raise Refused(path, "a whiteout is an empty file")
        if kind is Meaning.OPAQUE:
            notation.of(self._branch()).make_opaque(self._branch(), dirfd)
        elif hidden in (b"", b".", b".."):
            raise Refused(path, "a whiteout of nothing that a directory can have in it")
        else:
            notation.of(self._branch()).hide(self._branch(), dirfd, hidden, beside=True)
            if self.overlay:
                self.hidden.append((above, hidden))

    def _branch(self) -> Branch:
        """The layer, for who makes marks on branches; separate files, as it may have no base file."""
        return Branch(
            0, 0, b"", Perm.RW, frozenset({"nolwh"}), None,
            root_fd=self.root_fd, anchor_fd=-1, dev=0, fs_type="", writes_overlay=self.overlay,
        )  # fmt: skip

    def _make(
        self, dirfd: int, path: bytes, names: list[bytes], archive: tarfile.TarFile, member: tarfile.TarInfo
    ) -> None:
        name = names[-1]
        if member.isdir():
            if not self._is_directory(dirfd, name):
                self._clear(dirfd, name)
                syscalls.mkdir_at(dirfd, name, 0o700)
            self.directories[tuple(names)] = member
        elif member.islnk():
            self._link(dirfd, path, name, _bytes(member.linkname))
        else:
            self._clear(dirfd, name)
            fd = self._make_object(dirfd, path, name, archive, member)
            try:
                _set_attributes(fd, member, self.overlay)
            finally:
                os.close(fd)

    def _make_object(
        self, dirfd: int, path: bytes, name: bytes, archive: tarfile.TarFile, member: tarfile.TarInfo
    ) -> int:
        """A descriptor of the new file, symbolic link, FIFO or device."""
        if member.isreg():
            fd = syscalls.create_file_at(dirfd, name, os.O_WRONLY, 0o600)
            try:
                self._fill(fd, path, archive, member)
            except BaseException:
                os.close(fd)
                raise
            return fd
        if member.issym():
            syscalls.symlink_at(_bytes(member.linkname), dirfd, name)
        elif member.type in _SPECIAL:
            self._check_device(path, member)
            device = 0 if member.isfifo() else os.makedev(member.devmajor, member.devminor)
            syscalls.mknod_at(dirfd, name, _SPECIAL[member.type] | 0o600, device)
        else:
            raise Refused(path, f"of a type that is not known, {member.type!r}")
        return syscalls.pin_at(dirfd, name)

    def _check_device(self, path: bytes, member: tarfile.TarInfo) -> None:
        if member.isfifo():
            return
        if not self.devices:
            raise Refused(path, "a device node (--devices makes it)")
        if (member.devmajor, member.devminor) == (0, 0):
            raise Refused(path, "a device node that overlayfs takes for a whiteout")

    def _fill(self, fd: int, path: bytes, archive: tarfile.TarFile, member: tarfile.TarInfo) -> None:
        """Blocks of zeros become holes, however long the archive says that they are."""
        self.done.size += member.size
        os.ftruncate(fd, member.size)
        reader: Any = archive.extractfile(member)
        source = reader.raw  # what buffers it cannot seek in a stream
        for start, size in _extents(path, member):
            source.seek(start)
            copied = 0
            while copied < size:
                data = source.read(min(_CHUNK, size - copied))
                if not data:
                    raise tarfile.ReadError("unexpected end of data")
                _write(fd, data, start + copied)
                copied += len(data)

    def _link(self, dirfd: int, path: bytes, name: bytes, target: bytes) -> None:
        names = _names(target)
        if not names or any(whiteout.meaning(one)[0] is not Meaning.OBJECT for one in names):
            raise Refused(path, f"a hard link to {printable(target)}, which is no file")
        try:
            source = beneath.open_directory(self.root_fd, names[:-1])
        except OSError as error:
            raise Refused(path, f"a hard link to {printable(target)}: {error.strerror}") from None
        try:
            st = syscalls.stat_at(source, names[-1])
            if st_mod.S_ISDIR(st.st_mode):
                raise Refused(path, f"a hard link to {printable(target)}, which is a directory")
            if syscalls.exists_at(dirfd, name):
                if os.path.samestat(syscalls.stat_at(dirfd, name), st):
                    return
                self._clear(dirfd, name)
            syscalls.link_at(source, names[-1], dirfd, name)
        except FileNotFoundError:
            raise Refused(path, f"a hard link to {printable(target)}, which is not in the archive before it") from None
        finally:
            os.close(source)

    # -- directories ------------------------------------------------------------------------------

    def _open_parent(self, path: bytes, names: list[bytes]) -> int:
        """The directory that an entry is in, made if it is not there; ours to close."""
        if self.parent is not None and self.parent[0] == names:
            return self.parent[1]
        self.close()
        try:
            fd = beneath.open_directory(self.root_fd, names)
        except FileNotFoundError:
            fd = self._make_parents(path, names)
        except OSError as error:
            if error.errno not in _NO_WAY:
                raise
            raise Refused(path, "leads through a symbolic link, or something else that is no directory") from None
        self.parent = names, fd
        return fd

    def _make_parents(self, path: bytes, names: list[bytes]) -> int:
        for depth in range(len(names)):
            above = self._open_parent(path, names[:depth])
            with suppress(FileExistsError):
                syscalls.mkdir_at(above, names[depth], 0o755)
        self.close()
        return beneath.open_directory(self.root_fd, names)

    def _is_directory(self, dirfd: int, name: bytes) -> bool:
        try:
            return st_mod.S_ISDIR(syscalls.stat_at(dirfd, name).st_mode)
        except FileNotFoundError:
            return False

    def _clear(self, dirfd: int, name: bytes) -> None:
        """Make room for an entry: of two with one name the later one counts, as in any archive."""
        try:
            syscalls.unlink_at(dirfd, name)
        except FileNotFoundError:
            pass
        except (IsADirectoryError, PermissionError):  # EPERM: POSIX.1 of a directory
            sweep.remove_tree(dirfd, name)

    def finish(self) -> None:
        """Give directories their attributes, the deepest first: those above need not be searched any more."""
        for parent, name in self.hidden:
            with suppress(Refused):  # another entry has taken the directory's place
                notation.of(self._branch()).settle(self._branch(), self._open_parent(name, parent), name)
        self.close()
        for names in sorted(self.directories, key=len, reverse=True):
            try:
                above = beneath.open_directory(self.root_fd, list(names[:-1]))
                try:
                    fd = syscalls.open_listing_at(above, names[-1] if names else b".")
                finally:
                    os.close(above)
            except OSError as error:
                if error.errno in GONE or error.errno in _NO_WAY:
                    continue  # another entry has taken its place
                raise
            try:
                _set_attributes(fd, self.directories[names], self.overlay)
            except OSError as error:
                raise OSError(error.errno, error.strerror, b"/".join(names)) from error
            finally:
                os.close(fd)

    def close(self) -> None:
        """Let go of the directory that was used last."""
        if self.parent is not None:
            os.close(self.parent[1])
            self.parent = None


_NO_WAY: Final = frozenset({errno.ELOOP, errno.ENOTDIR, errno.EXDEV})
"""openat2(2) with RESOLVE_*, and of a way through what is no directory."""


def _bytes(name: str) -> bytes:
    """A name as it is in the archive."""
    return name.encode("utf-8", "surrogateescape")


def _names(path: bytes) -> list[bytes]:
    """The way that a path describes, from the root of the layer. Raises Refused."""
    if path.startswith(b"/"):
        raise Refused(path, "an absolute path")
    if b"\0" in path:
        raise Refused(path, "a path with a NUL byte")
    names = [name for name in path.split(b"/") if name not in (b"", b".")]
    if b".." in names:
        raise Refused(path, "a path with '..' in it")
    return names


def _extents(path: bytes, member: tarfile.TarInfo) -> list[tuple[int, int]]:
    """Where the data of a file is: offset and size of each piece, in order. Raises Refused."""
    if not member.issparse():
        return [(0, member.size)]
    sparse: Any = member.sparse
    pieces = [(start, size) for start, size in sparse or () if size]
    end = 0
    for start, size in pieces:
        if start < end or size < 0 or start + size > member.size:
            raise Refused(path, "a sparse file with pieces that overlap or lie outside of it")
        end = start + size
    return pieces


def _write(fd: int, data: bytes, offset: int) -> None:
    for start, stop in copydata.nonzero_runs(data):
        while start < stop:
            start += os.pwrite(fd, memoryview(data)[start:stop], offset + start)


def _set_attributes(fd: int, member: tarfile.TarInfo, overlay: bool) -> None:
    """Owner, extended attributes, mode and times, in the order that copydata.copy_metadata explains."""
    mode = member.mode & 0o7777
    ours = capabilities.acts_for_others()
    if ours:
        syscalls.chown_fd(fd, member.uid, member.gid)
    else:
        mode &= ~(st_mod.S_ISUID | st_mod.S_ISGID)
    place = syscalls.proc_path(fd)
    for key, value in member.pax_headers.items():
        name = key.removeprefix(XATTR)
        if name != key and (ours or not name.startswith(("security.", "trusted."))):
            kept = overlayattr.kept(name.encode()) if overlay else name.encode()
            syscalls.setxattr(place, kept, _bytes(value))
    if not member.issym():
        syscalls.chmod_fd(fd, mode)
    mtime = _nanoseconds(member)
    syscalls.utime_fd(fd, mtime, mtime)


def _nanoseconds(member: tarfile.TarInfo) -> int:
    text = member.pax_headers.get("mtime")
    if text is None:
        return int(member.mtime) * 1_000_000_000
    whole, _, rest = text.partition(".")
    nanoseconds = abs(int(whole or 0)) * 1_000_000_000 + int(f"{rest:0<9.9}" or 0)
    return -nanoseconds if text.startswith("-") else nanoseconds
