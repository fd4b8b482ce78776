"""What a mount process tells its successor of itself: options, branches, locks, session. JSON, in a memfd.

What it knows of the union is in the record (inodes/record.py), which has the number of that memfd. Written anew, never
in place, whenever something of it has changed: a successor reads all of it, or all of what was before.

A successor of another version passes over what it does not know (control/words.py), unless "needs" names it: then it
does not take over, and says so before the process that serves has made room.
"""

from __future__ import annotations

import errno
import json
import logging
import os
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

from udbad import __version__
from udbad.branch.branches import Branch, BranchSet
from udbad.control import registry
from udbad.control.words import known, said
from udbad.edge import poison
from udbad.errors import ExitCode, UserError
from udbad.inodes.record import READ, Record, UnreadableRecord, condemned
from udbad.kernel.session import Session
from udbad.mount.crash import Crash
from udbad.mount.keeper import Gone, Left, Table
from udbad.mount.watchdog import BEGUN, FACTS
from udbad.settings.options import format_options, parse_mount_options
from udbad.types import Perm

if TYPE_CHECKING:
    from udbad.mount.mountproc import MountProcess

log = logging.getLogger(__name__)

_NEEDED: Final = frozenset({"writes_overlay"})
"""Fields of a branch: a version that does not know one must not serve a branch where it has not its default value."""


def write(process: MountProcess, record: Record, last: int) -> int:
    """Say what the mount is now; returns the descriptor of that, which takes the place of `last` (-1: there is none).

    Raises OSError.
    """
    the_session = process.session
    assert isinstance(the_session, Session)  # through pyfuse3 there is no record
    facts = {
        "version": record.version,
        "udbad": __version__,
        "mount_point": os.fsdecode(process.mount_point),
        "options": format_options(process.options),
        "configured": process.configured,
        "started": process.started,
        "restarts": process.restarts,
        "pauses": process.pauses.value(),
        "generation": process.sb.branches.generation,
        **_facts_of(process.sb.branches),
        **process.offline.facts(),
        "locks": process.write_locks.held(),
        "restrictions": sorted(process.restrictions),
        "control": [process.presence.control_path, process.presence.control_fd],
        "session": the_session.facts(),
    }
    fd = _say(record, FACTS, facts)
    if last >= 0:
        os.close(last)
    return fd


def begin(record: Record, branches: BranchSet) -> int:
    """Say which branches a process takes over, before it asks them anything: it may wait for one, as any other process
    (mount/watchdog.py). Returns the descriptor of that, for `write`. Raises OSError."""
    away = [branch.id for branch in branches.branches if branch.offline]
    return _say(record, BEGUN, {**_facts_of(branches), "offline": away})


def _say(record: Record, note: str, facts: dict[str, Any]) -> int:
    fd = os.memfd_create("udbad facts", os.MFD_CLOEXEC)
    try:
        os.write(fd, json.dumps(facts).encode())
        record.note(note, b"%d" % fd)
    except BaseException:
        os.close(fd)
        raise
    return fd


def read(record: Record, take: Callable[[int], int]) -> dict[str, Any]:
    """What `write` has written last. Raises OSError; UserError when that is of a version that cannot be read."""
    noted = record.noted(FACTS)
    if noted is None:
        raise UserError("the mount process ended before it served", ExitCode.FAILURE)
    fd = take(int(noted))
    try:
        facts = json.loads(os.pread(fd, os.fstat(fd).st_size, 0))
    finally:
        os.close(fd)
    if not isinstance(facts, dict) or facts.get("version") not in READ:
        raise UserError("what it knows is written in another version", ExitCode.FAILURE)
    unknown = set(facts.get("needs", ())) - set(Branch.FIELDS)
    if unknown:
        text = ", ".join(sorted(unknown))
        raise UserError(f"it has branches with {text}, of which this version knows nothing", ExitCode.FAILURE)
    return facts


def _facts_of(branches: BranchSet) -> dict[str, Any]:
    told = [_branch_words(branch) for branch in branches.branches]
    return {"branches": told, "needs": sorted(_NEEDED.intersection(name for one in told for name in one))}


def _branch_words(branch: Branch) -> dict[str, Any]:
    return {
        **said(branch.values(), Branch.DEFAULTS),
        "path": os.fsdecode(branch.path),
        "perm": branch.perm.value,
        "attrs": sorted(branch.attrs),
        "restrictions": sorted(branch.restrictions),
    }


def branches(facts: dict[str, Any], take: Callable[[int], int], hung: Collection[int] = ()) -> BranchSet:
    """The branches themselves, by their descriptors: what somebody has mounted over their paths since is not asked.

    hung: the indexes of those that do not answer. Others of their file systems will not, either.

    Raises OSError.
    """
    devices = {facts["branches"][index]["dev"] for index in hung}
    away = {words["id"] for words in facts["branches"] if words["dev"] in devices}
    offline = away.union(facts.get("offline", ()))
    return BranchSet(
        tuple(_branch(words, take, words["id"] in offline) for words in facts["branches"]), facts["generation"]
    )


