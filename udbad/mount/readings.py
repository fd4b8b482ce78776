"""What a mount process says about itself at a scrape: every metric of origin mount, as metrics.Samples.

Everything is read from counters and tables that exist anyway; only copy-ups are counted here, by the
callbacks of edge/waiting.py. Branches are asked in threads and given up after PROBE_SECONDS: a branch that
hangs must not hang the scrape, and it gets no second question before it has answered the first.

Event loop only. Must not fail because of a branch, and must not touch the mount.
"""

from __future__ import annotations

import errno
import os
import sys
from collections import Counter
from typing import TYPE_CHECKING, Final

from udbad import __version__
from udbad.branch.branches import Branch
from udbad.coherence import inotify, leases
from udbad.coherence.replays import Kind
from udbad.edge.native import Native
from udbad.inodes.table import Census
from udbad.kernel.boundary import operations
from udbad.metrics import COHERENCE_STATES, COPYUP_BUCKETS, DEPTH_BUCKETS, EVENT_KINDS, Counts, Samples
from udbad.mount.hearing import Heard
from udbad.types import Trigger
from udbad.union.copyup import Job

if TYPE_CHECKING:
    from udbad.mount.mountproc import MountProcess

PROBE_SECONDS: Final = 0.3
_CENSUS_PORTION: Final = 10_000
"""Nodes that are counted between two requests, which takes less than a millisecond."""

_KIND_BITS: Final = {
    "gone": inotify.GONE,
    "names": inotify.NAMES,
    "content": inotify.CONTENT,
    "attributes": inotify.ATTRIBUTES,
}
assert set(_KIND_BITS) == set(EVENT_KINDS)

Space = tuple[int, int]
"""Bytes available, size in bytes."""


def text(path: bytes) -> str:
    """A path as a label value; labels are UTF-8."""
    return path.decode("utf-8", "backslashreplace")


