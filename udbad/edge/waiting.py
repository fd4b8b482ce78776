"""Requests that cannot be answered at once: what they wait for, and how they go on afterwards.

An operation that needs a copy-up is started again from its beginning when the copy is there, so nothing that it saw
before is used again; so is one for which a branch has changed underneath (ESTALE), after the directories it is about
were asked, and one that met the limit of descriptors. Small copies are made at once. The bytes of others travel in a
thread, and what is left of a read or an fsync (Later) runs in one, so any number of requests may wait while others are
served: what waits is a Request in a list, not a task or a thread.

A copy-up that nobody waits for any more is given up. INTERRUPT says only that the caller has some signal, and most of
those do not end a system call on a file: a request is given up when its caller has SIGKILL before it, which is what a
signal that ends a process becomes in each of its threads (complete_signal() in kernel/signal.c). As the kernel sends
INTERRUPT once (fuse_dev_queue_interrupt()), whoever had another signal first is looked at again while the copy goes on.

Event loop only, unless it says otherwise. Each `# After this:` says what may have changed.
"""

from __future__ import annotations

import errno
import logging
import signal
from collections import deque
from collections.abc import Callable
from functools import cached_property, partial
from time import monotonic
from typing import TYPE_CHECKING, Any, Final

from udbad.edge.operations import Later
from udbad.types import Trigger
from udbad.union import copyup
from udbad.union.fs import UnionFs
from udbad.union.superblock import NeedCopyUp

if TYPE_CHECKING:
    from concurrent.futures import ThreadPoolExecutor

log = logging.getLogger(__name__)

INLINE_COPY: Final = 64 * 1024
"""Bytes up to which a copy-up is done on the event loop: a thread would take longer. Not where the disk has to be
waited for, unless it is quick."""
QUICK_SECONDS: Final = 0.001
"""A disk is quick that took no longer than this the last time. It may once take longer, as may any rename(2) here."""
READERS: Final = 16
"""Reads that wait for disks and servers at the same time: as many keep an array of disks busy."""
SYNCERS: Final = 16
"""Likewise fsync and what else may take seconds, which must not keep reads from their turn."""
COPIERS: Final = 4
PATIENCE: Final = 0.0001
"""Seconds for which a read is looked for that the disk has been asked for: what it costs to have a thread wait."""
_IN_VAIN: Final = 4
_EVERY: Final = 16
"""Where so many in a row were looked for in vain, the disk is not quick; one of so many says if it has become so."""
_ATTEMPTS: Final = 8
_NO_DESCRIPTOR: Final = (errno.EMFILE, errno.ENFILE)
RETRIED: Final = frozenset({errno.ESTALE, *_NO_DESCRIPTOR})
"""Errors that `Waiting.go_on` may have a remedy for."""

Post = Callable[[Callable[[], object]], object]
"""Have something called on the event loop, soon; any thread."""


class Request:
    """One operation that is not done yet. Of its two ends an edge makes a subclass.

    unique: its number, by which INTERRUPT names it; 0: none. pid: who asks. directories: node ids to ask anew about.
    """

    __slots__ = ("attempts", "copy", "directories", "interrupted", "pid", "unique")

    def __init__(self, unique: int, pid: int, directories: tuple[int, ...]) -> None:
        self.unique = unique
        self.pid = pid
        self.directories = directories
        self.attempts = 0
        self.copy: CopyUp | None = None
        self.interrupted = False

    def perform(self) -> object:
        """The operation, from its beginning."""
        raise NotImplementedError

    def resume(self) -> None:
        """What is done next is part of this operation."""

    def suspend(self) -> None:
        """It waits from here on."""

    def begin_in_thread(self) -> None:
        """What this thread does next is part of it."""

    def answer(self, result: object, error: Exception | None) -> None:
        """The end: what the operation returned, or what it raised."""
        raise NotImplementedError

    def answer_from_thread(self, result: object, error: Exception | None) -> None:
        """The end of a Later, in the thread."""
        raise NotImplementedError


