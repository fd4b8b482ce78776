"""One row for each opcode: how its request is taken apart, which operation it is, how the result is packed.

Requests and answers are those of linux/fuse.h. A parser is given the header, the buffer that the request begins, and
its size in bytes, of which its own `least` is sure; whatever else it takes it has to look at first, as behind the
request the buffer still holds those before it. One that makes no sense raises Malformed. To add an operation: a method
in operations.py, a row here.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, TypeVar, TypeVarTuple

from udbad.edge.operations import Attributes, Entry, Negative, Opened, Operations, Space
from udbad.inodes.table import Node
from udbad.kernel import wire
from udbad.kernel.boundary import Malformed
from udbad.kernel.protocol import MAX_REQUEST
from udbad.types import Caller
from udbad.union.fs import NOW, SetAttr, Time

Head = tuple[int, int, int, int, int, int, int]
"""wire.REQUEST: length, opcode, unique, node id, uid, gid, pid."""
_NODE, _UID, _GID, _PID = 3, 4, 5, 6
Body = bytes | bytearray

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

_BODY: Final = wire.BODY


@dataclass(frozen=True, slots=True)
class Row:
    """What is done with a request of one opcode.

    name: it is counted under. least: size of the request in bytes, at least. parse: the operation's arguments. undo:
    takes back what a result gives to the kernel (references, a handle), for one that was not delivered. directories:
    which of the arguments are directories, to be asked about anew when a branch has changed underneath.
    """

    name: str
    least: int
    parse: Callable[[Head, bytearray, int], tuple[Any, ...]]
    operation: Callable[..., Any]
    encode: Callable[[Any], Body]
    undo: Callable[[Operations, Any], object] | None
    directories: tuple[int, ...]


def row(
    name: str,
    least: int,
    parse: Callable[[Head, bytearray, int], tuple[*Ts]],
    operation: Callable[[Operations, *Ts], T],
    encode: Callable[[T], Body],
    undo: Callable[[Operations, T], object] | None = None,
    directories: tuple[int, ...] = (),
) -> Row:
    """A Row whose parts fit together. least: bytes after the header."""
    return Row(name, _BODY + least, parse, operation, encode, undo, directories)


# -- taking requests apart ------------------------------------------------------------------------


def _caller(head: Head, umask: int = 0) -> Caller:
    return Caller(head[_UID], head[_GID], head[_PID], umask)


def _last_name(buffer: bytearray, start: int, size: int) -> bytes:
    """The name that the request ends with."""
    end = size - 1
    if buffer.find(0, start, size) != end:
        raise Malformed("a name without an end")
    return bytes(buffer[start:end])


def _two_names(buffer: bytearray, start: int, size: int) -> tuple[bytes, bytes]:
    middle = buffer.find(0, start, size)
    if middle < 0:
        raise Malformed("a name without an end")
    return bytes(buffer[start:middle]), _last_name(buffer, middle + 1, size)


def _node(head: Head, buffer: bytearray, size: int) -> tuple[int]:
    return (head[_NODE],)


def _nothing(head: Head, buffer: bytearray, size: int) -> tuple[()]:
    return ()


def _node_and_name(head: Head, buffer: bytearray, size: int) -> tuple[int, bytes]:
    end = size - 1
    if buffer.find(0, _BODY, size) != end:
        raise Malformed("a name without an end")
    return head[_NODE], bytes(buffer[_BODY:end])


def _lookup(head: Head, buffer: bytearray, size: int) -> tuple[int, bytes, int]:
    end = size - 1
    if buffer.find(0, _BODY, size) != end:
        raise Malformed("a name without an end")
    return head[_NODE], bytes(buffer[_BODY:end]), head[_PID]


def _handle(head: Head, buffer: bytearray, size: int) -> tuple[int]:
    return wire.QWORD.unpack_from(buffer, _BODY)


def _mknod(head: Head, buffer: bytearray, size: int) -> tuple[int, bytes, int, int, Caller]:
    mode, rdev, umask, _ = wire.FOUR_WORDS.unpack_from(buffer, _BODY)
    return head[_NODE], _last_name(buffer, _BODY + 16, size), mode, rdev, _caller(head, umask)


def _mkdir(head: Head, buffer: bytearray, size: int) -> tuple[int, bytes, int, Caller]:
    mode, umask = wire.TWO_WORDS.unpack_from(buffer, _BODY)
    return head[_NODE], _last_name(buffer, _BODY + 8, size), mode, _caller(head, umask)


def _symlink(head: Head, buffer: bytearray, size: int) -> tuple[int, bytes, bytes, Caller]:
    return head[_NODE], *_two_names(buffer, _BODY, size), _caller(head)


def _link(head: Head, buffer: bytearray, size: int) -> tuple[int, int, bytes]:
    (node_id,) = wire.QWORD.unpack_from(buffer, _BODY)
    return node_id, head[_NODE], _last_name(buffer, _BODY + 8, size)


def _rename(head: Head, buffer: bytearray, size: int) -> tuple[int, bytes, int, bytes, int]:
    (dst_dir,) = wire.QWORD.unpack_from(buffer, _BODY)
    src, dst = _two_names(buffer, _BODY + 8, size)
    return head[_NODE], src, dst_dir, dst, 0


def _rename2(head: Head, buffer: bytearray, size: int) -> tuple[int, bytes, int, bytes, int]:
    dst_dir, flags = wire.QWORD_AND_WORD.unpack_from(buffer, _BODY)
    src, dst = _two_names(buffer, _BODY + 16, size)
    return head[_NODE], src, dst_dir, dst, flags


def _create(head: Head, buffer: bytearray, size: int) -> tuple[int, bytes, int, int, Caller]:
    flags, mode, umask, _ = wire.FOUR_WORDS.unpack_from(buffer, _BODY)
    return head[_NODE], _last_name(buffer, _BODY + 16, size), flags, mode, _caller(head, umask)


def _tmpfile(head: Head, buffer: bytearray, size: int) -> tuple[int, int, int, Caller]:
    """As CREATE; the name is that of no file."""
    node_id, _, flags, mode, caller = _create(head, buffer, size)
    return node_id, flags, mode, caller


def _setattr(head: Head, buffer: bytearray, size: int) -> tuple[int, SetAttr, int | None, Caller]:
    valid, fh, length, atime, mtime, _, atime_nsec, mtime_nsec, _, mode, uid, gid = wire.SETATTR_IN.unpack_from(
        buffer, _BODY
    )
    atime_ns: Time = NOW if valid & wire.SET_ATIME_NOW else atime * wire.BILLION + atime_nsec
    mtime_ns: Time = NOW if valid & wire.SET_MTIME_NOW else mtime * wire.BILLION + mtime_nsec
    changes = SetAttr(
        mode=mode if valid & wire.SET_MODE else None,
        uid=uid if valid & wire.SET_UID else None,
        gid=gid if valid & wire.SET_GID else None,
        size=length if valid & wire.SET_SIZE else None,
        atime_ns=atime_ns if valid & wire.SET_ATIME else None,
        mtime_ns=mtime_ns if valid & wire.SET_MTIME else None,
    )
    return head[_NODE], changes, fh if valid & wire.SET_FH else None, _caller(head)


def _getxattr(head: Head, buffer: bytearray, size: int) -> tuple[int, bytes, int]:
    room, _ = wire.TWO_WORDS.unpack_from(buffer, _BODY)
    return head[_NODE], _last_name(buffer, _BODY + 8, size), room


def _listxattr(head: Head, buffer: bytearray, size: int) -> tuple[int, Caller, int]:
    room, _ = wire.TWO_WORDS.unpack_from(buffer, _BODY)
    return head[_NODE], _caller(head), room


def _removexattr(head: Head, buffer: bytearray, size: int) -> tuple[int, bytes, Caller]:
    return head[_NODE], _last_name(buffer, _BODY, size), _caller(head)


def _setxattr(head: Head, buffer: bytearray, size: int) -> tuple[int, bytes, bytes, Caller, int, bool]:
    """As before Linux 5.13, or without FUSE_SETXATTR_EXT."""
    return _key_and_value(head, buffer, size, _BODY + wire.TWO_WORDS.size, False)


def _setxattr_ext(head: Head, buffer: bytearray, size: int) -> tuple[int, bytes, bytes, Caller, int, bool]:
    start = _BODY + wire.TWO_WORDS.size
    (more,) = wire.SETXATTR_FLAGS.unpack_from(buffer, start)
    return _key_and_value(head, buffer, size, start + wire.SETXATTR_FLAGS.size, more & wire.ACL_KILL_SGID != 0)


def _key_and_value(
    head: Head, buffer: bytearray, size: int, start: int, kill_sgid: bool
) -> tuple[int, bytes, bytes, Caller, int, bool]:
    length, flags = wire.TWO_WORDS.unpack_from(buffer, _BODY)
    end = size - length - 1
    if end < start or buffer.find(0, start, size) != end:
        raise Malformed("an attribute whose name and value are not as long as it is")
    return head[_NODE], bytes(buffer[start:end]), bytes(buffer[end + 1 : size]), _caller(head), flags, kill_sgid


def _open(head: Head, buffer: bytearray, size: int) -> tuple[int, int, Caller]:
    flags, _ = wire.TWO_WORDS.unpack_from(buffer, _BODY)
    return head[_NODE], flags, Caller(head[_UID], head[_GID], head[_PID], 0)


def _opendir(head: Head, buffer: bytearray, size: int) -> tuple[int, int]:
    return head[_NODE], head[_PID]


def _read(head: Head, buffer: bytearray, size: int) -> tuple[int, int, int]:
    """Handle, offset or position, room in bytes; READDIR, too."""
    arguments: tuple[int, int, int] = wire.READ_IN.unpack_from(buffer, _BODY)
    if arguments[2] > MAX_REQUEST:
        raise Malformed("more is asked for than was agreed on")
    return arguments


def _write(head: Head, buffer: bytearray, size: int) -> tuple[int, int, memoryview]:
    fh, offset, length = wire.READ_IN.unpack_from(buffer, _BODY)
    end = wire.WRITE_DATA + length
    if end > size:
        raise Malformed("less data than it says")
    return fh, offset, memoryview(buffer)[wire.WRITE_DATA : end]


def _fsync(head: Head, buffer: bytearray, size: int) -> tuple[int, bool]:
    fh, flags = wire.QWORD_AND_WORD.unpack_from(buffer, _BODY)
    return fh, flags & wire.FSYNC_DATA_ONLY != 0


def _fallocate(head: Head, buffer: bytearray, size: int) -> tuple[int, int, int, int]:
    fh, offset, length, mode = wire.FALLOCATE_IN.unpack_from(buffer, _BODY)
    return fh, mode, offset, length


def _lseek(head: Head, buffer: bytearray, size: int) -> tuple[int, int, int]:
    arguments: tuple[int, int, int] = wire.LSEEK_IN.unpack_from(buffer, _BODY)
    return arguments


def _copy(head: Head, buffer: bytearray, size: int) -> tuple[int, int, int, int, int]:
    """What the answer to COPY_FILE_RANGE has room for."""
    return *_copy_64(head, buffer, size)[:4], min(wire.COPY_IN.unpack_from(buffer, _BODY)[5], wire.MOST_COPIED)


def _copy_64(head: Head, buffer: bytearray, size: int) -> tuple[int, int, int, int, int]:
    fh_in, offset_in, _, fh_out, offset_out, length = wire.COPY_IN.unpack_from(buffer, _BODY)
    return fh_in, offset_in, fh_out, offset_out, length


_Parser = Callable[[Head, bytearray, int], tuple[Any, ...]]


def _kept(parse: _Parser) -> _Parser:
    """`parse`, whose first argument is a handle, with the number of the node's kept file in the place of none."""

    def parse_kept(head: Head, buffer: bytearray, size: int) -> tuple[Any, ...]:
        arguments = parse(head, buffer, size)
        return arguments if arguments[0] else (-head[_NODE], *arguments[1:])

    return parse_kept


