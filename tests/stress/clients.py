"""Programs that use a directory as programs do, and know exactly what they must find in it.

Each (python -m tests.stress.clients NAME DIRECTORY) goes on until SIGTERM, finishes its round and says how many there
were. It works below DIRECTORY/NAME alone; what lies there before is in LOWER. Any error, and whatever is not as it
knows it to be, ends it with exit code 1. None of them knows what the directory is, or what happens to it.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import random
import shutil
import signal
import stat
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Final

MANY: Final = 1500
"""Names of a directory whose listing takes several requests."""
LARGE: Final = 3 << 20
PAGE: Final = mmap.PAGESIZE

More = Callable[[], bool]


def _text(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


def make_lower(directory: Path) -> None:
    """What the clients find there, for a lower branch."""
    for name in ("copied", "deleted", "mapped", "linked"):
        (directory / name).mkdir(parents=True)
        for number in range(4):
            (directory / name / f"lower {number}").write_bytes(_text(LARGE if name == "copied" else 3 * PAGE, number))
    (directory / "listed" / "many").mkdir(parents=True)
    for number in range(MANY):
        (directory / "listed" / "many" / f"name {number:05d}").touch()


@contextmanager
def opened(path: Path, flags: int, mode: int = 0o644) -> Iterator[int]:
    fd = os.open(path, flags, mode)
    try:
        yield fd
    finally:
        os.close(fd)


def same(found: object, right: object) -> None:
    if found != right:
        raise AssertionError(f"found {found!r:.300}, not {right!r:.300}")


def refused(number: int, call: Callable[[], object]) -> None:
    try:
        call()
    except OSError as error:
        same(error.errno, number)
    else:
        raise AssertionError(f"was not refused with {errno.errorcode[number]}")


# -- what counts ---------------------------------------------------------------------------------------


def appended(here: Path, more: More) -> int:
    """Two processes append to one file; each of their lines is there once, in the order in which it was written."""
    path = here / "log"
    path.touch()
    child = os.fork()
    count = 0
    who = b"b" if child == 0 else b"a"
    with opened(path, os.O_WRONLY | os.O_APPEND) as fd:
        while more():
            line = b"%s%08d\n" % (who, count) * (1 + count % 7)
            same(os.write(fd, line), len(line))
            count += 1
            if count % 16 == 0:
                os.fsync(fd)
    if child == 0:
        (here / "count").write_text(str(count))
        os._exit(0)
    os.kill(child, signal.SIGTERM)
    same(os.waitpid(child, 0)[1], 0)
    lines = path.read_bytes().splitlines()
    for one, number in ((b"a", count), (b"b", int((here / "count").read_text()))):
        right = [b"%s%08d" % (one, n) for n in range(number) for _ in range(1 + n % 7)]
        same([line for line in lines if line.startswith(one)], right)
    return count


def renamed(here: Path, more: More) -> int:
    """Every way to make, move and remove a name; each once."""
    count = 0
    other = here / "other"
    other.mkdir()
    while more():
        made = here / f"made {count}"
        os.mkdir(made)
        refused(errno.EEXIST, partial(os.mkdir, made))
        os.rename(made, here / "directory")
        with opened(here / "directory/file", os.O_CREAT | os.O_EXCL | os.O_WRONLY) as fd:
            os.write(fd, b"%d" % count)
        os.link(here / "directory/file", other / "link")
        same(os.stat(other / "link").st_nlink, 2)
        os.rename(other / "link", other / "moved")
        os.unlink(here / "directory/file")
        same(os.stat(other / "moved").st_nlink, 1)
        os.symlink(f"to {count}", here / "directory/symlink")
        os.rename(here / "directory/symlink", other / "symlink")
        same(os.readlink(other / "symlink"), f"to {count}")
        os.mkfifo(other / "fifo")
        os.rename(other / "fifo", other / "symlink")
        same(stat.S_ISFIFO(os.lstat(other / "symlink").st_mode), True)
        os.unlink(other / "symlink")
        os.rmdir(here / "directory")
        refused(errno.ENOENT, lambda: os.rmdir(here / "directory"))
        with opened(other / "new", os.O_CREAT | os.O_EXCL | os.O_WRONLY) as fd:
            os.write(fd, b"new")
        os.rename(other / "new", other / "moved")
        same((other / "moved").read_bytes(), b"new")
        with opened(here, os.O_TMPFILE | os.O_RDWR) as fd:
            os.write(fd, b"nameless %d" % count)
            os.link(f"/proc/self/fd/{fd}", here / "named", src_dir_fd=fd, follow_symlinks=True)
        same((here / "named").read_bytes(), b"nameless %d" % count)
        os.unlink(here / "named")
        os.unlink(other / "moved")
        same(os.listdir(here), ["other"])
        count += 1
    same(os.listdir(other), [])
    return count


def attributes(here: Path, more: More) -> int:
    """What is set is what is read."""
    path = here / "file"
    count = 0
    with opened(path, os.O_CREAT | os.O_RDWR) as fd:
        while more():
            os.chmod(path, 0o600 | count % 0o100)
            same(stat.S_IMODE(os.stat(path).st_mode), 0o600 | count % 0o100)
            os.chown(path, count % 1000, 7)
            same(os.fstat(fd).st_uid, count % 1000)
            os.utime(path, ns=(count * 10**9, count * 10**9 + 5))
            same(os.stat(path).st_mtime_ns, count * 10**9 + 5)
            os.setxattr(path, "user.key", b"%d" % count, os.XATTR_CREATE)
            same(os.getxattr(path, "user.key"), b"%d" % count)
            refused(errno.EEXIST, lambda: os.setxattr(path, "user.key", b"", os.XATTR_CREATE))
            os.removexattr(path, "user.key")
            refused(errno.ENODATA, lambda: os.removexattr(path, "user.key"))
            os.truncate(path, count % 9000)
            same(os.fstat(fd).st_size, count % 9000)
            os.pwrite(fd, b"end", count % 9000)
            same(os.stat(path).st_size, count % 9000 + 3)
            os.ftruncate(fd, 0)
            os.posix_fallocate(fd, 0, 5000)
            same(os.fstat(fd).st_size, 5000)
            os.close(os.open(path, os.O_WRONLY | os.O_TRUNC))
            same(os.fstat(fd).st_size, 0)
            count += 1
    return count


def linked(here: Path, more: More) -> int:
    """Hard links of files that have to be copied up first (pseudo-links)."""
    right = {number: _text(3 * PAGE, number) for number in range(4)}
    count = 0
    while more():
        number = count % 4
        source, link = here / f"lower {number}", here / f"link {number}"
        os.link(source, link)
        same(os.stat(source).st_nlink, 2)
        same(os.stat(source).st_ino, os.stat(link).st_ino)
        with opened(link, os.O_WRONLY) as fd:
            data = b"%d" % count
            os.pwrite(fd, data, 10)
            right[number] = right[number][:10] + data + right[number][10 + len(data) :]
        same(source.read_bytes(), right[number])
        os.unlink(link)
        same(os.stat(source).st_nlink, 1)
        count += 1
    return count


# -- what is held --------------------------------------------------------------------------------------


def deleted(here: Path, more: More) -> int:
    """Files without a name, from either branch, open over many rounds."""
    lower = [os.open(here / f"lower {number}", os.O_RDWR) for number in range(4)]
    right = [bytearray(_text(3 * PAGE, number)) for number in range(4)]
    for number in range(4):
        os.unlink(here / f"lower {number}")
    new = os.open(here / "new", os.O_RDWR | os.O_CREAT)
    os.unlink(here / "new")
    lower.append(new)
    right.append(bytearray())
    count = 0
    while more():
        for fd, content in zip(lower, right, strict=True):
            data = b"%d" % count
            at = count % (2 * PAGE) if content else 0
            same(os.pwrite(fd, data, at), len(data))
            content[at : at + len(data)] = data
            same(os.pread(fd, 4 * PAGE, 0), bytes(content))
            same((os.fstat(fd).st_nlink, os.fstat(fd).st_size), (0, len(content)))
        same(os.listdir(here), [])
        count += 1
    for fd in lower:
        os.close(fd)
    return count


def mapped(here: Path, more: More) -> int:
    """Shared mappings, of a file of either branch, and of one that is removed."""
    files = [os.open(here / f"lower {number}", os.O_RDWR) for number in range(2)]
    removed = os.open(here / "removed", os.O_RDWR | os.O_CREAT)
    files.append(removed)
    os.ftruncate(removed, 3 * PAGE)
    os.unlink(here / "removed")
    maps = [mmap.mmap(fd, 3 * PAGE) for fd in files]
    right = [bytearray(one[:]) for one in maps]
    same(bytes(right[0]), _text(3 * PAGE, 0))
    count = 0
    while more():
        for fd, one, content in zip(files, maps, right, strict=True):
            at = count * 37 % (3 * PAGE - 8)
            one[at : at + 8] = content[at : at + 8] = struct.pack("<Q", count)
            if count % 4 == 0:
                one.flush()
                same(os.pread(fd, 3 * PAGE, 0), bytes(content))
            same(one[:], bytes(content))
        count += 1
    for fd, one in zip(files, maps, strict=True):
        one.close()
        os.close(fd)
    same((here / "lower 0").read_bytes(), bytes(right[0]))
    return count


def copied(here: Path, more: More) -> int:
    """Large files that are copied up while one process has them open for reading, and another one writes."""
    count = 0
    copies = here / "copies"
    copies.mkdir()
    while more():
        number = count % 4
        right = bytearray(_text(LARGE, number))
        path = here / f"lower {number}"
        if count >= 4:  # they are on the upper branch by now: as many again
            path = copies / f"copy {number}"
            shutil.copyfile(here / f"lower {number}", path)
            right = bytearray((here / f"lower {number}").read_bytes())
        with opened(path, os.O_RDONLY) as reader:
            same(os.pread(reader, 100, 0), bytes(right[:100]))
            with opened(path, os.O_RDWR) as writer:
                os.pwrite(writer, b"%8d" % count, 1 << 20)
                right[1 << 20 : (1 << 20) + 8] = b"%8d" % count
                same(os.pread(writer, LARGE, 0), bytes(right))
            same(os.pread(reader, LARGE, 0), bytes(right))
            if count >= 4:
                os.unlink(path)
                same(os.pread(reader, LARGE, 0), bytes(right))
        count += 1
    return count


def locked(here: Path, more: More) -> int:
    """flock(2), and locks of fcntl(2) of a process and of an open file: as long as they are held, and no longer."""
    path = here / "locked"
    path.touch()
    count = 0
    whole = struct.pack("hhqqi", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)

    def elsewhere(held: bool) -> None:
        """What another process is told."""
        pid = os.fork()
        if pid == 0:
            try:
                with opened(path, os.O_RDWR) as fd:
                    for lock in (
                        lambda: fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB),
                        lambda: fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 10, 0),
                        lambda: fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 10, 100),
                    ):
                        if held:
                            refused(errno.EAGAIN, lock)
                        else:
                            lock()
            except BaseException as error:
                print(repr(error), file=sys.stderr)
                os._exit(1)
            os._exit(0)
        same(os.waitpid(pid, 0)[1], 0)

    while more():
        first, second, third = (os.open(path, os.O_RDWR) for _ in range(3))
        fcntl.flock(first, fcntl.LOCK_EX)
        fcntl.lockf(second, fcntl.LOCK_EX, 10, 0)
        fcntl.fcntl(third, fcntl.F_OFD_SETLK, whole[:8] + struct.pack("qqi", 100, 10, 0) + whole[28:])
        end = time.monotonic() + 0.5
        while time.monotonic() < end:
            elsewhere(True)
        fcntl.flock(first, fcntl.LOCK_UN)
        fcntl.lockf(second, fcntl.LOCK_UN)
        os.close(third)
        elsewhere(False)
        os.close(first)
        os.close(second)
        count += 1
    return count


# -- what goes on --------------------------------------------------------------------------------------


def executed(here: Path, more: More) -> int:
    """A program that runs cannot be written to, runs on, and others begin all the time."""
    program = here / "program"
    shutil.copy("/bin/sleep", program)
    long = subprocess.Popen([program, "1000"])
    count = 0
    try:
        while more():
            refused(errno.ETXTBSY, lambda: os.open(program, os.O_WRONLY))
            subprocess.run([program, "0"], check=True)
            same(long.poll(), None)
            script = here / "script"
            script.write_text(f"#!/bin/sh\nexit {count % 100}\n")
            script.chmod(0o755)
            same(subprocess.run([script], check=False).returncode, count % 100)
            script.unlink()
            count += 1
    finally:
        long.terminate()
    same(long.wait(), -signal.SIGTERM)
    return count


def inside(here: Path, more: More) -> int:
    """A current directory, which is renamed and at last removed."""
    count = 0
    while more():
        (here / "directory").mkdir()
        os.chdir(here / "directory")
        for number in range(20):
            Path("file").write_text(str(number))
            same(Path("file").read_text(), str(number))
            os.rename(here / ("directory" if number % 2 == 0 else "moved"), here / ("moved", "directory")[number % 2])
            same(os.getcwd(), str(here / ("moved", "directory")[number % 2]))
            os.unlink("file")
        os.rmdir(here / "directory")
        same(os.listdir("."), [])
        refused(errno.ENOENT, lambda: os.open("file", os.O_CREAT | os.O_WRONLY))
        os.chdir("/")
        count += 1
    return count


def listed(here: Path, more: More) -> int:
    """Listings that take their time: what stays is in them once."""
    right = sorted(f"name {number:05d}" for number in range(MANY))
    count = 0
    while more():
        with os.scandir(here / "many") as entries:
            found = []
            for number, entry in enumerate(entries):
                if number % 300 == 0:
                    time.sleep(0.05)
                found.append(entry.name)
        found = [name for name in found if not name.startswith("coming")]
        same(sorted(found), right)
        coming = here / "many" / f"coming {count}"
        coming.touch()
        same(coming.name in os.listdir(here / "many"), True)
        coming.unlink()
        same(coming.name in os.listdir(here / "many"), False)
        count += 1
    return count


def watched(here: Path, more: More) -> int:
    """inotify(7) on a directory says what is done in it, each thing once."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    fd = libc.inotify_init1(os.O_NONBLOCK)
    same(libc.inotify_add_watch(fd, os.fsencode(here), 0x100 | 0x200 | 0x80) > 0, True)  # IN_CREATE, _DELETE, _MOVED_TO
    count = 0
    while more():
        (here / "file").touch()
        os.rename(here / "file", here / "other")
        os.unlink(here / "other")
        data, found, at = os.read(fd, 1 << 16), [], 0
        while at < len(data):
            _, mask, _, size = struct.unpack_from("iIII", data, at)
            found.append((mask, data[at + 16 : at + 16 + size].rstrip(b"\0")))
            at += 16 + size
        same(found, [(0x100, b"file"), (0x80, b"other"), (0x200, b"other")])
        count += 1
    os.close(fd)
    return count


CLIENTS: Final[dict[str, Callable[[Path, More], int]]] = {
    function.__name__: function
    for function in (
        appended, renamed, attributes, linked, deleted, mapped, copied, locked, executed, inside, listed, watched,
    )
}  # fmt: skip


def main(name: str, directory: str) -> None:
    stopped = []
    signal.signal(signal.SIGTERM, lambda number, frame: stopped.append(number))
    here = Path(directory) / name
    here.mkdir(exist_ok=True)
    print(CLIENTS[name](here, lambda: not stopped), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
