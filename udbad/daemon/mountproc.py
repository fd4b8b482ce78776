"""The mount process: builds everything one mount needs, serves it, and takes it down in order.

Order of the end: stop the watcher, drain and join the invalidator, unmount, let pyfuse3's loop return,
close. A mount that ends cleanly marks its writable branches clean; after any other end the next mount
sweeps them for temporary names first.
"""

from __future__ import annotations

import errno
import gc
import logging
import os
import resource
import signal
from dataclasses import asdict
from typing import Any

import trio

from udbad.branch.accept import open_branches, permission_warnings, prepare_writable
from udbad.branch.branches import BranchSet
from udbad.branch.credentials import Credentials
from udbad.branch.policy import parse_copyup, parse_create
from udbad.coherence.base import Coherence
from udbad.coherence.none import NoneCoherence
from udbad.coherence.notify import NotifyCoherence
from udbad.coherence.reval import RevalCoherence
from udbad.config import MountOptions
from udbad.daemon import control
from udbad.kernel.boundary import OPERATIONS
from udbad.kernel.invalidator import Invalidator
from udbad.kernel.ops import Operations
from udbad.kernel.session import Session, check_mount_point
from udbad.kernel.waker import Waker
from udbad.union import fsck, plink
from udbad.union.fs import UnionFs
from udbad.union.tree import Tree, UnionOptions

log = logging.getLogger(__name__)

STRATEGIES: dict[str, type[Coherence]] = {
    "none": NoneCoherence,
    "reval": RevalCoherence,
    "notify": NotifyCoherence,
}

_RESERVED_FDS = 1024
_LINGER_SECONDS = 2
_MAX_DIRECTORY_FDS = 100_000


