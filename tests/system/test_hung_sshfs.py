"""A branch on sshfs whose server stops, or is gone: the mount goes on without it, and with it when there is one again.

The server is a private sshd on the loopback interface, with keys and a configuration of its own.
"""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.helpers.leaks import mount_on, read_mountinfo, remove_mount
from tests.helpers.mount import Mount, UnionFactory
from tests.helpers.offline import number_of, offline
from tests.system.support import OTHERS_LOG, clean_env, require, run, wait_gone
from udbad.mount import keeper

pytestmark = [
    pytest.mark.system,
    pytest.mark.fuse,
    pytest.mark.skipif(keeper.why_not() is not None, reason=str(keeper.why_not())),
]

LOG = f"another one takes over|has not answered for|answers again|{OTHERS_LOG}"
SECONDS = 60.0
SSHD = "/usr/sbin/sshd"  # it wants its absolute path, which it executes for each connection
SETTINGS = """
Port {port}
ListenAddress 127.0.0.1
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


def until(done: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + SECONDS
    while not done():
        assert time.monotonic() < end, f"no {what} after {SECONDS} s"
        time.sleep(0.02)


class Sshd:
    """The server, with one process for each connection, and one for the files."""

    def __init__(self, directory: Path) -> None:
        self._config = directory / "sshd_config"
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        for name in ("host", "user"):
            run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", directory / name)
        self._config.write_text(SETTINGS.format(port=self.port, directory=directory))
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # as the service of the system has it
        self.start()

    def start(self) -> None:
        self._process = subprocess.Popen(
            [SSHD, "-D", "-e", "-f", self._config], env=clean_env(), stderr=subprocess.DEVNULL
        )
        until(self._listens, "answer of sshd")

    def _listens(self) -> bool:
        assert self._process.poll() is None, "sshd has ended"
        try:
            with socket.create_connection(("127.0.0.1", self.port), SECONDS) as connection:
                return connection.recv(4) == b"SSH-"
        except ConnectionRefusedError:
            return False

    def _family(self) -> list[int]:
        family = [self._process.pid]
        for pid in family:
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
        self._process.wait(SECONDS)
        wait_gone(family)


@pytest.fixture
def sshd(tmp_path: Path) -> Iterator[Sshd]:
    require("sshfs", "sshd", "ssh-keygen")
    directory = tmp_path / "sshd"
    directory.mkdir()
    server = Sshd(directory)
    try:
        with _sshfs(server.port, directory, tmp_path / "real", tmp_path / "hung"):
            yield server
            server.signal(signal.SIGCONT)
    finally:
        server.kill()


@contextmanager
def _sshfs(port: int, keys: Path, directory: Path, mount_point: Path) -> Iterator[None]:
    """`directory` on `mount_point`, through ssh; both are made. Nothing is kept: each access asks the server."""
    directory.mkdir()
    mount_point.mkdir()
    options = (
        "reconnect,dir_cache=no,entry_timeout=0,attr_timeout=0,allow_other,default_permissions"
        f",IdentityFile={keys}/user,UserKnownHostsFile={keys}/known,StrictHostKeyChecking=accept-new"
    )
    process = subprocess.Popen(
        ["sshfs", "-f", "-F", "/dev/null", "-p", str(port), "-o", options, f"root@127.0.0.1:{directory}", mount_point],
        env=clean_env(),
    )
    try:
        until(lambda: any(one.path == mount_point for one in read_mountinfo()), "mount of sshfs")
        yield
        remove_mount(mount_on(mount_point))
    finally:
        process.terminate()
        process.wait(SECONDS)


@pytest.fixture
def mount(sshd: Sshd, union: UnionFactory, tmp_path: Path) -> Mount:
    for path in ("a/all", "real/all", "c/all", "real/only", "c/apart"):
        (tmp_path / path).mkdir(parents=True)
    for path in ("a/all/in_a", "real/all/in_hung", "real/only/f", "c/in_c"):
        (tmp_path / path).write_text(Path(path).name)
    layers = {"a": "rw", "hung": "rw", "c": "rw"}
    mount = union(layers, "notify", "survive=on,branch_timeout=1", allow_log=LOG)
    assert sorted(os.listdir(mount.path)) == ["all", "apart", "in_c", "only"]
    assert sorted(os.listdir(mount.path / "all")) == ["in_a", "in_hung"]
    assert sorted(os.listdir(mount.path / "apart")) == []
    return mount


def test_server_that_is_stopped(mount: Mount, sshd: Sshd) -> None:
    path = mount.path
    here = os.open(path / "apart", os.O_PATH)  # the kernel does not forget it
    file = os.open(path / "only/f", os.O_RDWR)
    sshd.signal(signal.SIGSTOP)
    assert number_of(os.stat, path / "only/new") == errno.EIO, "it was asked, and has waited"
    assert offline(mount) == [str(mount["hung"])]
    assert (path / "all/in_a").read_text() == "in_a"
    assert (path / "in_c").read_text() == "in_c"
    for name in ("", "all"):
        assert number_of(os.listdir, path / name) == errno.EIO, name
    assert number_of(os.pread, file, 1, 0) == errno.EIO
    (path / "apart/new").write_text("new")
    sshd.signal(signal.SIGCONT)
    until(lambda: offline(mount) == [], "return")
    assert os.pwrite(file, b"F", 0) == 1
    os.close(file)
    os.close(here)
    assert (path / "only/f").read_text() == "F"
    assert sorted(os.listdir(path / "all")) == ["in_a", "in_hung"]
    assert sorted(os.listdir(path / "apart")) == ["new"]


def test_server_that_is_gone(mount: Mount, sshd: Sshd) -> None:
    """The branch answers, with an error: the mount passes that on, makes nothing up, and does not go on without it."""
    sshd.kill()
    for name in ("only", "only/f", "only/new", "all/in_hung", "new"):
        assert number_of(os.stat, mount.path / name) == errno.EIO, name
    for name in ("", "all", "only"):
        assert number_of(os.listdir, mount.path / name) == errno.EIO, name
    assert offline(mount) == []
    sshd.start()
    assert sorted(os.listdir(mount.path)) == ["all", "apart", "in_c", "only"]
    assert sorted(os.listdir(mount.path / "all")) == ["in_a", "in_hung"]
    assert (mount.path / "only/f").read_text() == "f"
    assert number_of(os.stat, mount.path / "only/new") == errno.ENOENT


def test_server_that_is_gone_and_takes_no_connection(mount: Mount, sshd: Sshd) -> None:
    """As a machine that is off: sshfs waits for its new connection."""
    sshd.kill_connections()

    def without_it() -> bool:
        assert number_of(os.stat, mount.path / "only/new") == errno.EIO  # what was on its way is so at once
        return offline(mount) == [str(mount["hung"])]

    until(without_it, "the mount goes on without the branch")
    assert (mount.path / "all/in_a").read_text() == "in_a"
    assert number_of(os.listdir, mount.path / "all") == errno.EIO
    sshd.signal(signal.SIGCONT)
    until(lambda: offline(mount) == [], "return")
    assert sorted(os.listdir(mount.path / "all")) == ["in_a", "in_hung"]
    assert (mount.path / "only/f").read_text() == "f"
