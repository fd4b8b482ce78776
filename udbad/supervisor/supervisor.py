"""The supervisor: many mounts from one configuration, changed while they run.

One mount process per mount (runner.py), a control socket, reload on SIGHUP, on request and
when a file of the configuration changes (configwatch.py). May not import what serves a mount, nor
touch a mount point. When it dies the mounts go on; the next supervisor finds them under the run directory
and adopts them.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import signal
import time
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from udbad import __version__, logs
from udbad.control import exporter, private, registry
from udbad.control.asyncserver import AsyncServer
from udbad.control.protocol import NOT_ANSWERING, Message, bind, flag_of, text_of
from udbad.control.server import Command
from udbad.errors import ExitCode, UserError
from udbad.metrics import Samples
from udbad.settings.file import Config, ConfigError, DaemonSettings, MountSettings, config_files, load, shared_trees
from udbad.settings.options import format_options, parse_mount_options
from udbad.supervisor import adopting, save, sdnotify
from udbad.supervisor.configwatch import ConfigWatch, Signature, signature
from udbad.supervisor.reload import (
    OWN_KEYS,
    Outcome,
    Verdict,
    changed_keys,
    changed_options,
    judge_daemon,
    judge_hosts,
    judge_metrics,
)
from udbad.supervisor.runner import Runner, Shared, State
from udbad.supervisor.subscriptions import Job, Subscriptions
from udbad.supervisor.workers import Pool, Worker

log = logging.getLogger(__name__)

STATUS_SECONDS = 2.0
"""For what a mount process says about itself."""
_UNMOUNT_SECONDS = 3.0


class Supervisor:
    """Everything `udbad run` does, from the configuration to the last unmount."""

    def __init__(self, path: Path, config: Config, seen: Signature, pool: Pool, log_format: str | None = None) -> None:
        """seen: of the files, taken before `config` was read. log_format: wins over it. Made inside the event loop."""
        self.path = path
        self._watch = ConfigWatch(path, seen)
        self._log_format = log_format
        self.config = config
        daemon = config.daemon.model_copy(update={"log_format": log_format or config.daemon.log_format})
        pool.log_format = daemon.log_format
        self.shared = Shared(daemon, pool, self._parent_of, self._subscribe_soon)
        self.runners: dict[str, Runner] = {}
        self._subscriptions = Subscriptions()
        self.reloaded = time.time()
        self.reload_succeeded = True
        self._reloading = asyncio.Lock()
        self._end = asyncio.Event()
        self._keep_mounts = False
        self._tasks: set[asyncio.Task[Any]] = set()

    # -- from start to end ------------------------------------------------------------------------

    async def run(self) -> None:
        """Serve until told to stop. Raises UserError when another supervisor has the run directory."""
        run_dir = self.config.daemon.run_dir
        with ExitStack() as stack:
            sock = _take_run_dir(run_dir, stack)
            loop = asyncio.get_running_loop()
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, self._stop_soon, number)
            loop.add_signal_handler(signal.SIGHUP, self._reload_soon, "SIGHUP")
            adopted = self._adopt()
            for settings in self.config.mounts.values():
                if settings.enabled and settings.name not in self.runners:
                    self._add(Runner(settings, self.shared))
            for name, runner in adopted.items():
                runner.begin()
                await self._bring_up_to_date(name, runner)
            self._export(stack)
            server = AsyncServer(self._commands())
            await server.start(sock)
            self._spawn(self._announce())
            self._spawn(self._watch_files())
            self._spawn(self._feed_watchdog())
            try:
                await self._end.wait()
                sdnotify.notify("STOPPING=1")
                await self._subscriptions.close()
                await self._finish()
            finally:
                for task in self._tasks:
                    task.cancel()
                self._watch.close()
                await server.close()
                with suppress(FileNotFoundError):  # somebody has cleared the run directory
                    os.unlink(os.path.join(run_dir, registry.SOCKET_NAME))

    def _export(self, stack: ExitStack) -> None:
        """Serve metrics until the stack ends. Mounts matter more than numbers: they do without, and the log says so."""
        settings = self.config.metrics
        if settings.listen == "off":
            return
        host, port = exporter.parse_address(settings.listen)
        try:
            endpoint = exporter.start(
                host, port, self._targets, self._kept, certificate=settings.tls_certificate, key=settings.tls_key
            )
        except UserError as error:
            log.warning("no metrics are served: %s", error.message)
        else:
            stack.callback(endpoint.close)

    def _targets(self) -> dict[str, str]:
        """For the endpoint's threads: control sockets. list() of a dict is one step of the interpreter."""
        return {label: runner.control or "" for label, runner in list(self.runners.items())}

    def _kept(self) -> dict[str, Samples]:
        """For the endpoint's threads: what the mount processes do not know."""
        reload: Samples = {
            "udbad_config_last_reload_success": [((), int(self.reload_succeeded))],
            "udbad_config_last_reload_timestamp_seconds": [((), self.reloaded)],
        }
        return {
            label: {**reload, "udbad_mount_restarts_total": [((), runner.restarts)]}
            for label, runner in list(self.runners.items())
        }

    def _spawn(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _add(self, runner: Runner) -> None:
        self.runners[runner.label] = runner
        runner.begin()

    def _subscribe_soon(self) -> None:
        asyncio.get_running_loop().call_soon(self._subscribe)

    def _subscribe(self) -> None:
        """Have mounts hear of other hosts, those that say so and are there, also while their process is another one."""
        if not self._end.is_set():
            there = [one for one in self.runners.values() if one.state in (State.SERVING, State.RESTARTING)]
            jobs = {one.label: self._job(one.settings) for one in there if one.settings.published}
            self._subscriptions.follow(jobs, self.shared.daemon)

    def _job(self, settings: MountSettings) -> Job:
        daemon = self.shared.daemon
        return {
            "mount": settings.name,
            "published": dict(settings.published),
            "publish": settings.publish,
            "hosts": self.config.hosts.model_dump(),
            "run_dir": daemon.run_dir,
            "log_level": daemon.log_level,
            "log_format": daemon.log_format,
        }

    async def _announce(self) -> None:
        """READY=1 once every mount has come up or has a reason not to."""
        await asyncio.gather(*(runner.outcome.wait() for runner in self.runners.values()))
        states = [runner.state for runner in self.runners.values()]
        serving = sum(state is State.SERVING for state in states)
        log.info("ready, %d of %d mounts serve", serving, len(states))
        sdnotify.notify("READY=1", f"STATUS={serving} of {len(states)} mounts serve")

    def _stop_soon(self, number: signal.Signals) -> None:
        log.info("%s: stopping", signal.Signals(number).name)
        self._end.set()

    async def _finish(self) -> None:
        if self._keep_mounts:
            for runner in self.runners.values():
                runner.leave()
        else:
            todo = list(self.runners.values())
            while todo:
                # The innermost first: what lies in another mount keeps that busy.
                leaves = [one for one in todo if not any(self._parent_of(x.settings.mount_point) is one for x in todo)]
                await asyncio.gather(*(runner.stop() for runner in leaves))
                todo = [runner for runner in todo if runner not in leaves]
        self.shared.pool.close()
        log.info("stopped")

    def _parent_of(self, path: str) -> Runner | None:
        """The runner with the innermost mount that `path` lies in."""
        around = [
            runner
            for runner in self.runners.values()
            if path != runner.settings.mount_point
            and path.startswith(runner.settings.mount_point.rstrip("/") + "/")
            and runner.state is not State.FAILED
        ]
        return max(around, key=lambda runner: len(runner.settings.mount_point), default=None)

    async def _feed_watchdog(self) -> None:
        interval = sdnotify.watchdog_interval()
        while interval is not None:
            sdnotify.alive()
            await asyncio.sleep(interval)

    # -- mounts that run already ------------------------------------------------------------------

    def _adopt(self) -> dict[str, Runner]:
        """Runners for the mounts that an earlier supervisor has left."""
        adopted = {}
        for runner, to_renew in adopting.left(self.config, self.shared):
            self.runners[runner.label] = adopted[runner.label] = runner
            if to_renew is not None:
                self._spawn(self._renew(runner, to_renew))
        return adopted

    async def _renew(self, runner: Runner, worker: Worker) -> None:
        """Have a mount that a process of another version serves go on in one of this version."""
        problem = await runner.renew(worker)
        if problem is not None:
            log.warning("%s: is served by another version: %s", runner.label, problem)

    async def _bring_up_to_date(self, name: str, runner: Runner) -> None:
        """An adopted mount becomes what the configuration says now."""
        if runner.transient:
            return
        wanted = self.config.mounts.get(name)
        verdicts = await (self._remove(runner) if wanted is None else self._change(runner, wanted))
        _log_verdicts(verdicts)

    # -- reload -----------------------------------------------------------------------------------

    def _reload_soon(self, why: str) -> None:
        log.info("%s: reloading", why)
        self._spawn(self._reload_and_log())

    async def _reload_and_log(self) -> None:
        try:
            await self.reload()
        except ConfigError as error:
            log.error("nothing is changed, the configuration has %d problems", len(error.problems))
            for problem in error.problems:
                log.error("%s", problem)

    async def reload(self) -> list[Verdict]:
        """Read the configuration again and become that. Raises ConfigError, and then nothing has changed."""
        async with self._reloading:
            sdnotify.reloading()
            self.reloaded = time.time()
            self._watch.seen = signature(self.path)
            try:
                new = load(self.path)
            except ConfigError:
                self.reload_succeeded = False
                raise
            finally:
                sdnotify.notify("READY=1")
            self.reload_succeeded = True
            old, self.config = self.config, new
            verdicts = judge_daemon(old.daemon, new.daemon) + judge_metrics(old.metrics, new.metrics)
            verdicts += judge_hosts(old.hosts, new.hosts)
            await self._use_daemon_settings(old.daemon, new.daemon)
            configured = [runner for runner in self.runners.values() if not runner.transient]
            known = {runner.settings.name for runner in configured}
            # What goes first makes room for what comes.
            for runner in configured:
                wanted = new.mounts.get(runner.settings.name)
                if wanted is None or not wanted.enabled:
                    verdicts += await self._remove(runner)
            changes = []
            for name, settings in new.mounts.items():
                if name in self.runners and settings.enabled:
                    changes.append(self._change(self.runners[name], settings))
                elif name not in known and settings.enabled:
                    self._add(Runner(settings, self.shared))
                    verdicts.append(Verdict(f"mounts.{name}", "", Outcome.APPLIED, "new, is being mounted"))
            for result in await asyncio.gather(*changes):
                verdicts += result
            self._subscribe()
            _log_verdicts(verdicts)
            return verdicts

    async def _use_daemon_settings(self, old: DaemonSettings, new: DaemonSettings) -> None:
        self.shared.daemon = new.model_copy(
            update={"run_dir": self.shared.daemon.run_dir, "log_format": self._log_format or new.log_format}
        )
        if old.log_format != new.log_format:
            self.shared.pool.log_format = self.shared.daemon.log_format
            self.shared.pool.close()  # the next one says it in the new form
            logs.set_up(new.log_level, self.shared.daemon.log_format)
        elif old.log_level != new.log_level:
            await self._set_log_level(new.log_level)

    async def _remove(self, runner: Runner) -> list[Verdict]:
        problem = await runner.remove()
        table = f"mounts.{runner.label}"
        if problem is not None:
            return [Verdict(table, "", Outcome.REJECTED, f"cannot unmount: {problem}")]
        self.runners.pop(runner.label, None)
        return [Verdict(table, "", Outcome.APPLIED, "unmounted")]

    async def _change(self, runner: Runner, new: MountSettings) -> list[Verdict]:
        """Have a mount follow its settings; what cannot change now is used at its next start.

        Only what has changed in the configuration changes: branches added by hand stay.
        """
        table = f"mounts.{new.name}"
        keys = set(changed_keys(runner.settings, new)) | runner.pending
        runner.follow(new)
        if runner.state is not State.SERVING:
            if runner.legacy:
                runner.pending |= keys
            return [Verdict(table, key, Outcome.APPLIED, "at the next start") for key in sorted(keys)]
        if runner.worker is not None:
            runner.refresh(runner.worker.pid)
        outcomes = dict.fromkeys(keys & set(OWN_KEYS) - {"mount_point"}, Outcome.APPLIED)
        if "mount_point" in keys and runner.active.mount_point != new.mount_point:
            outcomes["mount_point"] = Outcome.NEEDS_REMOUNT
        values = {key: getattr(new.options, key) for key in keys - set(OWN_KEYS)}
        wanted = runner.active.options.but(**values)
        problem = ""
        if changed_options(runner.active.options, wanted):
            request = {"op": "reconfigure", "options": format_options(wanted),
                       "configured": format_options(new.options)}  # fmt: skip
            try:
                answer = await runner.request(request)
                problem = "" if answer["ok"] else str(answer["error"])
            except OSError as error:
                problem = str(error) or "no answer"
            if runner.worker is not None:
                runner.refresh(runner.worker.pid)
            left = set(changed_options(runner.active.options, wanted))
            refused = Outcome.REJECTED if problem else Outcome.NEEDS_REMOUNT
            outcomes.update({key: refused if key in left else Outcome.APPLIED for key in values})
        runner.pending = {key for key, outcome in outcomes.items() if outcome is not Outcome.APPLIED}
        return [
            Verdict(table, key, outcome, problem if outcome is Outcome.REJECTED else "")
            for key, outcome in sorted(outcomes.items())
        ]

    async def _watch_files(self) -> None:
        while True:
            await self._watch.changed()
            if self.shared.daemon.watch:
                log.info("the configuration has changed: reloading")
                await self._reload_and_log()

    # -- control ----------------------------------------------------------------------------------

    def _commands(self) -> dict[str, Command]:
        return {
            "ping": self._ping,
            "status": self._status,
            "reload": self._reload,
            "restart": self._restart,
            "change": self._change_and_save,
            "mount": self._mount,
            "log-level": self._log_level,
            "stop": self._stop,
        }

    async def _ping(self, request: Message) -> Message:
        return {}

    async def _status(self, request: Message) -> Message:
        self._forget_finished()
        return {
            "udbad": __version__,
            "pid": os.getpid(),
            "config": [str(file) for file in config_files(self.path)],
            "reloaded": self.reloaded,
            "reload_succeeded": self.reload_succeeded,
            "mounts": await asyncio.gather(*map(_describe, self.runners.values())),
        }

    async def _reload(self, request: Message) -> Message:
        return {"verdicts": [verdict.to_json() for verdict in await self.reload()]}

    def _find(self, request: Message) -> Runner:
        wanted = text_of(request, "mount")
        for runner in self.runners.values():
            if wanted == runner.label or (wanted.rstrip("/") or "/") == runner.settings.mount_point:
                return runner
        raise UserError(f"no mount {wanted!r}; there are {', '.join(self.runners) or 'none'}", ExitCode.NOT_MOUNTED)

    async def _restart(self, request: Message) -> Message:
        problem = await self._find(request).restart(flag_of(request, "force"))
        if problem is not None:
            raise UserError(problem, ExitCode.FAILURE)
        return {}

    async def _change_and_save(self, request: Message) -> Message:
        """Have a mount process do what is in "request", and write it to the configuration (save.py)."""
        inner = request.get("request")
        if not isinstance(inner, dict):
            raise UserError("the request must be an object", ExitCode.OPTION)
        async with self._reloading:
            runner = self._find(request)
            before = signature(self.path)
            answer, edited = await save.change_and_save(self.path, runner, inner)
            if before == self._watch.seen:
                self._watch.seen = signature(self.path)  # nothing but what is in force already
            # Of what else may have changed in the file, nothing is taken up here.
            key = "udba" if inner["op"] == "udba" else "branches"
            values = {key: getattr(edited.settings.options, key)}
            settings = replace(runner.settings, options=runner.settings.options.but(**values))
            self.config = replace(self.config, mounts={**self.config.mounts, settings.name: settings})
            runner.follow(settings)
            if key == "udba":
                runner.pending.discard(key)
            with suppress(OSError):  # it died since: the next process is told anyway
                await runner.request({"op": "configured", "options": format_options(settings.options)})
        log.info("%s: saved to %s", runner.label, edited.file)
        return {**answer, "saved": edited.file}

    async def _mount(self, request: Message) -> Message:
        """For mount.udba: a mount that is not in the configuration but looked after all the same."""
        options = parse_mount_options(text_of(request, "options"))
        mount_point = text_of(request, "mount_point")
        if not mount_point.startswith("/"):
            raise UserError("mount_point must be an absolute path", ExitCode.OPTION)
        end = time.monotonic() + _UNMOUNT_SECONDS
        self._forget_finished()
        while any(runner.settings.mount_point == mount_point for runner in self.runners.values()):
            # After `umount`, the end of the process may still be on its way to us.
            if time.monotonic() > end:
                break
            await asyncio.sleep(0.05)
            self._forget_finished()
        if any(runner.settings.mount_point == mount_point for runner in self.runners.values()):
            raise UserError(f"{mount_point} is the mount point of a mount already", ExitCode.MOUNT_POINT)
        settings = MountSettings("", mount_point, options, missing_branch="fail")
        for one in self.runners.values():
            for text in shared_trees(settings, one.settings) if one.settings.enabled else ():
                raise UserError(text, ExitCode.BRANCH)
        runner = Runner(settings, self.shared, transient=True)
        self._add(runner)
        await runner.outcome.wait()
        if runner.state is State.SERVING:
            return {}
        reason = runner.reason or "it did not start"
        # mount(8) waits for an answer: what does not work at once has failed.
        await runner.stop()
        self.runners.pop(runner.label, None)
        raise UserError(reason, ExitCode.FAILURE)

    def _forget_finished(self) -> None:
        for label, runner in list(self.runners.items()):
            if runner.finished:
                del self.runners[label]

    async def _log_level(self, request: Message) -> Message:
        try:
            await self._set_log_level(text_of(request, "level"))
        except ValueError as error:
            raise UserError(str(error), ExitCode.OPTION) from None
        return {}

    async def _set_log_level(self, level: str) -> None:
        logs.set_level(level)
        asked = [
            runner.request({"op": "log-level", "level": level}, STATUS_SECONDS) for runner in self.runners.values()
        ]
        await asyncio.gather(*asked, return_exceptions=True)

    async def _stop(self, request: Message) -> Message:
        self._keep_mounts = flag_of(request, "keep_mounts")
        log.info("asked to stop%s", ", mounts stay" if self._keep_mounts else "")
        asyncio.get_running_loop().call_soon(self._end.set)
        return {}


async def _describe(runner: Runner) -> Message:
    words: Message = {
        "name": runner.settings.name,
        "label": runner.label,
        "mount_point": runner.active.mount_point,
        "state": runner.state.value,
        "reason": runner.reason,
        "since": runner.since,
        "restarts": runner.restarts,
        "pid": runner.worker.pid if runner.worker is not None else None,
        "connection": runner.connection,
        "si": registry.mount_id(os.fsencode(runner.place)) if runner.place else None,
        "pending": sorted(runner.pending),
    }
    if runner.state is State.SERVING and runner.control is None:
        words["reason"] = "cannot be asked: it has no control socket"
    elif runner.state is State.SERVING:
        try:
            words["process"] = await runner.request({"op": "status"}, STATUS_SECONDS)
        except OSError as error:
            words["state"] = NOT_ANSWERING
            words["reason"] = str(error) or f"process {words['pid']} has not answered for {STATUS_SECONDS:g} s"
    return words


def _take_run_dir(run_dir: str, stack: ExitStack) -> Any:
    """The listening socket, with the run directory locked for as long as the stack lasts."""
    try:
        with private.directory(run_dir, make=True) as dirfd:
            lock = private.open_lock(dirfd, "lock")
        stack.callback(os.close, lock)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        sock = bind(os.path.join(run_dir, registry.SOCKET_NAME))
    except BlockingIOError:
        raise UserError(f"another supervisor uses {run_dir}", ExitCode.FAILURE) from None
    except OSError as error:
        raise UserError(f"{run_dir}: {error.strerror or error}", ExitCode.FAILURE) from None
    stack.callback(sock.close)
    return sock


def _log_verdicts(verdicts: Iterable[Verdict]) -> None:
    for verdict in verdicts:
        log.log(logging.WARNING if verdict.outcome is Outcome.REJECTED else logging.INFO, "%s", verdict)


def run(path: Path, pool: Pool, log_format: str | None = None) -> None:
    """`udbad run -c PATH`; log_format: instead of the one in the configuration. Raises UserError."""
    seen = signature(path)
    config = load(path)
    logs.set_up(config.daemon.log_level, log_format or config.daemon.log_format)

    async def serve() -> None:
        await Supervisor(path, config, seen, pool, log_format).run()

    asyncio.run(serve())
