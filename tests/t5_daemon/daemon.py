"""A real `udbad run` for tests: its configuration, its log, its commands, and a certain end.

What it leaves, whatever the test did, is taken away: the supervisor is stopped, then mount processes that
are still registered are killed and their mounts aborted. The run directory is not below tmp_path, because
the path of a unix socket has at most 107 bytes, unix(7).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from tests.helpers import forked
from tests.helpers.leaks import holders, mounts_under, remove_mount
from tests.helpers.mount import REPOSITORY, Process, ensure_fusectl
from udbad.control import registry
from udbad.control.protocol import Message, ask

COMMAND: Final = (sys.executable, "-m", "udbad")
DEADLINE: Final = 60.0
"""Seconds for anything that should happen at once, on two cores that others use too."""


def until(condition: Callable[[], Any], what: str, timeout: float = DEADLINE) -> Any:
    """Wait for something that another process does; returns the first true result."""
    end = time.monotonic() + timeout
    while True:
        result = condition()
        if result:
            return result
        assert time.monotonic() < end, f"not within {timeout:g} s: {what}"
        time.sleep(0.02)


def toml(value: object) -> str:
    """A value as TOML has it; JSON's strings, numbers and lists are TOML's."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {toml(one)}" for key, one in value.items()) + " }"
    return json.dumps(value)


class Daemon:
    """One configuration and the supervisor that runs it; use the fixture `daemon`."""

    def __init__(self, tmp_path: Path) -> None:
        self.tmp_path = tmp_path
        self.run_dir = tempfile.mkdtemp(prefix="udbad-run-")
        self.config = tmp_path / "udbad.toml"
        self.settings: dict[str, object] = {"run_dir": self.run_dir}
        self.hosts: dict[str, object] = {}
        self.mounts: dict[str, dict[str, object]] = {}
        self.process: Process | None = None
        self.executed = False
        """Whether the supervisor and commands are programs that start, as for users; else they are forked."""
        self.patch = ""
        """Python that supervisor, mount processes and commands run before they begin, when all of udbad is imported."""
        self.environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "UDBAD_RUN_DIR": self.run_dir}
        self._log_path = tmp_path / "daemon.log"

    # -- configuration ----------------------------------------------------------------------------

    def add(self, name: str, layers: Sequence[str] = ("top=rw", "base=ro"), **keys: object) -> Path:
        """A mount with branch directories tmp_path/NAME.LAYER, which are made; returns the mount point."""
        mount_point = self.tmp_path / f"{name}.mnt"
        mount_point.mkdir(exist_ok=True)
        branches = []
        for layer in layers:
            directory = self.tmp_path / f"{name}.{layer.partition('=')[0]}"
            directory.mkdir(exist_ok=True)
            branches.append(f"{directory}={layer.partition('=')[2]}")
        # Unless a test is about that: who kills a mount process has a dead mount.
        self.mounts[name] = {"mount_point": str(mount_point), "branches": branches, "survive": False, **keys}
        return mount_point

    def branch(self, name: str, layer: str) -> Path:
        return self.tmp_path / f"{name}.{layer}"

    def write(self) -> None:
        """Write the configuration; at once, as a careful editor does."""
        lines = ["[metrics]", 'listen = "off"']
        tables = {"hosts": self.hosts, "daemon": self.settings, **{f"mounts.{k}": v for k, v in self.mounts.items()}}
        for title, table in tables.items():
            lines += [f"[{title}]", *(f"{key} = {toml(value)}" for key, value in table.items())]
        temporary = self.config.with_suffix(".new")
        temporary.write_text("\n".join(lines) + "\n")
        temporary.replace(self.config)

    # -- life -------------------------------------------------------------------------------------

    def start(self, ready: bool = True) -> None:
        """Write the configuration and start the supervisor; ready: wait until it says so."""
        ensure_fusectl()
        self.write()
        before = len(self.log())
        with self._log_path.open("ab") as log:
            words = ["run", "-c", str(self.config)]
            if self.executed:
                self.process = subprocess.Popen(
                    [*COMMAND, *words],
                    stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd="/", env=self.environment,
                )  # fmt: skip
            else:
                self.process = forked.start(words, log.fileno(), environment=self.environment, patch=self.patch)
        if ready:
            until(lambda: "ready, " in self.log()[before:] or self.ended(), f"ready\n{self.log()}")
            assert not self.ended(), self.log()

    def ended(self) -> bool:
        assert self.process is not None
        return self.process.poll() is not None

    def log(self) -> str:
        return self._log_path.read_text(errors="replace") if self._log_path.exists() else ""

    def stop(self) -> None:
        """SIGTERM; it must end with code 0 and leave no mount."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(DEADLINE) == 0, self.log()
        assert not [mount for mount in mounts_under(self.tmp_path) if mount.fs_type == "fuse.udba"], self.log()
        assert not registry.entries(self.run_dir), self.log()

    def kill(self) -> None:
        """SIGKILL the supervisor alone."""
        assert self.process is not None
        self.process.kill()
        self.process.wait(DEADLINE)

    def destroy(self) -> None:
        """Leave nothing."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait(DEADLINE)
        entries = registry.entries(self.run_dir)
        for entry in entries:
            if re.search(rb"udbad|tests\.helpers\.forked", _command_line(entry.pid)):
                os.kill(entry.pid, signal.SIGKILL)
        for mount in reversed(mounts_under(self.tmp_path)):
            remove_mount(mount)
        if entries:  # their keepers, and who was to go on with them, write there until they find that there is no mount
            run_dir = Path(self.run_dir)
            until(lambda: not holders(run_dir), f"an end of who uses {run_dir}")
        shutil.rmtree(self.run_dir)

    # -- asking -----------------------------------------------------------------------------------

    def ask(self, operation: str, **words: object) -> Message:
        """One request to the supervisor."""
        return ask(os.path.join(self.run_dir, registry.SOCKET_NAME), {"op": operation, **words}, DEADLINE)

    def state(self, name: str) -> Mapping[str, Any]:
        """What `status` says of one mount."""
        mounts: dict[str, Mapping[str, Any]] = {mount["label"]: mount for mount in self.ask("status")["mounts"]}
        return mounts.get(name, {"state": "unknown", "pid": None})

    def wait_for(self, name: str, state: str = "serving", not_pid: int | None = None) -> Mapping[str, Any]:
        """Until the mount is in this state, in another process than `not_pid`."""

        def there() -> Mapping[str, Any] | None:
            now = self.state(name)
            return now if now["state"] == state and (not_pid is None or now["pid"] != not_pid) else None

        try:
            found: Mapping[str, Any] = until(there, f"{name} {state}")
        except AssertionError as error:
            error.add_note(f"{self.state(name)}\n{self.log()}")
            raise
        return found

    def command(self, *words: str, code: int | None = 0) -> str:
        """Run `udbad WORDS`; its output. code: the exit code it must have, None for any."""
        if self.executed:
            done = subprocess.run(
                [*COMMAND, *words], check=False, capture_output=True, text=True, timeout=DEADLINE, cwd="/",
                env=self.environment,
            )  # fmt: skip
        else:
            done = forked.run(words, self.environment, DEADLINE, self.patch)
        assert code is None or done.returncode == code, (words, done.returncode, done.stdout, done.stderr, self.log())
        return done.stdout + done.stderr


def _command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""
