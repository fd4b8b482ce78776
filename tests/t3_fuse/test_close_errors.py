"""What close(2) says on a branch that finds out only then that there is no room (NFS, CIFS, FUSE)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.helpers.full_branch import full_branch
from tests.helpers.mount import Mount, mounted
from tests.t3_fuse.live import debris, errno_of, modes

pytestmark = pytest.mark.fuse


@contextmanager
def union_on_it(
    tmp_path: Path, udba: str, layers: str = "full local"
) -> Iterator[tuple[Mount, Callable[[bool], None]]]:
    """A union of a writable branch that can be full, and of a local one, of which the first in `layers` is on top."""
    (tmp_path / "local").mkdir()
    (tmp_path / "local/lower").write_bytes(b"lower")
    with full_branch(tmp_path / "full") as set_full:
        top, base = layers.split()
        permission = "rw" if top == "local" else "ro"
        branches = [f"{tmp_path / top}=rw", f"{tmp_path / base}={'rw' if base == 'full' else permission}"]
        with mounted(branches, tmp_path / "mnt", udba) as mount:
            yield mount, set_full


def close_after_writing(path: Path, flags: int) -> str:
    fd = os.open(path, flags, 0o644)
    assert os.write(fd, b"text") == 4
    return errno_of(lambda: os.close(fd))


@modes
def test_close_tells_what_close_told(tmp_path: Path, udba: str) -> None:
    with union_on_it(tmp_path, udba) as (mount, set_full):
        root = mount.path
        assert close_after_writing(root / "file", os.O_CREAT | os.O_WRONLY) == ""
        set_full(True)
        for flags in (os.O_WRONLY, os.O_RDWR, os.O_WRONLY | os.O_APPEND):
            assert close_after_writing(root / "file", flags) == "EDQUOT", flags
            assert close_after_writing(root / f"new{flags}", flags | os.O_CREAT) == "EDQUOT", flags
        fd = os.open(root / "file", os.O_RDONLY)
        os.read(fd, 10)
        assert errno_of(lambda: os.close(fd)) == "", "nothing was written"
        # A handle is gone whatever its close said, and so is its number: other files show what is theirs.
        with (root / "lower").open("rb") as other:
            assert os.fstat(other.fileno()).st_size == 5
            assert os.stat(root / "file").st_ino != os.fstat(other.fileno()).st_ino
        # A copy that has no room is not published; nothing hides the lower file.
        assert errno_of(lambda: os.truncate(root / "lower", 0)) == "EDQUOT"
        assert (root / "lower").read_bytes() == b"lower"
        set_full(False)
        assert close_after_writing(root / "file", os.O_WRONLY) == ""
        os.truncate(root / "lower", 0)
        assert (root / "lower").read_bytes() == b""
        assert debris(tmp_path / "full.behind") == []


@modes
def test_who_cannot_fail_is_not_asked(tmp_path: Path, udba: str) -> None:
    """One request less for each close; but a mapping may still be dirty, which FLUSH writes."""
    (tmp_path / "top").mkdir()
    with mounted([f"{tmp_path / 'top'}=rw"], tmp_path / "mnt", udba) as mount:
        path = mount.path / "file"
        assert close_after_writing(path, os.O_CREAT | os.O_WRONLY) == ""
        path.read_bytes()
        assert mount.requests().get("flush", 0) == 0
        assert close_after_writing(path, os.O_RDWR) == ""
        assert close_after_writing(path, os.O_RDWR) == ""
        assert mount.requests()["flush"] == 2, "and is asked again"


@modes
def test_a_branch_that_comes_later_is_asked(tmp_path: Path, udba: str) -> None:
    """So the kernel must not have been told that FLUSH is not known here."""
    (tmp_path / "top").mkdir()
    top, full = tmp_path / "top", tmp_path / "full"
    with full_branch(full) as set_full, mounted([f"{top}=rw"], tmp_path / "mnt", udba) as mount:
        assert close_after_writing(mount.path / "file", os.O_CREAT | os.O_RDWR) == ""
        answer = mount.control({"op": "remount", "options": f"remount,prepend={full}=rw"})
        assert answer["ok"], answer
        set_full(True)
        assert close_after_writing(mount.path / "file", os.O_RDWR) == "", "it is on the local branch"
        assert close_after_writing(mount.path / "new", os.O_CREAT | os.O_WRONLY) == "EDQUOT"
        set_full(False)
