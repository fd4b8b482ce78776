"""A supervisor with its mounts, for tests of the one endpoint, and a file system that fills."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from tests.helpers import forked
from tests.helpers.leaks import FS_TYPE, mounts_under, remove_mount
from tests.t6_metrics.scrape import DEADLINE


class Daemon:
    """`udbad run` with a configuration of its own; mounts at base/NAME."""

    def __init__(self, base: Path, mounts: Mapping[str, str], listen: str = "127.0.0.1:0") -> None:
        """mounts: name to the TOML lines beside mount_point. listen: as in [metrics]."""
        # The path of a unix socket has at most 107 bytes, unix(7).
        self.scratch = Path(tempfile.mkdtemp(prefix="udbad-"))
        self.base = base
        self.mounts = dict(mounts)
        self.config = self.scratch / "udbad.toml"
        self._log = self.scratch / "log"
        lines = ["[daemon]", f'run_dir = "{self.scratch}/run"', "watch = false", "restart_delay = 0.0"]
        lines += ["[metrics]", f'listen = "{listen}"']
        for name, words in mounts.items():
            self.path(name).mkdir(exist_ok=True)
            lines += [f"[mounts.{name}]", f'mount_point = "{self.path(name)}"', words]
        self.config.write_text("\n".join(lines) + "\n")
        with self._log.open("wb") as log:
            self.process = forked.start(["run", "-c", str(self.config)], log.fileno())

    def path(self, name: str) -> Path:
        return self.base / name

    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def wait_for_log(self, pattern: str) -> re.Match[str]:
        end = time.monotonic() + DEADLINE
        while True:
            found = re.search(pattern, self.log())
            if found is not None:
                return found
            assert self.process.poll() is None, self.log()
            assert time.monotonic() < end, f"never logged: {pattern}\n{self.log()}"
            time.sleep(0.05)

    @property
    def port(self) -> int:
        return int(self.wait_for_log(r"metrics on https?://127\.0\.0\.1:(\d+)/")[1])

    def wait_until_served(self) -> None:
        served = len(self.mounts)
        self.wait_for_log(rf"ready, {served} of {served} mounts serve")

    def pid(self, name: str) -> int:
        """The process that serves a mount now, as the log names it."""
        found = re.findall(rf"{name}: serving on .*, process (\d+)", self.log())
        assert found, f"no process of {name}\n{self.log()}"
        return int(found[-1])

    def _children(self) -> list[int]:
        children = Path(f"/proc/{self.process.pid}/task").glob("*/children")
        return [int(word) for file in children for word in file.read_text().split()]

    def reload(self) -> None:
        self.process.send_signal(signal.SIGHUP)

    def stop(self) -> None:
        """The orderly end: everything is unmounted, the exit code is 0."""
        self.process.terminate()
        assert self.process.wait(DEADLINE) == 0, self.log()

    def destroy(self) -> None:
        """Leave nothing, whatever the state."""
        if self.process.poll() is None:
            children = self._children()
            self.process.kill()
            self.process.wait(DEADLINE)
            for child in children:
                try:
                    os.kill(child, signal.SIGKILL)
                except ProcessLookupError:
                    continue
        for mount in reversed(mounts_under(self.base)):
            if mount.fs_type == FS_TYPE:
                remove_mount(mount)
        shutil.rmtree(self.scratch)


@contextmanager
def daemon(base: Path, mounts: Mapping[str, str], listen: str = "127.0.0.1:0") -> Iterator[Daemon]:
    """A supervisor whose mounts all serve; at the end it must end in order."""
    running = Daemon(base, mounts, listen)
    try:
        running.wait_until_served()
        yield running
        running.stop()
    finally:
        sys.stderr.write(f"-- log of the daemon:\n{running.log()}\n")  # pytest shows it with a test that failed
        running.destroy()


@contextmanager
def small_tmpfs(path: Path, size: str) -> Iterator[Path]:
    """A file system with little room, mounted at `path`. size: as tmpfs(5) takes it."""
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(path)], check=True, timeout=DEADLINE)
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True, timeout=DEADLINE)
