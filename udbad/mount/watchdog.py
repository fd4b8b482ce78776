"""Whether a mount process waits for a branch that does not answer: looked at from its keeper, which then ends it.

One system call that does not come back (the server is gone, the disk is dying) holds up everything, and nobody can end
it from inside. What each thread waits in stands in /proc/PID/task/TID/syscall (proc(5)), and which branch that is about
says the mount of the descriptor in it: the keeper has the same ones. So it costs the mount process nothing, and asks
no branch.

A branch is given up when a thread was in one and the same call for `branch_timeout` without having been woken: a disk
that is slow, or a file that is large, wakes it again and again. Where that tells nothing, the branch is asked as well,
by a process that may hang: a call that flushes takes long by right (fsync(2)), one that waits for others to write is
woken by the clock (balance_dirty_pages() in mm/page-writeback.c), and close(2) has given its descriptor back already.

Then all the others are asked as well, at the same time: what has taken one server away may have taken more.

The finding is in the record before the process is killed. Its successor does not touch the branch (union/, offline).
"""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Final, NoReturn

from udbad.branch import syscalls
from udbad.inodes.record import Record
from udbad.mount.keeper import end_with_parent

FACTS: Final = "facts"
"""The note with the number of the descriptor of what a mount process tells its successor (handover.py)."""
BEGUN: Final = "begun"
"""That with the same of one that takes over and has told nothing yet: its branches alone."""
_LOOKS: Final = 4
"""In the time that a branch has to answer."""
_LONGEST_PAUSE: Final = 5.0
_LEAST_PROBE: Final = 1.0
"""Seconds that a branch gets at least when it is asked."""
_POLL: Final = 0.01
_END_SECONDS: Final = 2.0
"""For the threads of a killed process to end, but for those that wait uninterruptibly."""
_LARGEST_FD: Final = 1 << 22
_PATH: Final = rb"/proc/(?:self|thread-self|\d+)/fd/(\d+)\0"
_AT_FDCWD: Final = 0xFFFFFF9C

_IS_X86: Final = os.uname().machine == "x86_64"
# renameat, renameat2, linkat, copy_file_range, ioctl (FICLONE); by arch/x86/entry/syscalls/syscall_64.tbl, or
# scripts/syscall.tbl
_TWO_FILES: Final = {264, 316, 265, 326, 16} if _IS_X86 else {38, 276, 37, 285, 29}
"""Calls whose third argument is, or may be, a descriptor, too."""
_FLUSHING: Final = {74, 75, 306, 277} if _IS_X86 else {82, 83, 267, 84}
"""fsync, fdatasync, syncfs, sync_file_range."""
_CLOSE: Final = 3 if _IS_X86 else 57


class _Waiting:
    """What one thread waits in. call: the line of /proc/…/syscall. woken: it was since, and went to sleep again."""

    __slots__ = ("call", "since", "switches", "woken")

    def __init__(self, call: bytes, switches: bytes, since: float) -> None:
        self.call = call
        self.switches = switches
        self.since = since
        self.woken = False


