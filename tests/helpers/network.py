"""A network of hosts: namespaces that nothing else is in, each joined to the first one by a cable that can be pulled
out (veth(4))."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

_SECONDS = 60.0


class Host:
    """One of them, for as long as a process lives in it. Files are those of everybody."""

    def __init__(self, holder: subprocess.Popen[bytes], address: str) -> None:
        self.address = address
        self.namespace = holder.pid
        self.enter = ["nsenter", f"--net=/proc/{holder.pid}/ns/net"]
        """What a command line begins with to run there; it becomes the command, with the same pid."""

    def run(self, *words: str | Path) -> None:
        subprocess.run([*self.enter, *words], check=True, timeout=_SECONDS)

    def ip(self, words: str) -> None:
        self.run("ip", *words.split())

    def cut(self) -> None:
        """From the first one; what talks to its own address goes on at that."""
        self.ip("link set cable down")

    def mend(self) -> None:
        self.ip("link set cable up")


@contextmanager
def hosts(others: int) -> Iterator[list[Host]]:
    """The first one has the same address for all of the others."""
    with ExitStack() as stack:
        server = Host(stack.enter_context(_namespace()), "10.203.0.1")
        server.ip("link set lo up")
        server.ip(f"addr add {server.address}/32 dev lo")
        found = [server]
        for number in range(others):
            one = Host(stack.enter_context(_namespace()), f"10.203.0.{number + 2}")
            server.ip(f"link add cable{number} type veth peer name cable netns {one.namespace}")
            server.ip(f"link set cable{number} up")
            server.ip(f"route add {one.address}/32 dev cable{number} src {server.address}")
            one.ip("link set lo up")
            one.ip(f"addr add {one.address}/24 dev cable")
            one.mend()
            found.append(one)
        yield found


@contextmanager
def _namespace() -> Iterator[subprocess.Popen[bytes]]:
    ours = Path("/proc/self/ns/net").readlink()
    with subprocess.Popen(["unshare", "--net", "sleep", "infinity"]) as holder:
        try:
            end = time.monotonic() + _SECONDS
            while Path(f"/proc/{holder.pid}/ns/net").readlink() == ours:
                assert holder.poll() is None, "no namespace can be made"
                assert time.monotonic() < end
                time.sleep(0.005)
            yield holder
        finally:
            holder.kill()
