"""File servers of the kernel in a network namespace: knfsd and ksmbd, and their clients in others, as a `Share`."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from tests.helpers.leaks import mounts_under, remove_mount
from tests.helpers.merge import Entry
from tests.helpers.network import Host

SECONDS: Final = 120.0
_CONTROL: Final = Path("/proc/fs/nfsd")


def _run(*words: str | Path) -> None:
    subprocess.run(words, check=True, timeout=SECONDS)


@contextmanager
def ext4(directory: Path, megabytes: int = 200) -> Iterator[Path]:
    """A file system of its own on `directory`, which is made: a server needs handles that last, and change counters."""
    _run("modprobe", "loop")
    image = directory.with_suffix(".img")
    with image.open("wb") as file:
        file.truncate(megabytes << 20)
    _run("mkfs.ext4", "-q", image)
    directory.mkdir()
    _run("mount", "-o", "loop", image, directory)
    try:
        yield directory
    finally:
        _run("umount", directory)


@contextmanager
def _daemon(host: Host, *words: str | Path) -> Iterator[None]:
    with subprocess.Popen([*host.enter, *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as daemon:
        try:
            yield
            assert daemon.poll() is None, f"{words[0]} has ended"
        finally:
            daemon.kill()


@contextmanager
def _mounted(client: Host, point: Path, *words: str | Path) -> Iterator[None]:
    point.mkdir()
    client.run("mount", *words, point)
    try:
        yield
    finally:
        for mount in mounts_under(point):
            remove_mount(mount)


class Nfs:
    """NFS 4 of a directory, which is the root of what is exported."""

    hides_links = False

    def __init__(self, options: str, settle: float) -> None:
        """options: of the client, nfs(5)."""
        self.settle = settle
        self._options = options
        self._server = ""

    def shown(self, entry: Entry) -> Entry:
        return entry

    @contextmanager
    def serve(self, server: Host, export: Path) -> Iterator[None]:
        for module in ("nfsd", "nfsv4"):
            _run("modprobe", module)
        self._server = server.address
        with _mounted_control(server), _daemon(server, "rpcbind", "-f"), _daemon(server, "rpc.mountd", "-F"):
            server.run("exportfs", "-o", "rw,no_root_squash,no_subtree_check,fsid=0", f"*:{export}")
            server.run("rpc.nfsd", "--no-nfs-version", "3", "4")
            try:
                yield
            finally:
                server.run("rpc.nfsd", "0")
                server.run("exportfs", "-u", f"*:{export}")

    @contextmanager
    def bring(self, client: Host, point: Path) -> Iterator[None]:
        with _mounted(client, point, "-t", "nfs4", "-o", self._options, f"{self._server}:/"):
            yield


@contextmanager
def _mounted_control(server: Host) -> Iterator[None]:
    """That of the server's namespace."""
    server.run("mount", "-t", "nfsd", "nfsd", _CONTROL)
    try:
        (_CONTROL / "nfsv4gracetime").write_text("10\n")  # the least
        yield
    finally:
        _run("umount", _CONTROL)


class Cifs:
    """SMB 3 of a directory."""

    hides_links = False
    _SETTINGS = """
[global]
    netbios name = server
    map to guest = never
    interfaces = {interface}
    bind interfaces only = no
[share]
    path = {export}
    read only = no
    valid users = root
    force user = root
    create mask = 0777
    directory mask = 0777
"""

    def __init__(self, options: str, settle: float, directory: Path) -> None:
        """options: of the client, mount.cifs(8). directory: for what the server wants to know."""
        self.settle = settle
        self._options = options
        self._directory = directory
        self._server = ""

    def shown(self, entry: Entry) -> Entry:
        return entry

    @contextmanager
    def serve(self, server: Host, export: Path) -> Iterator[None]:
        for module in ("ksmbd", "cifs"):
            _run("modprobe", module)
        self._server = server.address
        settings, users = self._directory / "ksmbd.conf", self._directory / "users"
        settings.write_text(self._SETTINGS.format(export=export, interface="lo"))
        _run("ksmbd.adduser", "-a", "root", "-p", "secret", "-i", users)
        with _daemon(server, "ksmbd.mountd", "-n", "-c", settings, "-u", users):
            yield

    @contextmanager
    def bring(self, client: Host, point: Path) -> Iterator[None]:
        words = f"ip={self._server},username=root,password=secret,vers=3.1.1,{self._options}"
        with _mounted(client, point, "-i", "-t", "cifs", "-o", words, f"//{self._server}/share"):
            yield