class Watchdog:
    """Of one mount process; owned by its keeper."""

    def __init__(self, record: Record, timeout: float, fork: Callable[[], int]) -> None:
        """record: of that process. timeout: seconds that a branch has to answer. fork: makes a process with the same
        descriptors, as fork(2)."""
        self._record = record
        self._timeout = timeout
        self._fork = fork
        self._seen: dict[str, _Waiting] = {}
        self.pause = min(timeout / _LOOKS, _LONGEST_PAUSE)
        """Seconds between two looks."""

    def look(self, owner: int) -> bool:
        """True when process `owner` waits for a branch that does not answer: it is killed then, and nothing of it
        returns from the kernel any more."""
        try:
            index = self._hung(owner)
        except (OSError, ValueError, LookupError):
            return False  # it ends, or what it says of itself was just changed: the next look tells
        if index is None:
            return False
        # With those that hang for the same reason, each of which would cost a time-out of its own.
        others = self._silent([(other, fd) for other, fd, _ in self._branches() if other != index])
        self._record.condemn(owner, index, others)
        with suppress(ProcessLookupError):
            os.kill(owner, signal.SIGKILL)
        _wait_for_threads(owner)
        return True

    def _hung(self, owner: int) -> int | None:
        """The index of the branch."""
        now = time.monotonic()
        seen = {}
        for thread in os.listdir(f"/proc/{owner}/task"):
            waiting = _look_at(f"/proc/{owner}/task/{thread}", now)
            if waiting is None:
                continue
            before = self._seen.get(thread)
            if before is not None and before.call == waiting.call:
                before.woken = before.woken or before.switches != waiting.switches
                waiting = before
            seen[thread] = waiting
        self._seen = seen
        for waiting in seen.values():
            if now - waiting.since >= self._timeout:
                index = self._blamed(owner, waiting)
                if index is not None:
                    return index
                waiting.since = time.monotonic()
        return None

    def _blamed(self, owner: int, waiting: _Waiting) -> int | None:
        """The branch that a thread waits for, if it does not answer."""
        number, *arguments = (int(word, 0) for word in waiting.call.split()[:7])
        fds = list(_descriptors(owner, number, arguments))
        if not fds:
            return None
        closes = number == _CLOSE  # close_fd() in fs/file.c frees the number first: another file may have it by now
        mounts = {_mount_of(fd) for fd in fds}
        suspects = [(index, fd) for index, fd, mount in self._branches() if closes or mount in mounts]
        if len(suspects) == 1 and not closes and not waiting.woken and number not in _FLUSHING:
            return suspects[0][0]
        return next(iter(self._silent(suspects)), None)

    def _branches(self) -> Iterator[tuple[int, int, int]]:
        """Index, descriptor of the root and number of its mount, of each branch that is served."""
        said = self._record.noted(FACTS) or self._record.noted(BEGUN)
        if said is None:
            return
        fd = int(said)
        facts = json.loads(os.pread(fd, os.fstat(fd).st_size, 0))
        for index, words in enumerate(facts["branches"]):
            if words["id"] not in facts.get("offline", ()):
                root = int(words["root_fd"])
                yield index, root, _mount_of(root)

    def _silent(self, suspects: list[tuple[int, int]]) -> list[int]:
        """Ask branches, all at once; the indexes of those that do not answer."""
        asked = []
        for index, fd in suspects:
            pid = self._fork()
            if pid == 0:
                _ask(fd)
            asked.append((index, pid))
        end = time.monotonic() + max(self._timeout / _LOOKS, _LEAST_PROBE)
        while asked and time.monotonic() < end:
            asked = [(index, pid) for index, pid in asked if not os.waitpid(pid, os.WNOHANG)[0]]
            time.sleep(_POLL)
        for _, pid in asked:
            os.kill(pid, signal.SIGKILL)
        return [index for index, _ in asked]


def _look_at(task: str, now: float) -> _Waiting | None:
    """What a thread waits in; None when it does not, or has ended."""
    try:
        with open(f"{task}/syscall", "rb") as stream:
            call = stream.read()
        with open(f"{task}/status", "rb") as stream:
            switches = stream.read().rpartition(b"\nvoluntary_ctxt_switches")[2]
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if call.startswith((b"running", b"-1")) else _Waiting(call, switches, now)


def _descriptors(owner: int, number: int, arguments: list[int]) -> Iterator[int]:
    """The descriptors that a system call is about; a path of ours leads through one of them, in /proc."""
    first = arguments[0]
    if first < _LARGEST_FD:
        yield first
    else:
        place = arguments[1] if first & 0xFFFFFFFF == _AT_FDCWD else first
        found = re.match(_PATH, _read_memory(owner, place))
        if found is not None:
            yield int(found[1])
    if number in _TWO_FILES and arguments[2] < _LARGEST_FD:
        yield arguments[2]


def _read_memory(owner: int, place: int) -> bytes:
    try:
        with open(f"/proc/{owner}/mem", "rb", buffering=0) as memory:
            return os.pread(memory.fileno(), 64, place)
    except (OSError, OverflowError):
        return b""


def _mount_of(fd: int) -> int:
    """The number of the mount (mnt_id in mountinfo) that a descriptor of ours is on, without asking its file system; -1
    when it is closed."""
    try:
        with open(f"/proc/self/fdinfo/{fd}", "rb") as stream:
            words = stream.read().split()
    except OSError:
        return -1
    return int(words[words.index(b"mnt_id:") + 1])


def _ask(fd: int) -> NoReturn:
    """In a process of its own: have the file system ask its server or disk."""
    try:
        end_with_parent()
        syscalls.ask_server(fd)
    finally:
        os._exit(0)


def _wait_for_threads(owner: int) -> None:
    """Return when no thread of a killed process can do anything more: it has ended, or waits uninterruptibly and ends
    when it wakes."""
    end = time.monotonic() + _END_SECONDS
    while time.monotonic() < end and not all(state in "DZX" for state in _states(owner)):
        time.sleep(_POLL)


def _states(owner: int) -> Iterator[str]:
    with suppress(FileNotFoundError, ProcessLookupError):
        for thread in os.listdir(f"/proc/{owner}/task"):
            with suppress(FileNotFoundError, ProcessLookupError), open(f"/proc/{owner}/task/{thread}/stat") as stream:
                yield stream.read().rpartition(")")[2].split()[0]
