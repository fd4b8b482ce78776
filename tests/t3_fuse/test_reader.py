"""A request that is taken back before it is read must neither stop nor end the event loop (kernel/reader.py)."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.mount import DEADLINE, UnionFactory

pytestmark = pytest.mark.fuse

# The request is there when the descriptor is waited for, and gone when it is read: the window is a few
# microseconds wide, so it is made here by saying "readable" once when nothing is: to what reads /dev/fuse
# (REQUEST), or to pyfuse3 (HANDED).
_SPURIOUS = """
import os
from udbad.kernel import reader

def once():
    try:
        os.unlink({trigger!r})
    except FileNotFoundError:
        return False
    return True

poll = reader._ppoll

def ppoll(polls, *rest):
    if once():
        polls[0].revents, polls[1].revents = 1, 0
        return 1
    return poll(polls, *rest)

real = reader.Reader.wait_readable

async def wait_readable(self, fd):
    if not once():
        await real(self, fd)

if {handed}:
    reader.Reader.wait_readable = wait_readable
else:
    reader._ppoll = ppoll

from udbad.cli import main

main()
"""


@pytest.mark.parametrize("handed", [False, True], ids=["request", "handed"])
def test_mount_goes_on_when_there_is_nothing_to_read(
    union: UnionFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, handed: bool
) -> None:
    trigger = tmp_path / "trigger"
    script = tmp_path / "daemon.py"
    script.write_text(_SPURIOUS.format(trigger=str(trigger), handed=handed))
    monkeypatch.setattr("tests.helpers.mount.DAEMON", (sys.executable, str(script)))
    mount = union(udba="notify")
    trigger.touch()
    (mount.path / "made").mkdir()  # one for pyfuse3; after it the loop reads although there is nothing
    assert mount.control({"op": "flush"})["ok"]
    assert not trigger.exists()
    assert not (mount.path / "a third name").exists()
    assert (mount.path / "made").is_dir()


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
