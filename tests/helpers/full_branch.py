"""A FUSE file system for a branch, on which writes succeed and close(2) says that there was no room for them.

As a program (python -m tests.helpers.full_branch DIRECTORY MOUNT_POINT) it shows DIRECTORY, with just the operations
that a union needs. While DIRECTORY.full exists, each FLUSH is answered EDQUOT, as NFS and CIFS may answer it.
"""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    import pyfuse3

_PATIENCE: Final = 20
"""Seconds until the program must serve."""


@contextmanager
def full_branch(path: Path) -> Iterator[Callable[[bool], None]]:
    """Mount one at `path`, which is made. What is returned makes it full, or not full any more."""
    directory, full = path.with_suffix(".behind"), path.with_suffix(".behind.full")
    directory.mkdir()
    path.mkdir()
    device = path.stat().st_dev

    def set_full(is_full: bool) -> None:
        full.touch() if is_full else full.unlink()

    with ExitStack() as stack:
        process = subprocess.Popen([sys.executable, "-m", "tests.helpers.full_branch", str(directory), str(path)])
        stack.callback(process.wait, _PATIENCE)
        stack.callback(subprocess.run, ["umount", "-l", str(path)], check=True, timeout=_PATIENCE)
        end = time.monotonic() + _PATIENCE
        while path.stat().st_dev == device:
            assert process.poll() is None, "the file system has ended"
            assert time.monotonic() < end, "the file system does not come"
            time.sleep(0.01)
        yield set_full


# -- the program ------------------------------------------------------------------------------


def _sent(function: Callable[..., Any]) -> Callable[..., Any]:
    async def handler(*args: Any, **words: Any) -> Any:
        import pyfuse3

        try:
            return await function(*args, **words)
        except OSError as error:
            raise pyfuse3.FUSEError(error.errno or errno.EIO) from None

    return handler


def main() -> None:
    """Serve until the mount point is unmounted."""
    import pyfuse3
    import trio

    root = os.fsencode(sys.argv[1])
    paths: dict[int, bytes] = {1: root}
    full = sys.argv[1] + ".full"

    def entry(path: bytes) -> pyfuse3.EntryAttributes:
        st = os.lstat(path)
        found = pyfuse3.EntryAttributes()
        found.st_ino = 1 if path == root else st.st_ino
        for name in ("mode", "nlink", "uid", "gid", "size", "atime_ns", "mtime_ns", "ctime_ns"):
            setattr(found, f"st_{name}", getattr(st, f"st_{name}"))
        found.attr_timeout = found.entry_timeout = 0
        paths[found.st_ino] = path
        return found

    class Server(pyfuse3.Operations):
        enable_writeback_cache = False

        @_sent
        async def lookup(self, parent: int, name: bytes, ctx: object) -> pyfuse3.EntryAttributes:
            return entry(os.path.join(paths[parent], name) if name != b"." else paths[parent])

        @_sent
        async def getattr(self, inode: int, ctx: object) -> pyfuse3.EntryAttributes:
            return entry(paths[inode])

        @_sent
        async def setattr(
            self, inode: int, attr: pyfuse3.EntryAttributes, fields: pyfuse3.SetattrFields, fh: int | None, ctx: object
        ) -> pyfuse3.EntryAttributes:
            path = paths[inode]
            if fields.update_mode:
                os.chmod(path, attr.st_mode & 0o7777)
            if fields.update_size:
                os.truncate(path, attr.st_size)
            if fields.update_mtime:
                os.utime(path, ns=(attr.st_atime_ns, attr.st_mtime_ns))
            return entry(path)

        @_sent
        async def mkdir(self, parent: int, name: bytes, mode: int, ctx: object) -> pyfuse3.EntryAttributes:
            os.mkdir(os.path.join(paths[parent], name), mode & 0o7777)
            return entry(os.path.join(paths[parent], name))

        @_sent
        async def create(
            self, parent: int, name: bytes, mode: int, flags: int, ctx: object
        ) -> tuple[pyfuse3.FileInfo, pyfuse3.EntryAttributes]:
            path = os.path.join(paths[parent], name)
            fd = os.open(path, flags | os.O_CREAT | os.O_CLOEXEC, mode & 0o7777)
            return pyfuse3.FileInfo(fh=fd), entry(path)

        @_sent
        async def open(self, inode: int, flags: int, ctx: object) -> pyfuse3.FileInfo:
            return pyfuse3.FileInfo(fh=os.open(paths[inode], flags & ~os.O_NOFOLLOW | os.O_CLOEXEC))

        @_sent
        async def read(self, fh: int, offset: int, size: int) -> bytes:
            return os.pread(fh, size, offset)

        @_sent
        async def write(self, fh: int, offset: int, data: bytes) -> int:
            return os.pwrite(fh, data, offset)

        @_sent
        async def flush(self, fh: int) -> None:
            if os.access(full, os.F_OK):
                raise OSError(errno.EDQUOT, "")

        @_sent
        async def fsync(self, fh: int, datasync: bool) -> None:
            os.fsync(fh)

        @_sent
        async def release(self, fh: int) -> None:
            os.close(fh)

        @_sent
        async def unlink(self, parent: int, name: bytes, ctx: object) -> None:
            os.unlink(os.path.join(paths[parent], name))

        @_sent
        async def rmdir(self, parent: int, name: bytes, ctx: object) -> None:
            os.rmdir(os.path.join(paths[parent], name))

        @_sent
        async def rename(self, src: int, name: bytes, dst: int, new: bytes, flags: int, ctx: object) -> None:
            if flags:
                raise OSError(errno.EINVAL, "")
            target = os.path.join(paths[dst], new)
            os.rename(os.path.join(paths[src], name), target)
            entry(target)

        @_sent
        async def link(self, inode: int, parent: int, name: bytes, ctx: object) -> pyfuse3.EntryAttributes:
            os.link(paths[inode], os.path.join(paths[parent], name))
            return entry(os.path.join(paths[parent], name))

        @_sent
        async def opendir(self, inode: int, ctx: object) -> int:
            return inode

        @_sent
        async def readdir(self, fh: int, start: int, token: pyfuse3.ReaddirToken) -> None:
            for number, name in list(enumerate(sorted(os.listdir(paths[fh])), 1))[start:]:
                if not pyfuse3.readdir_reply(token, name, entry(os.path.join(paths[fh], name)), number):
                    return

        async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
            pass

        @_sent
        async def statfs(self, ctx: object) -> pyfuse3.StatvfsData:
            status, reply = os.statvfs(root), pyfuse3.StatvfsData()
            for name in ("bsize", "frsize", "blocks", "bfree", "bavail", "files", "ffree", "favail", "namemax"):
                setattr(reply, f"f_{name}", getattr(status, f"f_{name}"))
            return reply

    pyfuse3.init(Server(), sys.argv[2], {"fsname=full", "allow_other", "default_permissions"})
    trio.run(pyfuse3.main)
    pyfuse3.close(unmount=False)


if __name__ == "__main__":
    main()
