"""What is known about each mount under the run directory, for whoever comes later: the supervisor, clients, scripts.

    RUN_DIR/si_<id>/mount.json   who serves the mount, and how to start it again
    RUN_DIR/si_<id>/control      socket of the mount process
    RUN_DIR/si_<id>/br0 ...      one line each, path=perm+attr, as aufs has them in /sys/fs/aufs
    RUN_DIR/si_<id>/alive        locked by the mount process while it lives
    RUN_DIR/si_<id>/claim        locked by whoever is mounting there or taking the entry away

Written by the mount process only; everybody else reads, and passes over what somebody else than root may have
written (private.py): a supervisor mounts what is said here. The id follows from the mount point, so a mount
keeps it over restarts, and a directory that a killed process left is used again. Never touches a mount point.

The run directory may be shared by several mount and pid namespaces (containers that bind /run): a mount that is in
no mountinfo here, of a process whose number means nothing here, may be served all the same. So only the lock says
who lives: flock(2) belongs to the open file, which no namespace hides, and ends with the process.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import time
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from udbad.control import private
from udbad.control.words import known

log = logging.getLogger(__name__)

SOCKET_NAME = "udbad.sock"  # of the supervisor, in the run directory
ENTRY = "mount.json"
ALIVE = "alive"
CLAIM = "claim"
CLAIM_SECONDS = 10.0
_CLAIM_PAUSE = 0.05
_MAX_LINKS = 40  # MAXSYMLINKS (linux/namei.h)


class Entry(NamedTuple):
    """One mount. name: in the configuration, or "". supervised: started by a supervisor, which restarts it.

    mount_point: as the kernel has it; asked: as somebody wrote it, with symbolic links perhaps.
    options: as after -o, as they are now; configured: as the configuration had them. connection: number under
    /sys/fs/fuse/connections. started: seconds since 1970. pid: in the pid namespace of the mount process;
    namespace: number of its mount namespace, namespaces(7), 0 if not known. keeper, record: with what another process
    can go on with the mount (mount/keeper.py), 0: nobody can; ended: the descriptor there by which it says that the
    mount process has ended, -1: none.
    """

    name: str
    mount_point: str
    asked: str
    options: str
    configured: str
    pid: int
    connection: int
    supervised: bool
    version: str
    started: float
    directory: str
    namespace: int = 0
    keeper: int = 0
    record: int = 0
    ended: int = -1

    @property
    def id(self) -> str:
        return os.path.basename(self.directory).removeprefix("si_")

    @property
    def control(self) -> str:
        return os.path.join(self.directory, "control")

    @property
    def label(self) -> str:
        return self.name or self.mount_point


def mount_id(mount_point: bytes) -> str:
    """The si of a mount: 16 hexadecimal digits."""
    try:
        from _blake2 import blake2b  # hashlib's; that itself loads all of OpenSSL, which takes 3 ms
    except ImportError:
        from hashlib import blake2b

    return blake2b(mount_point, digest_size=8).hexdigest()


def real_mount_point(path: bytes) -> bytes:
    """The path the kernel will show in mountinfo; resolves all of it but the last component, which may hang."""
    path = os.path.abspath(path)
    return os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path)) if path != b"/" else path


def mount_namespace() -> int:
    """The number of our mount namespace (namespaces(7)); 0 without /proc."""
    try:
        return os.stat("/proc/self/ns/mnt").st_ino
    except OSError:
        return 0


def directory(run_dir: str, mount_point: bytes) -> str:
    return os.path.join(run_dir, f"si_{mount_id(mount_point)}")


class Claim:
    """Keeps others from mounting on the same mount point until it is released; ends with the process, too.

    Two processes that start at the same time would both find nothing mounted there. The lock, flock(2), is on a file
    that only root can open. One that is left keeps nobody out.
    """

    def __init__(self, run_dir: str, mount_point: bytes, seconds: float | None = None) -> None:
        """mount_point: from real_mount_point(). Raises OSError: EBUSY when somebody has it for so many seconds
        (None: CLAIM_SECONDS)."""
        self._path = path = directory(run_dir, mount_point)
        end = time.monotonic() + (CLAIM_SECONDS if seconds is None else seconds)
        while not self._take(path):
            if time.monotonic() > end:
                raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
            time.sleep(_CLAIM_PAUSE)

    def _take(self, path: str) -> bool:
        with _entered(path, make=True) as dirfd:
            fd = private.open_lock(dirfd, CLAIM)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.samestat(os.fstat(fd), os.stat(CLAIM, dir_fd=dirfd)):
                    self._fd, fd = fd, -1
                    return True
            except (BlockingIOError, FileNotFoundError):
                pass  # somebody has it, or whoever has just unmounted has removed it
            finally:
                if fd >= 0:
                    os.close(fd)
        return False

    def release(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def withdraw(self) -> None:
        """Release it, and take away what was made for it alone: nothing has come of it."""
        if self._fd < 0:
            return
        try:
            if os.listdir(self._path) == [CLAIM]:
                _remove(self._path, ignore_errors=True)
        except OSError:
            pass  # gone, or nobody's any more; it keeps nobody out
        finally:
            self.release()


@contextmanager
def _entered(path: str, make: bool = False) -> Iterator[int]:
    """A descriptor of the directory of a mount, checked with the run directory; make: both, if missing."""
    with private.directory(os.path.dirname(path), make), private.directory(path, make) as dirfd:
        yield dirfd


class Registration:
    """The directory of one mount, from its beginning to its orderly end; every method raises OSError."""

    def __init__(self, run_dir: str, mount_point: bytes) -> None:
        """mount_point: from real_mount_point(). Precondition: it is claimed, so nobody else does the same, or sweeps.

        Raises OSError: EBUSY when the directory belongs to a living mount on the same path of another mount namespace.
        """
        self.path = directory(run_dir, mount_point)
        self._mount_point = mount_point
        with _entered(self.path, make=True):
            pass
        other = read(self.path)
        if other is not None and other.namespace not in (0, mount_namespace()) and is_alive(other):
            raise OSError(errno.EBUSY, "the mount on this path of another mount namespace is registered there")
        self._life = self._begin_life()

    def _begin_life(self) -> int:
        """A locked file of our own, in the place of an earlier one: its process may still be ending."""
        temporary = os.path.join(self.path, ".alive.new")
        fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.replace(temporary, os.path.join(self.path, ALIVE))
        except BaseException:
            os.close(fd)
            raise
        return fd

    def write(self, entry: Entry) -> None:
        """Say who serves the mount."""
        words = entry._asdict()
        del words["directory"]
        self._replace(ENTRY, json.dumps(words) + "\n")

    def write_branches(self, lines: Iterable[str]) -> None:
        """Make br0, br1 ... say what the branches are now."""
        count = 0
        for line in lines:
            self._replace(f"br{count}", line + "\n")
            count += 1
        for name in os.listdir(self.path):
            if name.startswith("br") and name[2:].isdigit() and int(name[2:]) >= count:
                os.unlink(os.path.join(self.path, name))

    def _replace(self, name: str, text: str) -> None:
        with _entered(self.path) as dirfd:
            private.write(dirfd, name, os.fsencode(text))

    def remove(self) -> None:
        """The mount has ended in order: nothing of it is left to know, unless another process is there already."""
        try:
            if self._is_ours():
                claim = Claim(os.path.dirname(self.path), self._mount_point, 0)
                try:
                    if self._is_ours():
                        _remove(self.path)
                finally:
                    claim.release()
        except OSError as error:
            if error.errno != errno.EBUSY:  # somebody begins there, who will say what is so then
                raise
        finally:
            self.release()

    def _is_ours(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self._life), os.stat(os.path.join(self.path, ALIVE)))
        except FileNotFoundError:
            return False

    def release(self) -> None:
        """As the end of the process would: what is registered stays, and is that of a dead mount."""
        if self._life >= 0:
            os.close(self._life)
            self._life = -1


def is_alive(entry: Entry) -> bool:
    """Whether the process of an entry lives, in whatever namespace."""
    try:
        fd = os.open(os.path.join(entry.directory, ALIVE), os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:  # of a version that had no such file
        return os.path.exists(f"/proc/{entry.pid}")
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def read(path: str) -> Entry | None:
    """The entry in a directory si_<id>; None when there is none, or none that makes sense.

    What another version knows beyond it is passed over: the mount is there all the same.
    """
    try:
        with _entered(path) as dirfd:
            words = json.loads(private.read(dirfd, ENTRY))
        entry = Entry(**{**known(Entry._fields, words), "directory": path})
    except private.NotPrivate as error:
        log.warning("%s is passed over: %s %s", path, error.filename, error.strerror)
        return None
    except (OSError, ValueError, TypeError):
        return None
    types = {
        "pid": int,
        "connection": int,
        "name": str,
        "mount_point": str,
        "asked": str,
        "options": str,
        "supervised": bool,
    }
    return entry if all(isinstance(getattr(entry, key), kind) for key, kind in types.items()) else None


def entries(run_dir: str) -> list[Entry]:
    """Every mount that was not ended in order, alive or not."""
    try:
        names = sorted(name for name in os.listdir(run_dir) if name.startswith("si_"))
    except OSError:
        return []
    found = [read(os.path.join(run_dir, name)) for name in names]
    return [entry for entry in found if entry is not None]


def sweep(run_dir: str, mounted: Collection[tuple[str, int]]) -> None:
    """Remove what killed processes have left about mounts that are gone, too.

    mounted: mount point and connection number of every union there is here; the kernel gives a number to the next
    mount as soon as it is free, so it says nothing alone. A dead mount that is still there keeps its entry: the
    next process on that mount point needs it. Whoever is just being started there, or is swept by another, is left.
    """
    for entry in entries(run_dir):
        if (entry.mount_point, entry.connection) in mounted or is_alive(entry):
            continue
        try:
            claim = Claim(run_dir, os.fsencode(entry.mount_point), 0)
        except OSError:
            continue
        try:
            # Since it was read, another process may have begun there, and have given up its claim.
            if not is_alive(entry):
                _remove(entry.directory, ignore_errors=True)
        finally:
            claim.release()


def _remove(directory: str, ignore_errors: bool = False) -> None:
    import shutil  # not at TAB

    shutil.rmtree(directory, ignore_errors)


def find(run_dir: str, path: str) -> tuple[Entry, str] | None:
    """The mount that a path is in, and the path inside it ("" for its root). The innermost mount wins.

    path: absolute; also the name of a mount, or its si_<id>. Nothing inside a mount is touched: it may hang.
    """
    known = {entry.mount_point: entry for entry in entries(run_dir)}
    for entry in known.values():
        if path in (entry.name, f"si_{entry.id}"):
            return entry, ""
    place, inside = _walk(os.path.abspath(path), known)
    while inside and place in known:
        deeper = next((top for top in known if _below(f"{place}/{inside}", top) is not None and top != place), None)
        if deeper is None or len(deeper) <= len(place):
            break
        place, inside = deeper, _below(f"{place}/{inside}", deeper) or ""
    return (known[place], inside) if place in known else None


def _walk(path: str, stops: Collection[str]) -> tuple[str, str]:
    """Follow symbolic links as far as a path in `stops`: (that path or the whole real one, the rest)."""
    todo = [part for part in path.split("/") if part][::-1]
    place = ""
    links = 0
    while todo:
        part = todo.pop()
        if part == "..":
            place = os.path.dirname(place).rstrip("/")
            continue
        step = f"{place}/{part}"
        if step in stops:
            return step, "/".join(todo[::-1])
        try:
            target = os.readlink(step)
        except OSError:  # no link, or nothing
            place = step
            continue
        links += 1
        if links > _MAX_LINKS:
            break
        if target.startswith("/"):
            place = ""
        todo += [piece for piece in target.split("/") if piece not in ("", ".")][::-1]
    return place or "/", ""


def _below(path: str, top: str) -> str | None:
    if path == top:
        return ""
    return path[len(top) + 1 :] if path.startswith(top.rstrip("/") + "/") else None