def _both_kept(parse: _Parser) -> _Parser:
    """The same of a copy: the source's handle is the first argument, the target's the third."""

    def parse_kept(head: Head, buffer: bytearray, size: int) -> tuple[Any, ...]:
        fh_in, offset_in, fh_out, *rest = parse(head, buffer, size)
        target = wire.COPY_IN.unpack_from(buffer, _BODY)[2]
        return fh_in or -head[_NODE], offset_in, fh_out or -target, *rest

    return parse_kept


def _write_kept(head: Head, buffer: bytearray, size: int) -> tuple[int, int, memoryview, int]:
    """With the flags of open(2), which nobody has told of."""
    fh, offset, data = _write(head, buffer, size)
    (flags,) = wire.WORD.unpack_from(buffer, wire.WRITE_FLAGS_AT)
    return fh or -head[_NODE], offset, data, flags


# -- operations that have to know how much room there is --------------------------------------------

_Sized = bytes | int
"""A value, or, when no room was given, its size."""


def _sized_getxattr(operations: Operations, node_id: int, key: bytes, room: int) -> _Sized:
    return _fitting(operations.getxattr(node_id, key), room)


def _sized_listxattr(operations: Operations, node_id: int, caller: Caller, room: int) -> _Sized:
    return _fitting(b"".join([name + b"\0" for name in operations.listxattr(node_id, caller)]), room)


