"""One row for each opcode: how its request is taken apart, which operation it is, how the result is packed.

Requests and answers are those of linux/fuse.h. A parser is given what was received, of whose size its own `least` is
sure; whatever else it takes it has to look at first, as behind the request the buffer still holds those before it. One
that makes no sense raises Malformed. To add an operation: a method in operations.py, a row here.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, NamedTuple, TypeVar, TypeVarTuple

from udbad.edge.operations import Attributes, Entry, Negative, Opened, Operations, Space
from udbad.inodes.node import Node
from udbad.kernel import wire
from udbad.kernel.boundary import Malformed
from udbad.kernel.device import caller_of, name_at, names_at, word_at
from udbad.kernel.protocol import MAX_REQUEST
from udbad.kernel.received import Received
from udbad.kernel.wire import attributes, dirent, entry, negative
from udbad.types import Caller
from udbad.union.fs import SetAttr

Body = bytes | bytearray
Place = int

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

_BODY: Final = wire.BODY


class Refused:
    """What an operation may return in the place of raising the error with this number, where that is the usual answer:
    an exception takes as long as all the rest of a request. Only where there is nothing to `undo`."""

    __slots__ = ("number",)

    def __init__(self, number: int) -> None:
        self.number = number


_NO_DATA: Final = Refused(errno.ENODATA)


class Row(NamedTuple):
    """What is done with a request of one opcode.

    name: it is counted under. least: size of the request in bytes, at least. parse: the operation's arguments. undo:
    takes back what a result gives to the kernel (references, a handle), for one that was not delivered. directories:
    which of the arguments are directories, to be asked about anew when a branch has changed underneath.
    """

    name: str
    least: int
    parse: Callable[[Received], tuple[Any, ...]]
    operation: Callable[..., Any]
    encode: Callable[[Any], Body]
    undo: Callable[[Operations, Any], object] | None
    directories: tuple[int, ...]


def row(
    name: str,
    least: int,
    parse: Callable[[Received], tuple[*Ts]],
    operation: Callable[[Operations, *Ts], T],
    encode: Callable[[T], Body],
    undo: Callable[[Operations, T], object] | None = None,
    directories: tuple[int, ...] = (),
) -> Row:
    """A Row whose parts fit together. least: bytes after the header."""
    return Row(name, _BODY + least, parse, operation, encode, undo, directories)


# -- taking requests apart ------------------------------------------------------------------------


def _last_name(request: Received, start: Place) -> bytes:
    """The name that the request ends with."""
    name = name_at(request, start)
    if name is None:
        raise Malformed("a name without an end")
    return name


def _two_names(request: Received, start: Place) -> tuple[bytes, bytes]:
    names = names_at(request, start)
    if names is None:
        raise Malformed("a name without an end")
    return names


def _node(request: Received) -> tuple[int]:
    return (request.node,)


def _nothing(request: Received) -> tuple[()]:
    return ()


def _node_and_name(request: Received) -> tuple[int, bytes]:
    return request.node, _last_name(request, _BODY)


def _lookup(request: Received) -> tuple[int, bytes, int]:
    return request.node, _last_name(request, _BODY), request.pid


def _handle(request: Received) -> tuple[int]:
    return wire.QWORD.unpack_from(request.buffer, _BODY)


def _mknod(request: Received) -> tuple[int, bytes, int, int, Caller]:
    mode, rdev, umask, _ = wire.FOUR_WORDS.unpack_from(request.buffer, _BODY)
    return request.node, _last_name(request, _BODY + 16), mode, rdev, caller_of(request, umask)


def _mkdir(request: Received) -> tuple[int, bytes, int, Caller]:
    mode, umask = wire.TWO_WORDS.unpack_from(request.buffer, _BODY)
    return request.node, _last_name(request, _BODY + 8), mode, caller_of(request, umask)


def _symlink(request: Received) -> tuple[int, bytes, bytes, Caller]:
    return request.node, *_two_names(request, _BODY), caller_of(request, 0)


def _link(request: Received) -> tuple[int, int, bytes]:
    (node_id,) = wire.QWORD.unpack_from(request.buffer, _BODY)
    return node_id, request.node, _last_name(request, _BODY + 8)


def _rename(request: Received) -> tuple[int, bytes, int, bytes, int]:
    (dst_dir,) = wire.QWORD.unpack_from(request.buffer, _BODY)
    src, dst = _two_names(request, _BODY + 8)
    return request.node, src, dst_dir, dst, 0


def _rename2(request: Received) -> tuple[int, bytes, int, bytes, int]:
    dst_dir, flags = wire.QWORD_AND_WORD.unpack_from(request.buffer, _BODY)
    src, dst = _two_names(request, _BODY + 16)
    return request.node, src, dst_dir, dst, flags


def _create(request: Received) -> tuple[int, bytes, int, int, Caller]:
    flags, mode, umask = word_at(request, _BODY), word_at(request, _BODY + 4), word_at(request, _BODY + 8)
    return request.node, _last_name(request, _BODY + 16), flags, mode, caller_of(request, umask)


def _tmpfile(request: Received) -> tuple[int, int, int, Caller]:
    """As CREATE; the name is that of no file."""
    node_id, _, flags, mode, caller = _create(request)
    return node_id, flags, mode, caller


def _setattr(request: Received) -> tuple[int, SetAttr, int | None, Caller]:
    mode, uid, gid, size, atime, mtime, fh = wire.setattr_in(request.buffer)
    return request.node, SetAttr(mode, uid, gid, size, atime, mtime), fh, caller_of(request, 0)


def _getxattr(request: Received) -> tuple[int, bytes, int]:
    return request.node, _last_name(request, _BODY + 8), word_at(request, _BODY)


def _listxattr(request: Received) -> tuple[int, Caller, int]:
    return request.node, caller_of(request, 0), word_at(request, _BODY)


def _removexattr(request: Received) -> tuple[int, bytes, Caller]:
    return request.node, _last_name(request, _BODY), caller_of(request, 0)


def _setxattr(request: Received) -> tuple[int, bytes, bytes, Caller, int, bool]:
    """As before Linux 5.13, or without FUSE_SETXATTR_EXT."""
    return _key_and_value(request, _BODY + wire.TWO_WORDS.size, False)


def _setxattr_ext(request: Received) -> tuple[int, bytes, bytes, Caller, int, bool]:
    start = _BODY + wire.TWO_WORDS.size
    (more,) = wire.SETXATTR_FLAGS.unpack_from(request.buffer, start)
    return _key_and_value(request, start + wire.SETXATTR_FLAGS.size, more & wire.ACL_KILL_SGID != 0)


def _key_and_value(request: Received, start: int, kill_sgid: bool) -> tuple[int, bytes, bytes, Caller, int, bool]:
    length, flags = wire.TWO_WORDS.unpack_from(request.buffer, _BODY)
    end = request.size - length - 1
    if end < start or request.buffer.find(0, start, request.size) != end:
        raise Malformed("an attribute whose name and value are not as long as it is")
    return (
        request.node,
        bytes(request.buffer[start:end]),
        bytes(request.buffer[end + 1 : request.size]),
        caller_of(request, 0),
        flags,
        kill_sgid,
    )


def _open(request: Received) -> tuple[int, int, Caller]:
    return request.node, word_at(request, _BODY), caller_of(request, 0)


def _opendir(request: Received) -> tuple[int, int]:
    return request.node, request.pid


def _read(request: Received) -> tuple[int, int, int]:
    """Handle, offset or position, room in bytes; READDIR, too."""
    arguments: tuple[int, int, int] = wire.READ_IN.unpack_from(request.buffer, _BODY)
    if arguments[2] > MAX_REQUEST:
        raise Malformed("more is asked for than was agreed on")
    return arguments


def _write(request: Received) -> tuple[int, int, memoryview]:
    fh, offset, length = wire.READ_IN.unpack_from(request.buffer, _BODY)
    end = wire.WRITE_DATA + length
    if end > request.size:
        raise Malformed("less data than it says")
    return fh, offset, memoryview(request.buffer)[wire.WRITE_DATA : end]


def _fsync(request: Received) -> tuple[int, bool]:
    fh, flags = wire.QWORD_AND_WORD.unpack_from(request.buffer, _BODY)
    return fh, flags & wire.FSYNC_DATA_ONLY != 0


def _fallocate(request: Received) -> tuple[int, int, int, int]:
    fh, offset, length, mode = wire.FALLOCATE_IN.unpack_from(request.buffer, _BODY)
    return fh, mode, offset, length


def _lseek(request: Received) -> tuple[int, int, int]:
    arguments: tuple[int, int, int] = wire.LSEEK_IN.unpack_from(request.buffer, _BODY)
    return arguments


def _copy(request: Received) -> tuple[int, int, int, int, int]:
    """What the answer to COPY_FILE_RANGE has room for."""
    return *_copy_64(request)[:4], min(wire.COPY_IN.unpack_from(request.buffer, _BODY)[5], wire.MOST_COPIED)


def _copy_64(request: Received) -> tuple[int, int, int, int, int]:
    fh_in, offset_in, _, fh_out, offset_out, length = wire.COPY_IN.unpack_from(request.buffer, _BODY)
    return fh_in, offset_in, fh_out, offset_out, length


_Parser = Callable[[Received], tuple[Any, ...]]


def _kept(parse: _Parser) -> _Parser:
    """`parse`, whose first argument is a handle, with the number of the node's kept file in the place of none."""

    def parse_kept(request: Received) -> tuple[Any, ...]:
        arguments = parse(request)
        return arguments if arguments[0] else (-request.node, *arguments[1:])

    return parse_kept


