"""`whiteouts=overlay`: what a mount has written is what overlayfs and fuse-overlayfs show, and they leave it so."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from tests.helpers.merge import Tree, diff, snapshot
from tests.helpers.mount import MountFailed, UnionFactory
from tests.t3_fuse.test_overlay_layers import (
    READERS,
    build,
    change,
    fuse_overlayfs,
    marks,
    without_records,
)

pytestmark = pytest.mark.fuse

Opener = Callable[[list[Path], Path, Path, Path], AbstractContextManager[None]]
LAYERS = {"up": "rw", "mid": "ro+wh", "low": "ro+wh"}


@pytest.fixture
def layers(tmp_path: Path) -> tuple[Path, Path]:
    mid, low = tmp_path / "mid", tmp_path / "low"
    mid.mkdir()
    low.mkdir()
    build(low, mid)
    return mid, low


def shown_by(
    opener: Opener, layers: tuple[Path, Path], tmp_path: Path, act: Callable[[Path], None] | None = None
) -> Tree:
    work, point = tmp_path / "work", tmp_path / "point"
    for path in (work, point):
        path.mkdir(exist_ok=True)
    if act is not None:
        with opener(list(layers), tmp_path / "up", work, point):
            act(point)
    with opener(list(layers), tmp_path / "up", work, point):
        return without_records(snapshot(point))


def more(union: Path) -> None:
    """What takes whiteouts away again, and renames over them and over merged directories."""
    (union / "gone").mkdir()
    (union / "gone/other").write_text("other")
    (union / "removed").write_text("back")
    os.link(union / "removed", union / "dir/removed")
    os.symlink("removed", union / "renamed")
    os.mkfifo(union / "dir/both")
    (union / "over").mkdir()
    (union / "over/inside").write_text("inside")
    os.rename(union / "over", union / "emptied")
    (union / "deep/er/file").unlink()
    (union / "deep/er").rmdir()
    (union / "dir/renamed").rename(union / "deep/er")
    shutil.rmtree(union / "again")
    (union / "made").rename(union / "again")
    (union / "file").write_text("file")
    os.rename(union / "file", union / "replaced")
    (union / "both").unlink()


@pytest.mark.parametrize("opener", READERS)
@pytest.mark.parametrize("udba", ["none", "reval", "notify"])
def test_what_is_written_is_shown_by_others(
    union: UnionFactory, layers: tuple[Path, Path], tmp_path: Path, opener: Opener, udba: str
) -> None:
    mount = union(LAYERS, udba, "whiteouts=overlay")
    change(mount.path)
    shown = without_records(snapshot(mount.path))
    mount.unmount()
    devices, attributes, names = marks(tmp_path / "up")
    assert devices
    assert attributes
    assert not names
    assert diff(shown, shown_by(opener, layers, tmp_path), ignore=("nlink",)) == []

    mount = union(LAYERS, udba, "whiteouts=overlay")
    assert diff(shown, without_records(snapshot(mount.path))) == []
    more(mount.path)
    shown = without_records(snapshot(mount.path))
    mount.unmount()
    assert marks(tmp_path / "up")[2] == 0
    assert diff(shown, shown_by(opener, layers, tmp_path), ignore=("nlink",)) == []


@pytest.mark.parametrize("opener", READERS)
def test_what_others_have_written_is_written_on(
    union: UnionFactory, layers: tuple[Path, Path], tmp_path: Path, opener: Opener
) -> None:
    """By overlayfs first, then here, then by overlayfs again: as if one of them had done it all."""
    (tmp_path / "up").mkdir()
    before = shown_by(opener, layers, tmp_path, change)
    mount = union(LAYERS, "notify", "whiteouts=overlay")
    assert diff(before, without_records(snapshot(mount.path)), ignore=("nlink",)) == []
    more(mount.path)
    shown = without_records(snapshot(mount.path))
    mount.unmount()
    assert diff(shown, shown_by(opener, layers, tmp_path), ignore=("nlink",)) == []


def test_a_branch_in_the_other_notation_is_refused(union: UnionFactory, tmp_path: Path) -> None:
    union({"top": "rw", "base": "ro"}).unmount()
    with pytest.raises(MountFailed, match="top has whiteouts of aufs; `udbad convert aufs overlay"):
        union({"top": "rw", "base": "ro"}, "reval", "whiteouts=overlay")
    assert ".wh..wh.over" not in os.listdir(tmp_path / "top")


def test_auto_goes_on_as_the_branch_was_written(union: UnionFactory, layers: tuple[Path, Path], tmp_path: Path) -> None:
    """A whiteout in the root shows that it is a layer of overlayfs; an empty branch is one of aufs."""
    mount = union(LAYERS, "reval", "whiteouts=overlay")
    (mount.path / "removed").unlink()
    mount.unmount()
    mount = union(LAYERS, "reval")
    assert not (mount.path / "removed").exists()
    (mount.path / "dir/removed").unlink()
    mount.unmount()
    assert marks(tmp_path / "up") == (2, 0, 0)
    mount = union({"empty": "rw", "low": "ro"}, "reval")
    (mount.path / "removed").unlink()
    assert marks(tmp_path / "empty")[0] == 0


def test_a_device_that_would_be_a_whiteout_cannot_be_made(union: UnionFactory) -> None:
    mount = union({"top": "rw", "base": "ro"}, "reval", "whiteouts=overlay")
    with pytest.raises(PermissionError):
        os.mknod(mount.path / "null", 0o020644, os.makedev(0, 0))
    os.mknod(mount.path / "null", 0o020644, os.makedev(1, 3))
    assert os.listdir(mount.path) == ["null"]


REFUSING = """
import ctypes, errno, struct
instructions = [
    (0x20, 0, 0, 0),                               # nr
    (0x15, 0, 4, {mknodat}),
    (0x20, 0, 0, 32),                              # mode, the lower half
    (0x54, 0, 0, 0o170000),
    (0x15, 0, 1, 0o020000),
    (0x06, 0, 0, 0x00050000 | errno.EPERM),
    (0x20, 0, 0, 0),
    *((0x15, 0, 1, number) if even else (0x06, 0, 0, 0x00050000 | errno.EOPNOTSUPP)
      for number in {attributes} for even in (True, False)),
    (0x06, 0, 0, 0x7fff0000),
]
code = b"".join(struct.pack("HBBI", *one) for one in instructions)
kept = ctypes.create_string_buffer(code, len(code))
program = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(instructions), ctypes.addressof(kept)))
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(22, 2, ctypes.c_void_p(ctypes.addressof(program)), 0, 0) == 0, ctypes.get_errno()
"""
"""seccomp(2): mknodat(2) of a character device is EPERM, as in a sandbox that allows none, and setting an attribute
EOPNOTSUPP, as on a file system that has none. Classic BPF of struct seccomp_data."""
NUMBERS = {"x86_64": (259, (188, 189, 190)), "aarch64": (33, (5, 6, 7))}
"""mknodat, and setxattr, lsetxattr and fsetxattr."""

WITHOUT_CAP_MKNOD = """
import ctypes, struct
libc = ctypes.CDLL(None, use_errno=True)
head = ctypes.create_string_buffer(struct.pack("Ii", 0x20080522, 0))
data = ctypes.create_string_buffer(24)
assert libc.capget(head, data) == 0
sets = [word & ~(1 << 27) if at < 3 else word for at, word in enumerate(struct.unpack("6I", data.raw))]
assert libc.capset(head, ctypes.create_string_buffer(struct.pack("6I", *sets))) == 0, ctypes.get_errno()
"""


@pytest.mark.skipif(shutil.which("fuse-overlayfs") is None, reason="not installed")
@pytest.mark.skipif(os.uname().machine not in NUMBERS, reason="ok: numbers of its system calls are not known here")
@pytest.mark.parametrize("attributes", [True, False])
@pytest.mark.parametrize("udba", ["reval", "notify"])
def test_where_no_device_can_be_made(
    union: UnionFactory, layers: tuple[Path, Path], tmp_path: Path, patch_daemon: Callable[[str], None], udba: str,
    attributes: bool,
) -> None:  # fmt: skip
    """Whiteouts are `.wh.NAME`, and without attributes opaque marks `.wh..wh..opq`: fuse-overlayfs reads them."""
    mknodat, setting = NUMBERS[os.uname().machine]
    patch_daemon(REFUSING.format(mknodat=mknodat, attributes=() if attributes else setting))
    options = "whiteouts=overlay,dirren=off"
    mount = union(LAYERS, udba, options)
    change(mount.path)
    shown = without_records(snapshot(mount.path))
    mount.unmount()
    devices, opaque, names = marks(tmp_path / "up")
    assert (devices, opaque > 0) == (0, attributes)
    assert names > 5
    assert diff(shown, shown_by(fuse_overlayfs, layers, tmp_path), ignore=("nlink",)) == []

    mount = union(LAYERS, udba, options)
    assert diff(shown, without_records(snapshot(mount.path))) == []
    os.unlink(tmp_path / "up/dir/.wh.removed")  # directly
    mount.flush()
    assert (mount.path / "dir/removed").read_text() == "dir/removed"
    (mount.path / "dir/removed").unlink()
    more(mount.path)
    shown = without_records(snapshot(mount.path))
    mount.unmount()
    assert marks(tmp_path / "up")[0] == 0
    assert diff(shown, shown_by(fuse_overlayfs, layers, tmp_path), ignore=("nlink",)) == []


def test_devices_need_no_capability(
    union: UnionFactory, layers: tuple[Path, Path], tmp_path: Path, patch_daemon: Callable[[str], None]
) -> None:
    """As in a user namespace, and where a container's runtime has dropped it: vfs_mknod() lets whiteouts through."""
    patch_daemon(WITHOUT_CAP_MKNOD)
    mount = union(LAYERS, "notify", "whiteouts=overlay")
    change(mount.path)
    with pytest.raises(PermissionError):
        os.mknod(mount.path / "null", 0o020644, os.makedev(1, 3))
    mount.unmount()
    devices, attributes, names = marks(tmp_path / "up")
    assert (devices > 5, attributes > 0, names) == (True, True, 0)
