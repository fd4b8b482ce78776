"""What a power failure leaves of a copy-up, on a disk that forgets what it was not told to flush."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.mount import mounted
from tests.helpers.volatile_disk import SIZES, Disk, volatile_disk
from udbad.branch.ordering import keeps_order

pytestmark = pytest.mark.fuse

FILES = {"small": b"x" * 1000, "large": bytes(range(256)) * 4000, "linked": b"l" * 5000}


def copy_up_all(disk: Disk, base: Path, mount_point: Path, options: str, udba: str) -> dict[str, bytes | None]:
    """Copy every file up in one way or another; then what the branch has after a power failure, by name."""
    branch = disk.path / mount_point.name
    branch.mkdir()
    with mounted([f"{branch}=rw", f"{base}=ro"], mount_point, udba, options) as mount:
        (mount.path / "d/small").chmod(0o600)
        with (mount.path / "d/large").open("rb+", buffering=0) as large:
            large.write(FILES["large"][:10])
        # Its only known name goes while it is open: the copy becomes the home of a pseudo-link.
        with (mount.path / "d/linked").open("rb+", buffering=0) as linked:
            (mount.path / "d/linked").unlink()
            linked.write(FILES["linked"][:10])
        # Somebody syncs another file, which commits the journal with all the names in it.
        with (disk.path / "other").open("wb") as other:
            os.fsync(other.fileno())
        with disk.after_power_failure() as path:
            after = path / mount_point.name
            found = {name: read(after / "d" / name) for name in ("small", "large")}
            homes = [home for home in (after / ".wh..wh.plnk").iterdir() if home.is_file()]
            found["linked"] = read(homes[0]) if homes else None
    return found


def read(path: Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None


@pytest.mark.parametrize("file_system", list(SIZES))
def test_a_name_never_comes_before_its_content(tmp_path: Path, file_system: str) -> None:
    """Although nothing is flushed but the journal, which these file systems keep in order (branch/ordering.py).

    With the default the copies are whole; without any sync this disk does show what it is for.
    """
    base = tmp_path / "base"
    (base / "d").mkdir(parents=True)
    for name, content in FILES.items():
        (base / "d" / name).write_bytes(content)
    os.link(base / "d/linked", base / "d/other-name")
    with volatile_disk(tmp_path / "disk", file_system) as disk:
        assert keeps_order(file_system, os.stat(disk.path).st_dev)
        assert copy_up_all(disk, base, tmp_path / "default", "", "notify") == FILES
        lost = copy_up_all(disk, base, tmp_path / "off", "copyup_fsync=off", "notify")
        assert {name: content and content.strip(b"\0") for name, content in lost.items()} == dict.fromkeys(FILES, b"")


# -- what programs ask for --------------------------------------------------------------------------

DATA = b"d" * 70_000


def write(path: Path, sync: Callable[[int], object], flags: int = 0, data: bytes = DATA) -> None:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | flags, 0o644)
    try:
        os.write(fd, data)
        sync(fd)
    finally:
        os.close(fd)


def map_and_sync(path: Path) -> None:
    write(path, lambda fd: os.ftruncate(fd, len(DATA)), data=b"")
    fd = os.open(path, os.O_RDWR)
    try:
        with mmap.mmap(fd, len(DATA)) as memory:
            memory[:] = DATA
            memory.flush()  # msync(2) with MS_SYNC
    finally:
        os.close(fd)


def sync_another_descriptor(path: Path) -> None:
    """As `sync FILE`, which opens it for reading."""
    write(path, lambda _: None)
    sync_opened(path)


def sync_opened(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def copy_up_and_sync(path: Path) -> None:
    """The lower file has another content; who opened it before the copy-up syncs the copy."""
    reader = os.open(path, os.O_RDONLY)
    try:
        write(path, lambda _: None)
        os.fsync(reader)
    finally:
        os.close(reader)


ASKS: dict[str, Callable[[Path], None]] = {
    "fsync": lambda path: write(path, os.fsync),
    "fdatasync": lambda path: write(path, os.fdatasync),
    "O_SYNC": lambda path: write(path, lambda _: None, os.O_SYNC),
    "O_DSYNC": lambda path: write(path, lambda _: None, os.O_DSYNC),
    "msync": map_and_sync,
    "sync FILE": sync_another_descriptor,
    "copy-up": copy_up_and_sync,
}


def test_what_was_synced_is_on_the_branch(tmp_path: Path) -> None:
    """And what was not is lost on this disk, each time: so it is the asking that counts, not something else that
    commits the journal. syncfs(2) and sync(2) are not passed on by the kernel (README)."""
    (tmp_path / "base/d").mkdir(parents=True)
    for name in ("copy-up", "lost copy-up"):
        (tmp_path / "base/d" / name).write_bytes(b"lower" + DATA)
    with volatile_disk(tmp_path / "disk") as disk:
        branch = disk.path / "branch"
        (branch / "d").mkdir(parents=True)
        # Nothing but the program's own sync: that of a copy-up would do for it.
        words = [f"{branch}=rw", f"{tmp_path / 'base'}=ro"]
        with mounted(words, tmp_path / "mnt", "notify", "copyup_fsync=off") as mount:
            directory = mount.path / "d"
            os.sync()
            there: dict[str, bool] = {}
            for name, ask in ASKS.items():
                write(directory / f"lost {name}", lambda _: None)
                with disk.after_power_failure() as path:
                    assert (read(path / "branch/d" / f"lost {name}") or b"").strip(b"\0") == b"", name
                ask(directory / name)
                with disk.after_power_failure() as path:
                    there[name] = (read(path / "branch/d" / name) or b"")[: len(DATA)] == DATA
                sync_opened(directory / f"lost {name}")  # so that it cannot be what commits the journal for the next
            assert there == dict.fromkeys(ASKS, True)


def test_names_are_on_the_branch_when_their_directory_was_synced(tmp_path: Path) -> None:
    (tmp_path / "base/d").mkdir(parents=True)
    (tmp_path / "base/d/lower").touch()
    with volatile_disk(tmp_path / "disk") as disk:
        branch = disk.path / "branch"
        (branch / "d").mkdir(parents=True)
        (branch / "d/old").touch()
        with mounted([f"{branch}=rw", f"{tmp_path / 'base'}=ro"], tmp_path / "mnt", "notify") as mount:
            directory = mount.path / "d"
            os.sync()

            def names() -> list[str]:
                with disk.after_power_failure() as path:
                    return sorted(os.listdir(path / "branch/d"))

            (directory / "made").mkdir()
            (directory / "old").rename(directory / "new")
            (directory / "lower").unlink()
            assert names() == ["old"]
            sync_opened(directory)
            assert names() == [".wh.lower", "made", "new"]
