"""mvdown and sync in the mount process: their steps run between requests, their copying in threads.

A sync goes on by itself: the client that began it asks for the progress, and when it dies nothing is lost. One
runs at a time, and the branches cannot be changed meanwhile. When the mount ends, it stops where it is.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Generator
from typing import TYPE_CHECKING, Any, TypeVar

import trio

from udbad.branch.branches import Branch
from udbad.branch.spec import printable
from udbad.control.protocol import Message, flag_of, path_of, text_of
from udbad.errors import ExitCode, UserError
from udbad.mount import rebranch
from udbad.mount.offline import check_answering

if TYPE_CHECKING:
    from udbad.mount.mountproc import MountProcess
    from udbad.tools import syncdown
    from udbad.tools.carry import Halt, Work

log = logging.getLogger(__name__)

T = TypeVar("T")

_SHOWN = 100  # paths that had to stay, in one answer


async def drive(steps: Generator[Work | None, None, T], halt: Halt) -> T:
    """Run the steps: each up to its yield here, then what it yields in a thread; an OSError of that is raised there.

    When cancelled, the work under way is asked to stop and waited for, and the steps clean up.
    """
    error: OSError | None = None
    try:
        while True:
            try:
                work = next(steps) if error is None else steps.throw(error)
            except StopIteration as end:
                result: T = end.value
                return result
            # After this: the world may be another one; every step says what it looks at again.
            error = None if work is None else await _in_thread(work, halt)
            if work is None:
                await trio.lowlevel.checkpoint()
    finally:
        steps.close()


async def _in_thread(work: Work, halt: Halt) -> OSError | None:
    error: OSError | None = None

    async def stop_with_us() -> None:
        try:
            await trio.sleep_forever()
        except trio.Cancelled:
            if not finished:
                halt.asked = True
            raise

    finished = False
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stop_with_us)
        try:
            # After this: see drive().
            await trio.to_thread.run_sync(work)
        except OSError as raised:
            error = raised
        finished = True
        nursery.cancel_scope.cancel()
    return error


class Carrying:
    """The control operations."""

    def __init__(self, process: MountProcess) -> None:
        self.process = process
        self._moves = 0
        self._sync: syncdown.Sync | None = None
        self._running = False
        self._error = ""
        self._code = ExitCode.FAILURE

    def check_idle(self) -> None:
        """Raises UserError: REFUSED while something is carried, which needs the branches as they are."""
        if self._running:
            raise UserError("a sync is under way: wait for its end, or stop it", ExitCode.REFUSED)
        if self._moves:
            raise UserError("a file is being moved down: try again", ExitCode.REFUSED)

    async def mvdown(self, request: Message) -> dict[str, Any]:
        """Move one file down; answers when it is done. Words as in mvdown.Options."""
        from udbad.tools import mvdown
        from udbad.tools.carry import Halt

        check_answering(self.process.sb.branches)
        flags = ("overwrite_lower", "keep_upper", "read_only_upper", "read_only_lower")
        parts = path_of(request)
        source = text_of(request, "source", "")
        options = mvdown.Options(
            **{flag: flag_of(request, flag) for flag in flags},
            source=(await self._find(source)).path if source else b"",
            openers=await self.process.beside.openers(),
        )
        halt = Halt()
        self._moves += 1
        try:
            answer = await drive(mvdown.steps(self.process.sb, parts, options, halt), halt)
        except OSError as error:
            path = printable(b"/".join(parts))
            raise UserError(f"/{path}: {error.strerror}; it was not moved", ExitCode.FAILURE) from None
        finally:
            self._moves -= 1
        # After this: nothing is used any more.
        await trio.to_thread.run_sync(self.process.invalidator.flush)
        return answer

    async def sync(self, request: Message) -> dict[str, Any]:
        """Begin to merge branch `source` into `target`, or do nothing when that is under way."""
        from udbad.tools import syncdown
        from udbad.tools.carry import Halt

        check_answering(self.process.sb.branches)
        named = text_of(request, "source"), text_of(request, "target")
        mode = text_of(request, "mode")
        if mode not in ("copy", "move"):
            raise UserError("mode must be copy or move", ExitCode.OPTION)
        # After this: a sync may have begun, or the branches have changed; both is asked for below.
        source, target = [(await self._find(path)).path for path in named]
        move = mode == "move"
        if self._running and self._sync is not None:
            now = self._sync
            if (now.src.path, now.dst.path, now.move) == (source, target, move):
                return {"joined": True}
            raise UserError("another sync is under way", ExitCode.REFUSED)
        src, dst = syncdown.check(self.process.sb, source, target, move)
        self._sync = syncdown.Sync(self.process.sb, src, dst, move, Halt())
        self._running = True
        self._error = ""
        self.process.beside.nursery.start_soon(self._run, self._sync)
        return {"joined": False}

    async def _find(self, path: str) -> Branch:
        return await rebranch.find(self.process.sb.branches, os.fsencode(path))

    async def _run(self, sync: syncdown.Sync) -> None:
        label = f"{printable(sync.src.path)} into {printable(sync.dst.path)}"
        log.info("sync: merging %s", label)
        try:
            await drive(sync.steps(), sync.halt)
            await trio.to_thread.run_sync(self.process.invalidator.flush)
            log.info("sync: merged %s, %d names", label, sync.progress.synced)
        except OSError as error:
            if error.errno == errno.ECANCELED:
                self._error = "stopped; what is merged stays so, and running it again does the rest"
            else:
                self._error = f"{printable(sync.progress.current)}: {error.strerror}; running it again does the rest"
            self._code = ExitCode.FAILURE
            log.info("sync: %s", self._error)
        except Exception as error:
            # A bug must not take the mount along; the steps leave the union as it was wherever they end.
            log.exception("sync of %s failed", label)
            self._error = f"internal error: {type(error).__name__}"
            self._code = ExitCode.FAILURE
        finally:
            self._running = False

    async def status(self, request: Message) -> dict[str, Any]:
        """How far the sync is, or how the last one ended."""
        sync = self._sync
        if sync is None:
            raise UserError("no sync was begun", ExitCode.REFUSED)
        progress = sync.progress
        return {
            "running": self._running,
            "error_text": self._error,
            "error_code": int(self._code),
            "source": os.fsdecode(sync.src.path),
            "target": os.fsdecode(sync.dst.path),
            "move": sync.move,
            "names": progress.names,
            "size": progress.size,
            "synced": progress.synced,
            "synced_size": progress.synced_size,
            "moved": progress.moved,
            "current": os.fsdecode(progress.current),
            "left": {os.fsdecode(path): reason for path, reason in list(progress.left.items())[:_SHOWN]},
            "left_count": len(progress.left),
        }

    async def stop(self, request: Message) -> dict[str, Any]:
        """Ask the sync to stop; `sync-status` says when it has."""
        if self._sync is not None:
            self._sync.halt.asked = True
        return {}