def _fitting(value: bytes, room: int) -> _Sized:
    if room == 0:
        return len(value)
    if len(value) > room:
        raise OSError(errno.ERANGE, "")
    return value


_Listing = tuple[bytes, list[Node]]


def _readdirplus(operations: Operations, fh: int, start: int, room: int) -> _Listing:
    """Each entry but "." and ".." is a reference that the kernel takes."""
    parts: list[bytes] = []
    given: list[Node] = []
    entry, dirent, least = wire.entry, wire.dirent, wire.ENTRY_SIZE + wire.DIRENT_SIZE
    listing = operations.entries(fh, start)
    for name, node, st, ttl, attr_ttl, after, counted in listing:
        room -= least + (len(name) + 7 & ~7)
        if room < 0:
            listing.close()
            break
        if counted:
            parts.append(entry(node, st, ttl, attr_ttl))
            given.append(node)
        else:
            parts.append(wire.NO_ENTRY)
        parts.append(dirent(node.id, node.kind, name, after))
    return b"".join(parts), given


def _readdir(operations: Operations, fh: int, start: int, room: int) -> bytes:
    """Without attributes."""
    parts: list[bytes] = []
    dirent, least = wire.dirent, wire.DIRENT_SIZE
    for name, number, kind, after in operations.names(fh, start):
        room -= least + (len(name) + 7 & ~7)
        if room < 0:
            break
        parts.append(dirent(number, kind, name, after))
    return b"".join(parts)


