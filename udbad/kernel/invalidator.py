"""Telling the kernel what to forget, from threads of its own.

A notification blocks while a request it concerns is being served (fuse_reverse_inval_entry takes the
directory's i_rwsem; inval_inode waits for pages under READ), so it is never written on the event loop,
which has to serve that very request: that would wedge daemon and client for good. Nobody waits for
one either, except `flush`, which handlers must never call.

Each notification is a key in the pending dictionary of one thread, chosen by node, so that a second one
for the same thing costs nothing while the first waits, and one slow directory does not hold up the
others. What may be told a little later (`attributes_soon`) has a thread that first waits for more of the same.
ENOENT is success: the kernel had nothing of the kind. So is ENOTDIR: it had forgotten the directory,
and meanwhile a file has got the number.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
from array import array
from collections.abc import Callable, Iterable, Iterator
from enum import Enum
from itertools import islice
from time import monotonic
from typing import Final, NamedTuple, TypeVar

from udbad.metrics import INVALIDATION_BUCKETS, Counts

log = logging.getLogger(__name__)

_THREADS = 4
_PATIENCE_SECONDS = 0.01
"""How long what may be told a little later waits for more of the same."""
_LIMIT = 200_000
"""Pending notifications of one thread above which all its names are replaced by one epoch, where there are epochs."""

_T = TypeVar("_T")
_Key = tuple[str, int, bytes]
_EPOCH: _Key = ("epoch", 0, b"")


def _of_nodes(_: int, nodes: bytes) -> list[tuple[int, bytes]]:
    return [(node, b"") for node in array("Q", nodes)]


_MANY: Final[dict[str, tuple[str, Callable[[int, bytes], list[tuple[int, bytes]]]]]] = {
    "expire many": ("expire", lambda node, names: [(node, name) for name in names.split(b"/")]),
    "attributes many": ("attributes", _of_nodes),
    "data many": ("data", _of_nodes),
}
"""Kinds of keys that stand for many notifications, to what each of these is."""
_TOGETHER: Final = 256
"""How many those are at most."""
_NAMES = ("entry", "expire", "expire many")
_LOOK_SECONDS = 1.0
_NOTHING_HELD = (errno.ENOENT, errno.ENOTDIR)
"""The kernel's answer when it holds nothing of what it is to forget."""


class State(Enum):
    ACCEPTING = "accepting"
    DRAINING = "draining"
    STOPPED = "stopped"


class InvalidatorStatistics(NamedTuple):
    """sent: notifications by kind. missed: those the kernel had nothing of. latency: seconds until it was told.

    latency_counts: as metrics.Counts.value() gives them. oldest: age in seconds of the oldest one not yet told.
    """

    state: str
    sent: dict[str, int]
    missed: int
    pending: int
    failed: int
    latency_sum: float
    latency_max: float
    latency_counts: list[float]
    oldest: float


class _Shard:
    """One thread and what it has to do, oldest first.

    All fields are guarded by `ready`, but for the counts, which only the thread changes: a count that all
    threads raised would lose some.
    """

    def __init__(self, patience: float = 0.0) -> None:
        """patience: seconds that the first one of several has to wait."""
        self.patience = patience
        self.hurry = False
        """Somebody waits for what is pending."""
        self.ready = threading.Condition()
        self.pending: dict[_Key, tuple[int, float]] = {}
        self.sequence = 0
        self.done = 0
        self.stopping = False
        self.thread: threading.Thread | None = None
        self.sending: float | None = None
        """Since when what is being written now has been known."""
        self.sent = {"entry": 0, "expire": 0, "attributes": 0, "data": 0, "epoch": 0}
        self.missed = 0
        self.failed = 0
        self.latency = Counts(INVALIDATION_BUCKETS)
        self.latency_max = 0.0

    def oldest(self) -> float | None:
        """Since when the oldest thing not yet told has been known (seconds of time.monotonic)."""
        with self.ready:
            waiting = next(iter(self.pending.values()), None)
            return self.sending if self.sending is not None or waiting is None else waiting[1]


