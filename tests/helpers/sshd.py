"""A private sshd, with keys and a configuration of its own, and sshfs that talks to it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from tests.helpers.leaks import mount_on, read_mountinfo, remove_mount
from tests.helpers.network import Host
from tests.system.support import clean_env, run, wait_gone

_SECONDS: Final = 60.0
_SSHD: Final = "/usr/sbin/sshd"  # it wants its absolute path, which it executes for each connection
_SETTINGS: Final = """
Port {port}
ListenAddress {address}
HostKey {directory}/host
AuthorizedKeysFile {directory}/user.pub
PidFile none
StrictModes no
UsePAM yes
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin prohibit-password
Subsystem sftp internal-sftp
"""


def _until(done: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + _SECONDS
    while not done():
        assert time.monotonic() < end, f"no {what} after {_SECONDS} s"
        time.sleep(0.02)


class Sshd:
    """The server, with one process for each connection, and one for the files."""

    def __init__(self, directory: Path, host: Host | None = None) -> None:
        """directory: for its keys. host: where it runs; None: here, on the loopback interface."""
        self.keys = directory
        self.address = "127.0.0.1" if host is None else host.address
        self._enter = [] if host is None else host.enter
        self._config = directory / "sshd_config"
        self.port = 22
        if host is None:
            with socket.create_server(("127.0.0.1", 0)) as free:
                self.port = free.getsockname()[1]
        for name in ("host", "user"):
            run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", directory / name)
        self._config.write_text(_SETTINGS.format(port=self.port, address=self.address, directory=directory))
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # as the service of the system has it
        self.start()

    def start(self) -> None:
        self._process = subprocess.Popen(
            [*self._enter, _SSHD, "-D", "-e", "-f", self._config], env=clean_env(), stderr=subprocess.DEVNULL
        )
        _until(self._listens, "answer of sshd")

    def _listens(self) -> bool:
        assert self._process.poll() is None, "sshd has ended"
        probe = [*self._enter, "bash", "-c", f"read -r -n 4 said </dev/tcp/{self.address}/{self.port} && echo $said"]
        return subprocess.run(probe, capture_output=True, timeout=_SECONDS, check=False).stdout == b"SSH-\n"

    def _family(self) -> list[int]:
        family = [self._process.pid]
        for pid in family:
            with suppress(FileNotFoundError, ProcessLookupError):  # a connection that has ended meanwhile
                family += [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
        return family

    def signal(self, number: int) -> list[int]:
        """To all of it, the one that listens first. Returns the processes."""
        family = self._family()
        for pid in family:
            # Who was killed while the one that listens was stopped is reaped by it as soon as it goes on.
            with suppress(ProcessLookupError):
                os.kill(pid, number)
        return family

    def kill_connections(self) -> None:
        """And begin to serve no other one, until SIGCONT."""
        first, *others = self.signal(signal.SIGSTOP)
        for pid in others:
            os.kill(pid, signal.SIGKILL)
        assert first == self._process.pid

    def kill(self) -> None:
        if self._process.poll() is not None:
            return
        family = self.signal(signal.SIGKILL)
        self._process.wait(_SECONDS)
        wait_gone(family)


@contextmanager
def private_sshd(directory: Path, host: Host | None = None) -> Iterator[Sshd]:
    """directory: is made."""
    directory.mkdir()
    server = Sshd(directory, host)
    try:
        yield server
    finally:
        server.kill()


@contextmanager
def sshfs_over_ssh(
    server: Sshd, directory: Path, mount_point: Path, options: str, enter: Sequence[str] = ()
) -> Iterator[None]:
    """`directory` of the server on `mount_point`, which is made. enter: what its command line begins with."""
    mount_point.mkdir()
    keys = server.keys
    words = f"{options},IdentityFile={keys}/user,UserKnownHostsFile={keys}/known,StrictHostKeyChecking=accept-new"
    process = subprocess.Popen(
        [
            *enter, "sshfs", "-f", "-F", "/dev/null", "-p", str(server.port), "-o", words,
            f"root@{server.address}:{directory}", mount_point,
        ],
        env=clean_env(),
    )  # fmt: skip
    try:
        _until(lambda: any(one.path == mount_point for one in read_mountinfo()), "mount of sshfs")
        yield
        remove_mount(mount_on(mount_point))
    finally:
        process.terminate()
        process.wait(_SECONDS)