class CopyUp:
    """One copy-up of a regular file. requests: those that wait for it; `began`: the one that it was begun for."""

    __slots__ = ("abandoned", "began", "ended", "job", "need", "requests", "started", "stopped", "waiting")

    def __init__(self, waiting: Waiting, need: NeedCopyUp, job: copyup.Job, request: Request) -> None:
        self.waiting = waiting
        self.need = need
        self.job = job
        self.began = request
        self.requests = [request]
        self.abandoned: list[Request] = []
        """Given up, to be answered when nothing is left of the copy."""
        self.ended: list[Callable[[], object]] = []
        """Called when it has ended, one way or another."""
        self.started = monotonic()
        self.stopped = False
        """Nobody wants it any more."""

    def transfer_in_thread(self) -> None:
        self.began.begin_in_thread()
        self.transfer()

    def transfer(self) -> None:
        """Any thread."""
        copyup.transfer(self.job, self._is_unwanted)

    def _is_unwanted(self) -> bool:
        for request in tuple(self.requests):
            if request.interrupted and is_dying(request.pid):
                self.waiting.post(partial(self.waiting.give_up, request))
        return self.stopped


class Waiting:
    """Everything that waits, of one mount."""

    def __init__(self, fs: UnionFs, post: Post) -> None:
        self.fs = fs
        self.post = post
        self.copyups: dict[int, CopyUp] = {}
        """Those whose bytes are in a thread, by node id."""
        self.on_copyup: Callable[[copyup.Job, float], None] | None = None
        self.on_copyup_failed: Callable[[Trigger, int], None] | None = None
        self._waited: dict[int, float] = {}
        """By branch id: the seconds that its disk has taken for the last small copy-up."""
        self._interruptible: dict[int, Request] = {}
        """Those that wait for a copy-up, by their number."""
        self.patience = 0.0
        """PATIENCE, where somebody calls `look`."""
        self._looked_for: deque[tuple[Request, Later, float]] = deque()
        """With the time at which a thread is to wait instead."""
        self._in_vain = 0
        self._closing = False

    @cached_property
    def _readers(self) -> ThreadPoolExecutor:
        return _pool(READERS, "read")

    @cached_property
    def _syncers(self) -> ThreadPoolExecutor:
        return _pool(SYNCERS, "sync")

    @cached_property
    def _copiers(self) -> ThreadPoolExecutor:
        return _pool(COPIERS, "copy")

    def go_on(self, request: Request, error: Exception) -> None:
        """`error` is what the operation has raised: do what helps and start it again, or have it answered later.

        Only NeedCopyUp, Later and OSError have a remedy; all else, and what is raised again, is the answer.
        """
        if isinstance(error, Later):
            if error.look is not None and self.patience and self._looks():
                self._looked_for.append((request, error, monotonic() + self.patience))
                request.suspend()
                return
            pool = self._readers if error.quick else self._syncers
            if error.then is None:
                pool.submit(_finish, request, error)
            else:
                # After this: `then` knows what it is about.
                pool.submit(self._finish_on_loop, request, error, error.then)
            request.suspend()
            return
        try:
            copy = self._remedy(request, error)
        except Exception as another:
            request.answer(None, another)
            return
        if copy is None:
            self._again(request, error.then if isinstance(error, NeedCopyUp) and error.prepare is None else None)
        elif copy.began is request:
            self._begin(copy)
        else:
            copy.requests.append(request)
            self._note(request, copy)
            request.suspend()
            # After this: the node may be up, gone, or have failed to come up.

    def _looks(self) -> bool:
        """Whether the next read is worth being looked for."""
        if self._in_vain < _IN_VAIN:
            return True
        self._in_vain += 1
        return self._in_vain % _EVERY == 0

    def look(self) -> bool:
        """Answer what has become possible without waiting; whether there may soon be more. What takes longer than
        `patience` is left to threads."""
        if not self._looked_for:
            return False
        now = monotonic()
        for _ in range(len(self._looked_for)):
            request, later, until = self._looked_for.popleft()
            result = None if later.look is None else later.look()
            if result is not None:
                self._in_vain = 0
                request.answer(result, None)
            elif now < until:
                self._looked_for.append((request, later, until))
            else:
                self._in_vain += 1
                self._readers.submit(_finish, request, later)
        return bool(self._looked_for)

    def _again(self, request: Request, then: Callable[[], object] | None = None) -> None:
        """Start an operation from its beginning. then: all that is left to do instead."""
        try:
            result = request.perform() if then is None else then()
        except Exception as error:
            if then is None:
                self.go_on(request, error)
            else:
                request.answer(None, error)
        else:
            request.answer(result, None)

    def _remedy(self, request: Request, error: Exception) -> CopyUp | None:
        """Do what helps; returns the copy-up to wait for, if that is what it is. Raises what is to be answered."""
        first = not request.attempts
        request.attempts += 1
        if request.attempts > _ATTEMPTS:
            raise OSError(errno.EIO, "the branches changed too often during one operation")
        if isinstance(error, NeedCopyUp):
            return self._copy_up(request, error)
        if isinstance(error, OSError) and first:
            if error.errno in _NO_DESCRIPTOR and self.fs.table.shed():
                return None
            if error.errno == errno.ESTALE and request.directories:
                for node_id in request.directories:
                    self.fs.recover(node_id)
                return None
        raise error

    # -- copy-ups -----------------------------------------------------------------------------

    def _copy_up(self, request: Request, need: NeedCopyUp) -> CopyUp | None:
        """The copy-up of a node: one under way, or a new one; None when it is done already. Raises OSError."""
        under_way = need.node.busy
        if isinstance(under_way, CopyUp):
            return under_way
        try:
            job = copyup.begin(self.fs.sb, need)
        except OSError as error:
            self._count_failure(need, error)
            raise
        return None if job is None else CopyUp(self, need, job, request)

    def _begin(self, copy: CopyUp) -> None:
        job, node = copy.job, copy.need.node
        small = job.st.st_size <= INLINE_COPY or job.length == 0
        if not small or (job.fsync and self._waited.get(job.branch.id, 1.0) > QUICK_SECONDS):
            try:
                copyup.hold(job)
            except OSError as error:
                self._ended(copy, error)
                return
            node.busy = self.copyups[node.id] = copy
            self._note(copy.began, copy)
            # After this: names may have changed; commit checks that the source still is what it was.
            self._in_pool(self._copiers, copy.transfer_in_thread, partial(self._transferred, copy))
            copy.began.suspend()
            return
        try:
            copy.transfer()
        except Exception as error:
            self._transferred(copy, error)
        else:
            self._transferred(copy, None, at_once=True)

    def _note(self, request: Request, copy: CopyUp) -> None:
        request.copy = copy
        if request.unique:
            self._interruptible[request.unique] = request

    def _transferred(self, copy: CopyUp, error: Exception | None, at_once: bool = False) -> None:
        """The bytes are there, or could not be had: publish the copy. at_once: as for `copyup.commit`."""
        sb, node = self.fs.sb, copy.need.node
        if copy.job.waited is not None and copy.job.st.st_size <= INLINE_COPY:
            self._waited[copy.job.branch.id] = copy.job.waited
        if self.copyups.pop(node.id, None) is not None:
            node.busy = None
        if error is None and (copy.stopped or self._closing):
            error = OSError(errno.ECANCELED, "nobody waits for it")
        if error is None:
            copy.began.resume()
            try:
                copyup.commit(sb, copy.job, at_once)
                if copyup.takes_away(copy.job):
                    # After this: the source may be another file, or in use; it is looked at again.
                    settle = partial(copyup.settle_names, sb, copy.job)
                    self._in_pool(self._copiers, settle, partial(self._settled, copy))
                    return
            except Exception as another:
                error = another
        self._ended(copy, error)

    def _settled(self, copy: CopyUp, error: Exception | None) -> None:
        if error is None:
            try:
                copyup.take_away(self.fs.sb, copy.job)
            except Exception as another:
                error = another
        self._ended(copy, error)

    def _ended(self, copy: CopyUp, error: Exception | None) -> None:
        """It has worked or not: leave nothing behind, and have everybody who has waited go on."""
        try:
            copyup.abort(copy.job)
        except OSError as another:
            error = error or another
        cancelled = isinstance(error, OSError) and error.errno == errno.ECANCELED
        if error is None:
            if self.on_copyup is not None:
                self.on_copyup(copy.job, monotonic() - copy.started)
        elif not cancelled:
            self._count_failure(copy.need, error)
        waiting = copy.requests + copy.abandoned
        for request in waiting:
            self._interruptible.pop(request.unique, None)
            request.copy = None
        for call in copy.ended:
            call()
        for request in waiting:
            if self._closing or request in copy.abandoned:
                request.answer(None, OSError(errno.EINTR, "given up"))
            elif request is not copy.began or cancelled:
                self._again(request)
            elif error is None:
                self._again(request, copy.need.then)
            elif isinstance(error, OSError) and error.errno in (errno.ESTALE, errno.EEXIST):
                self._again(request)  # somebody was faster, or it has moved
            else:
                request.answer(None, error)

    def _count_failure(self, need: NeedCopyUp, error: Exception) -> None:
        if self.on_copyup_failed is not None and isinstance(error, OSError):
            self.on_copyup_failed(need.trigger, error.errno or errno.EIO)

    # -- giving up ----------------------------------------------------------------------------

    def interrupt(self, unique: int) -> None:
        """The caller of a request has a signal."""
        request = self._interruptible.get(unique)
        if request is not None:
            request.interrupted = True
            if is_dying(request.pid):
                self.give_up(request)

    def give_up(self, request: Request) -> None:
        """Its caller will not see an answer: end the copy-up that it waits for, if nobody else does."""
        copy = request.copy
        if copy is None or request not in copy.requests:
            return  # it has gone on, or was given up before
        copy.requests.remove(request)
        if copy.requests:
            del self._interruptible[request.unique]
            request.copy = None
            request.answer(None, OSError(errno.EINTR, "given up"))
        else:
            copy.stopped = True
            copy.abandoned.append(request)

    def close(self) -> None:
        """The connection has ended: give up copy-ups, wait for threads; what they have posted is still to be called."""
        self._closing = True
        for request, later, _ in self._looked_for:
            self._readers.submit(_finish, request, later)
        self._looked_for.clear()
        for copy in self.copyups.values():
            copy.stopped = True
        for name in ("_copiers", "_readers", "_syncers"):
            if name in self.__dict__:
                getattr(self, name).shutdown()

    # -- threads ------------------------------------------------------------------------------

    def background(self, call: Callable[[], object], then: Callable[[], object]) -> None:
        """Have `call` made in a thread and then `then` on the event loop, for nobody who waits."""

        def done(error: Exception | None) -> None:
            if error is not None:
                log.error("background work failed", exc_info=error)
            then()

        self._in_pool(self._syncers, call, done)

    def _finish_on_loop(self, request: Request, later: Later, then: Callable[[Exception | None], object]) -> None:
        """In a thread: a Later whose end is for the event loop."""
        request.begin_in_thread()
        result, error = None, None
        try:
            result = later.call(*later.args)
        except Exception as raised:
            error = raised

        def end() -> None:
            request.resume()
            try:
                then(error)
            except Exception as another:
                request.answer(None, error or another)
            else:
                request.answer(result, error)

        self.post(end)

    def _in_pool(
        self, pool: ThreadPoolExecutor, call: Callable[[], object], then: Callable[[Exception | None], object]
    ) -> None:
        """then: called on the event loop, with what was raised."""

        def work() -> None:
            error = None
            try:
                call()
            except Exception as raised:
                error = raised
            self.post(partial(then, error))

        pool.submit(work)


def _finish(request: Request, later: Later) -> None:
    """In a thread, which answers by itself: two turns of the event loop would take as long as the disk."""
    request.begin_in_thread()
    try:
        result = later.call(*later.args)
    except Exception as error:
        request.answer_from_thread(None, error)
    else:
        request.answer_from_thread(result, None)


def _pool(most: int, name: str, **options: Any) -> ThreadPoolExecutor:
    from concurrent.futures import ThreadPoolExecutor  # a mount begins without it (mount/later.py)

    return ThreadPoolExecutor(most, name, **options)


def is_dying(pid: int) -> bool:
    """Whether a thread has SIGKILL before it, or is gone. pid 0: somebody we cannot see, who may live."""
    if not pid:
        return False
    try:
        with open(f"/proc/{pid}/status", "rb") as status:
            lines = status.read().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return True
    masks = (int(line.split()[1], 16) for line in lines if line.startswith((b"SigPnd:", b"ShdPnd:")))
    return any(mask >> signal.SIGKILL - 1 & 1 for mask in masks)
