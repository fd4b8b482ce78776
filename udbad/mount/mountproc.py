"""The mount process: builds everything one mount needs, serves it, and takes it down in order.

Order of the end: unmount, let the event loop return, give up what waits, stop the watcher, drain and join the
invalidator, close. A mount that ends cleanly marks its writable branches clean; after any other end the next mount
sweeps them for temporary names first.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Callable
from contextlib import ExitStack
from types import FrameType
from typing import TYPE_CHECKING

from udbad import __version__, compiled
from udbad.branch import capabilities
from udbad.branch.accept import open_branches, permission_warnings
from udbad.branch.credentials import Credentials
from udbad.branch.policy import parse_copyup, parse_create
from udbad.branch.writelock import WriteLocks
from udbad.coherence.base import Coherence
from udbad.coherence.none import NoneCoherence
from udbad.coherence.reval import RevalCoherence
from udbad.control import exporter, registry
from udbad.edge.holding import Holding
from udbad.edge.idmap import IdMap
from udbad.edge.native import Native
from udbad.edge.once import copies
from udbad.errors import ExitCode, UserError
from udbad.inodes.record import Record
from udbad.kernel import boundary
from udbad.kernel.invalidator import Invalidator
from udbad.kernel.mounts import mounts_inside
from udbad.kernel.passthrough import Passthrough
from udbad.kernel.session import Session, check_mount_point
from udbad.metrics import PAUSE_BUCKETS, Counts, Samples, Server
from udbad.mount import descriptors, handover, iomode, later, strictness
from udbad.mount.handover import Predecessor
from udbad.mount.keeper import Keeper
from udbad.mount.offline import Offline, end_for_another
from udbad.mount.presence import NOBODY, Identity, Presence
from udbad.mount.readings import MetricsReader, text
from udbad.mount.writing import Writing
from udbad.settings import ids
from udbad.settings.options import MountOptions, format_options
from udbad.union import homes, recall
from udbad.union.fs import UnionFs
from udbad.union.superblock import Superblock, UnionOptions

if TYPE_CHECKING:
    import socket

    from udbad.edge.portable import Portable
    from udbad.edge.portable_session import PortableSession
    from udbad.edge.replay import Replayer
    from udbad.mount.beside import Beside
    from udbad.mount.life import Guard

log = logging.getLogger(__name__)

STOPPING = signal.SIGINT, signal.SIGTERM


class MountProcess:
    """One mount from its options to its end. restarts: how often another process has taken it over; pauses: how long
    that took, in seconds."""

    def __init__(
        self,
        options: MountOptions,
        mount_point: bytes,
        identity: Identity = NOBODY,
        record: Record | None = None,
        predecessor: Predecessor | None = None,
        keeper: Keeper | None = None,
    ) -> None:
        """mount_point: absolute path of an existing directory. record: what a successor is to know goes there; keeper:
        and has it.
        predecessor: whose mount goes on here; `options` are those that it had. Raises UserError.
        """
        self.options = options
        self.asked = mount_point
        self.mount_point = registry.real_mount_point(mount_point)
        self.identity = identity
        self.configured = format_options(options)
        self.started = time.time() if predecessor is None else predecessor.facts["started"]
        self.restarts: int = 0 if predecessor is None else predecessor.facts["restarts"] + 1
        self.pauses = Counts(PAUSE_BUCKETS)
        if predecessor is not None:
            *self.pauses.buckets, self.pauses.sum = predecessor.facts["pauses"]
        self.record = record
        self.keeper = keeper
        self._predecessor = predecessor
        self._facts_fd = -1
        self.mortal = ""
        """Why the mount ends with this process, if it does."""
        self.guard: Guard | None = None
        for notice in options.notices:
            log.info("%s", notice)
        if compiled.why_not():
            log.info("runs uncompiled, which takes more CPU time: %s", compiled.why_not())
        max_fds, all_fds = descriptors.limits()
        self._io_fallbacks: list[str] = []
        self.presence = Presence(self.mount_point, identity, options.control)
        with ExitStack() as ending:
            ending.callback(self.presence.close)
            self._dead = 0
            if predecessor is None:
                self._dead = self.presence.claim()
                if not self._dead and check_mount_point(self.mount_point):
                    log.info("mount point %s is not empty; its content is hidden while mounted", text(self.mount_point))
                self.branches = open_branches(options.branches, options.ro, self.mount_point, options.whiteouts)
            else:
                self.branches = handover.branches(predecessor.facts, predecessor.take, predecessor.hung)
            ending.callback(lambda: self.branches.close())  # those of then
            if record is not None and predecessor is not None:
                self._facts_fd = handover.begin(record, self.branches)
            self.offline = Offline(self.branches, predecessor, options.branch_timeout)
            if options.warn_perm and predecessor is None:
                for line in permission_warnings(self.branches):
                    log.info("%s", line)
            creds = Credentials()
            # Released after the marks: the next to write to a branch must not find a mark, nor lose its own to us.
            self.write_locks = WriteLocks()
            ending.callback(self.write_locks.close)
            if predecessor is not None:
                self.write_locks.take_over(handover.locks(predecessor.facts, predecessor.take), self.branches)
            if not options.ro:
                self.write_locks.take(self.branches.answering)
            self.writing = Writing()
            ending.callback(self.writing.close)
            if not options.ro:
                self.writing.begin(self.branches.answering, options.plink, ready=predecessor is not None)
            strictness.settle(self)
            self.sb = Superblock(self.branches, _union_options(options), max_fds, all_fds)
            ending.callback(homes.close, self.sb)
            homes.load(self.sb)
            self.fs = UnionFs(self.sb, creds)
            ending.callback(self.fs.walks.close)
            endpoint = self._export()
            if endpoint is not None:
                ending.callback(endpoint.close)
            if predecessor is None:
                self.restrictions = self.branches.restrictions
                strictness.tell(self.branches, options)
            else:
                self.restrictions = frozenset(predecessor.facts["restrictions"])
            self._is_portable = is_portable(options)
            why_not = _why_not_replay(options)
            self._replays = options.replay != "off" and why_not is None
            if options.replay != "off" and why_not is not None:
                log.info("replay has no effect: %s", why_not)
            asked, reasons = iomode.possible(options, self.branches, self._is_portable)
            if predecessor is not None and options.io == "auto":
                asked, reasons = "", []  # as was agreed on, which branches that have come since may not suit
            for line in reasons:
                self._fall_back(line)
            if predecessor is None:
                self.session = self._begin_session(asked)
            else:
                self.session = handover.session(predecessor, self.mount_point)
            ending.callback(self.session.close)
            if self.session.no_open:  # before the edge, whose table depends on it
                self.fs.keep_files(max(all_fds // 4, 64))
            elif asked == "cached":
                self._fall_back(iomode.NO_CACHED)
            recalled = None
            if predecessor is not None:
                recalled = recall.recall(
                    self.fs,
                    predecessor.record,
                    predecessor.takes,
                    copies(predecessor.record.slots),
                    self.offline.abandoned,
                )
            if record is not None:
                recall.keep(self.fs, record, recalled)
            self.invalidator = Invalidator(
                self.session.tell,
                self.session.has_epochs,
                lambda: mounts_inside(self.session.connection),
                self.session.tell_many if isinstance(self.session, Session) else None,
            )
            ending.callback(self._stop_invalidator)
            self.coherence = strategy_of(options.udba)(self.sb, self.invalidator)
            ending.callback(lambda: self.coherence.stop())  # the one of then
            self.coherence.start()
            if predecessor is not None:
                self.coherence.recalled()
            self.passthrough: Passthrough | None = None
            self.holding = Holding(self.fs.walks)
            self.edge = self._make_edge()
            self._lend_turns()
            if asked == "passthrough" and self.passthrough is None:
                self._fall_back(iomode.NO_PASSTHROUGH)
            ending.callback(self.edge.close)
            self.readings = MetricsReader(self)
            self.beside: Beside  # soon after it serves
            self._stop_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
            ending.callback(self._close_stop_fd)
            self.asked_to_stop = 0
            """The signal that did, before trio could see it."""
            self._serving = self.ready = False
            self._ending = ending.pop_all()

    def io(self) -> tuple[str, list[str]]:
        """Who reads and writes files, by the name of the option, and where it cannot be as asked for: a line each."""
        if self.passthrough is not None:
            return "passthrough", self._io_fallbacks + self.passthrough.fallbacks
        return "requests" if self.fs.kept is None else "cached", self._io_fallbacks

    def _fall_back(self, line: str) -> None:
        self._io_fallbacks.append(line)
        log.info("%s", line)

    def _begin_session(self, io: str) -> Session | PortableSession:
        if not self._is_portable:
            return Session(
                self.mount_point, self._source(), self.flags_for(self.options), self._acl(), io,
                self.options.allow_idmap,
            )  # fmt: skip
        if self.options.allow_idmap or _id_map(self.options) is not None:
            text = "uidmapping, gidmapping, squash_to_uid, squash_to_gid and allow_idmap cannot be through pyfuse3"
            raise UserError(text, ExitCode.OPTION)
        # Not for everybody: importing pyfuse3 takes a while.
        from udbad.edge.portable_session import PortableSession

        return PortableSession(self.mount_point, self._source(), self.flags_for(self.options), self._acl())

    def _acl(self) -> bool:
        """Whether the kernel is to ask for ACLs, which are attributes."""
        return self.options.acl and self.options.xattrs

    def _make_edge(self) -> Native | Portable:
        session, stale = self.session, self.holding.stale
        if isinstance(session, Session):
            if session.passthrough:
                self.passthrough = Passthrough(session.fd, self.fs)
            return self._make_native(session, stale)
        from udbad.edge.portable import Portable

        return Portable(session, self.fs, self.coherence, stale)

    def _make_native(self, session: Session, stale: Callable[[int], None]) -> Native:
        if self.record is not None and self._predecessor is not None:
            handover.carry_on(self._predecessor, self.record)
        native = Native(
            session.fd, self.fs, self.coherence, stale, session.setxattr_ext, self.passthrough, self.record,
            _id_map(self.options), self._replays,
        )  # fmt: skip
        if native.once is not None:
            native.once.settle()
        if self._replays:
            from udbad.edge.replay import Replayer  # not for everybody

            native.replayer = Replayer(self.options.replay, native, lambda: mounts_inside(self.session.connection))
            native.replayer.attend(self.coherence)
        return native

    def _source(self) -> str:
        """What /proc/mounts shows as source, and nothing beside it: umount(8) and findmnt(8) look for this word."""
        return self.options.fsname if self.options.fsname != "none" else self.identity.name or "none"

    def _take_over(self, predecessor: Predecessor) -> None:
        """From here on the mount is ours, and what was asked of the predecessor is asked of us. Raises OSError."""
        assert isinstance(self.session, Session)
        self.session.begin_again()
        self._predecessor = None
        log.info("%s goes on in process %d", text(self.mount_point), os.getpid())
        self._ending.callback(predecessor.end)  # if that comes before
        self._read_on(predecessor)

    def _read_on(self, predecessor: Predecessor) -> None:
        """Make nodes that nobody has asked for, between requests, and let go of the predecessor when there are none."""
        assert isinstance(self.edge, Native)
        unread = self.sb.table.unread
        if self.sb.table.read_some():
            self.edge.loop.post(lambda: self._read_on(predecessor))
            return
        predecessor.end()
        if unread is not None and self.record is not None:
            self.record.bound(unread.live_bytes)

    def write_entry(self) -> None:
        """Bring what others can read about this mount up to date, a successor among them. Raises OSError."""
        if self.record is not None:
            self._facts_fd = handover.write(self, self.record, self._facts_fd)
        registration = self.presence.registration
        if registration is None:
            return
        registration.write_branches(branch.describe() for branch in self.branches.branches)
        registration.write(
            registry.Entry(
                name=self.identity.name,
                mount_point=os.fsdecode(self.mount_point),
                asked=os.fsdecode(self.asked),
                options=format_options(self.options),
                configured=self.configured,
                pid=os.getpid(),
                connection=self.session.connection,
                supervised=self.identity.supervised,
                version=__version__,
                started=self.started,
                directory=registration.path,
                namespace=registry.mount_namespace(),
                keeper=0 if self.keeper is None else self.keeper.pid,
                record=0 if self.record is None else self.record.fd,
                ended=-1 if self.guard is None else self.guard.ended,
            )
        )

    def _export(self) -> Server | None:
        """Serve metrics of this mount alone, when asked to. The mount matters more: without them the log says so."""
        if self.options.metrics is None:
            return None
        name = self.identity.name or text(self.mount_point)
        # Nobody starts a standalone mount again, and its configuration was read once.
        kept: Samples = {
            "udbad_mount_restarts_total": [((), self.restarts)],
            "udbad_config_last_reload_success": [((), 1)],
            "udbad_config_last_reload_timestamp_seconds": [((), self.started)],
        }
        host, port = exporter.parse_address(self.options.metrics)
        try:
            return exporter.start(host, port, lambda: {name: self.presence.control_path}, lambda: {name: kept})
        except UserError as error:
            log.warning("no metrics are served: %s", error.message)
            return None

    def serve(self, on_ready: Callable[[], None]) -> None:
        """Serve until unmounted or told to stop by SIGINT or SIGTERM; on_ready is called once requests are answered.

        Others see the mount only when everything that can be refused has been done; `abandon` undoes what was done so
        far. Raises UserError, also when the connection was aborted through fusectl.
        """
        self._serving = True
        with ExitStack() as ending:
            wanted = [self._stop_fd]
            listener = self.presence.listen(self._predecessor)
            if listener is not None:
                ending.enter_context(listener)
                wanted.append(listener.fileno())
            if self._predecessor is None:
                self.session.mount(self._dead)
            else:
                self.pauses.observe(time.monotonic() - self._predecessor.died)
            try:
                self.write_entry()
            except OSError as error:
                log.warning("not registered in %s: %s", self.identity.run_dir, error.strerror)
            self.presence.release_claim()
            if self._predecessor is not None:
                self._take_over(self._predecessor)
            if self.session.lacks:
                log.info("served through %s, without %s", self.session.edge, "; ".join(self.session.lacks))
            on_ready()
            self.ready = True
            self.edge.run(
                lambda: self._attend(listener), lambda begin: later.load_in_thread(boundary.requests, wanted, begin)
            )
            if self.guard is not None and not self.edge.aborted:
                self.guard.over()  # before anything is closed that another process would need
        if self.edge.aborted:
            raise UserError(f"{text(self.mount_point)}: the connection was aborted; its users get errors until it is "
                            "unmounted or mounted again", ExitCode.FAILURE)  # fmt: skip

    async def _attend(self, listener: socket.socket | None) -> None:
        """On trio, until requests are not served any more: all else."""
        from udbad.mount.beside import Beside  # when it serves, later.py

        self.holding.begin()
        self.beside = Beside(self)
        await self.beside.run(listener, self.asked_to_stop)

    def check_successor(self) -> None:
        """Raises UserError when no other process could go on with the mount."""
        if self.keeper is None:
            raise UserError("nobody could go on with the mount", ExitCode.FAILURE)

    def make_room(self) -> None:
        """End here, for another process to go on with the mount. Raises UserError when none could."""
        self.check_successor()
        self.write_entry()
        log.info("makes room for another process")
        end_for_another()

    @property
    def replayer(self) -> Replayer | None:
        return self.edge.replayer if isinstance(self.edge, Native) else None

    def on_late_signal(self, number: int, frame: FrameType | None) -> None:
        """A signal when nothing on trio waits for it: before that is there it will see that there was one. After the
        mount has gone it comes too late: dying half-way through `close` would leave the branches marked, and the
        supervisor with a process that was killed."""
        if not self._serving:
            signal.default_int_handler(number, frame)
        self.asked_to_stop = number
        if self._stop_fd >= 0:
            os.eventfd_write(self._stop_fd, 1)

    def _close_stop_fd(self) -> None:
        fd, self._stop_fd = self._stop_fd, -1
        os.close(fd)

    def close(self) -> None:
        """The end after serving: release everything, in order, and mark the branches clean."""
        self._ending.close()

    def abandon(self) -> None:
        """The end of a start that failed: as if it had not been tried. Nothing has been served."""
        if self._predecessor is not None:
            # Another process will try: the mount and what is known of it stay.
            self.presence.leave()
        elif self.session.mounted:
            try:
                self.session.unmount(lazy=True)
            except OSError as error:
                log.warning("%s: %s", text(self.mount_point), error.strerror)
        self._ending.close()

    def _stop_invalidator(self) -> None:
        if not self.invalidator.stop():
            log.warning("some notifications are still in the kernel")

    def flags_for(self, options: MountOptions) -> frozenset[str]:
        """The flags of the mount with these options; `restrictions`: of every branch that it ever had."""
        return options.mount_flags(self.restrictions)

    def set_read_only(self, ro: bool) -> None:
        """Have the union refuse every change, or none; what that means for the branches is the caller's."""
        self.options = self.options.but(ro=ro)
        self.apply_union_options()

    def apply_union_options(self) -> None:
        """Have the union follow `options`, which have changed."""
        self.sb.options = _union_options(self.options)
        self.coherence.options_changed()

    def restart_coherence(self, mode: str | None = None) -> None:
        """Begin anew with a strategy (None: the same one) after one that has handed over."""
        strategy = strategy_of(mode or self.coherence.name)
        self.coherence = self.edge.operations.coherence = strategy(self.sb, self.invalidator)
        if self.replayer is not None:
            self.replayer.attend(self.coherence)
        self._lend_turns()
        self.coherence.start()
        self.beside.coherence_restarted()

    def _lend_turns(self) -> None:
        """Let the strategy do between requests what would take long at once."""
        if isinstance(self.edge, Native):
            self.coherence.later = self.edge.loop.post


