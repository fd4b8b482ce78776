"""What the control socket of a mount process can be asked for; each is one line of `table`.

Paths in requests are relative to the mount and are looked up in the daemon's own tables and on the
branches, never through the mount: a process that asks its own mount waits for itself.
"""

from __future__ import annotations

import errno
import logging
import os
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import trio

from udbad import __version__
from udbad.branch.branches import Branch, BranchSet, BranchSpec
from udbad.branch.spec import format_branch
from udbad.coherence import hints
from udbad.control.protocol import Message, checked_text, edits_of, flag_of, hints_of, path_of, text_of
from udbad.control.server import Command
from udbad.errors import ExitCode, UserError
from udbad.inodes.paths import last_path
from udbad.inodes.record import UnreadableRecord
from udbad.kernel.boundary import operations
from udbad.logs import set_level
from udbad.mount import rebranch, strictness
from udbad.mount.carrying import Carrying
from udbad.mount.hearing import Heard
from udbad.mount.leasing import Leasing
from udbad.mount.offline import check_answering
from udbad.mount.publishing import Publishing
from udbad.settings.options import FIELDS, MountOptions, parse_mount_options, parse_remount
from udbad.types import Perm
from udbad.union import reconfigure

if TYPE_CHECKING:
    from udbad.mount.mountproc import MountProcess

log = logging.getLogger(__name__)

LIVE = frozenset(
    {
        *("branches", "udba", "create", "cpup", "dirwh", "diropq", "sum", "fsync_copyup"),
        *("verbose", "warn_perm", "rdcache", "watch_reserve", "dirren", "labels", "ro", "kernel_flags"),
    }
)
"""Mount options that can change while mounted; the others are agreed with the kernel at the mount."""


HINTS_AT_ONCE = 32
"""Hints that are followed before requests have their turn: each may be a look at every branch."""


