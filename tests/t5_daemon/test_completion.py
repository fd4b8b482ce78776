"""TAB in bash, zsh and fish themselves, on a terminal: what they then call udbad with."""

from __future__ import annotations

import json
import os
import pty
import select
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.helpers.mount import REPOSITORY

SHARE = REPOSITORY / "share"
SECONDS = 60.0

PROGRAM = """\
#!/bin/sh
# Completes as udbad does; called in any other way it says what with.
[ -z "$_UDBAD_COMPLETE" ] || exec {python} -c 'from udbad.cli import main; main(prog_name="udbad")'
printf '%s\\0' "$@" >>{called}; echo >>{called}
"""

SHELLS = {
    "bash": (["bash", "--norc", "--noprofile", "-i"], f"source {SHARE}/bash-completion/completions/udbad"),
    "zsh": (
        ["zsh", "-f", "-i"],
        f"fpath=({SHARE}/zsh/site-functions $fpath); autoload -U compinit; compinit -D; unsetopt beep",
    ),
    "fish": (["fish", "--no-config", "-i"], f"source {SHARE}/fish/vendor_completions.d/udbad.fish"),
}


@dataclass(frozen=True)
class Terminal:
    """A directory with a program `udbad`, and a run directory with one mount."""

    directory: Path
    run_dir: Path
    mount_point: str

    def called(self, shell: str, trace: Path, *typed: str) -> list[list[str]]:
        """The arguments that udbad gets when somebody types these lines, "\\t" being TAB.

        trace: for the output of strace.
        """
        output = self.directory / "called"
        command, set_up = SHELLS[shell]
        strace = ["strace", "-f", "--seccomp-bpf", "-s", "4096", "-e", "trace=%file", "-o", str(trace)]
        environment = {
            "PATH": f"{self.directory}:/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME": str(self.directory),
            "TERM": "dumb",
            "LC_ALL": "C.UTF-8",
            "PYTHONPATH": str(REPOSITORY),
            "UDBAD_RUN_DIR": str(self.run_dir),
        }
        master, slave = pty.openpty()
        try:
            process = subprocess.Popen(
                ["setsid", "--ctty", "--wait", *strace, *command],
                stdin=slave,
                stdout=slave,
                stderr=slave,
                env=environment,
                cwd=self.directory,
            )
            os.write(master, "".join(f"{line}\n" for line in (set_up, *typed, "exit")).encode())
            os.close(slave)
            slave = -1
            shown = self._drained(master, process)
        finally:
            os.close(master)
            if slave >= 0:
                os.close(slave)
        assert output.exists(), shown
        return [line.split("\0")[:-1] for line in output.read_text().splitlines()]

    @staticmethod
    def _drained(master: int, process: subprocess.Popen[bytes]) -> str:
        """All that is shown until the shell has ended."""
        shown = b""
        deadline = time.monotonic() + SECONDS
        while process.poll() is None and time.monotonic() < deadline:
            if select.select([master], [], [], 0.1)[0]:
                with suppress(OSError):  # EIO: nobody has the terminal open any more
                    shown += os.read(master, 65536)
        if process.poll() is None:
            process.kill()
        process.wait()
        return shown.decode(errors="replace")


@pytest.fixture
def terminal(tmp_path: Path) -> Terminal:
    program = tmp_path / "udbad"
    program.write_text(PROGRAM.format(python=sys.executable, called=tmp_path / "called"))
    program.chmod(0o755)
    mount_point = f"{tmp_path}/dry, wet [a]*"
    entry = tmp_path / "run" / "si_1"
    entry.mkdir(parents=True)
    words = {
        "name": "work",
        "mount_point": mount_point,
        "asked": mount_point,
        "options": "rw,br=/some/top=rw:/other/base=ro",
        "configured": "",
        "pid": 1,
        "connection": 1,
        "supervised": True,
        "version": "0",
        "started": 0.0,
    }
    (entry / "mount.json").write_text(json.dumps(words))
    return Terminal(tmp_path, tmp_path / "run", mount_point)


@pytest.mark.parametrize("shell", SHELLS)
def test_tab(terminal: Terminal, shell: str, tmp_path: Path) -> None:
    """Commands, options, mounts and branches. Whatever a mount point is called, it arrives as it is; it may hang, so
    no system call has its path."""
    assert shutil.which(shell), f"install {shell}: .ci/install-debian.sh run test"
    trace = tmp_path / "trace"
    start = terminal.mount_point[: terminal.mount_point.index("dry")]
    lines = {
        "udbad inval\t/x": ["invalidate", "/x"],
        "udbad branch del wo\t/so\t": ["branch", "del", "work", "/some/top"],
        "udbad udba work no\tx --sa\t": ["udba", "work", "nox", "--save"],
        f"udbad umount {start}\t": ["umount", terminal.mount_point],
    }
    assert terminal.called(shell, trace, *lines) == [*lines.values()]
    touched = [line for line in trace.read_text().splitlines() if "dry" in line and "execve(" not in line]
    if shell != "fish":  # which itself looks at whatever stands on the line, to underline it
        assert touched == []
    assert "mount.json" in trace.read_text()