class MetricsReader:
    """Reads the numbers of one mount process."""

    def __init__(self, process: MountProcess) -> None:
        self._process = process
        self._copyups: dict[tuple[str, str], Counts] = {}
        self._copied = 0
        self._failures: dict[str, int] = {}
        self._asked: set[int] = set()
        self.heard: dict[int, Heard] = {}
        """By the id of a branch: what is heard of other hosts."""
        process.edge.waiting.on_copyup = self._copied_up
        process.edge.waiting.on_copyup_failed = self._copyup_failed

    def _copied_up(self, job: Job, seconds: float) -> None:
        key = (job.trigger.value, job.method.value)
        counts = self._copyups.get(key)
        if counts is None:
            counts = self._copyups[key] = Counts(COPYUP_BUCKETS)
        counts.observe(seconds)
        self._copied += job.copied

    def _copyup_failed(self, trigger: Trigger, number: int) -> None:
        name = errno.errorcode.get(number, "unknown")
        self._failures[name] = self._failures.get(name, 0) + 1

    async def census(self) -> Census:
        """Of all nodes; some at a time, as there may be a million."""
        import trio  # as the rest of this module serves before that is there (later.py)

        census = Census()
        nodes = list(self._process.sb.table.nodes.values())
        for first in range(0, len(nodes), _CENSUS_PORTION):
            if first:
                await trio.lowlevel.checkpoint()  # after this some may be gone: they were there when this began
            census.count(nodes[first : first + _CENSUS_PORTION])
        return census

    async def samples(self) -> Samples:
        """Every metric of the mount. Takes PROBE_SECONDS at most beside what the event loop is busy with."""
        spaces = await self._spaces()
        census = await self.census()
        # After this: the branches may be others; one that was not asked yet is left out this time.
        return {
            **self._about(),
            **self._requests(),
            **self._copying(),
            **self._coherence(census),
            **self._replays(),
            **self._hosts(),
            **self._tables(census),
            **self._survival(),
            **self._branches(spaces),
        }

    def _about(self) -> Samples:
        process = self._process
        options = process.options
        info = (process.coherence.name, text(process.mount_point), options.create, options.cpup)
        return {
            "udbad_mount_info": [(info, 1)],
            "udbad_build_info": [((__version__, sys.version.split()[0], os.uname().release), 1)],
        }

    def _requests(self) -> Samples:
        requests = []
        durations = []
        for name, stats in operations().items():
            answered = sum(stats.buckets)
            requests += [
                ((name, "ok"), answered - stats.errors),
                ((name, "error"), stats.errors - stats.bugs),
                ((name, "bug"), stats.bugs),
            ]
            durations.append(((name,), [*stats.buckets, stats.seconds]))
        counters = self._process.sb.counters
        depths = {
            "found": counters.depth_found,
            "negative": counters.depth_negative,
            "whiteout": counters.depth_whiteout,
        }
        return {
            "udbad_requests_total": list(requests),
            "udbad_request_duration_seconds": list(durations),
            "udbad_lookup_depth": [((outcome,), _depths(counts)) for outcome, counts in depths.items()],
        }

    def _copying(self) -> Samples:
        return {
            "udbad_copyup_duration_seconds": [(key, counts.value()) for key, counts in self._copyups.items()],
            "udbad_copyup_bytes_total": [((), self._copied)],
            "udbad_copyups_in_flight": [((), len(self._process.edge.waiting.copyups))],
            "udbad_copyup_failures_total": [((name,), count) for name, count in self._failures.items()],
        }

    def _coherence(self, census: Census) -> Samples:
        coherence = self._process.coherence
        statistics = coherence.statistics(census)
        sent = self._process.invalidator.statistics()
        branches = self._process.sb.branches.branches
        events = {(text(branch.path), kind): 0 for branch in branches for kind in EVENT_KINDS}
        for key, count in coherence.branch_events.items():
            kind = next(kind for kind, bit in _KIND_BITS.items() if key & bit)
            events[text(branches[key >> inotify.KIND_BITS].path), kind] += count
        states = [
            ((text(branch.path), state), int(coherence.state_of(branch) == state))
            for branch in branches
            for state in COHERENCE_STATES
        ]
        return {
            "udbad_coherence_events_total": list(events.items()),
            "udbad_coherence_echoes_total": [((), statistics.echoes)],
            "udbad_coherence_overflows_total": [((), statistics.overflows)],
            "udbad_redirects_unusable_total": [((), self._process.sb.bad_redirects)],
            "udbad_coherence_lag_seconds": [((), sent.oldest)],
            "udbad_coherence_state": list(states),
            "udbad_invalidations_total": [((kind,), count) for kind, count in sent.sent.items()],
            "udbad_invalidation_latency_seconds": [((), sent.latency_counts)],
            "udbad_watches": [((), statistics.watches)],
            "udbad_watch_limit": [((), statistics.watch_limit or inotify.watch_limit())],
        }

    def _replays(self) -> Samples:
        replayer = self._process.replayer
        done = Counter() if replayer is None else replayer.done
        return {
            "udbad_replayed_events_total": [((kind.value,), done[kind]) for kind in Kind],
            "udbad_replays_dropped_total": [((), 0 if replayer is None else replayer.dropped)],
        }

    def _hosts(self) -> Samples:
        process, moment = self._process, leases.now()
        branches = process.sb.branches.branches
        known = [(text(one.path), one, self.heard[one.id]) for one in branches if one.id in self.heard]
        return {
            "udbad_hosts_believed": [
                ((path,), int(process.coherence.state_of(branch) == "healthy")) for path, branch, _ in known
            ],
            "udbad_hosts_lag_seconds": [
                ((path, host), max(moment - passed, 0.0))
                for path, _, one in known
                for host, passed in one.hosts.items()
            ],
            "udbad_hosts_heartbeat_seconds": [
                ((path,), max(moment - one.last, 0.0)) for path, _, one in known if one.last
            ],
            "udbad_hosts_gaps_total": [((path,), one.gaps) for path, _, one in known],
            "udbad_hosts_hints_total": [((path,), one.hints) for path, _, one in known],
        }

    def _tables(self, census: Census) -> Samples:
        sb = self._process.sb
        table = sb.table.statistics(census)
        return {
            "udbad_inodes": [((), table.nodes)],
            "udbad_directory_views": [((), table.views)],
            "udbad_open_handles": [((), len(sb.handles))],
        }

    def _survival(self) -> Samples:
        edge, record = self._process.edge, self._process.record
        slot = edge.slot if isinstance(edge, Native) else None
        resent, decided, answered, refused = (0, 0, 0, 0) if slot is None else slot.counts()
        return {
            "udbad_takeover_duration_seconds": [((), self._process.pauses.value())],
            "udbad_requests_resent_total": [((), resent)],
            "udbad_requests_recovered_total": [(("decided",), decided), (("answered",), answered)],
            "udbad_requests_refused_total": [((), refused)],
            "udbad_state_bytes": [((), 0 if record is None else record.memory_used)],
        }

    def _branches(self, spaces: dict[int, Space | None]) -> Samples:
        branches = [branch for branch in self._process.sb.branches.branches if branch.id in spaces]
        ro = self._process.options.ro
        known = [(text(branch.path), space) for branch in branches if (space := spaces[branch.id]) is not None]
        return {
            "udbad_branch_up": [((text(branch.path),), int(spaces[branch.id] is not None)) for branch in branches],
            "udbad_branch_writable": [((text(branch.path),), int(branch.writable and not ro)) for branch in branches],
            "udbad_branch_free_bytes": [((path,), free) for path, (free, _) in known],
            "udbad_branch_size_bytes": [((path,), size) for path, (_, size) in known],
        }

    async def _spaces(self) -> dict[int, Space | None]:
        """Branch id to its space, None for a branch that does not answer or whose directory is gone."""
        import trio  # as the rest of this module serves before that is there (later.py)

        spaces: dict[int, Space | None] = {}

        async def ask(branch: Branch) -> None:
            if branch.id in self._asked:
                return
            self._asked.add(branch.id)
            # Of its own: the branch may be removed while the thread waits.
            fd = os.dup(branch.root_fd)
            spaces[branch.id] = await trio.to_thread.run_sync(
                self._ask, fd, branch.id, abandon_on_cancel=True, limiter=trio.CapacityLimiter(1)
            )

        branches = self._process.sb.branches.branches
        for branch in branches:
            spaces[branch.id] = None
        with trio.move_on_after(PROBE_SECONDS):
            async with trio.open_nursery() as nursery:
                for branch in branches:
                    if not branch.offline:
                        nursery.start_soon(ask, branch)
        return spaces

    def _ask(self, fd: int, branch_id: int) -> Space | None:
        """In a thread of its own, which may wait for ever."""
        try:
            if os.fstat(fd).st_nlink == 0:
                return None
            space = os.fstatvfs(fd)
        except OSError:
            return None
        finally:
            os.close(fd)
            self._asked.discard(branch_id)
        return space.f_bavail * space.f_frsize, space.f_blocks * space.f_frsize


def _depths(counts: list[int]) -> list[float]:
    result = Counts(DEPTH_BUCKETS)
    for depth, times in enumerate(counts):
        if times:
            result.observe(depth, times)
    return result.value()
