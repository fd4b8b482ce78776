"""branch/mountflags.py where the kernel refuses: a notice at most, and never a change of the mount that others use."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from udbad.branch import mountflags, syscalls
from udbad.branch.branches import Branch
from udbad.types import Perm

RDONLY, NOATIME = 0x1, 0x10


@pytest.fixture
def branch(tmp_path: Path) -> Iterator[Branch]:
    fd = os.open(tmp_path, os.O_PATH)
    made = Branch(
        0, 0, os.fsencode(tmp_path), Perm.RO, frozenset(), None, fd, os.dup(fd), os.fstat(fd).st_dev, "ext4",
        private=True,
    )  # fmt: skip
    yield made
    made.close()


def test_each_refusal(branch: Branch, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    asked: list[int] = []
    refusals: dict[int, int] = {}

    def refuse(_fd: int, on: int, _off: int) -> None:
        asked.append(on)
        if number := refusals.get(on, refusals.get(-1)):
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(syscalls, "set_mount_attributes", refuse)
    for case, expected, notices in (
        ({}, [RDONLY | NOATIME], 0),
        ({RDONLY | NOATIME: errno.EBUSY}, [RDONLY | NOATIME, NOATIME], 0),  # a file is open for writing
        ({RDONLY | NOATIME: errno.EPERM}, [RDONLY | NOATIME, RDONLY], 0),  # access times are locked
        ({-1: errno.ENOSYS}, [RDONLY | NOATIME, NOATIME], 1),
    ):
        refusals.clear()
        refusals.update(case)
        asked.clear()
        caplog.clear()
        mountflags.settle([branch], [], ())
        assert asked == expected
        assert len(caplog.records) == notices
    asked.clear()
    caplog.clear()
    mountflags.settle([branch.but(private=False)], [], ())
    assert (asked, len(caplog.records)) == ([], 1), "it was not cloned"
    caplog.clear()
    mountflags.settle([branch], [branch], ("noatime",))
    assert (asked, len(caplog.records)) == ([NOATIME], 0), "of one that is written to nothing was promised"


def test_writing_to_a_branch_that_is_not_writable(branch: Branch, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(syscalls, "set_mount_attributes", lambda _fd, on, off: asked.append((on, off)))
    with mountflags.writing_to(branch, branch.but(perm=Perm.RW)):
        assert asked == [(0, RDONLY)]
    assert asked == [(0, RDONLY), (RDONLY, 0)]
