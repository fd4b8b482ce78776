"""Pieces of the portable edge that a mount does not show by itself."""

from __future__ import annotations

import ctypes
import errno
import os
from time import monotonic

import pytest

from udbad.branch import capabilities
from udbad.edge import portable, portable_session
from udbad.kernel import mounts


def test_a_read_that_waits_for_ever_is_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    """As libfuse's: by ctypes, which, unlike os.read, does not begin anew after EINTR (PEP 475)."""
    monkeypatch.setattr(portable, "HEARTBEAT", 0.05)
    reader, writer = os.pipe()
    libc = ctypes.CDLL(None, use_errno=True)
    began = monotonic()
    try:
        with portable._heartbeat():
            assert libc.read(reader, ctypes.create_string_buffer(1), 1) == -1
        assert ctypes.get_errno() == errno.EINTR
        assert monotonic() - began < 5
    finally:
        os.close(reader)
        os.close(writer)


def test_nothing_is_told_before_there_is_a_session() -> None:
    """The coherence strategy starts before the mount is made; libfuse would be asked without one."""
    session = portable_session.PortableSession(b"/nowhere", "none", frozenset(), True)
    for kind in ("entry", "expire", "attributes", "data"):
        session.tell(kind, 2, b"name")
    session.close()


@pytest.mark.parametrize("user", [False, True])
def test_options_for_libfuse(monkeypatch: pytest.MonkeyPatch, user: bool) -> None:
    monkeypatch.setattr(capabilities, "acts_for_others", lambda: not user)
    flags = frozenset({"nosuid", "noatime", "lazytime"})
    session = portable_session.PortableSession(b"/nowhere", "a,b\\\u00e9", flags, True)
    words = {"fsname=a\\,b\\\\?", "subtype=udba", "default_permissions", "nosuid", "noatime"}
    assert session._options() == words | (set() if user else {"allow_other", "dev"})


@pytest.mark.parametrize(
    ("said", "number", "text"),
    [
        (b"fusermount3: failed to unmount /x: Device or resource busy\n", errno.EBUSY, "failed to unmount /x"),
        (b"fusermount3: entry for /x not found in /etc/mtab\n", errno.EPERM, "entry for /x"),
        (b"", errno.EPERM, os.strerror(errno.EPERM)),
    ],
)
def test_what_the_helper_says_is_an_error(said: bytes, number: int, text: str) -> None:
    error = mounts.helper_error(said, b"/x")
    assert error.errno == number
    assert text in str(error.strerror)
