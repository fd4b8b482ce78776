"""Where log lines go (udbad/logs.py): to syslog(3), from a process that has left its terminal."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.helpers.mount import REPOSITORY

SAYS_WHAT_CAME = """
import logging, os, socket, subprocess
from udbad import logs
subprocess.run(["mount", "-t", "tmpfs", "none", "/dev"], check=True)
logs.set_up("info", "plain")
logs.to_syslog()
logging.warning("nobody listens")
listener = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
listener.bind("/dev/log")
logging.debug("left out")
for level in (logging.INFO, logging.WARNING, logging.ERROR, logging.CRITICAL):
    logging.log(level, "line of %s", "text")
    data = listener.recv(1000).rstrip(b"\\0")
    number, _, rest = data[1:].partition(b">")
    print(int(number), rest[len("Jan  1 00:00:00 "):].decode())
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="ok: /dev/log is root's")
def test_syslog() -> None:
    """With their priorities, also to a daemon that comes later; nothing goes to stderr."""
    done = subprocess.run(
        ["unshare", "-m", sys.executable, "-P", "-c", SAYS_WHAT_CAME], check=True, capture_output=True, text=True,
        timeout=60, env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    daemon = 3 << 3  # LOG_DAEMON, sys/syslog.h
    assert done.stderr == ""
    assert done.stdout.splitlines() == [f"{daemon + priority} udbad: line of text" for priority in (6, 4, 3, 2)]
