"""Branches of a mount that do not answer: since when, and another process with them as soon as they do.

What serves a mount never asks such a branch (union/, offline). A process of its own does: it hangs as long as the
branch does, and nothing waits for it. It has one descriptor, of the branch's root, so it keeps nothing of the mount
alive. When it says that the branch has answered, this process makes room for another one, which goes on as after a
crash: everything is asked anew, with the branch.

A branch that does not answer again soon after it has is left alone for a while before it is asked, longer each time:
the disk whose root directory can be read, but not that one file, must not hold up everybody again and again.
"""

from __future__ import annotations

import ctypes
import logging
import os
import select
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, NamedTuple, NoReturn

from udbad.branch.branches import Branch, BranchSet
from udbad.branch.spec import shown
from udbad.control.words import known
from udbad.errors import ExitCode, UserError
from udbad.mount.keeper import LEFT, end_with_parent

if TYPE_CHECKING:
    from udbad.mount.handover import Predecessor
    from udbad.mount.mountproc import MountProcess

log = logging.getLogger(__name__)

_NAME: Final = b"udbad prober"
_AGAIN_SECONDS: Final = 1.0
"""After an error."""
_SOON: Final = 3600.0
"""Seconds after which it does not count any more that a branch was away; the longest wait, too."""
_PR_SET_NAME: Final = 15


class Outage(NamedTuple):
    """Of one branch: since when (seconds since the epoch), how often within `_SOON` of the one before; ended:
    time.monotonic() of the end, 0 while it lasts."""

    since: float
    times: int = 1
    ended: float = 0.0


def outages(facts: dict[str, Any]) -> dict[int, Outage]:
    """Of what a predecessor has said: by branch id."""
    return {int(branch): Outage(**known(Outage._fields, words)) for branch, words in facts.get("outages", {}).items()}


def ask_first(paths: Sequence[bytes], timeout: int) -> int:
    """Before branches are opened by a process that would hang with them. Raises UserError (BRANCH) for one that does
    not answer within so many seconds. Precondition: no thread yet. Returns the number of a child that ends just now,
    to be waited for when there is nothing better to do."""
    reader, writer = os.pipe2(os.O_CLOEXEC)
    owner, pid = os.getpid(), os.fork()
    if pid == 0:
        _ask_paths(owner, paths, writer)
    os.close(writer)
    try:
        poll = select.poll()
        poll.register(reader, select.POLLIN)
        for path in paths:
            if not poll.poll(timeout * 1000):
                os.kill(pid, signal.SIGKILL)  # and not waited for, as it may never end
                raise UserError(f"branch {shown(path)} has not answered for {timeout} s", ExitCode.BRANCH)
            if not os.read(reader, 1):
                break
    finally:
        os.close(reader)
    return pid


def _ask_paths(owner: int, paths: Sequence[bytes], writer: int) -> NoReturn:
    """In a process of its own. What is wrong with a branch is found by whoever opens it."""
    try:
        _be_alone(owner, writer)
        for path in paths:
            with suppress(OSError):
                os.statvfs(path)
            os.write(writer, b".")
    finally:
        os._exit(0)


def check_answering(branches: BranchSet) -> None:
    """Raises UserError (BRANCH) when there is one that does not: for what asks all of them."""
    for branch in branches.branches:
        if branch.offline:
            raise UserError(f"branch {shown(branch.path)} does not answer; try again when it does", ExitCode.BRANCH)