def _together(all_of_them: Iterable[_T]) -> Iterator[list[_T]]:
    rest = iter(all_of_them)
    while some := list(islice(rest, _TOGETHER)):
        yield some


class Invalidator:
    """Implements coherence.base.KernelNotifier."""

    def __init__(
        self,
        tell: Callable[[str, int, bytes], None],
        epochs: bool,
        mounts_inside: Callable[[], bool] = lambda: False,
        tell_many: Callable[[str, list[tuple[int, bytes]]], tuple[int, int]] | None = None,
    ) -> None:
        """tell: gives the kernel one notification, by its kind (a key of protocol.NOTIFICATIONS), node and name; may
        block; raises OSError. epochs: NOTIFY_INC_EPOCH is known.

        mounts_inside: whether something is mounted inside the union, which an epoch would detach. tell_many: the same
        for many nodes and names; returns how many the kernel had nothing of, and the errno of another failure, 0.
        """
        self._tell = tell
        self._tell_many = tell_many
        self.epochs = epochs
        self._mounts_inside = mounts_inside
        self._looked = -1.0
        self._epoch_is_safe = False
        self.state = State.ACCEPTING
        self.since: float | None = None
        self._patient = _Shard(_PATIENCE_SECONDS)
        self._rest = _Shard()
        """What there is much of, and nobody is to wait behind."""
        self._shards = [*(_Shard() for _ in range(_THREADS)), self._patient, self._rest]
        for number, shard in enumerate(self._shards):
            shard.thread = threading.Thread(target=self._work, args=(shard,), name=f"invalidate-{number}", daemon=True)
            shard.thread.start()

    # -- KernelNotifier -----------------------------------------------------------------------

    def entry(self, parent: int, name: bytes) -> None:
        self._put(("entry", parent, name))

    def expire(self, parent: int, name: bytes) -> None:
        self._put(("expire", parent, name))

    def attributes(self, node: int) -> None:
        self._put(("attributes", node, b""))

    def attributes_soon(self, node: int) -> None:
        self._put(("attributes", node, b""), self._patient)

    def data(self, node: int) -> None:
        self._put(("data", node, b""))

    def expire_all(self, parent: int, names: Iterable[bytes]) -> None:
        for some in _together(names):
            self._put(("expire many", parent, b"/".join(some)))

    def attributes_all(self, nodes: Iterable[int]) -> None:
        for some in _together(nodes):
            self._put(("attributes many", 0, array("Q", some).tobytes()), self._rest)

    def data_all(self, nodes: Iterable[int]) -> None:
        for some in _together(nodes):
            self._put(("data many", 0, array("Q", some).tobytes()), self._rest)

    def everything(self) -> bool:
        """One notification for every cached name; False when there is none, and names must be given."""
        safe = self._may_use_epoch(0.0)
        if safe:
            self._put(_EPOCH)
        return safe

    def _may_use_epoch(self, max_age: float) -> bool:
        """max_age: seconds that an earlier look for mounts inside the union is good for."""
        now = monotonic()
        if self.epochs and now - self._looked > max_age:
            self._looked, self._epoch_is_safe = now, not self._mounts_inside()
        return self._epoch_is_safe

    def _put(self, key: _Key, shard: _Shard | None = None) -> None:
        if shard is None:
            shard = self._shards[key[1] % _THREADS]
        if key in shard.pending:
            return  # its thread has not begun with that; the lock takes longer than this look
        with shard.ready:
            if self.state is not State.ACCEPTING or key in shard.pending:
                return
            if key[0] in _NAMES:
                if _EPOCH in shard.pending:
                    return  # sent later than this was put, so it covers this name too
                if len(shard.pending) >= _LIMIT and self._may_use_epoch(_LOOK_SECONDS):
                    # Attributes and pages stay, no epoch covers them; there are as many as nodes, at most.
                    shard.pending = {k: v for k, v in shard.pending.items() if k[0] not in _NAMES}
                    key = _EPOCH
            shard.sequence += 1
            shard.pending[key] = (shard.sequence, monotonic() if self.since is None else self.since)
            if len(shard.pending) == 1:  # else it knows that there is something to do
                shard.ready.notify_all()

    # -- threads ------------------------------------------------------------------------------

    def _work(self, shard: _Shard) -> None:
        while True:
            with shard.ready:
                if not shard.pending:
                    shard.hurry = False
                    while not shard.pending:
                        if shard.stopping:
                            return
                        shard.ready.wait()
                    if shard.patience:
                        shard.ready.wait_for(lambda: shard.hurry or shard.stopping, shard.patience)
                key = next(iter(shard.pending))
                sequence, since = shard.pending.pop(key)
                shard.sending = since
            self._send(key, shard)
            taken = monotonic() - since
            with shard.ready:
                shard.done = sequence
                shard.sending = None
                shard.latency.observe(taken)
                shard.latency_max = max(shard.latency_max, taken)
                shard.ready.notify_all()

    def _send(self, key: _Key, shard: _Shard) -> None:
        kind, node, name = key
        if kind in _MANY:
            self._send_many(key, shard)
            return
        shard.sent[kind] += 1
        try:
            self._tell(kind, node, name)
        except OSError as error:
            if error.errno in _NOTHING_HELD:
                shard.missed += 1
            elif error.errno != errno.ENODEV:  # unmounted already
                shard.failed += 1
                log.error("kernel refused to forget %s of node %d: %s", kind, node, error.strerror)

    def _send_many(self, key: _Key, shard: _Shard) -> None:
        kind, ones = _MANY[key[0]][0], _MANY[key[0]][1](*key[1:])
        if self._tell_many is None:
            for one in ones:
                self._send((kind, *one), shard)
            return
        shard.sent[kind] += len(ones)
        missed, failure = self._tell_many(kind, ones)
        shard.missed += missed
        if failure not in (0, errno.ENODEV):
            shard.failed += 1
            log.error("kernel refused to forget some %s: %s", kind, os.strerror(failure))

    # -- barriers -----------------------------------------------------------------------------

    def flush(self) -> None:
        """Return when everything put before this call has reached the kernel. Never from a handler or the loop."""
        for shard in self._shards:
            with shard.ready:
                target = shard.sequence
                if shard.pending:
                    shard.hurry = True
                    shard.ready.notify_all()
                while shard.done < target and shard.pending:
                    shard.ready.wait()
                while shard.done < target and not shard.stopping:
                    shard.ready.wait(1.0)

    def stop(self, deadline: float = 10.0) -> bool:
        """Finish what is pending and join the threads; False when some are still busy after `deadline` seconds."""
        self.state = State.DRAINING
        for shard in self._shards:
            with shard.ready:
                shard.stopping = True
                shard.ready.notify_all()
        end = monotonic() + deadline
        joined = True
        for shard in self._shards:
            assert shard.thread is not None
            shard.thread.join(max(end - monotonic(), 0))
            joined = joined and not shard.thread.is_alive()
        self.state = State.STOPPED
        return joined

    def statistics(self) -> InvalidatorStatistics:
        shards = self._shards
        known = [since for since in (shard.oldest() for shard in shards) if since is not None]
        return InvalidatorStatistics(
            state=self.state.value,
            sent={kind: sum(shard.sent[kind] for shard in shards) for kind in shards[0].sent},
            missed=sum(shard.missed for shard in shards),
            pending=sum(len(shard.pending) for shard in shards),
            failed=sum(shard.failed for shard in shards),
            latency_sum=sum(shard.latency.sum for shard in shards),
            latency_max=max(shard.latency_max for shard in shards),
            latency_counts=[sum(column) for column in zip(*(shard.latency.value() for shard in shards), strict=True)],
            oldest=monotonic() - min(known) if known else 0.0,
        )
