"""The native edge: reads requests from /dev/fuse, performs them, and answers in one go.

One request after the other, on the event loop and without a turn of trio: read, taken apart, performed and packed by
its row of table.py, written. What cannot be answered at once goes to waiting.py, and is answered from there. The kernel
may take a request back while it is served (its caller was killed): then it does not take the answer either, and what
the answer would have given it is taken back here.
"""

from __future__ import annotations

import errno
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any, Final

from udbad.coherence.base import Coherence
from udbad.edge.idmap import IdMap
from udbad.edge.loop import Loop
from udbad.edge.once import RULES, Answered, Once, Rule
from udbad.edge.operations import Later, Operations
from udbad.edge.poison import Poison
from udbad.edge.table import (
    OLD_SETXATTR,
    TABLE,
    Body,
    Refused,
    Row,
    first_number,
    forgotten,
    with_nothing,
    without_open,
    without_sync,
    without_xattrs,
)
from udbad.edge.waiting import PATIENCE, RETRIED, Request, Waiting
from udbad.inodes.record import Record
from udbad.inodes.slot import CURRENT, RESENT
from udbad.kernel import boundary, wire
from udbad.kernel.device import answer, now, receive
from udbad.kernel.passthrough import Passthrough
from udbad.kernel.received import Received
from udbad.union.fs import UnionFs
from udbad.union.superblock import NeedCopyUp

if TYPE_CHECKING:
    import trio

    from udbad.edge.replay import Replayer

log = logging.getLogger(__name__)

REPLAY_UID: Final = 0xFFFF_FFD0
"""As whom the helper of replay.py asks. No user has a number that high (systemd: "Users, Groups, UIDs and GIDs")."""

_GONE = (errno.ENOENT, errno.EINTR)
_TAKEN_BACK = (errno.ENOENT, errno.ENODEV, errno.ECONNABORTED)
"""Errors of an answer that nobody waits for any more."""
_PORTION = 64
"""Nodes that are forgotten at a time, which takes less than a millisecond."""
_SILENT = (wire.FORGET, wire.BATCH_FORGET)

Unique = int
Bound = tuple[Any, Any, Any, int, boundary.OpStats, Row, Rule | None]
"""parse, operation, encode, least size of the request in bytes, counters, the whole row, and how it is done once; None:
it may be done twice, or nobody goes on after a crash."""


class _Waiter(Request):
    """A request that is not answered yet."""

    __slots__ = ("_arguments", "_native", "_node", "_row", "_rule", "_start", "_stats")

    def __init__(
        self, native: Native, bound: Bound, request: Received, arguments: tuple[Any, ...], start: float
    ) -> None:
        _, _, _, _, stats, row, rule = bound
        super().__init__(request.unique, request.pid, tuple([arguments[index] for index in row.directories]))
        self._native = native
        self._row = row
        self._rule = rule
        self._stats = stats
        self._node = request.node
        # The buffer will hold other requests.
        self._arguments = tuple([bytes(each) if type(each) is memoryview else each for each in arguments])
        self._start = start

    def perform(self) -> object:
        native, operation = self._native, self._row.operation
        if self._rule is None or native.once is None:
            self.resume()
            return operation(native.operations, *self._arguments)
        return native.once.perform(self._rule, self.unique, operation, self._arguments)

    def resume(self) -> None:
        if self._native.once is not None:
            self._native.once.resume(self.unique)

    def suspend(self) -> None:
        if self._native.slot is not None:
            self._native.slot.words[CURRENT] = 0

    def begin_in_thread(self) -> None:
        if self._native.slot is not None:
            self._native.slot.begin_in_thread(self.unique)

    def _deliver(self, result: object, error: Exception | None, recorded: bool) -> int:
        """Write the answer; returns its errno. Any thread, where the row has no `undo`. recorded: note before what it
        has changed, on the event loop."""
        row, native = self._row, self._native
        number = 0
        body: Body = b""
        if type(result) is Refused:
            number = result.number
        elif error is None:
            try:
                body = row.encode(result)
            except Exception as another:
                error, result = another, None
        if error is not None:
            number = boundary.number_of(error, self._stats, row.name, self._node)
        if recorded:
            native.keep(self._rule, self.unique, number, body)
        if not native.send(self.unique, number, body) and not number and row.undo is not None:
            row.undo(native.operations, result)
        return number

    def answer(self, result: object, error: Exception | None) -> None:
        number = self._deliver(result, error, self._native.record is not None)
        if number == errno.ESTALE:
            self._native.stale(self.pid)
        self._stats.count(now() - self._start, number)

    def answer_from_thread(self, result: object, error: Exception | None) -> None:
        number = self._deliver(result, error, False)
        boundary.count_in_thread(self._stats, now() - self._start, number)


