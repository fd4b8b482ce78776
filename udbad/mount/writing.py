"""The branches that a mount writes to: marked and made ready first, swept while the mount serves, left in order.

A branch that the last mount did not leave in order may hold temporary names. Nobody sees them, so they are no reason
to wait: looking for them takes a walk through the branch, in a thread, once the mount serves. Until that is done the
branch keeps its mark, and the next mount sweeps again. Marks and locks of a branch go together (branch/writelock.py):
whoever calls has the lock.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterable
from typing import TYPE_CHECKING

from udbad.branch.accept import prepare_writable
from udbad.branch.branches import Branch
from udbad.branch.dirtymark import begin_writing, end_writing
from udbad.branch.sweep import sweep_temporaries

if TYPE_CHECKING:
    import trio

log = logging.getLogger(__name__)

_Identity = tuple[int, int]


class _Sweep:
    """One branch to be swept. stopped: nothing may be removed any more, because the branch is no longer ours."""

    def __init__(self, branch: Branch) -> None:
        self.name = branch.describe()
        self.stopped = threading.Event()
        self._branch = branch
        self._fd = os.dup(branch.root_fd)  # of its own: the branch may go while the thread waits

    def run(self) -> int | None:
        """In a thread, which may wait as long as the branch hangs; None when it could not be done."""
        import trio  # not where a mount begins

        try:
            return sweep_temporaries(self._fd, self.stopped.is_set, trio.from_thread.run_sync, self._branch)
        except trio.RunFinishedError:  # abandoned, and the mount has ended
            return None
        except OSError as error:
            log.warning("branch %s: cannot be swept: %s", self.name, error.strerror)
            return None
        finally:
            self.close()

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


class _Begun:
    """A branch that is written to, with a descriptor of its own. sweep: still to be done or under way."""

    __slots__ = ("branch", "sweep", "sweeping")

    def __init__(self, branch: Branch, sweep: _Sweep | None) -> None:
        self.branch = branch
        self.sweep = sweep
        self.sweeping = False


class Writing:
    """Every branch that this mount has begun to write to and not left yet, by the identity of its directory."""

    def __init__(self) -> None:
        self._begun: dict[_Identity, _Begun] = {}
        self._one_at_a_time: trio.CapacityLimiter | None = None

    def begin(self, branches: Iterable[Branch], plink: bool, ready: bool = False) -> None:
        """Mark those that are writable and make them ready, where that was not done before; any thread.

        To be called before anything else is written to them. plink: make the directory of pseudo-links. ready: they
        are, as this mount goes on: nobody is to see a later mtime of their roots, nor to wait for their disks. Raises
        UserError (BRANCH); `keep` is due then.
        """
        for branch in branches:
            identity = _identity(branch)
            if branch.writable and identity not in self._begun:
                left = begin_writing(branch, durable=ready)
                own = branch.but(root_fd=os.dup(branch.root_fd))
                self._begun[identity] = _Begun(own, _Sweep(own) if left else None)
                if not ready:
                    prepare_writable(branch, plink)

    def sweep(self, nursery: trio.Nursery) -> None:
        """Start sweeping what has to be, in the background, one branch after the other."""
        for begun in self._begun.values():
            if begun.sweep is not None and not begun.sweeping:
                begun.sweeping = True
                nursery.start_soon(self._sweep, begun, begun.sweep)

    async def _sweep(self, begun: _Begun, sweep: _Sweep) -> None:
        log.info("branch %s was not unmounted cleanly; it is swept for temporary names", sweep.name)
        import trio

        self._one_at_a_time = self._one_at_a_time or trio.CapacityLimiter(1)
        # With the mount it is abandoned, and stopped by `keep`: it may hang.
        removed = await trio.to_thread.run_sync(sweep.run, abandon_on_cancel=True, limiter=self._one_at_a_time)
        # After this: the branch may have been left; then nobody asks for the mark any more.
        if removed is not None and not sweep.stopped.is_set():
            begun.sweep = None
            log.info("branch %s: swept %d temporary names", sweep.name, removed)

    def keep(self, branches: Iterable[Branch]) -> None:
        """Leave all but the writable ones among `branches`, after the last change of them; any thread.

        Their marks are taken away, unless they still have to be swept.
        """
        wanted = {_identity(branch) for branch in branches if branch.writable}
        for identity in self._begun.keys() - wanted:
            begun = self._begun.pop(identity)
            if begun.sweep is None:
                end_writing(begun.branch)
            else:
                # What it has listed by now was there while the branch was ours; what it lists later, it leaves.
                begun.sweep.stopped.set()
                if not begun.sweeping:
                    begun.sweep.close()
            os.close(begun.branch.root_fd)

    def close(self) -> None:
        """Leave all."""
        self.keep(())


def _identity(branch: Branch) -> _Identity:
    st = os.fstat(branch.root_fd)
    return st.st_dev, st.st_ino