def strategy_of(mode: str) -> type[Coherence]:
    """Raises ValueError for a mode that does not exist."""
    if mode == "notify":
        from udbad.coherence.notify import NotifyCoherence  # with it comes asyncio, which others can wait for

        return NotifyCoherence
    known: dict[str, type[Coherence]] = {"none": NoneCoherence, "reval": RevalCoherence}
    if mode not in known:
        raise ValueError(f"unknown mode {mode!r}; known are {', '.join(known)}, notify")
    return known[mode]


def is_portable(options: MountOptions) -> bool:
    """Whether requests come through pyfuse3."""
    return options.edge == "pyfuse3" or (options.edge == "auto" and not capabilities.may_mount())


def _why_not_replay(options: MountOptions) -> str | None:
    """Why watchers of the union cannot be told of direct changes; None when they can."""
    if is_portable(options):
        return "it is served through pyfuse3"
    if options.allow_idmap:
        return "with allow_idmap, the kernel does not say who asks"
    return None


def _id_map(options: MountOptions) -> IdMap | None:
    """None where every id is shown as it is."""
    users = ids.of(options.uidmapping, options.squash_to_uid)
    groups = ids.of(options.gidmapping, options.squash_to_gid)
    return IdMap(users, groups) if options.allow_idmap or users != ids.SAME or groups != ids.SAME else None


def _union_options(options: MountOptions) -> UnionOptions:
    """The part of the options that the union itself looks at."""
    return UnionOptions(
        create=parse_create(options.create),
        copyup=parse_copyup(options.cpup),
        read_only=options.ro,
        plink=options.plink,
        show_whiteouts=options.shwh,
        dirwh=options.dirwh,
        watch_reserve=options.watch_reserve,
        watch=options.watch,
        opaque_always=options.diropq == "always",
        sum_space=options.sum,
        acl=options.acl,
        direct_io=options.dio,
        dirren=options.dirren,
        fsync_copyup=options.fsync_copyup and not options.volatile,
        volatile=options.volatile,
        xattrs=options.xattrs,
        labels=options.labels,
    )
