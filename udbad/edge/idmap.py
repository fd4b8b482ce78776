"""Owners that a union shows as others: done where requests are taken apart and answers packed, and nowhere else.

Below the edge every id is one of the branches. With a mapping the rows of the table are others, which take the ids of a
request to those of the branches and put the shown ones into what was packed; without one nothing of this is there.
What the kernel checks (default_permissions, ACLs) it checks by the ids that are shown.

Who has no id on the branches creates nothing there, nor is anything given to him: EOVERFLOW and EINVAL, as for an
idmapped mount (may_create() in fs/namei.c, setattr_prepare()). To whatever else he may do, he is nobody.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

from udbad.edge.operations import Operations
from udbad.edge.table import Body, Row
from udbad.errors import os_error
from udbad.kernel import wire
from udbad.kernel.received import Received
from udbad.settings.ids import OVERFLOW, Ids
from udbad.types import Caller
from udbad.union.fs import SetAttr

_NOBODY: Final = 0xFFFFFFFF
"""FUSE_INVALID_UIDGID: with FUSE_ALLOW_IDMAP the kernel says only of who creates something who that is."""

# linux/fuse.h: where struct fuse_attr has uid and gid, behind what comes before it in each answer.
_OWNER: Final = struct.Struct("<II")
_OWNER_IN_ENTRY: Final = 40 + 68
_OWNER_IN_ATTR: Final = 16 + 68
_OWNER_IN_STATX: Final = 32 + 20
_ENTRY_SIZE: Final = 128
_NODE_ID: Final = struct.Struct("<Q")
_NAME_LENGTH_AT: Final = _ENTRY_SIZE + 16
_NAME_LENGTH: Final = struct.Struct("<I")
_LISTED_SIZE: Final = _ENTRY_SIZE + 24

# linux/posix_acl_xattr.h: a version, then tag, permissions and id of each entry.
_ACLS: Final = (b"system.posix_acl_access", b"system.posix_acl_default")
_ACL_HEAD: Final = 4
_ACL_ENTRY: Final = struct.Struct("<HHI")
_ACL_USER, _ACL_GROUP = 2, 8

_ENTRIES: Final = (wire.LOOKUP, wire.SYMLINK, wire.MKNOD, wire.MKDIR, wire.LINK, wire.CREATE, wire.TMPFILE)
_CREATING: Final = frozenset({wire.SYMLINK, wire.MKNOD, wire.MKDIR, wire.CREATE, wire.TMPFILE})


class IdMap(NamedTuple):
    """users, groups: what is shown of the ids of the branches."""

    users: Ids
    groups: Ids

    def rows(self, rows: Mapping[int, Row]) -> dict[int, Row]:
        """The rows of a table that does so."""
        mapped = dict(rows)
        for opcode, row in rows.items():
            parse = self._parsing(row.parse, opcode in _CREATING)
            if opcode != wire.LISTXATTR:
                mapped[opcode] = row._replace(parse=parse)
        for opcode in _ENTRIES:
            mapped[opcode] = mapped[opcode]._replace(encode=self._packing(mapped[opcode].encode, self._entry))
        for opcode in (wire.GETATTR, wire.SETATTR):
            mapped[opcode] = mapped[opcode]._replace(encode=self._packing(mapped[opcode].encode, self._attr))
        mapped[wire.STATX] = mapped[wire.STATX]._replace(encode=self._packing(mapped[wire.STATX].encode, self._statx))
        listing = mapped[wire.READDIRPLUS]
        mapped[wire.READDIRPLUS] = listing._replace(encode=self._packing(listing.encode, self._listing))
        getting, setting = mapped[wire.GETXATTR], mapped[wire.SETXATTR]
        mapped[wire.GETXATTR] = getting._replace(operation=self._getting(getting.operation))
        mapped[wire.SETXATTR] = setting._replace(parse=self._setting(setting.parse))
        return mapped

    # -- what comes in ------------------------------------------------------------------------

    def _parsing(self, parse: Callable[[Received], tuple[Any, ...]], creating: bool) -> Callable[..., tuple[Any, ...]]:
        def mapped(request: Received) -> tuple[Any, ...]:
            return tuple([self._meant(argument, creating) for argument in parse(request)])

        return mapped

    def _meant(self, argument: object, creating: bool) -> object:
        if type(argument) is Caller:
            return self._caller(argument, creating)
        if type(argument) is SetAttr:
            argument.uid = _given(self.users, argument.uid)
            argument.gid = _given(self.groups, argument.gid)
        return argument

    def _caller(self, caller: Caller, creating: bool) -> Caller:
        uid = _NOBODY if caller.uid == _NOBODY else self.users.kept(caller.uid)
        gid = _NOBODY if caller.gid == _NOBODY else self.groups.kept(caller.gid)
        if creating and (uid in (-1, _NOBODY) or gid in (-1, _NOBODY)):
            raise os_error(errno.EOVERFLOW)
        if uid in (-1, _NOBODY):
            uid = 0 if caller.uid == 0 else OVERFLOW
        if gid in (-1, _NOBODY):
            gid = 0 if caller.gid == 0 else OVERFLOW
        return caller._replace(uid=uid, gid=gid)

    def _setting(self, parse: Callable[[Received], tuple[Any, ...]]) -> Callable[[Received], tuple[Any, ...]]:
        def mapped(request: Received) -> tuple[Any, ...]:
            node, key, value, *rest = parse(request)
            return node, key, self._acl(value, inward=True) if key in _ACLS else value, *rest

        return mapped

    # -- what goes out ------------------------------------------------------------------------

    def _packing(self, encode: Callable[[Any], Body], show: Callable[[bytearray], None]) -> Callable[[Any], Body]:
        def mapped(result: object) -> Body:
            body = bytearray(encode(result))
            show(body)
            return body

        return mapped

    def _show(self, body: bytearray, at: int) -> None:
        uid, gid = _OWNER.unpack_from(body, at)
        _OWNER.pack_into(body, at, self.users.shown(uid), self.groups.shown(gid))

    def _entry(self, body: bytearray) -> None:
        if _NODE_ID.unpack_from(body)[0]:  # else there is no such name
            self._show(body, _OWNER_IN_ENTRY)

    def _attr(self, body: bytearray) -> None:
        self._show(body, _OWNER_IN_ATTR)

    def _statx(self, body: bytearray) -> None:
        self._show(body, _OWNER_IN_STATX)

    def _listing(self, body: bytearray) -> None:
        at = 0
        while at < len(body):
            if _NODE_ID.unpack_from(body, at)[0]:
                self._show(body, at + _OWNER_IN_ENTRY)
            (length,) = _NAME_LENGTH.unpack_from(body, at + _NAME_LENGTH_AT)
            at += _LISTED_SIZE + (length + 7 & ~7)

    def _getting(self, operation: Callable[..., bytes | int]) -> Callable[..., bytes | int]:
        def mapped(operations: Operations, node_id: int, key: bytes, room: int) -> bytes | int:
            value = operation(operations, node_id, key, room)
            return self._acl(value, inward=False) if key in _ACLS and isinstance(value, bytes) else value

        return mapped

    def _acl(self, value: bytes, inward: bool) -> bytes:
        """An ACL with its ids taken to the branches, or shown. Raises EINVAL for one that cannot be there."""
        if (len(value) - _ACL_HEAD) % _ACL_ENTRY.size:
            return value  # none; the branch says so
        body = bytearray(value)
        for at in range(_ACL_HEAD, len(value), _ACL_ENTRY.size):
            tag, permissions, number = _ACL_ENTRY.unpack_from(value, at)
            if tag in (_ACL_USER, _ACL_GROUP):
                ids = self.users if tag == _ACL_USER else self.groups
                found = ids.kept(number) if inward else ids.shown(number)
                if found < 0:
                    raise os_error(errno.EINVAL)
                _ACL_ENTRY.pack_into(body, at, tag, permissions, found)
        return bytes(body)


def _given(ids: Ids, number: int | None) -> int | None:
    """The id of the branches that somebody gives something to. Raises EINVAL where there is none."""
    if number is None:
        return None
    found = ids.kept(number)
    if found < 0:
        raise os_error(errno.EINVAL)
    return found
