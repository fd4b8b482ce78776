"""Requests that kill whoever performs them: found by what each process was at when it died, and refused.

The kernel sends a request that nobody has answered to the next process, which dies of it as well, and so on: for all
users of the mount for ever. What a process is at is noted in its slot (slot.py), by one word a request; which of them
it died of is looked at by the next one. A request that DEATHS processes were at is answered EIO and not performed. So
is another one that asks for the same from then on, as programs try again; until the mount is made anew, or goes over
to a process of another version, which may know better.

A process that is killed by somebody was at some request as well. That it was at the same one so many times in a row
is chance only where one takes longer than to kill a process, so it is not counted for what takes long: what waits,
and what runs in a thread, unless that thread is known to have crashed (mount/crash.py).

Event loop only.
"""

from __future__ import annotations

import errno
import logging
import os
from collections import Counter
from typing import Final
from zlib import crc32

from udbad.edge.once import newest_first
from udbad.inodes.paths import last_path
from udbad.inodes.record import Record, pack, unpack
from udbad.inodes.slot import RESENT, Slot
from udbad.inodes.table import InodeTable
from udbad.kernel import wire
from udbad.kernel.received import Received

log = logging.getLogger(__name__)

DEATHS: Final = 5
"""Processes that one request may kill; fewer than there are slots."""
REFUSED: Final = 3
SENT_AGAIN: Final = 0
"""Of Slot.counts."""
_NOTE: Final = "refused"
_MOST_KINDS: Final = 32
_ON_HANDLES: Final = frozenset(
    {wire.READ, wire.WRITE, wire.READDIR, wire.READDIRPLUS, wire.FSYNC, wire.FSYNCDIR, wire.FLUSH, wire.LSEEK,
     wire.FALLOCATE, wire.RELEASE, wire.RELEASEDIR}
)  # fmt: skip
"""What begins with a handle, which is another one each time the same is asked for."""
_NAMED: Final = frozenset(
    {wire.LOOKUP, wire.SYMLINK, wire.MKNOD, wire.MKDIR, wire.UNLINK, wire.RMDIR, wire.RENAME, wire.RENAME2, wire.LINK,
     wire.CREATE}
)  # fmt: skip
"""What ends with a name, or with where a symbolic link leads."""

Kind = tuple[int, int, int]
"""What is asked for: opcode, node, checksum of the rest."""


def blame(slots: memoryview, thread: int) -> None:
    """The newest process has crashed in this thread, as threading.get_ident() named it; 0: in none."""
    newest_first(slots)[0].blame(thread)


def absolve(slots: memoryview) -> None:
    """What the newest process was at is not what it died of."""
    blame(slots, 0)


class Poison:
    """Which requests are refused, of one mount."""

    def __init__(self, own: Slot, record: Record, table: InodeTable) -> None:
        """own: the slot of this process. record: with the slots of all processes, and what the one before has said."""
        died_at = Counter(slot.current for slot in newest_first(record.slots) if slot.sequence)
        self._suspects = {unique for unique, deaths in died_at.items() if unique and deaths >= DEATHS}
        self._own = own
        self._record = record
        self._table = table
        noted = record.noted(_NOTE)
        self._kinds: list[Kind] = [] if noted is None else unpack(noted)

    @property
    def known(self) -> bool:
        """Whether there is anything to be refused but what is sent again."""
        return bool(self._kinds)

    def refuses(self, request: Received, name: str) -> bool:
        """Whether to answer a request EIO. name: of its operation. To be asked about each one that was sent again, and
        about all others where something is `known`."""
        again = request.unique >= RESENT
        if again:
            self._own.count(SENT_AGAIN)
        if not self._suspects and not self._kinds:
            return False
        kind = _kind(request)
        if kind not in self._kinds:
            if not again or request.unique & ~RESENT not in self._suspects:
                return False
            self._kinds = [*self._kinds[1 - _MOST_KINDS :], kind]
            self._record.note(_NOTE, pack(self._kinds))
            log.error(
                "%d processes died of a request: %s; it is answered %s from now on",
                DEATHS, self._describe(request, name), errno.errorcode[errno.EIO],
            )  # fmt: skip
        self._own.count(REFUSED)
        return True

    def _describe(self, request: Received, name: str) -> str:
        """What can be said without performing anything of it."""
        node = self._table.find(request.node)
        path = os.fsdecode(b"?" if node is None else last_path(node))
        if request.opcode in _NAMED:
            last = bytes(request.buffer[wire.BODY : request.size]).rstrip(b"\0").rpartition(b"\0")[2]
            path = f"{path.rstrip('/')}/{os.fsdecode(last)}"
        return f"{name} of {path} (node {request.node}) by process {request.pid}"


def _kind(request: Received) -> Kind:
    start = wire.BODY + (8 if request.opcode in _ON_HANDLES else 0)
    return request.opcode, request.node, crc32(memoryview(request.buffer)[start : request.size])


def carry_on(predecessor: Record, record: Record, refusals: bool) -> None:
    """Have a record say what that of the process before says: slots and, with `refusals`, what is refused."""
    record.slots[:] = predecessor.slots
    noted = predecessor.noted(_NOTE) if refusals else None
    if noted is not None:
        record.note(_NOTE, noted)
