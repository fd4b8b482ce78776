"""What a mount process does beside requests, on trio: commands, signals, an unmount, and whatever those set off.

Imported when the mount serves already (later.py), as trio and this take longer than all that a first request needs.
"""

from __future__ import annotations

import errno
import logging
import signal
import socket
from typing import TYPE_CHECKING, Any, Final

import trio

from udbad.control import trioserver
from udbad.errors import ExitCode, UserError
from udbad.kernel.openers import openers
from udbad.kernel.session import Session
from udbad.mount import replayhelper
from udbad.mount.commands import Commands
from udbad.mount.keeper import Keeper
from udbad.mount.mountproc import STOPPING, strategy_of
from udbad.mount.readings import text
from udbad.union.kept import WRITING_SECONDS, KeptFiles

if TYPE_CHECKING:
    from udbad.edge.replay import Replayer
    from udbad.mount.mountproc import MountProcess

log = logging.getLogger(__name__)

_LINGER_SECONDS: Final = 2
_OPENERS_SECONDS: Final = 10


class Beside:
    """nursery: of what ends with the mount, once `run` runs."""

    def __init__(self, process: MountProcess) -> None:
        self.nursery: trio.Nursery
        self._process = process
        self._commands = Commands(process)
        self._changing_mode = trio.CancelScope()

    async def run(self, listener: socket.socket | None, stop: int) -> None:
        """Until requests are not served any more. listener: of the control socket. stop: a signal that has come when
        nobody could wait for it yet, 0."""
        process = self._process
        with trio.open_signal_receiver(*STOPPING) as signals:
            async with trio.open_nursery() as self.nursery:
                self.nursery.start_soon(self._stop_on_signal, signals, stop)
                if not process.edge.takes_events:
                    self.nursery.start_soon(self._run_coherence)
                process.writing.sweep(self.nursery)
                if process.keeper is not None:
                    self.nursery.start_soon(self._watch_keeper, process.keeper)
                self.nursery.start_soon(process.offline.watch, process)
                if process.fs.kept is not None:
                    self.nursery.start_soon(self._rest, process.fs.kept)
                if process.replayer is not None:
                    self.nursery.start_soon(self._replay, process.replayer)
                    self.nursery.start_soon(process.replayer.attend_again)
                if listener is not None:
                    self.nursery.start_soon(trioserver.serve, listener, self._commands.table())
                try:
                    await process.edge.serve()
                finally:
                    self.nursery.cancel_scope.cancel()

    async def _stop_on_signal(self, signals: Any, before: int) -> None:
        if before:
            await self._stop(before)
        async for number in signals:
            await self._stop(number)

    async def _stop(self, number: int) -> None:
        log.info("%s: unmounting", signal.Signals(number).name)
        await self.unmount(force=True)

    async def unmount(self, force: bool) -> None:
        """Unmount, after which `run` returns.

        Raises OSError without force: EBUSY when it is in use or something else is mounted over it, EINVAL when it was
        detached already (umount -l) and its last users keep it. force: it ends all the same, its users get errors.
        """
        process = self._process
        session = process.session
        try:
            # After this: the mount is gone and the process ends, or it stays.
            await trio.to_thread.run_sync(session.unmount)
        except OSError as error:
            if not force:
                raise
            if error.errno == errno.EBUSY:
                try:
                    await trio.to_thread.run_sync(session.unmount, True)
                    log.warning("%s is in use; detached, users get errors", text(process.mount_point))
                except OSError as other:
                    error = other
            if session.mounted:
                log.warning("%s: %s; the session ends all the same", text(process.mount_point), error.strerror)
            process.edge.terminate()
            return
        # Normally the loop has ended with the mount. It has not where a copy of the mount is left in
        # another mount namespace (a container, a service with private mounts).
        await trio.sleep(_LINGER_SECONDS)
        log.info("the mount is still in use in another mount namespace; ending all the same")
        process.edge.terminate()

    async def openers(self, writing: bool = False) -> list[tuple[int, int]]:
        """(node id, pid) of files that are open or mapped, where the kernel does not tell of that (io=cached).

        In a thread, which may wait for a process that waits for us. Raises UserError when it does so too long.
        """
        process = self._process
        if process.fs.kept is None:
            return []
        with trio.move_on_after(_OPENERS_SECONDS):
            return await trio.to_thread.run_sync(openers, process.session.connection, writing, abandon_on_cancel=True)
        raise UserError("who has files open cannot be found out at the moment: try again", ExitCode.FAILURE)

    async def set_mode(self, mode: str) -> None:
        """Change the coherence mode while mounted; when this returns, the new promise holds.

        Raises ValueError for a mode that does not exist.
        """
        process = self._process
        strategy_of(mode)
        log.info("coherence mode changes from %s to %s", process.coherence.name, mode)
        process.coherence.hand_over()
        process.restart_coherence(mode)
        # After this: nothing is used any more; requests meanwhile were served in the new mode.
        await trio.to_thread.run_sync(process.invalidator.flush)

    async def _watch_keeper(self, keeper: Keeper) -> None:
        await trio.lowlevel.wait_readable(keeper.pidfd)
        self._process.keeper = None
        self._process.mortal = "the keeper has ended"
        log.warning("the keeper has ended: when this process does, users of the mount get errors")

    async def _replay(self, replayer: Replayer) -> None:
        from udbad.edge.replay import helper  # not for everybody

        process = self._process
        assert isinstance(process.session, Session)
        await replayer.run(helper(replayhelper.__file__, process.mount_point, process.session.id))

    async def _rest(self, kept: KeptFiles) -> None:
        """Until cancelled, and only while there is something to do: a mount that nobody uses wakes nobody."""
        while True:
            written = trio.Event()
            kept.on_written = written.set
            while kept.rest():  # noqa: ASYNC110  # not waiting for anybody: what was written longer ago is to rest
                await trio.sleep(WRITING_SECONDS)
            await written.wait()

    async def _run_coherence(self) -> None:
        """The strategy's background work, begun anew when another strategy takes over."""
        while True:
            self._changing_mode = trio.CancelScope()
            with self._changing_mode:
                await self._process.coherence.run()
                await trio.sleep_forever()

    def coherence_restarted(self) -> None:
        """Another strategy has taken over."""
        self._changing_mode.cancel()