class Native:
    """Serves the requests of one mount."""

    takes_events = True
    """Branch events are taken between requests; Coherence.run has nothing to do."""

    def __init__(
        self,
        fd: int,
        fs: UnionFs,
        coherence: Coherence,
        stale: Callable[[int], None],
        setxattr_ext: bool = True,
        passthrough: Passthrough | None = None,
        record: Record | None = None,
        id_map: IdMap | None = None,
        replays: bool = False,
    ) -> None:
        """fd: /dev/fuse, non-blocking. stale: told the process (thread) id of who is told ESTALE. setxattr_ext:
        FUSE_SETXATTR_EXT was agreed on. passthrough: gives files to the kernel, where that was agreed on. record:
        by which the next process goes on when this one is killed; with the slots of those before this one. id_map:
        shows owners as others. replays: there will be a `replayer`."""
        self._fd = fd
        self.fs = fs
        self.stale = stale
        self.waiting = Waiting(fs, lambda call: self.loop.post(call))
        self.look = self.waiting.look
        self.operations = Operations(fs, coherence, self.waiting.background, passthrough=passthrough)
        self.record = record
        self.once = self.slot = self._poison = None
        if record is not None:
            self.once = Once(record.slots, self.operations)
            self.slot = self.once.own
            self._poison = Poison(self.slot, record, fs.table)
        self._refuses = self._poison is not None and self._poison.known
        self.aborted = False
        """Whether the connection has ended because somebody has aborted it, through fusectl."""
        self.replayer: Replayer | None = None
        """Takes the requests of its own helper."""
        self._over: trio.Event | None = None
        self._forgotten: deque[Iterator[tuple[int, int]]] = deque()
        """What BATCH_FORGET has given back, and was not taken notice of yet."""
        self._table = fs.table
        self._request = Received()
        rows = TABLE if setxattr_ext else {**TABLE, wire.SETXATTR: OLD_SETXATTR}
        if fs.kept is not None:
            rows = without_open(rows, not fs.sb.options.show_whiteouts)
        if fs.sb.options.volatile:
            rows = without_sync(rows)
        if replays:
            rows = with_nothing(rows)
        if id_map is not None:
            rows = id_map.rows(rows)
        if not fs.sb.options.xattrs:
            rows = without_xattrs(rows)
        self._rows: dict[int, Bound] = {
            opcode: (
                row.parse, row.operation, row.encode, row.least, boundary.operation(row.name), row,
                None if self.once is None else RULES.get(opcode),
            )
            for opcode, row in rows.items()
        }  # fmt: skip
        self.loop = Loop()  # last: it has a descriptor
        self.waiting.patience = PATIENCE if self.loop.spins else 0.0

    # -- life ---------------------------------------------------------------------------------

    def run(self, main: Callable[[], Awaitable[None]], soon: Callable[[Callable[[], object]], object]) -> None:
        """Serve from now on, and run `main` on trio soon, as Loop.run() does. Raises what it raises."""
        self.loop.serve(self._fd, self)
        self.loop.run(main, soon)

    async def serve(self) -> None:
        """Return when the mount is gone, the connection aborted, or `terminate` called."""
        import trio  # not for serving

        self._over = trio.Event()
        if self.loop.serves:
            await self._over.wait()

    def terminate(self) -> None:
        """Serve no more, and end `serve`; event loop only."""
        self.loop.leave()
        if self._over is not None:
            self._over.set()

    def close(self) -> None:
        """Give up what waits, and wait for the threads; after `run`, before the descriptor is closed."""
        self.waiting.close()
        self.loop.call_posted()
        self.loop.close()

    # -- what the loop asks for ------------------------------------------------------------------

    def events(self) -> int:
        return self.operations.coherence.events

    def take_events(self) -> None:
        self.operations.coherence.take_events()

    def take(self, seconds: boundary.Seconds = 0.0) -> bool:
        """Serve one request; False when there was none, however often it was looked for in so many seconds."""
        request = self._request
        try:
            if not receive(self._fd, request, seconds):
                return False
        except OSError as error:
            if error.errno not in _GONE:  # else taken back while it was read
                self.aborted = error.errno == errno.ECONNABORTED  # FUSE_ABORT_ERROR; unmounted: ENODEV
                self.terminate()
            return False
        replayer = self.replayer
        if replayer is not None and request.uid == REPLAY_UID and replayer.take(request):
            return True
        slot = self.slot
        if slot is not None:
            slot.words[CURRENT] = request.unique
            if (request.unique >= RESENT or self._refuses) and self._refused(request):
                return True
        table = self._table
        if table.over_budget():  # between operations, none of which has a descriptor of a directory
            table.trim()
        bound = self._rows.get(request.opcode)
        if bound is None or request.length != request.size:
            self._take_other(request)
            return True
        parse, operation, encode, least, stats, row, rule = bound
        once = self.once
        if request.size < least:
            self._take_other(request)
            return True
        start = now()
        number = 0
        body: Body = b""
        arguments: tuple[Any, ...] = ()
        result = None
        try:
            arguments = parse(request)
            if rule is None or once is None:
                result = operation(self.operations, *arguments)
            else:
                result = once.perform(rule, request.unique, operation, arguments)
            if type(result) is Refused:
                number = result.number
            else:
                body = encode(result)
        except (NeedCopyUp, Later) as error:
            self.waiting.go_on(_Waiter(self, bound, request, arguments, start), error)
            return True
        except Answered as answered:
            number, body = answered.number, answered.body
        except OSError as error:
            if error.errno in RETRIED:
                self.waiting.go_on(_Waiter(self, bound, request, arguments, start), error)
                return True
            number = boundary.number_of(error, stats, row.name, request.node)
        except Exception as error:
            number = boundary.number_of(error, stats, row.name, request.node)
        if self.record is not None:
            self.keep(rule, request.unique, number, body)
        stats.count(now() - start, number)
        if (not self.send(request.unique, number, body) or number) and row.undo is not None and result is not None:
            row.undo(self.operations, result)
        return True

    def keep(self, rule: Rule | None, unique: Unique, number: boundary.Errno, body: Body) -> None:
        """Record what an operation has changed, then that it was done. A handle is rather given anew than to nobody."""
        record = self.record
        if record is None or self.once is None:
            return
        if record.changed:
            try:
                record.flush()
            except OSError as error:
                log.error("what has changed cannot be recorded: %s", error.strerror)
        if rule is not None and not rule.opens:
            self.once.result(unique, number, body)

    def _refused(self, request: Received) -> bool:
        """Whether a request was answered without being performed, as it may be one that nobody survives."""
        poison = self._poison
        if poison is None:
            return False
        bound = self._rows.get(request.opcode)
        if not poison.refuses(request, f"opcode {request.opcode}" if bound is None else bound[5].name):
            return False
        self._refuses = True
        self.send(request.unique, errno.EIO, b"")
        return True

    def _take_other(self, request: Received) -> None:
        """A request that is no operation, or one that makes no sense."""
        opcode = request.opcode
        if request.size < wire.BODY:  # what follows is of an earlier request
            log.error("malformed request of %d bytes", request.size)
            return
        try:
            if request.length != request.size or opcode in self._rows:
                raise boundary.Malformed(f"{request.length} bytes long, of which {request.size} came")
            if opcode == wire.FORGET:
                self.fs.forget(request.node, first_number(request))
                return
            if opcode == wire.BATCH_FORGET:
                # Copied, as the buffer will hold other requests.
                self._forgotten.append(iter(list(forgotten(request))))
                if len(self._forgotten) == 1:
                    self._forget_some()
                return
            if opcode == wire.INTERRUPT:
                self.waiting.interrupt(first_number(request))
                return
        except Exception as error:
            number = boundary.number_of(error, boundary.operation("forget"), f"opcode {opcode}", request.node)
            if opcode not in _SILENT:
                self.send(request.unique, number, b"")
            return
        # For an operation that we do not have. The kernel does not ask for it again then.
        self.send(request.unique, 0 if opcode == wire.DESTROY else errno.ENOSYS, b"")

    def _forget_some(self) -> None:
        """Between two requests: of nodes that nobody waits for there may be tens of thousands at a time."""
        forget = self.fs.forget
        some = list(islice(self._forgotten[0], _PORTION))
        for one, times in some:
            forget(one, times)
        if len(some) < _PORTION:
            self._forgotten.popleft()
        if self._forgotten:
            self.loop.post(self._forget_some)

    def send(self, unique: Unique, number: boundary.Errno, body: Body) -> bool:
        """Any thread. False when the kernel has not taken the answer, because whoever asked was killed meanwhile."""
        try:
            answer(self._fd, unique, number, body)
        except OSError as error:
            if error.errno not in _TAKEN_BACK:
                log.error("cannot answer a request: %s", error.strerror)
            return False
        return True
