"""A file server and clients of it, each a host of its own: what is changed on the server is told to the clients.

On the server run a message bus and `udbad watch`; on each client the file system that brings the files there, a union
of them, and `udbad subscribe`. How the files come there is up to a `Share`.
"""

from __future__ import annotations

import asyncio
import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Protocol

from tests.helpers.bus import UNCACHED
from tests.helpers.merge import NO_XATTRS, Entry, Tree
from tests.helpers.mount import REPOSITORY, Mount, mounted
from tests.helpers.network import Host, hosts
from tests.helpers.sshd import Sshd, private_sshd, sshfs_over_ssh
from udbad.hosts import barrier
from udbad.hosts.bus import BusSettings
from udbad.hosts.link import MountLink
from udbad.hosts.serving import subscribe
from udbad.hosts.subscriber import Following, Subscriber
from udbad.settings.file import load

SECONDS: Final = 60.0
_PORT: Final = 4222


class Share(Protocol):
    """A network file system."""

    @property
    def settle(self) -> float:
        """Seconds for which its client may keep what it has asked for (docs/hosts.md)."""

    @property
    def hides_links(self) -> bool:
        """Whether it shows of no file that it has other names."""

    def shown(self, entry: Entry) -> Entry:
        """What it shows of an object of the server."""

    def serve(self, server: Host, export: Path) -> AbstractContextManager[object]:
        """While the server has `export` for clients."""

    def bring(self, client: Host, point: Path) -> AbstractContextManager[object]:
        """While a client has it on `point`, which is made."""


class Sshfs:
    """With a real network between, and nothing that is cached."""

    settle = 0.0
    hides_links = True

    def __init__(self, directory: Path) -> None:
        """directory: for keys."""
        self._directory = directory
        self._sshd: Sshd | None = None
        self._export = directory

    def shown(self, entry: Entry) -> Entry:
        """SFTP, of version 3, knows whole seconds, and neither link counts nor extended attributes."""
        if entry.mtime_ns is None:
            return replace(entry, xattrs=NO_XATTRS)
        return replace(entry, mtime_ns=entry.mtime_ns // 10**9 * 10**9, nlink=1, xattrs=NO_XATTRS)

    @contextmanager
    def serve(self, server: Host, export: Path) -> Iterator[None]:
        with private_sshd(self._directory / "sshd", server) as self._sshd:
            self._export = export
            yield

    def bring(self, client: Host, point: Path) -> AbstractContextManager[None]:
        assert self._sshd is not None
        return sshfs_over_ssh(self._sshd, self._export, point, UNCACHED, client.enter)


@dataclass
class Client:
    """One that has a mount of what is on the server."""

    host: Host
    mount: Mount

    def behind(self) -> list[str]:
        """Have the mount see everything that was changed up to now; who has not told that."""
        answer = self.mount.control({"op": "subscribers"})
        return barrier.ask(answer["subscribers"], SECONDS) if answer["subscribers"] else ["nobody listens"]

    def catch_up(self) -> None:
        assert self.behind() == []


@dataclass
class Site:
    """branches: the directories on the server, top first."""

    server: Host
    share: Share
    branches: list[Path]
    clients: list[Client]

    def shown(self, tree: Tree) -> Tree:
        """What clients see of what is on the server."""
        return {path: self.share.shown(entry) for path, entry in tree.items()}


@contextmanager
def _program(host: Host, log: Path, *words: str | Path) -> Iterator[None]:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    with (
        log.open("wb") as output,
        subprocess.Popen([*host.enter, *words], stdout=output, stderr=output, env=environment, cwd="/") as program,
    ):
        try:
            yield
            assert program.poll() is None, "has ended"
        except BaseException as error:
            error.add_note(f"-- {log.name}:\n{log.read_text()}")
            raise
        finally:
            program.terminate()
            program.wait(SECONDS)


@contextmanager
def site(
    root: Path, share: Share, branches: Mapping[Path, str], *, options: str = "", allow_log: str | None = None,
    clients: int = 2, bound: float = 10.0,
) -> Iterator[Site]:  # fmt: skip
    """branches: directories in `root`/export with their permissions, top first; they are what is shared.

    options, allow_log: of the mounts. bound: that of [hosts], seconds.
    """
    with ExitStack() as stack:
        server, *others = stack.enter_context(hosts(clients))
        config = root / "hosts.toml"
        config.write_text(
            f'[hosts]\nurls = ["nats://{server.address}:{_PORT}"]\nname = "server"\n'
            f"bound = {bound}\nsettle = {share.settle}\n"
        )
        words = ["-a", server.address, "-p", str(_PORT), "-js", "-sd", str(root / "bus")]
        stack.enter_context(_program(server, root / "bus.log", "nats-server", *words))
        pairs = [f"{path.name}={path}" for path in branches]
        stack.enter_context(
            _program(server, root / "watch.log", sys.executable, "-m", "udbad", "watch", "-c", config, *pairs)
        )
        stack.enter_context(share.serve(server, root / "export"))
        found = [
            stack.enter_context(_client(one, root / f"client{number}", share, branches, config, options, allow_log))
            for number, one in enumerate(others)
        ]
        end = time.monotonic() + SECONDS + share.settle
        while late := [name for client in found for name in client.behind()]:
            assert time.monotonic() < end, late
            time.sleep(0.1)
        yield Site(server, share, list(branches), found)


@contextmanager
def _client(
    host: Host, root: Path, share: Share, branches: Mapping[Path, str], config: Path, options: str,
    allow_log: str | None,
) -> Iterator[Client]:  # fmt: skip
    root.mkdir()
    here = {root / "share" / path.name: permission for path, permission in branches.items()}
    words = [f"{path}={permission}" for path, permission in here.items()]
    log = "nobody vouches for it any more" + (f"|{allow_log}" if allow_log else "")
    with (
        share.bring(host, root / "share"),
        mounted(words, root / "mnt", "notify", options, allow_log=log) as mount,
        _program(
            host,
            root / "log",
            sys.executable,
            "-m",
            __name__,
            config,
            mount.control_path,
            mount.control_path.with_name("hosts"),
            *here,
        ),
    ):
        mount.branches = list(branches)
        yield Client(host, mount)


def main(config: str, control: str, path: str, *branches: str) -> None:
    """`udbad subscribe` for a mount of which only a test knows. path: of the socket where it answers."""
    table = load(Path(config)).hosts
    subscribers = [
        Subscriber(
            BusSettings.of(table), Following(Path(branch).name, branch, table.bound, table.settle),
            MountLink("", "", branch, control, path),
        )
        for branch in branches
    ]  # fmt: skip
    asyncio.run(subscribe(subscribers, barrier.listen(path), lambda: None))


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    main(*sys.argv[1:])