class Commands:
    """The operations of one mount process."""

    def __init__(self, process: MountProcess) -> None:
        self.process = process
        self.carrying = Carrying(process)
        self.leasing = Leasing(process)
        self.publishing = Publishing(process)
        self._changing = trio.Lock()

    def table(self) -> dict[str, Command]:
        return {
            "ping": self.ping,
            "status": self.status,
            "stats": self.stats,
            "metrics": self.metrics,
            "flush": self.flush,
            "udba": self.udba,
            "where": self.where,
            "why": self.why,
            "invalidate": self.invalidate,
            "feed": self.feed,
            "lease": self.leasing.lease,
            "heard": self.heard,
            "subscribers": self.leasing.subscribers,
            "published": self.publishing.published,
            "busy": self.busy,
            "branches": self.branches,
            "reconfigure": self.reconfigure,
            "configured": self.configured,
            "remount": self.remount,
            "log-level": self.log_level,
            "mvdown": self.carrying.mvdown,
            "sync": self.carrying.sync,
            "sync-status": self.carrying.status,
            "sync-stop": self.carrying.stop,
            "write-state": self.write_state,
            "renew": self.renew,
            "retire": self.retire,
            "stop": self.stop,
        }

    async def ping(self, request: Message) -> dict[str, Any]:
        return {}

    # -- looking ----------------------------------------------------------------------------------

    async def status(self, request: Message) -> dict[str, Any]:
        process = self.process
        io, fallbacks = process.io()
        census = await process.readings.census()
        return {
            "name": process.identity.name,
            "mount_point": os.fsdecode(process.mount_point),
            "pid": os.getpid(),
            "udbad": __version__,
            "uptime": time.time() - process.started,
            "udba": process.coherence.name,
            "io": io,
            "io_fallbacks": fallbacks,
            "edge": process.session.edge,
            "lacks": process.session.lacks,
            "mortal": process.mortal,
            "restarts": process.restarts,
            "branches": [branch.describe() for branch in process.sb.branches.branches],
            "offline": process.offline.since(),
            "requests": sum(stats.requests for stats in operations().values()),
            "open_handles": len(process.sb.handles),
            "connection": process.session.connection,
            "coherence": process.coherence.statistics(census)._asdict(),
        }

    async def stats(self, request: Message) -> dict[str, Any]:
        process = self.process
        passed = process.passthrough
        census = await process.readings.census()
        return {
            "requests": {name: stats.requests for name, stats in operations().items()},
            "seconds": {name: stats.seconds for name, stats in operations().items()},
            "errors": sum(stats.errors for stats in operations().values()),
            "bugs": sum(stats.bugs for stats in operations().values()),
            "table": process.sb.table.statistics(census)._asdict(),
            "coherence": process.coherence.statistics(census)._asdict(),
            "invalidator": process.invalidator.statistics()._asdict(),
            "depths": {
                "found": process.sb.counters.depth_found,
                "negative": process.sb.counters.depth_negative,
                "whiteout": process.sb.counters.depth_whiteout,
            },
            "passthrough": {"opens": passed.opens, "in_use": passed.in_use} if passed is not None else {},
            "copyups": [
                {"path": os.fsdecode(last_path(job.node)), "size": job.st.st_size, "done": job.progress}
                for job in (copy.job for copy in process.edge.waiting.copyups.values())
            ],
            "open_handles": len(process.sb.handles),
            "connection": process.session.connection,
        }

    async def metrics(self, request: Message) -> dict[str, Any]:
        """What the metrics endpoint asks for at each scrape (metrics.Samples)."""
        return {"metrics": await self.process.readings.samples()}

    async def heard(self, request: Message) -> dict[str, Any]:
        """What is known of the hosts that change "branch" is this from now on (hearing.py)."""
        heard = Heard.of(request)
        branch = await rebranch.find(self.process.sb.branches, os.fsencode(text_of(request, "branch")))
        if heard is None:
            self.process.readings.heard.pop(branch.id, None)
        else:
            self.process.readings.heard[branch.id] = heard
        return {}

    async def where(self, request: Message) -> dict[str, Any]:
        """Which branch serves a path, and every copy of it."""
        from udbad.tools import explain

        check_answering(self.process.sb.branches)
        return explain.where(self.process.sb, path_of(request))

    async def why(self, request: Message) -> dict[str, Any]:
        """How a path is resolved, name by name and branch by branch."""
        options = self.process.options
        from udbad.tools import explain

        check_answering(self.process.sb.branches)
        return {**explain.why(self.process.sb, path_of(request)), "create": options.create, "cpup": options.cpup}

    async def busy(self, request: Message) -> dict[str, Any]:
        """What keeps a branch from being removed."""
        wanted = os.fsencode(text_of(request, "branch"))
        sb = self.process.sb
        branch = await rebranch.find(sb.branches, wanted)
        # After this: it may have gone from the mount, and then nothing of it is used.
        users = reconfigure.users(sb, branch, await self.process.beside.openers())
        return {"users": [{"pid": user.pid, "command": _command(user.pid), "what": user.what,
                           "path": os.fsdecode(user.path)} for user in users]}  # fmt: skip

    # -- changing ---------------------------------------------------------------------------------

    async def flush(self, request: Message) -> dict[str, Any]:
        """Every direct change made before the request is seen by every access after the answer."""
        self.process.coherence.drain()
        await trio.to_thread.run_sync(self.process.invalidator.flush)
        if self.process.replayer is not None:
            await self.process.replayer.idle()
        return {}

    async def udba(self, request: Message) -> dict[str, Any]:
        try:
            async with self._changing:
                await self.process.beside.set_mode(text_of(request, "mode"))
        except ValueError as error:
            raise UserError(str(error), ExitCode.OPTION) from None
        self.process.options = self.process.options.but(udba=self.process.coherence.name)
        self._write_entry()
        return {"mode": self.process.coherence.name}

    async def invalidate(self, request: Message) -> dict[str, Any]:
        """Believe nothing that is cached about a path and what is below it; returns how many nodes that were."""
        count = self.process.coherence.invalidate(path_of(request))
        await trio.to_thread.run_sync(self.process.invalidator.flush)
        return {"nodes": count}

    async def feed(self, request: Message) -> dict[str, Any]:
        """Hints of others (coherence/hints.py); what they changed is seen by every access after the answer.

        Returns how many there were, how many of them could be about something cached, and how many are outside.
        """
        process, hinted = self.process, hints_of(request)
        roots = hints.roots_of(process.sb.branches, process.mount_point)
        known = outside = 0
        for number, (path, kind) in enumerate(hinted):
            # After this: each hint finds the tree as it is then.
            if number % HINTS_AT_ONCE == HINTS_AT_ONCE - 1:
                await trio.lowlevel.checkpoint()
            held = hints.take_one(process.coherence, roots, os.fsencode(path), hints.kinds_of(kind))
            known += held is True
            outside += held is None
        if known:
            await trio.to_thread.run_sync(process.invalidator.flush)
        return {"hints": len(hinted), "known": known, "outside": outside}

    async def branches(self, request: Message) -> dict[str, Any]:
        """Apply (option, value) pairs of add, ins, append, prepend, del and mod; without any, list the branches."""
        edits = edits_of(request)
        if edits:
            self.carrying.check_idle()
            async with self._changing:
                if self.process.offline:
                    return _listed(await rebranch.abandon(self.process, edits, self.carrying.check_idle))
                await rebranch.change_branches(self.process, edits, self.carrying.check_idle)
                self._note_branches()
        return _listed(self.process.sb.branches)

    def _note_branches(self) -> None:
        specs = tuple(rebranch.current_specs(self.process.sb.branches))
        self.process.options = self.process.options.but(branches=specs)
        self._write_entry()

    def _write_entry(self) -> None:
        try:
            self.process.write_entry()
        except OSError as error:
            log.warning("cannot write what the mount is now: %s", error)

    async def reconfigure(self, request: Message) -> dict[str, Any]:
        """Become what `options` (all of them, as after -o) say, as far as that goes while mounted.

        configured: what the configuration says, to be remembered. Returns the keys applied, and those that
        need a new mount. Either every live key is applied or, with an error, none.
        """
        new = parse_mount_options(text_of(request, "options"))
        if new.source is not None:  # another one is for another mount
            new = new.but(branches=self.process.options.branches)
        configured = _options_text(request, "configured") if "configured" in request else None
        process = self.process
        async with self._changing:
            gone: list[Branch] = []
            if process.offline and "branches" in _live(process.options, new):
                gone = rebranch.left_out(process, new.branches)
                await rebranch.check_leaving(process, self.carrying.check_idle)
            # After this: a branch that did not answer stays away as long as this process lives.
            answer = await self._become(new.but(branches=process.options.branches) if gone else new)
            if configured is not None:
                process.configured = configured
                if not gone:
                    self._write_entry()
            if gone:  # with all of that, or this process is found as it was
                rebranch.leave(process, gone, new.branches)
                answer["applied"] = sorted([*answer["applied"], "branches"])
            return answer

    async def configured(self, request: Message) -> dict[str, Any]:
        """Remember what the configuration says, after it was made to follow the mount."""
        self.process.configured = _options_text(request, "options")
        self._write_entry()
        return {}

    async def remount(self, request: Message) -> dict[str, Any]:
        """`mount -o remount,...`: the options given replace the present ones, from left to right.

        All or nothing: an option that cannot change while mounted is an error and nothing is done.
        """
        check_answering(self.process.sb.branches)  # whose paths are looked at
        async with self._changing:
            text, now = text_of(request, "options"), self.process.options
            # In a thread, as in rebranch.find. After this: the options are the same, `_changing` is held.
            new = await trio.to_thread.run_sync(parse_remount, text, now, abandon_on_cancel=True)
            fixed = sorted(_changed(self.process.options, new) - _live(self.process.options, new))
            fixed = ["dirsync" if key == "kernel_flags" else key for key in fixed]
            if fixed:
                raise UserError(
                    f"{', '.join(fixed)} cannot change while mounted: umount, and mount again", ExitCode.OPTION
                )
            return await self._become(new)

    async def _become(self, new: MountOptions) -> dict[str, Any]:
        process = self.process
        changed = _changed(process.options, new)
        live = _live(process.options, new)
        target = process.options.but(**{key: getattr(new, key) for key in live})
        # What can be refused comes first.
        await self._change_access(target, "branches" in live)
        process.options = target
        process.apply_union_options()
        strictness.settle(process)
        if "udba" in live:
            await process.beside.set_mode(new.udba)
        if live:
            log.info("changed while mounted: %s", ", ".join(sorted(live)))
            self._write_entry()
        return {"applied": sorted(live), "needs_remount": sorted(changed - LIVE)}

    async def _change_access(self, target: MountOptions, branches: bool) -> None:
        """Change branches, if they do, what the kernel permits on the mount, and whether we write to branches: all or
        nothing. Raises UserError.

        Read-only begins with the kernel, which knows who may still write and then lets nobody begin to; writable
        ends with it.
        """
        process = self.process
        old = process.options
        before = process.session.flags
        first = process.flags_for(target) if target.ro else before
        try:
            await self._set_flags(first)
            await self._change_branches(target, branches)
            try:
                await self._set_flags(process.flags_for(target))  # with those of new branches
            except UserError:
                await self._change_branches(old, branches)
                raise
        except BaseException:
            with trio.CancelScope(shield=True):
                await self._set_flags(before)
            raise

    async def _set_flags(self, flags: frozenset[str]) -> None:
        session = self.process.session
        if flags == session.flags:
            return
        try:
            # After this: the mount may be another one only in what was asked for; `_changing` is held.
            await trio.to_thread.run_sync(session.set_flags, flags)
        except OSError as error:
            place = os.fsdecode(self.process.mount_point)
            if error.errno == errno.EBUSY and error.strerror == os.strerror(errno.EBUSY):
                raise UserError(
                    f"{place} is busy: {self._who(await self.process.beside.openers(True), True)}", ExitCode.FAILURE
                ) from None
            raise UserError(f"{place}: {error.strerror}", ExitCode.FAILURE) from None

    async def _change_branches(self, target: MountOptions, branches: bool) -> None:
        process, check = self.process, self.carrying.check_idle
        if not branches and target.ro == process.options.ro:
            return
        check()
        top = process.sb.branches[0]
        specs: Sequence[BranchSpec] = target.branches
        if not branches:
            specs = rebranch.current_specs(process.sb.branches)
            if target.ro or target.branches[0].perm is not None or top.perm is not Perm.RO:
                await rebranch.set_read_only(process, target.ro, check)
                return
            # It was given no permission, and has that of a read-only mount.
            specs = [specs[0]._replace(perm=None), *specs[1:]]
        await rebranch.set_branches(process, specs, check, target.ro)

    async def log_level(self, request: Message) -> dict[str, Any]:
        try:
            set_level(text_of(request, "level"))
        except ValueError as error:
            raise UserError(str(error), ExitCode.OPTION) from None
        return {}

    async def write_state(self, request: Message) -> dict[str, Any]:
        """Have another version of udbad be able to go on with the mount: "reads", the versions of the state that it
        can read. UserError when none of them can be written; then nothing changes."""
        record, versions = self.process.record, request.get("reads")
        if record is None or not isinstance(versions, list) or not all(type(one) is int for one in versions):
            raise UserError("nobody could go on with the mount", ExitCode.FAILURE)
        self.process.sb.table.read_all()
        try:
            record.write_as(versions)
            self.process.write_entry()
        except UnreadableRecord as error:
            raise UserError(f"what it knows cannot be written for another version: {error}", ExitCode.FAILURE) from None
        except OSError as error:
            raise UserError(f"what it knows cannot be written: {error.strerror}", ExitCode.FAILURE) from None
        return {"version": record.version}

    async def renew(self, request: Message) -> dict[str, Any]:
        """Have the guardian become one of another version: "command", how that is started, and "path", PYTHONPATH."""
        from udbad.mount.life import Renewal

        guard, command = self.process.guard, request.get("command")
        if guard is None or guard.renewed is None:
            raise UserError("it has no guardian, and cannot go over to another version", ExitCode.FAILURE)
        if not isinstance(command, list) or not command:
            raise UserError("command must be a list of strings", ExitCode.OPTION)
        words = [checked_text(word, "command") for word in command]
        try:
            guard.renewed(Renewal(words, text_of(request, "path"), self.process.presence.control_path))
        except OSError:
            raise UserError("its guardian has ended", ExitCode.FAILURE) from None
        return {}

    async def retire(self, request: Message) -> dict[str, Any]:
        """Make room for another process: end here, between two operations, as if killed. Gives no answer then."""
        self.process.make_room()
        return {}

    async def stop(self, request: Message) -> dict[str, Any]:
        """Unmount; with "force" also what is in use. EBUSY is answered with who uses it."""
        force = flag_of(request, "force")
        try:
            await self.process.beside.unmount(force)
        except OSError as error:
            place = os.fsdecode(self.process.mount_point)
            if error.errno == errno.EBUSY and error.strerror == os.strerror(errno.EBUSY):
                raise UserError(
                    f"{place} is busy: {self._who(await self.process.beside.openers())}", ExitCode.FAILURE
                ) from None
            raise UserError(f"{place}: {error.strerror}", ExitCode.FAILURE) from None
        return {}

    def _who(self, openers: Sequence[tuple[int, int]], writing: bool = False) -> str:
        """Who keeps the mount from being unmounted, or from being made read-only, as far as it is known here."""
        handles = self.process.sb.handles
        opened = [
            ("open file", one.node, one.pid)
            for one in handles.files.values()
            if one.fh > 0 and (not writing or one.flags & os.O_ACCMODE != os.O_RDONLY or one.node.parent is None)
        ]
        found = [(self.process.sb.table.find(number), pid) for number, pid in openers]
        untold = [(node, pid) for node, pid in found if node is not None]
        opened += [("open directory" if node.is_dir() else "open file", node, pid) for node, pid in untold]
        if writing and not opened:
            return "somebody writes to it"
        told = [one for one in handles.dirs.values() if one.fh > 0 and not writing]
        opened += [("open directory", one.node, one.pid) for one in told]
        if not opened:
            return "somebody is in it, or something is mounted in it"
        what, node, pid = opened[0]
        more = f" and {len(opened) - 1} more" if len(opened) > 1 else ""
        removed = node.parent is None and node is not self.process.sb.root
        path = "(removed)" if removed else os.fsdecode(last_path(node))
        return f"{what} {path} of process {pid}{more}"


def _listed(branches: BranchSet) -> dict[str, Any]:
    return {
        "branches": [branch.describe() for branch in branches.branches],
        "specs": [format_branch(spec) for spec in rebranch.current_specs(branches)],
    }


def _options_text(request: Message, key: str) -> str:
    """Options that others will parse: whoever takes this mount over must not stumble over them. Raises UserError."""
    text = text_of(request, key)
    parse_mount_options(text)
    return text


def _live(old: MountOptions, new: MountOptions) -> set[str]:
    """The options that differ and can change while mounted; dirsync cannot (MS_RMT_MASK of the kernel)."""
    live = _changed(old, new) & LIVE
    return live - {"kernel_flags"} if "dirsync" in old.kernel_flags ^ new.kernel_flags else live


def _changed(old: MountOptions, new: MountOptions) -> set[str]:
    fields = FIELDS.keys() - {"notices", "control", "metrics"}
    return {key for key in fields if getattr(old, key) != getattr(new, key)}


def _command(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/comm") as file:
            return file.read().strip()
    except OSError:
        return ""