def _both_kept(parse: _Parser) -> _Parser:
    """The same of a copy: the source's handle is the first argument, the target's the third."""

    def parse_kept(request: Received) -> tuple[Any, ...]:
        fh_in, offset_in, fh_out, *rest = parse(request)
        target = wire.COPY_IN.unpack_from(request.buffer, _BODY)[2]
        return fh_in or -request.node, offset_in, fh_out or -target, *rest

    return parse_kept


def _write_kept(request: Received) -> tuple[int, int, memoryview, int]:
    """With the flags of open(2), which nobody has told of."""
    fh, offset, data = _write(request)
    (flags,) = wire.WORD.unpack_from(request.buffer, wire.WRITE_FLAGS_AT)
    return fh or -request.node, offset, data, flags


# -- operations that have to know how much room there is --------------------------------------------

_Sized = bytes | int
"""A value, or, when no room was given, its size."""


def _sized_getxattr(operations: Operations, node_id: int, key: bytes, room: int) -> _Sized | Refused:
    value = operations.find_xattr(node_id, key)
    return _NO_DATA if value is None else _fitting(value, room)


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
    least = wire.ENTRY_SIZE + wire.DIRENT_SIZE
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
    return wire.dirents(operations.names(fh, start), room)


# -- packing results --------------------------------------------------------------------------------


