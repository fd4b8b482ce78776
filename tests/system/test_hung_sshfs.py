"""A branch on sshfs whose server stops, or is gone: the mount goes on without it, and with it when there is one again.

The server is a private sshd on the loopback interface, with keys and a configuration of its own.
"""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.helpers.mount import Mount, UnionFactory
from tests.helpers.offline import number_of, offline
from tests.helpers.sshd import Sshd, private_sshd, sshfs_over_ssh
from tests.system.support import OTHERS_LOG, require
from udbad.mount import keeper

pytestmark = [
    pytest.mark.system,
    pytest.mark.fuse,
    pytest.mark.skipif(keeper.why_not() is not None, reason=str(keeper.why_not())),
]

LOG = f"another one takes over|has not answered for|answers again|{OTHERS_LOG}"
SECONDS = 60.0
UNCACHED = "reconnect,dir_cache=no,entry_timeout=0,attr_timeout=0,allow_other,default_permissions"
"""Each access asks the server."""


def until(done: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + SECONDS
    while not done():
        assert time.monotonic() < end, f"no {what} after {SECONDS} s"
        time.sleep(0.02)


@pytest.fixture
def sshd(tmp_path: Path) -> Iterator[Sshd]:
    require("sshfs", "sshd", "ssh-keygen")
    (tmp_path / "real").mkdir()
    with (
        private_sshd(tmp_path / "sshd") as server,
        sshfs_over_ssh(server, tmp_path / "real", tmp_path / "hung", UNCACHED),
    ):
        yield server
        server.signal(signal.SIGCONT)


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
