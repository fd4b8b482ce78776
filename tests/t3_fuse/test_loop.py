"""The event loop of a mount (edge/loop.py): a request that is taken back, and everything else beside requests."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.mount import DEADLINE, UnionFactory
from tests.t5_daemon.daemon import until

pytestmark = pytest.mark.fuse

# The request is there when the descriptor is waited for, and gone when it is read: the window is a few
# microseconds wide, so it is made here by saying "readable" once when nothing is.
_SPURIOUS = """
import os
from udbad.kernel import device

def once():
    try:
        os.unlink({trigger!r})
    except FileNotFoundError:
        return False
    return True

wait = device.wait
device.wait = lambda *arguments: device.REQUESTS if once() else wait(*arguments)
"""


def test_mount_goes_on_when_there_is_nothing_to_read(
    union: UnionFactory, tmp_path: Path, patch_daemon: Callable[[str], None]
) -> None:
    trigger = tmp_path / "trigger"
    patch_daemon(_SPURIOUS.format(trigger=str(trigger)))
    mount = union(udba="notify")
    trigger.touch()
    (mount.path / "made").mkdir()
    assert mount.control({"op": "flush"})["ok"]
    assert not trigger.exists()
    assert not (mount.path / "a third name").exists()
    assert (mount.path / "made").is_dir()


_NO_DESCRIPTORS = """
import errno, os, trio

begin = trio.lowlevel.start_guest_run

def begin_if_it_may(*arguments, **more):
    if os.path.exists({path!r}):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
    return begin(*arguments, **more)

trio.lowlevel.start_guest_run = begin_if_it_may
"""


def test_requests_are_served_while_nothing_else_can_begin(
    union: UnionFactory, tmp_path: Path, patch_daemon: Callable[[str], None]
) -> None:
    full = tmp_path / "full"
    full.touch()
    patch_daemon(_NO_DESCRIPTORS.format(path=str(full)))
    mount = union(udba="notify", allow_log="are attended to yet: Too many open files; tried again")
    until(lambda: "tried again" in mount.log(), "a first attempt")
    (mount.path / "made").mkdir()
    full.unlink()
    assert mount.control({"op": "stats"})["bugs"] == 0
    assert mount.log().count("tried again") == 1


def test_a_killed_client_ends_its_copy_up(union: UnionFactory, tmp_path: Path) -> None:
    """And the lower file, the branch above it and everybody else are as if it had not been tried."""
    lower = tmp_path / "base" / "big"
    lower.parent.mkdir()
    with lower.open("wb") as stream:
        for _ in range(64):
            stream.write(os.urandom(1 << 20) * 8)
    mount = union({"top": "rw", "base": "ro"}, "notify")
    before = lower.stat()
    with subprocess.Popen(["chmod", "600", mount.path / "big"]) as client:
        end = time.monotonic() + DEADLINE
        while not mount.control({"op": "stats"})["copyups"]:
            assert time.monotonic() < end
        client.send_signal(signal.SIGKILL)
        assert client.wait(DEADLINE) == -signal.SIGKILL
    assert mount.control({"op": "stats"})["copyups"] == []
    assert [name for name in os.listdir(mount["top"]) if "big" in name] == []
    after = lower.stat()
    assert (after.st_mode, after.st_ctime_ns) == (before.st_mode, before.st_ctime_ns)
    (mount.path / "big").chmod(0o640)
    assert (mount["top"] / "big").stat().st_mode & 0o7777 == 0o640


def test_what_is_not_in_memory_is_read_from_the_disk(union: UnionFactory, tmp_path: Path) -> None:
    """By a thread, which answers and counts by itself."""
    content = os.urandom(1 << 20)
    lower = tmp_path / "base" / "file"
    lower.parent.mkdir()
    lower.write_bytes(content)
    mount = union({"top": "rw", "base": "ro"}, "notify")
    with lower.open("rb") as stream:
        os.fsync(stream.fileno())
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    before = mount.control({"op": "stats"})
    assert (mount.path / "file").read_bytes() == content
    after = mount.control({"op": "stats"})
    assert after["requests"]["read"] > before["requests"].get("read", 0)
    assert after["seconds"]["read"] > before["seconds"].get("read", 0)


_BUSY = """
import os, sys
os.chdir(sys.argv[1])
while True:
    os.close(os.open("own", os.O_CREAT | os.O_WRONLY, 0o644))
    os.unlink("own")
"""


def test_everything_else_has_its_turn_while_requests_keep_coming(union: UnionFactory, tmp_path: Path) -> None:
    """The event loop, which answers on the control socket, and the events of direct changes, own ones amid them."""
    mount = union({"top": "rw", "base": "ro"}, "notify")
    client = subprocess.Popen([sys.executable, "-c", _BUSY, mount.path])
    try:
        for number in range(50):
            name = f"direct{number}"
            assert not (mount.path / name).exists()
            (tmp_path / "base" / name).touch()
            end = time.monotonic() + DEADLINE
            while not (mount.path / name).exists():
                assert time.monotonic() < end, f"{name} is not seen"
            mount.flush()
    finally:
        client.kill()
        client.wait()