def _done(result: None) -> bytes:
    return b""


def _data(result: Body) -> Body:
    return result


def _found(result: Entry | Negative) -> bytes:
    return negative(result) if isinstance(result, float) else _entry(result)


def _entry(result: Entry) -> bytes:
    node, st, entry_ttl, attr_ttl = result
    return entry(node, st, entry_ttl, attr_ttl)


def _attributes(result: Attributes) -> bytes:
    node, st, attr_ttl = result
    return attributes(node, st, attr_ttl)


def _attributes_and_birth(result: tuple[Attributes, int]) -> bytes:
    return wire.statx(*result[0], result[1])


def _number(result: int) -> bytes:
    return wire.QWORD.pack(result)


def _opened(result: Opened) -> bytes:
    return wire.OPENED.pack(*result)


def _created(result: tuple[Entry, Opened]) -> bytes:
    return _entry(result[0]) + wire.OPENED.pack(*result[1])


def _sized(result: _Sized | Refused) -> bytes:
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
    if not isinstance(result, float):
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
        kept[opcode] = kept[opcode]._replace(parse=_kept(kept[opcode].parse))
    for opcode in _TWO_HANDLES:
        kept[opcode] = kept[opcode]._replace(parse=_both_kept(kept[opcode].parse))
    if directories:
        del kept[wire.OPENDIR]
        for opcode in _DIRECTORY_HANDLE:
            kept[opcode] = kept[opcode]._replace(parse=_kept(kept[opcode].parse))
    kept[wire.WRITE] = kept[wire.WRITE]._replace(parse=_write_kept, operation=_O.write_kept)
    return kept


def without_xattrs(rows: Mapping[int, Row]) -> dict[int, Row]:
    """The rows of a union without extended attributes: the first request of each kind is ENOSYS, and the kernel says
    EOPNOTSUPP from then on by itself."""
    gone = (wire.SETXATTR, wire.GETXATTR, wire.LISTXATTR, wire.REMOVEXATTR)
    return {opcode: each for opcode, each in rows.items() if opcode not in gone}


def without_sync(rows: Mapping[int, Row]) -> dict[int, Row]:
    """The rows of a volatile union: the first FSYNC is ENOSYS, and the kernel asks for none any more."""
    return {opcode: each for opcode, each in rows.items() if opcode not in (wire.FSYNC, wire.FSYNCDIR)}


NOTHING: Final = (1 << 63) - 2
"""Handle of a file that is opened for nothing (replay.py)."""


def with_nothing(rows: Mapping[int, Row]) -> dict[int, Row]:
    """The rows where there may be such files; the kernel does not say who closes one."""
    return {**rows, wire.RELEASE: rows[wire.RELEASE]._replace(operation=_release)}


def _release(operations: Operations, fh: int) -> None:
    if fh != NOTHING:
        operations.release(fh)


def first_number(request: Received) -> int:
    """Of FORGET: how many references are given back. Of INTERRUPT: the unique number of the request it is about."""
    if request.size < _BODY + wire.QWORD.size:
        raise Malformed("too short")
    number: int = wire.QWORD.unpack_from(request.buffer, _BODY)[0]
    return number


def forgotten(request: Received) -> Iterator[tuple[int, int]]:
    """What BATCH_FORGET gives back: (node id, references)."""
    start = _BODY + wire.TWO_WORDS.size
    count = wire.TWO_WORDS.unpack_from(request.buffer, _BODY)[0] if request.size >= start else 1
    end = start + count * wire.FORGET_ONE.size
    if end > request.size:
        raise Malformed("less than it says")
    return wire.FORGET_ONE.iter_unpack(memoryview(request.buffer)[start:end])