# -- packing results --------------------------------------------------------------------------------


def _done(result: None) -> bytes:
    return b""


def _data(result: Body) -> Body:
    return result


def _found(result: Entry | Negative) -> bytes:
    return wire.negative(result.ttl) if isinstance(result, Negative) else wire.entry(*result)


def _entry(result: Entry) -> bytes:
    return wire.entry(*result)


def _attributes(result: Attributes) -> bytes:
    return wire.attributes(*result)


def _attributes_and_birth(result: tuple[Attributes, int]) -> bytes:
    return wire.statx(*result[0], result[1])


def _number(result: int) -> bytes:
    return wire.QWORD.pack(result)


def _opened(result: Opened) -> bytes:
    return wire.OPENED.pack(*result)


def _created(result: tuple[Entry, Opened]) -> bytes:
    return wire.entry(*result[0]) + wire.OPENED.pack(*result[1])


def _sized(result: _Sized) -> bytes:
    return wire.TWO_WORDS.pack(result, 0) if type(result) is int else result  # type: ignore[return-value]  # bytes then


def _written(result: int) -> bytes:
    return wire.TWO_WORDS.pack(result, 0)


def _listed(result: _Listing) -> bytes:
    return result[0]


def _space(result: Space) -> bytes:
    return wire.STATFS_OUT.pack(
        result.blocks, result.free, result.available, result.files, result.files_free,
        result.block_size, result.longest_name, result.fragment_size,
    )  # fmt: skip


