"""A request that is taken back before it is read must neither stop nor end the event loop (kernel/reader.py)."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.helpers.mount import UnionFactory

pytestmark = pytest.mark.fuse

# The request is there when the descriptor is waited for, and gone when it is read: the window is a few
# microseconds wide, so it is made here by saying "readable" once when nothing is.
_SPURIOUS = """
import os
from udbad.kernel import reader

real = reader._Reader.wait_readable

async def wait_readable(self, fd):
    if os.path.exists({trigger!r}):
        os.unlink({trigger!r})
        return
    await real(self, fd)

reader._Reader.wait_readable = wait_readable

from udbad.cli import main

main()
"""


def test_mount_goes_on_when_there_is_nothing_to_read(
    union: UnionFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trigger = tmp_path / "trigger"
    script = tmp_path / "daemon.py"
    script.write_text(_SPURIOUS.format(trigger=str(trigger)))
    monkeypatch.setattr("tests.helpers.mount.DAEMON", (sys.executable, str(script)))
    mount = union(udba="notify")
    (mount.path / "another name").exists()  # the root's attributes are cached: one request from now on
    trigger.touch()
    (mount.path / "some name").exists()  # after this request the loop reads although there is nothing
    assert mount.control({"op": "flush"})["ok"]
    assert not trigger.exists()
    assert not (mount.path / "a third name").exists()