class Offline:
    """The branches of one mount process that do not answer."""

    def __init__(self, branches: BranchSet, predecessor: Predecessor | None, timeout: int) -> None:
        """Precondition: this process has no thread yet, and no descriptor of a file on such a branch. timeout: seconds
        that a branch has to answer. Raises OSError."""
        self._branches = [branch for branch in branches.branches if branch.offline]
        self._outages: dict[int, Outage] = {}
        self._back: set[int] = set()
        self._answers: dict[int, int] = {}
        """By branch id: readable when it has answered."""
        self.abandoned: set[int] = set()
        """Ids of branches that were removed while they did not answer: what was open on them is never looked at."""
        if predecessor is None:
            return
        self._outages = outages(predecessor.facts)
        self.abandoned |= set(predecessor.facts.get("abandoned", ()))
        for branch in self._branches:
            outage = self._outages.get(branch.id)
            if outage is None or outage.ended:
                again = outage is not None and time.monotonic() - outage.ended < _SOON
                outage = self._outages[branch.id] = Outage(time.time(), outage.times + 1 if again and outage else 1)
                log.error(
                    "branch %s has not answered for %d s: the mount goes on without it", shown(branch.path), timeout
                )
            delay = min(timeout * 2.0 ** (outage.times - 1), _SOON) if outage.times > 1 else 0.0
            self._answers[branch.id] = _probe(branch, delay, predecessor.killed)

    def __bool__(self) -> bool:
        return bool(self._branches)

    def since(self) -> dict[str, float]:
        """By path, in words."""
        return {os.fsdecode(branch.path): self._outages[branch.id].since for branch in self._branches}

    def facts(self) -> dict[str, Any]:
        """For the next process."""
        return {
            "offline": [branch.id for branch in self._branches if branch.id not in self._back],
            "abandoned": sorted(self.abandoned),
            "outages": {str(branch): outage._asdict() for branch, outage in self._outages.items()},
        }

    async def watch(self, process: MountProcess) -> None:
        """Until one answers: then this process ends, and the next one has it."""
        import trio  # not where a mount begins

        async with trio.open_nursery() as nursery:
            for branch in self._branches:
                nursery.start_soon(self._wait, process, branch)

    async def _wait(self, process: MountProcess, branch: Branch) -> None:
        import trio

        await trio.lowlevel.wait_readable(self._answers[branch.id])
        if not os.read(self._answers[branch.id], 1):
            log.warning("branch %s: nobody asks whether it answers again; mount again then", shown(branch.path))
            return
        self._back.add(branch.id)
        self._outages[branch.id] = self._outages[branch.id]._replace(ended=time.monotonic())
        log.warning("branch %s answers again", shown(branch.path))
        try:
            process.make_room()
        except UserError as error:
            log.error("branch %s stays away until it is mounted again: %s", shown(branch.path), error.message)


def _probe(branch: Branch, delay: float, killed: Sequence[int]) -> int:
    """Have a branch asked after `delay` seconds, and when processes `killed` have ended, which may still wait for it.
    The descriptor that a byte can be read from when it has answered."""
    reader, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    owner = os.getpid()
    pid = os.fork()
    if pid == 0:
        _ask(owner, branch.root_fd, writer, delay, killed)
    os.close(writer)
    return reader


def _ask(owner: int, root: int, writer: int, delay: float, killed: Sequence[int]) -> NoReturn:
    """In a process of its own."""
    try:
        _be_alone(owner, root, writer)
        for pid in killed:
            _wait_for(pid)
        time.sleep(delay)
        while not _answers(root):
            time.sleep(_AGAIN_SECONDS)
        os.write(writer, b"!")
    finally:
        os._exit(0)


def _be_alone(owner: int, *kept: int) -> None:
    """Have nothing of a mount open but these descriptors, and end with process `owner`."""
    end_with_parent()
    ctypes.CDLL(None).prctl(_PR_SET_NAME, _NAME, 0, 0, 0)
    last = -1
    for fd in (*sorted({0, 1, 2, *kept}), 1 << 30):
        if fd > last + 1:  # an empty range would be everything
            os.closerange(last + 1, fd)
        last = fd
    if os.getppid() != owner:
        os._exit(0)


def _wait_for(killed: int) -> None:
    with suppress(OSError):
        pidfd = os.pidfd_open(killed)
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        poll.poll()
        os.close(pidfd)


def _answers(root: int) -> bool:
    """Ask a branch for what it does not know by heart: its names, and its space. May hang."""
    try:
        fd = os.open(b".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=root)
        try:
            with os.scandir(fd) as names:
                next(names, None)
            os.fstatvfs(fd)
        finally:
            os.close(fd)
    except OSError:
        return False
    return True


def end_for_another() -> NoReturn:
    """End, between two operations, as if killed: what is open is the keeper's."""
    logging.shutdown()
    os._exit(LEFT)