# -- taking back what was not delivered ---------------------------------------------------------------


def _not_found(operations: Operations, result: Entry | Negative) -> None:
    if not isinstance(result, Negative):
        operations.forget(result[0].id, 1)


def _not_entered(operations: Operations, result: Entry) -> None:
    operations.forget(result[0].id, 1)


def _not_opened(operations: Operations, result: Opened) -> None:
    operations.release(result[0])


def _not_created(operations: Operations, result: tuple[Entry, Opened]) -> None:
    operations.release(result[1][0])
    operations.forget(result[0][0].id, 1)


def _not_opened_directory(operations: Operations, result: Opened) -> None:
    operations.releasedir(result[0])


def _not_listed(operations: Operations, result: _Listing) -> None:
    operations.unlisted(result[1])


# -- the table ------------------------------------------------------------------------------------------

_O = Operations
_FIRST, _SECOND = (0,), (1,)

TABLE: Final[dict[int, Row]] = {
    wire.LOOKUP: row("lookup", 1, _lookup, _O.lookup, _found, _not_found, _FIRST),
    wire.GETATTR: row("getattr", 0, _node, _O.getattr, _attributes),
    wire.SETATTR: row("setattr", wire.SETATTR_IN.size, _setattr, _O.setattr, _attributes),
    wire.READLINK: row("readlink", 0, _node, _O.readlink, _data),
    wire.SYMLINK: row("symlink", 2, _symlink, _O.symlink, _entry, _not_entered, _FIRST),
    wire.MKNOD: row("mknod", 17, _mknod, _O.mknod, _entry, _not_entered, _FIRST),
    wire.MKDIR: row("mkdir", 9, _mkdir, _O.mkdir, _entry, _not_entered, _FIRST),
    wire.UNLINK: row("unlink", 1, _node_and_name, _O.unlink, _done, None, _FIRST),
    wire.RMDIR: row("rmdir", 1, _node_and_name, _O.rmdir, _done, None, _FIRST),
    wire.RENAME: row("rename", 10, _rename, _O.rename, _done, None, (0, 2)),
    wire.RENAME2: row("rename", 18, _rename2, _O.rename, _done, None, (0, 2)),
    wire.LINK: row("link", 9, _link, _O.link, _entry, _not_entered, _SECOND),
    wire.OPEN: row("open", 8, _open, _O.open, _opened, _not_opened),
    wire.READ: row("read", 20, _read, _O.read, _data),
    wire.WRITE: row("write", wire.WRITE_DATA - _BODY, _write, _O.write, _written),
    wire.STATFS: row("statfs", 0, _nothing, _O.statfs, _space),
    wire.RELEASE: row("release", 8, _handle, _O.release, _done),
    wire.FSYNC: row("fsync", 16, _fsync, _O.fsync, _done),
    wire.SETXATTR: row("setxattr", 17, _setxattr_ext, _O.setxattr, _done),
    wire.GETXATTR: row("getxattr", 9, _getxattr, _sized_getxattr, _sized),
    wire.LISTXATTR: row("listxattr", 8, _listxattr, _sized_listxattr, _sized),
    wire.REMOVEXATTR: row("removexattr", 1, _removexattr, _O.removexattr, _done),
    wire.FLUSH: row("flush", 8, _handle, _O.flush, _done),
    wire.OPENDIR: row("opendir", 8, _opendir, _O.opendir, _opened, _not_opened_directory, _FIRST),
    wire.READDIR: row("readdir", 20, _read, _readdir, _data),
    wire.READDIRPLUS: row("readdir", 20, _read, _readdirplus, _listed, _not_listed),
    wire.RELEASEDIR: row("releasedir", 8, _handle, _O.releasedir, _done),
    wire.FSYNCDIR: row("fsyncdir", 16, _fsync, _O.fsyncdir, _done),
    wire.CREATE: row("create", 17, _create, _O.create, _created, _not_created, _FIRST),
    wire.TMPFILE: row("tmpfile", 17, _tmpfile, _O.tmpfile, _created, _not_created, _FIRST),
    wire.FALLOCATE: row("fallocate", wire.FALLOCATE_IN.size, _fallocate, _O.fallocate, _done),
    wire.LSEEK: row("lseek", wire.LSEEK_IN.size, _lseek, _O.lseek, _number),
    wire.COPY_FILE_RANGE: row("copy_file_range", wire.COPY_IN.size, _copy, _O.copy_file_range, _written),
    wire.COPY_FILE_RANGE_64: row("copy_file_range", wire.COPY_IN.size, _copy_64, _O.copy_file_range, _number),
    wire.STATX: row("statx", 24, _node, _O.statx, _attributes_and_birth),
}
"""What is answered. A second form of an operation is counted with the first."""

