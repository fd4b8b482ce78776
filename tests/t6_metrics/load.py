"""A mixed load on a mount with udba=notify, until killed: python -m tests.t6_metrics.load MOUNT LOWEST_BRANCH.

A process of its own: pytest looks after the descriptors that its own process has open.
"""

from __future__ import annotations

import itertools
import os
import sys
import time
from contextlib import suppress
from pathlib import Path

from tests.t6_metrics.scrape import DEADLINE

SIZE = 100_000
"""Bytes of each file that is copied up: more than what is copied on the event loop."""


def one_round(mount: Path, base: Path, number: int) -> None:
    """Something for every panel: lookups of each outcome, a copy-up, direct changes, a listing, a removal."""
    (base / f"low{number}").write_bytes(os.urandom(SIZE))
    seen = mount / f"low{number}"
    end = time.monotonic() + DEADLINE
    while not seen.exists():  # the kernel may remember that there was no such name, until it is told
        assert time.monotonic() < end
    with seen.open("r+b") as file:
        file.write(b"own")
    for name in ("deep", f"low{number}", f"missing{number}", "gone"):
        with suppress(FileNotFoundError):
            os.stat(mount / name)
    (base / "known").write_bytes(b"%d" % number)
    (mount / "known").read_bytes()
    os.listdir(mount)
    seen.unlink()
    (base / f"low{number}").unlink()


def main() -> None:
    mount, base = map(Path, sys.argv[1:])
    for number in itertools.count():
        one_round(mount, base, number)
        time.sleep(0.02)  # the server under test and its client share the machine


if __name__ == "__main__":
    main()
