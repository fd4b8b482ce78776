"""A file system that can stop answering: a directory, shown through pyfuse3 by a process that SIGSTOP holds up.

In a test: with stalling(directory, mount_point) as server: …, server.stall(), server.go_on(). Nothing is kept by the
kernel, so that each access asks the server.

A request that the server has read when it stops cannot be ended by a signal; one that it has not can. `stuck` makes the
first kind: names that begin with STUCK are looked up and never answered, until `go_on`. So is reading a file whose name
begins with HALF, from HALF_AT bytes on, for who had opened it before `go_on`.
"""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyfuse3
import trio

from tests.helpers.killing import stop
from tests.helpers.leaks import abort_connection, read_mountinfo, remove_mount

STUCK = "stuck"
HALF = "half"
HALF_AT = 1 << 20
_DEADLINE = 20.0
_REPOSITORY = Path(__file__).resolve().parents[2]


class Server:
    """The test's side. connection: the number of its mount among those of FUSE."""

    def __init__(self, process: subprocess.Popen[bytes], connection: int) -> None:
        self.process = process
        self.connection = connection

    def stall(self) -> None:
        stop(self.process.pid)

    def wait_for_half(self) -> None:
        """Return when somebody reads a HALF that far."""
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == b"half\n"

    @property
    def waiting(self) -> int:
        """How many requests there are that it has not answered."""
        return int(Path(f"/sys/fs/fuse/connections/{self.connection}/waiting").read_text())

    def go_on(self) -> None:
        self.process.send_signal(signal.SIGCONT)
        self.process.send_signal(signal.SIGUSR1)


@contextmanager
def stalling(directory: Path, mount_point: Path) -> Iterator[Server]:
    """`directory` on `mount_point`; both are made if they are missing."""
    directory.mkdir(exist_ok=True)
    mount_point.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "tests.helpers.stalling", str(directory), str(mount_point)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=_REPOSITORY)
    mount = None
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        mount = next(one for one in read_mountinfo() if one.path == mount_point)
        server = Server(process, mount.minor)
        yield server
        server.go_on()
    finally:
        if mount is not None:
            remove_mount(mount)
        process.send_signal(signal.SIGCONT)
        process.terminate()
        try:
            process.wait(_DEADLINE)
        except subprocess.TimeoutExpired:
            if mount is not None:
                abort_connection(mount.minor)
            process.kill()
            process.wait(_DEADLINE)
        if process.stdout is not None:
            process.stdout.close()


# -- the server's side ------------------------------------------------------------------------------


_COPIED = (
    *("st_mode", "st_nlink", "st_uid", "st_gid", "st_rdev", "st_size"),
    *("st_atime_ns", "st_mtime_ns", "st_ctime_ns"),
)


