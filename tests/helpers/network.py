"""A network of two hosts: namespaces that nothing else is in, joined by a cable that can be pulled out (veth(4))."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

ADDRESSES: Final = ("10.203.0.1", "10.203.0.2")
_SECONDS: Final = 30.0


class Host:
    """One of them, for as long as a process lives in it. Files are those of everybody."""

    def __init__(self, holder: subprocess.Popen[bytes], address: str) -> None:
        self.address = address
        self.namespace = holder.pid
        self.enter = ["nsenter", f"--net=/proc/{holder.pid}/ns/net"]
        """What a command line begins with to run there; it becomes the command, with the same pid."""

    def ip(self, words: str) -> None:
        subprocess.run([*self.enter, "ip", *words.split()], check=True, timeout=_SECONDS)

    def cut(self) -> None:
        """From the other one; what talks to its own address goes on at that."""
        self.ip("link set cable down")

    def mend(self) -> None:
        self.ip("link set cable up")


@contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    with ExitStack() as stack:
        hosts = [Host(stack.enter_context(_namespace()), address) for address in ADDRESSES]
        first, second = hosts
        first.ip(f"link add cable type veth peer name cable netns {second.namespace}")
        for host in hosts:
            host.ip("link set lo up")
            host.ip(f"addr add {host.address}/30 dev cable")
            host.mend()
        yield first, second


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
