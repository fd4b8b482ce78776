"""O_TMPFILE through a mount, and the link that publishes such a file.

What callers without privileges get is compared with a native directory in test_native_parity.py.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from tests.helpers.mount import UnionFactory
from tests.helpers.posix import link_fd
from tests.t3_fuse.live import debris, errno_of, lower, modes, names, opened

pytestmark = pytest.mark.fuse

NAMELESS = os.O_TMPFILE | os.O_RDWR


@modes
@pytest.mark.parametrize("how", ["requests", "passthrough"])
@pytest.mark.parametrize("by_proc", [True, False])
def test_published(union: UnionFactory, tmp_path: Path, udba: str, how: str, by_proc: bool) -> None:
    lower(tmp_path)
    mount = union({"top": "rw", "base": "ro"}, udba, f"io={how}")
    assert os.listdir(mount.path / "d") == ["f"]
    assert not (mount.path / "d/new").exists(), "and the kernel may remember that"
    with opened(mount.path / "d", NAMELESS) as fd:
        os.write(fd, b"content")
        assert (os.fstat(fd).st_nlink, os.fstat(fd).st_size) == (0, 7)
        assert os.listdir(mount.path / "d") == ["f"]
        number = os.fstat(fd).st_ino
        link_fd(fd, str(mount.path / "d/new"), by_proc)
        assert os.fstat(fd).st_nlink == 1
        assert sorted(os.listdir(mount.path / "d")) == ["f", "new"]
        os.write(fd, b" more")
        assert (mount.path / "d/new").read_bytes() == b"content more"
        assert (mount.path / "d/new").stat().st_ino == number
        assert errno_of(lambda: link_fd(fd, str(mount.path / "d/f"), by_proc)) == "EEXIST"
    st = (mount.path / "d/new").stat()
    assert (st.st_size, st.st_nlink, stat.S_IMODE(st.st_mode)) == (12, 1, 0o644)
    assert (mount["top"] / "d/new").read_bytes() == b"content more"
    mount.remount()
    assert (mount.path / "d/new").read_bytes() == b"content more"
    assert debris(mount["top"]) == []


@modes
@pytest.mark.parametrize("how", ["requests", "passthrough", "cached"])
@pytest.mark.parametrize("named", [False, True])
def test_further_descriptors(union: UnionFactory, udba: str, how: str, named: bool) -> None:
    """open(2) by way of /proc/self/fd, of which the kernel does not tell with io=cached; of what never had a name, and
    of what was removed."""
    mount = union({"top": "rw", "base": "ro"}, udba, f"io={how}")
    if named:
        first = os.open(mount.path / "f", os.O_RDWR | os.O_CREAT)
        os.unlink(mount.path / "f")
    else:
        first = os.open(mount.path, NAMELESS)
    os.write(first, b"content")
    with opened(Path(f"/proc/self/fd/{first}"), os.O_RDWR) as second:
        os.close(first)
        assert os.pread(second, 100, 0) == b"content"
        os.pwrite(second, b"C", 0)
        assert (os.fstat(second).st_nlink, os.fstat(second).st_size) == (0, 7)
        if not named:
            link_fd(second, str(mount.path / "new"))
            assert (mount.path / "new").read_bytes() == b"Content"
    assert debris(mount["top"]) == []


@modes
def test_over_a_name_that_was_removed(union: UnionFactory, tmp_path: Path, udba: str) -> None:
    lower(tmp_path)
    mount = union({"top": "rw", "base": "ro"}, udba)
    (mount.path / "d/f").unlink()
    with opened(mount.path, NAMELESS) as fd:
        os.write(fd, b"content")
        link_fd(fd, str(mount.path / "d/f"))
    assert (mount.path / "d/f").read_bytes() == b"content"
    assert names(mount["top"] / "d") == ["f"]


@modes
def test_nothing_is_left_of_one_without_a_name(union: UnionFactory, udba: str) -> None:
    """Whether it was closed, or its mount process killed."""
    mount = union({"top": "rw", "base": "ro"}, udba)
    before = names(mount["top"])
    with opened(mount.path, NAMELESS) as fd:
        os.write(fd, b"content")
        with opened(Path(f"/proc/self/fd/{fd}"), os.O_RDONLY) as second:
            assert os.pread(second, 100, 0) == b"content"
    fd = os.open(mount.path, NAMELESS, 0o644)
    os.write(fd, b"content")
    mount.kill()
    assert errno_of(lambda: os.close(fd)) == "ENOTCONN"
    mount.start()
    assert names(mount["top"]) == before
    assert debris(mount["top"]) == []


@modes
def test_where_there_is_no_writable_branch(union: UnionFactory, tmp_path: Path, udba: str) -> None:
    lower(tmp_path)
    mount = union({"base": "ro"}, udba)
    assert errno_of(lambda: os.open(mount.path / "d", NAMELESS)) == "EROFS"


@modes
def test_never_publishable(union: UnionFactory, udba: str) -> None:
    mount = union({"top": "rw", "base": "ro"}, udba)
    with opened(mount.path, NAMELESS | os.O_EXCL) as fd:
        assert errno_of(lambda: link_fd(fd, str(mount.path / "new"))) == "ENOENT"
    assert os.listdir(mount.path) == []
