"""Message buses of the tests' own, and a file server: nats-server and redis-server on the loopback interface, sshfs."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.helpers.leaks import mounts_under, remove_mount
from tests.helpers.mount import Mount

SECONDS = 30.0
SFTP_SERVER = "/usr/lib/openssh/sftp-server"
UNCACHED = "dir_cache=no,entry_timeout=0,attr_timeout=0,negative_timeout=0"
"""Of sshfs: it keeps nothing, and has the kernel keep nothing."""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
        return port


def is_believed(mount: Mount) -> bool:
    """Whether the kernel needs to ask nothing about what it was told of d/old."""
    path = mount.path / "d"

    def requests() -> int:
        counted: dict[str, int] = mount.control({"op": "stats"})["requests"]
        return sum(counted.values())

    os.listdir(path)
    (path / "old").stat()
    before = requests()
    (path / "old").stat()
    return requests() == before


class Server:
    """A message bus in a process of its own, which can be killed and started again."""

    def __init__(self, kind: str, directory: Path, words: Sequence[str] = (), port: int = 0) -> None:
        """kind: nats or redis. words: more of its command line. port: 0 for any one."""
        self.kind = kind
        self.port = port or free_port()
        self.directory = directory
        self._words = words
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    @property
    def url(self) -> str:
        return f"{self.kind}://127.0.0.1:{self.port}"

    def _command(self) -> list[str]:
        port = str(self.port)
        if self.kind == "nats":
            return ["nats-server", "-a", "127.0.0.1", "-p", port, "-js", "-sd", str(self.directory), *self._words]
        return [
            *("redis-server", "--bind", "127.0.0.1", "--port", port, "--dir", str(self.directory)),
            *("--save", "", "--appendonly", "no", *self._words),
        ]

    def start(self) -> None:
        self._process = subprocess.Popen(self._command(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        end = time.monotonic() + SECONDS
        while True:
            assert self._process.poll() is None, f"{self.kind} has ended"
            assert time.monotonic() < end, f"{self.kind} does not answer"
            try:
                socket.create_connection(("127.0.0.1", self.port), SECONDS).close()
                return
            except ConnectionRefusedError:
                time.sleep(0.01)

    def signal(self, number: int) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait(SECONDS)
            self._process = None


@contextmanager
def bus_server(kind: str, directory: Path, words: Sequence[str] = (), port: int = 0) -> Iterator[Server]:
    directory.mkdir(exist_ok=True)
    server = Server(kind, directory, words, port)
    try:
        yield server
    finally:
        server.kill()


@contextmanager
def sshfs(source: Path, point: Path, options: str = UNCACHED) -> Iterator[Path]:
    """A real sshfs, which talks to its server without ssh between: `source` mounted on `point`."""
    point.mkdir(exist_ok=True)
    here, there = socket.socketpair()
    with here, there:
        server = subprocess.Popen([SFTP_SERVER], stdin=there.fileno(), stdout=there.fileno(), stderr=subprocess.DEVNULL)
        client = subprocess.Popen(
            ["sshfs", "-f", "-o", f"passive,{options}", f":{source}", str(point)],
            stdin=here.fileno(), stdout=here.fileno(), stderr=subprocess.DEVNULL,
        )  # fmt: skip
    try:
        end = time.monotonic() + SECONDS
        while not mounts_under(point):
            assert client.poll() is None, "sshfs has ended"
            assert time.monotonic() < end, "sshfs does not mount"
            time.sleep(0.01)
        yield point
    finally:
        for mount in mounts_under(point):
            remove_mount(mount)
        for process in (client, server):
            process.terminate()
            process.wait(SECONDS)
