"""Room for descriptors is made before anybody shares the table of them. A table never shrinks: each has a process."""

from __future__ import annotations

import subprocess
import sys

import pytest

RESERVES = """
import fcntl, os, re, sys
from pathlib import Path
from udbad.mount import descriptors

def room():
    return int(re.search(r"FDSize:\\s*(\\d+)", Path("/proc/self/status").read_text())[1])

descriptors.limits()
before = len(os.listdir("/proc/self/fd"))
if os.fork() == 0:
    os.close(fcntl.fcntl(0, fcntl.F_DUPFD, int(sys.argv[1])))
    had = room()
    pid = os.getpid()
    if os.fork() == 0:
        assert room() < had
        descriptors.reserve([pid, 1 << 30])
        print(had, room(), len(os.listdir("/proc/self/fd")) - before, flush=True)
        os._exit(0)
    os.wait()
    os._exit(0)
os.wait()
"""


@pytest.mark.parametrize(("highest", "room"), [(100, 4096), (9000, 16384)])
def test_as_much_as_the_process_before_had(highest: int, room: int) -> None:
    """highest: number of a descriptor of that. Nothing that was opened for it stays open."""
    said = subprocess.run([sys.executable, "-c", RESERVES, str(highest)], check=True, capture_output=True, text=True)
    had, has, more = map(int, said.stdout.split())
    assert (has, more) == (room, 0)
    assert had <= room
