"""A disk with a volatile cache: what was not flushed is gone after a power failure.

A FUSE file served by this module as a program (python -m tests.helpers.volatile_disk DIRECTORY CURRENT STABLE),
with a loop device on it. Each write goes to the image CURRENT, and is copied to STABLE when the disk is told to
flush: a file system's flush becomes fsync of the loop device's file, and that an FSYNC here.

    with volatile_disk(path) as disk:            # ext4 or XFS, mounted at disk.path
        …
        with disk.after_power_failure() as path:  # what a machine would find that lost its power now
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import pyfuse3

SIZES: Final = {"ext4": 64 << 20, "xfs": 320 << 20}
"""Bytes; sparse. mkfs.xfs refuses less than 300 MiB."""
_MAKE: Final = {
    "ext4": ["mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0"],
    "xfs": ["mkfs.xfs", "-q"],
}
_OPTIONS: Final = {"ext4": "commit=600", "xfs": "defaults"}
"""The journal is committed when somebody syncs, and not because five seconds have passed (XFS: thirty)."""
_DISK: Final = 2
"""Inode number of the file."""
_PATIENCE: Final = 20
"""Seconds until the program must serve."""


class Disk:
    """path: where its file system is mounted."""

    def __init__(self, path: Path, stable: Path, file_system: str) -> None:
        self.path = path
        self._stable = stable
        self._file_system = file_system

    @contextmanager
    def after_power_failure(self) -> Iterator[Path]:
        """Where what is on the disk for good is mounted; the disk itself goes on."""
        image = self._stable.with_suffix(".image")
        shutil.copyfile(self._stable, image)
        path = self.path.with_name(self.path.name + ".after")
        path.mkdir(exist_ok=True)
        options = "loop,nouuid" if self._file_system == "xfs" else "loop"
        _call("mount", "-t", self._file_system, "-o", options, str(image), str(path))
        try:
            yield path
        finally:
            _call("umount", str(path))


@contextmanager
def volatile_disk(path: Path, file_system: str = "ext4") -> Iterator[Disk]:
    """A new disk with a file system (ext4, xfs) on it, mounted at `path`, which is made."""
    current, stable = path.with_suffix(".current"), path.with_suffix(".stable")
    with current.open("xb") as stream:
        stream.truncate(SIZES[file_system])
    _call(*_MAKE[file_system], str(current))
    _call("cp", "--sparse=always", str(current), str(stable))
    device = path.with_suffix(".device")
    for directory in (path, device):
        directory.mkdir()
    words = [sys.executable, "-m", "tests.helpers.volatile_disk", str(device), str(current), str(stable)]
    with ExitStack() as stack:
        process = subprocess.Popen(words)
        stack.callback(process.wait, _PATIENCE)
        stack.callback(_call, "umount", "-l", str(device))
        end = time.monotonic() + _PATIENCE
        while not (device / "disk").exists():
            assert process.poll() is None, "the disk has ended"
            assert time.monotonic() < end, "the disk does not come"
            time.sleep(0.01)
        loop = _call("losetup", "--find", "--show", str(device / "disk"))
        stack.callback(_call, "losetup", "--detach", loop)
        _call("mount", "-t", file_system, "-o", _OPTIONS[file_system], loop, str(path))
        stack.callback(_call, "umount", "-l", str(path))
        yield Disk(path, stable, file_system)


def _call(*words: str) -> str:
    return subprocess.run(words, check=True, capture_output=True, text=True, timeout=60).stdout.strip()


# -- the program ------------------------------------------------------------------------------


def main() -> None:
    """Serve the file until the directory is unmounted."""
    import pyfuse3
    import trio

    current, stable = (os.open(path, os.O_RDWR | os.O_CLOEXEC) for path in sys.argv[2:4])
    length = os.fstat(current).st_size
    unflushed: set[tuple[int, int]] = set()

    class Server(pyfuse3.Operations):
        async def getattr(self, inode: int, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
            entry = pyfuse3.EntryAttributes()
            entry.st_ino = inode
            entry.st_mode = stat.S_IFREG | 0o600 if inode == _DISK else stat.S_IFDIR | 0o700
            entry.st_size = length if inode == _DISK else 0
            entry.st_nlink = 1
            entry.attr_timeout = entry.entry_timeout = 600
            return entry

        async def lookup(self, parent: int, name: bytes, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
            if name != b"disk":
                raise pyfuse3.FUSEError(errno.ENOENT)
            return await self.getattr(_DISK, ctx)

        async def open(self, inode: int, flags: int, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
            return pyfuse3.FileInfo(fh=inode)

        async def setattr(
            self, inode: int, attr: pyfuse3.EntryAttributes, fields: pyfuse3.SetattrFields, fh: int | None,
            ctx: pyfuse3.RequestContext,
        ) -> pyfuse3.EntryAttributes:  # fmt: skip
            return await self.getattr(inode, ctx)

        async def read(self, fh: int, offset: int, size: int) -> bytes:
            return os.pread(current, size, offset)

        async def write(self, fh: int, offset: int, data: bytes) -> int:
            unflushed.add((offset, len(data)))
            return os.pwrite(current, data, offset)

        async def fsync(self, fh: int, datasync: bool) -> None:
            for offset, size in unflushed:
                os.pwrite(stable, os.pread(current, size, offset), offset)
            unflushed.clear()

    pyfuse3.init(Server(), sys.argv[1], {"fsname=volatile"})
    trio.run(pyfuse3.main)
    pyfuse3.close(unmount=False)


if __name__ == "__main__":
    main()