def _branch(words: dict[str, Any], take: Callable[[int], int], offline: bool) -> Branch:
    return Branch(
        **{
            **known(Branch.FIELDS, words),
            "path": os.fsencode(words["path"]),
            "perm": Perm(words["perm"]),
            "attrs": frozenset(words["attrs"]),
            "restrictions": frozenset(words["restrictions"]),
            "root_fd": take(words["root_fd"]),
            "anchor_fd": take(words["anchor_fd"]),
            "offline": offline,
        }
    )


def locks(facts: dict[str, Any], take: Callable[[int], int]) -> list[tuple[int, int, int]]:
    """The write locks, for WriteLocks.take_over(). Raises OSError."""
    return [(dev, ino, take(fd) if fd >= 0 else -1) for dev, ino, fd in facts["locks"]]


def session(predecessor: Predecessor, mount_point: bytes) -> Session:
    """The session, to be begun again. Raises OSError."""
    facts = predecessor.facts["session"]
    return Session.resume(mount_point, predecessor.take(facts["fd"]), facts)


def control(predecessor: Predecessor, path: str) -> int:
    """The listening control socket, where that is still at `path`: who has connected is answered; else -1.

    Raises OSError.
    """
    known, fd = predecessor.facts["control"]
    if known != path or fd < 0:
        return -1
    try:
        return predecessor.take(fd)
    except OSError as error:
        if error.errno != errno.EBADF:
            raise
    return -1  # it was closed at an orderly end, which a kill has cut short


def carry_on(predecessor: Predecessor, record: Record) -> None:
    """Have a record say what processes of the mount were at when they died, the last one included; before Native is
    made. What a version refuses, another one may know how to do."""
    poison.carry_on(predecessor.record, record, predecessor.facts.get("udbad") == __version__)
    crash = predecessor.crash
    if crash.text:
        log.error("the process before has crashed: %s", crash)
    if predecessor.hung:
        poison.absolve(record.slots)
    if crash.thread is not None:
        poison.blame(record.slots, crash.thread)


class Predecessor:
    """A mount process that has ended, by its keeper: what it has left."""

    def __init__(self, left: Sequence[Left], mount_point: bytes, died: float = 0.0) -> None:
        """left: by one or several processes, the newest first: one that was killed before it had taken all over has
        said nothing, and does not count. mount_point: as the kernel has it; what was left of another mount is not ours.
        died: time.monotonic() of its end. Raises OSError, UserError: nothing is left, or it is of another version.

        hung: indexes of branches that one of them has waited for too long, killed: those processes, which may still.
        """
        self.died = died
        self.hung: set[int] = set()
        self.killed: list[int] = []
        self._tables: list[Table] = []
        problem: Exception = UserError("nothing is left of the process before", ExitCode.FAILURE)
        waiting = iter(left)
        for keeper, record in waiting:
            try:
                table = Table(keeper)
            except Gone as error:
                problem = error
                continue
            self._tables.append(table)
            try:
                self.take = table.take
                fd = table.take(record)
                found = condemned(fd)
                if found is not None:
                    self.killed.append(found[0])
                    self.hung.update(found[1])
                self.record = _attach(fd)
                self.facts = read(self.record, table.take)
                if os.fsencode(self.facts["mount_point"]) != mount_point:
                    raise UserError(f"process {keeper} keeps another mount", ExitCode.FAILURE)
            except (OSError, UserError) as error:
                problem = error
            else:
                self.takes = [table.take]
                """Of this one, and of those that it may not have taken all from."""
                self.crash = Crash(self.record, table.take)
                for older, _ in waiting:  # which one of the others has not come to ending
                    with suppress(Gone):
                        self._tables.append(Table(older))
                        self.takes.append(self._tables[-1].take)
                return
        self.close()
        raise problem

    def end(self) -> None:
        """The mount is somebody else's now, who has a keeper of his own: close what nobody took, soon."""
        for table in self._tables:
            table.end()

    def close(self) -> None:
        """After `end`: return when all is closed."""
        for table in self._tables:
            table.close()
        self._tables.clear()

    def join(self) -> None:
        """Return when they have ended, after `end`: whoever looks for one must not find it."""
        for table in self._tables:
            table.join()


def look(left: Sequence[Left], mount_point: bytes) -> None:
    """Whether this version could go on with a mount that another one serves. Raises OSError, UserError if not."""
    predecessor = Predecessor(left, registry.real_mount_point(mount_point))
    try:
        parse_mount_options(predecessor.facts["options"])
        branches(predecessor.facts, lambda number: number)  # nothing is opened, so nothing is to be closed
    except (LookupError, TypeError, ValueError) as error:
        raise UserError(f"what it says of its branches is not understood: {error}", ExitCode.FAILURE) from None
    finally:
        predecessor.close()


def _attach(fd: int) -> Record:
    try:
        return Record.attach(fd)
    except UnreadableRecord as error:
        os.close(fd)
        raise UserError(f"what it knows cannot be read: {error}", ExitCode.FAILURE) from None
    except OSError:
        os.close(fd)
        raise