class MountProcess:
    """One mount from its options to its end."""

    def __init__(self, options: MountOptions, mount_point: bytes) -> None:
        """mount_point: absolute path of an existing directory. Raises UserError."""
        self.options = options
        self.mount_point = mount_point
        for notice in options.notices:
            log.info("%s", notice)
        max_fds = _raise_fd_limit()
        if check_mount_point(mount_point):
            log.info("mount point %s is not empty; its content is hidden while mounted", os.fsdecode(mount_point))
        self.branches = open_branches(options.branches, options.ro, mount_point)
        if options.warn_perm:
            for line in permission_warnings(self.branches):
                log.info("%s", line)
        creds = Credentials()
        _prepare(self.branches, options)
        self.tree = Tree(self.branches, _union_options(options), max_fds)
        plink.load(self.tree)
        self.fs = UnionFs(self.tree, creds)
        flags: set[str] = set(options.kernel_flags)
        if options.ro:
            flags.add("ro")
        self.session = Session(mount_point, options.fsname, frozenset(flags), options.acl)
        self.invalidator = Invalidator(self.session.notify, self.session.has_epochs)
        self.coherence = STRATEGIES[options.udba](self.tree, self.invalidator)
        self.coherence.start()
        self.operations = Operations(self.fs, self.coherence, self.session.switch)

    async def serve(self, ready_fd: int) -> None:
        """Serve until unmounted or told to stop by SIGINT or SIGTERM; READY is written once requests are answered."""
        listener = control.listen(self.options.control) if self.options.control else None
        self.session.attach(self.operations)
        with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._stop_on_signal, signals)
                nursery.start_soon(self._run_coherence)
                nursery.start_soon(Waker(self.mount_point).beat)
                if listener is not None:
                    nursery.start_soon(control.serve, listener, self._commands())
                if ready_fd >= 0:
                    os.write(ready_fd, b"READY\n")
                    os.close(ready_fd)
                try:
                    await self.session.serve()
                finally:
                    nursery.cancel_scope.cancel()

    async def _stop_on_signal(self, signals: Any) -> None:
        async for number in signals:
            log.info("%s: unmounting", signal.Signals(number).name)
            try:
                # After this: the mount is gone and main() returns, or it is busy and stays.
                await trio.to_thread.run_sync(self.session.unmount)
            except OSError as error:
                if error.errno != errno.EBUSY:
                    raise
                log.warning("%s is in use; detached, users get errors", os.fsdecode(self.mount_point))
                await trio.to_thread.run_sync(self.session.unmount, True)
                self.session.terminate()
                return
            # Normally the loop has ended with the mount. It has not where a copy of the mount is left in
            # another mount namespace (a container, a service with private mounts).
            await trio.sleep(_LINGER_SECONDS)
            log.info("the mount is still in use in another mount namespace; ending all the same")
            self.session.terminate()

    def close(self) -> None:
        """The end after serving: release everything and mark the branches clean."""
        self.coherence.stop()
        if not self.invalidator.stop():
            log.warning("some notifications are still in the kernel")
        self.session.close()
        plink.close(self.tree)
        if not self.options.ro:
            for branch in self.branches.branches:
                if branch.writable:
                    fsck.mark_clean(branch.root_fd)
        self.branches.close()
        if self.options.control:
            os.unlink(self.options.control)

    def _commands(self) -> dict[str, control.Command]:
        return {"flush": self._flush, "stats": self._stats, "udba": self._udba}

    async def _run_coherence(self) -> None:
        """The strategy's background work, begun anew when another strategy takes over."""
        while True:
            self._changing_mode = trio.CancelScope()
            with self._changing_mode:
                await self.coherence.run()
                await trio.sleep_forever()

    async def set_mode(self, mode: str) -> None:
        """Change the coherence mode while mounted; when this returns, the new promise holds.

        Raises ValueError for a mode that does not exist.
        """
        if mode not in STRATEGIES:
            raise ValueError(f"unknown mode {mode!r}; known are {', '.join(STRATEGIES)}")
        log.info("coherence mode changes from %s to %s", self.coherence.name, mode)
        self.coherence.stop()
        self.restart_coherence(mode)
        # After this: nothing is used any more; requests meanwhile were served in the new mode.
        await trio.to_thread.run_sync(self.invalidator.flush)

    def restart_coherence(self, mode: str | None = None) -> None:
        """Begin anew with a strategy (None: the same one) that was stopped; nothing cached so far is believed."""
        strategy = STRATEGIES[mode or self.coherence.name]
        self.coherence = self.operations.coherence = strategy(self.tree, self.invalidator)
        self.coherence.start()
        self.coherence.drop_everything()
        self._changing_mode.cancel()

    async def _flush(self, request: control.Request) -> dict[str, Any]:
        """Every direct change made before the request is seen by every access after the answer."""
        self.coherence.drain()
        await trio.to_thread.run_sync(self.invalidator.flush)
        return {}

    async def _udba(self, request: control.Request) -> dict[str, Any]:
        try:
            await self.set_mode(str(request.get("mode")))
        except ValueError as error:
            return {"ok": False, "error": str(error)}
        return {"mode": self.coherence.name}

    async def _stats(self, request: control.Request) -> dict[str, Any]:
        return {
            "requests": {name: stats.requests for name, stats in OPERATIONS.items()},
            "bugs": sum(stats.bugs for stats in OPERATIONS.values()),
            "table": asdict(self.tree.table.statistics()),
            "coherence": asdict(self.coherence.statistics()),
            "invalidator": asdict(self.invalidator.statistics()),
            "open_handles": len(self.tree.handles),
            "connection": self.session.connection,
        }


def _raise_fd_limit() -> int:
    """Allow as many descriptors as the hard limit permits; how many may be directories is returned."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return min(max(hard // 2, hard - 8 * _RESERVED_FDS), _MAX_DIRECTORY_FDS)


def _prepare(branches: BranchSet, options: MountOptions) -> None:
    if options.ro:
        return
    for branch in branches.branches:
        if not branch.writable:
            continue
        if fsck.was_dirty(branch.root_fd):
            swept = fsck.sweep_temporaries(branch.root_fd)
            log.info("branch %s was not unmounted cleanly; swept %d temporary names", branch.describe(), swept)
        fsck.mark_dirty(branch.root_fd)
        prepare_writable(branch, options.plink)


def _union_options(options: MountOptions) -> UnionOptions:
    return UnionOptions(
        create=parse_create(options.create),
        copyup=parse_copyup(options.cpup),
        read_only=options.ro,
        plink=options.plink,
        show_whiteouts=options.shwh,
        dirwh=options.dirwh,
        opaque_always=options.diropq == "always",
        sum_space=options.sum,
        acl=options.acl,
        direct_io=options.dio,
        fsync_copyup=options.fsync_copyup,
    )


def run(options: MountOptions, mount_point: bytes, ready_fd: int) -> None:
    """Mount and serve in this process until unmounted. Raises UserError when it cannot start."""
    process = MountProcess(options, mount_point)
    gc.freeze()
    clean = False
    try:
        trio.run(process.serve, ready_fd)
        clean = True
    finally:
        if clean:
            process.close()