OLD_SETXATTR: Final = row("setxattr", 9, _setxattr, _O.setxattr, _done)
"""The row of SETXATTR where FUSE_SETXATTR_EXT was not agreed on."""


_ONE_HANDLE: Final = (wire.READ, wire.FSYNC, wire.FALLOCATE, wire.LSEEK)
_DIRECTORY_HANDLE: Final = (wire.READDIR, wire.READDIRPLUS, wire.FSYNCDIR)
_TWO_HANDLES: Final = (wire.COPY_FILE_RANGE, wire.COPY_FILE_RANGE_64)


def without_open(rows: Mapping[int, Row], directories: bool) -> dict[int, Row]:
    """The rows where the kernel opens files by itself (union/kept.py); directories: these, too, and keeps each listing.

    There is no OPEN, OPENDIR or FLUSH: the first of each is ENOSYS, and none follows. Handle 0 is the node's kept file.
    """
    kept = {opcode: each for opcode, each in rows.items() if opcode not in (wire.OPEN, wire.FLUSH)}
    for opcode in _ONE_HANDLE:
        kept[opcode] = replace(kept[opcode], parse=_kept(kept[opcode].parse))
    for opcode in _TWO_HANDLES:
        kept[opcode] = replace(kept[opcode], parse=_both_kept(kept[opcode].parse))
    if directories:
        del kept[wire.OPENDIR]
        for opcode in _DIRECTORY_HANDLE:
            kept[opcode] = replace(kept[opcode], parse=_kept(kept[opcode].parse))
    kept[wire.WRITE] = replace(kept[wire.WRITE], parse=_write_kept, operation=_O.write_kept)
    return kept


def first_number(buffer: bytearray, size: int) -> int:
    """Of FORGET: how many references are given back. Of INTERRUPT: the unique number of the request it is about."""
    if size < _BODY + wire.QWORD.size:
        raise Malformed("too short")
    number: int = wire.QWORD.unpack_from(buffer, _BODY)[0]
    return number


def forgotten(buffer: bytearray, size: int) -> Iterator[tuple[int, int]]:
    """What BATCH_FORGET gives back: (node id, references)."""
    start = _BODY + wire.TWO_WORDS.size
    count = wire.TWO_WORDS.unpack_from(buffer, _BODY)[0] if size >= start else 1
    end = start + count * wire.FORGET_ONE.size
    if end > size:
        raise Malformed("less than it says")
    return wire.FORGET_ONE.iter_unpack(memoryview(buffer)[start:end])