class _Directory(pyfuse3.Operations):
    """Objects by their paths; a number for each path that was ever looked up."""

    supports_dot_lookup = False
    enable_writeback_cache = False

    def __init__(self, root: str) -> None:
        super().__init__()
        self._paths: dict[int, str] = {pyfuse3.ROOT_INODE: root}
        self._lists: dict[int, list[str]] = {}
        self.halves: dict[int, bool] = {}
        """Open files that are read by half; whether that was said."""
        self.released = trio.Event()

    def _path(self, parent: int, name: bytes) -> str:
        return os.path.join(self._paths[parent], os.fsdecode(name))

    def _entry(self, path: str) -> Any:
        try:
            st = os.lstat(path)
        except OSError as error:
            raise pyfuse3.FUSEError(error.errno or errno.EIO) from None
        number = pyfuse3.ROOT_INODE if path == self._paths[pyfuse3.ROOT_INODE] else st.st_ino
        self._paths[number] = path
        entry = pyfuse3.EntryAttributes()
        for one in _COPIED:
            setattr(entry, one, getattr(st, one))
        entry.st_ino = number
        entry.generation = 0
        entry.entry_timeout = entry.attr_timeout = 0
        entry.st_blksize = 4096
        entry.st_blocks = (st.st_size + 511) // 512
        return entry

    def _call(self, function: Any, *arguments: Any, **words: Any) -> Any:
        try:
            return function(*arguments, **words)
        except OSError as error:
            raise pyfuse3.FUSEError(error.errno or errno.EIO) from None

    async def lookup(self, parent: int, name: bytes, ctx: Any = None) -> Any:
        if name.startswith(STUCK.encode()):
            await self.released.wait()
        return self._entry(self._path(parent, name))

    async def getattr(self, inode: int, ctx: Any = None) -> Any:
        return self._entry(self._paths[inode])

    async def setattr(self, inode: int, attr: Any, fields: Any, fh: int | None, ctx: Any) -> Any:
        path = self._paths[inode]
        if fields.update_size:
            self._call(os.truncate, path, attr.st_size)
        if fields.update_mode:
            self._call(os.chmod, path, attr.st_mode & 0o7777)
        if fields.update_uid or fields.update_gid:
            uid = attr.st_uid if fields.update_uid else -1
            self._call(os.chown, path, uid, attr.st_gid if fields.update_gid else -1, follow_symlinks=False)
        if fields.update_atime or fields.update_mtime:
            st = os.lstat(path)
            times = (
                attr.st_atime_ns if fields.update_atime else st.st_atime_ns,
                attr.st_mtime_ns if fields.update_mtime else st.st_mtime_ns,
            )
            self._call(os.utime, path, ns=times, follow_symlinks=False)
        return self._entry(path)

    async def opendir(self, inode: int, ctx: Any) -> int:
        self._lists[inode] = sorted(self._call(os.listdir, self._paths[inode]))
        return inode

    async def readdir(self, fh: int, start_id: int, token: Any) -> None:
        for position, name in enumerate(self._lists[fh]):
            if position >= start_id:
                entry = self._entry(os.path.join(self._paths[fh], name))
                if not pyfuse3.readdir_reply(token, os.fsencode(name), entry, position + 1):
                    return

    async def mkdir(self, parent: int, name: bytes, mode: int, ctx: Any) -> Any:
        path = self._path(parent, name)
        self._call(os.mkdir, path, mode)
        self._call(os.chown, path, ctx.uid, ctx.gid)
        return self._entry(path)

    async def rmdir(self, parent: int, name: bytes, ctx: Any) -> None:
        self._call(os.rmdir, self._path(parent, name))

    async def unlink(self, parent: int, name: bytes, ctx: Any) -> None:
        self._call(os.unlink, self._path(parent, name))

    async def link(self, inode: int, parent: int, name: bytes, ctx: Any) -> Any:
        self._call(os.link, self._paths[inode], self._path(parent, name))
        return self._entry(self._path(parent, name))

    async def rename(self, old: int, old_name: bytes, new: int, new_name: bytes, flags: int, ctx: Any) -> None:
        if flags:
            raise pyfuse3.FUSEError(errno.EINVAL)
        before, after = self._path(old, old_name), self._path(new, new_name)
        self._call(os.rename, before, after)
        for number, path in self._paths.items():
            if path == before or path.startswith(before + "/"):
                self._paths[number] = after + path[len(before) :]

    async def open(self, inode: int, flags: int, ctx: Any) -> Any:
        fd = self._call(os.open, self._paths[inode], flags & ~(os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_DIRECT))
        if os.path.basename(self._paths[inode]).startswith(HALF):
            self.halves[fd] = False
        return pyfuse3.FileInfo(fh=fd, direct_io=False, keep_cache=False)

    async def create(self, parent: int, name: bytes, mode: int, flags: int, ctx: Any) -> Any:
        path = self._path(parent, name)
        fd = self._call(os.open, path, flags & ~os.O_NOFOLLOW | os.O_CREAT, mode)
        self._call(os.chown, path, ctx.uid, ctx.gid)
        return pyfuse3.FileInfo(fh=fd), self._entry(path)

    async def read(self, fh: int, offset: int, size: int) -> bytes:
        if fh in self.halves and offset >= HALF_AT:
            if not self.halves[fh]:
                self.halves[fh] = True
                print("half", flush=True)
            await self.released.wait()
        return self._call(os.pread, fh, size, offset)  # type: ignore[no-any-return]  # bytes

    async def write(self, fh: int, offset: int, buffer: bytes) -> int:
        return self._call(os.pwrite, fh, buffer, offset)  # type: ignore[no-any-return]  # how many

    async def fsync(self, fh: int, datasync: bool) -> None:
        self._call(os.fsync, fh)

    async def flush(self, fh: int) -> None:
        return

    async def release(self, fh: int) -> None:
        self.halves.pop(fh, None)
        os.close(fh)

    async def statfs(self, ctx: Any) -> Any:
        said, data = os.statvfs(self._paths[pyfuse3.ROOT_INODE]), pyfuse3.StatvfsData()
        for one in ("f_bsize", "f_frsize", "f_blocks", "f_bfree", "f_bavail", "f_files", "f_ffree", "f_favail"):
            setattr(data, one, getattr(said, one))
        data.f_namemax = 255
        return data


async def _let_go(operations: _Directory, task_status: trio.TaskStatus[None]) -> None:
    with trio.open_signal_receiver(signal.SIGUSR1) as signals:
        task_status.started()
        async for _ in signals:
            operations.halves.clear()
            operations.released.set()
            operations.released = trio.Event()


async def _serve(operations: _Directory) -> None:
    async with trio.open_nursery() as nursery:
        await nursery.start(_let_go, operations)  # before anybody sends the signal
        print("ready", flush=True)
        await pyfuse3.main()
        nursery.cancel_scope.cancel()


def _main(directory: str, mount_point: str) -> None:
    operations = _Directory(directory)
    pyfuse3.init(operations, mount_point, {"fsname=stalling", "allow_other", "default_permissions"})
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    trio.run(_serve, operations)
    pyfuse3.close(unmount=False)


if __name__ == "__main__":
    _main(*sys.argv[1:])
