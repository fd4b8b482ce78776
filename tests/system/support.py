"""What the system tests share: bounded subprocesses, tree manifests, the list of udba modes.

Nothing here knows the daemon; a scenario that uses only this module runs on any directory. Every
wait is bounded, because a program stuck in a broken mount would otherwise hold the whole run.
"""

from __future__ import annotations

import hashlib
import os
import select
import shutil
import signal
import stat
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.helpers.leaks import RUN_MARKER
from tests.helpers.profile import scaled

MODES = scaled(["notify"], ["none", "reval", "notify"])
"""Every scenario runs once under each of these udba modes: other tests have what is particular to each."""

OTHERS_LOG = r"lost branch events|coherence limited"
"""Warnings that other tests on the same machine may cause."""

each_mode = pytest.mark.parametrize("udba", MODES)

_HASH_BLOCK = 1 << 20


# -- programs ---------------------------------------------------------------------------------


def clean_env(**extra: str) -> dict[str, str]:
    """An environment that does not depend on who runs the tests.

    Kept are proxies and the marker by which the leak check knows the processes of this run.
    """
    kept = {k: v for k, v in os.environ.items() if k == RUN_MARKER or k.lower().endswith("_proxy")}
    path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    return {"PATH": path, "LC_ALL": "C", "TZ": "UTC", "HOME": "/nonexistent", **kept, **extra}


def run(
    *argv: str | bytes | Path,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    timeout: float = 120,
    stdin: bytes = b"",
    ok: Sequence[int] = (0,),
) -> str:
    """Run a program to its end and return its stdout and stderr together, as text.

    timeout in seconds. An exit code outside `ok` or a time-out is an AssertionError that carries the
    output. The program gets its own process group, which is killed on a time-out; a process that
    even SIGKILL does not end (stuck in a dead mount) is reported and left, never waited for.
    """
    process = subprocess.Popen(
        argv,
        cwd=cwd,
        env=clean_env() if env is None else env,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(stdin, timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        try:
            output, _ = process.communicate(timeout=10)
        except subprocess.TimeoutExpired:
            pytest.fail(f"{argv!r} was still running after {timeout} s and does not even die of SIGKILL")
        pytest.fail(f"{argv!r} was still running after {timeout} s:\n{_text(output)}")
    assert process.returncode in ok, f"{argv!r} ended with {process.returncode}:\n{_text(output)}"
    return _text(output)


def _text(output: bytes) -> str:
    return output.decode("utf-8", "backslashreplace")


def require(*programs: str) -> None:
    """Fail, never skip, when a program is missing: packages.txt lists what to install."""
    search = clean_env()["PATH"]
    missing = [program for program in programs if shutil.which(program, path=search) is None]
    assert not missing, f"missing {missing}: install the packages in tests/system/packages.txt"


def wait_gone(pids: Sequence[int], timeout: float = 20) -> None:
    """Wait until none of the processes exists any more; they need not be children."""
    for pid in pids:
        try:
            pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        try:
            assert select.select([pidfd], [], [], timeout)[0], f"process {pid} is still there after {timeout} s"
        finally:
            os.close(pidfd)


# -- manifests --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Entry:
    """All of one object that a copy must keep. `linked` is the first path with the same inode."""

    kind: str
    mode: int
    uid: int
    gid: int
    size: int
    mtime_ns: int
    rdev: int
    linked: bytes
    content: bytes
    xattrs: tuple[tuple[str, bytes], ...]
    ctime_ns: int = 0


Manifest = dict[bytes, Entry]


def manifest(root: Path, *, ctime: bool = False) -> Manifest:
    """Relative path to Entry for the tree below `root`, itself included as b".".

    Contents as SHA-256 (a symlink's text as it is). ctime: include it, to prove that nothing was
    written at all.
    """
    result: Manifest = {}
    fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        result[b"."] = _entry(fd, b".", b".", {}, ctime)
        _descend(fd, b"", result, {}, ctime)
    finally:
        os.close(fd)
    return result


def _descend(directory: int, prefix: bytes, result: Manifest, first: dict[tuple[int, int], bytes], ctime: bool) -> None:
    """Enter what is in `directory`, in byte order, so that groups of hard links come out alike.

    Relative to descriptors: in a mount that asks its daemon for every step of a path, whole paths
    would take many times as long.
    """
    for name in sorted(os.fsencode(name) for name in os.listdir(directory)):
        entry = result[prefix + name] = _entry(directory, name, prefix + name, first, ctime)
        if entry.kind == "d":
            fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=directory)
            try:
                _descend(fd, prefix + name + b"/", result, first, ctime)
            finally:
                os.close(fd)


def _entry(directory: int, name: bytes, path: bytes, first: dict[tuple[int, int], bytes], ctime: bool) -> Entry:
    """One object; `path` is its name in the manifest, `first` the first path of each inode with several."""
    st = os.lstat(name, dir_fd=directory)
    is_directory = stat.S_ISDIR(st.st_mode)
    content = b""
    # Only a file is opened: devices do things when opened. The rest is reached without being followed.
    here: int | bytes = b"/proc/self/fd/%d/%s" % (directory, name)
    fd = -1
    try:
        if stat.S_ISREG(st.st_mode):
            here = fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=directory)
            content = _digest(fd)
        elif stat.S_ISLNK(st.st_mode):
            content = os.readlink(name, dir_fd=directory)
        follow = fd >= 0  # a descriptor must not be asked not to follow
        names = sorted(os.listxattr(here, follow_symlinks=follow))
        xattrs = tuple((key, os.getxattr(here, key, follow_symlinks=follow)) for key in names)
    finally:
        if fd >= 0:
            os.close(fd)
    return Entry(
        kind=stat.filemode(st.st_mode)[0],
        mode=stat.S_IMODE(st.st_mode),
        uid=st.st_uid,
        gid=st.st_gid,
        size=0 if is_directory else st.st_size,
        mtime_ns=st.st_mtime_ns,
        rdev=st.st_rdev if stat.S_ISBLK(st.st_mode) or stat.S_ISCHR(st.st_mode) else 0,
        linked=path if is_directory else first.setdefault((st.st_dev, st.st_ino), path),
        content=content,
        xattrs=xattrs,
        ctime_ns=st.st_ctime_ns if ctime else 0,
    )


def below(root: Path) -> Manifest:
    """The manifest without the root itself: mounting and unmounting make and remove helpers there (semantics 1)."""
    entries = manifest(root)
    del entries[b"."]
    return entries


def _digest(fd: int) -> bytes:
    digest = hashlib.sha256()
    while block := os.read(fd, _HASH_BLOCK):
        digest.update(block)
    return digest.digest()


def assert_same(actual: Manifest, expected: Manifest, what: str) -> None:
    """Fail with the first differences, each naming the path and the fields that differ."""
    lines = [f"only in the actual tree: {path!r}" for path in sorted(actual.keys() - expected.keys())]
    lines += [f"missing in the actual tree: {path!r}" for path in sorted(expected.keys() - actual.keys())]
    for path in sorted(actual.keys() & expected.keys()):
        a, e = actual[path], expected[path]
        if a != e:
            fields = [name for name in Entry.__slots__ if getattr(a, name) != getattr(e, name)]
            lines.append(f"{path!r}: " + ", ".join(f"{n} {getattr(a, n)!r} not {getattr(e, n)!r}" for n in fields))
    assert not lines, f"{what}: {len(lines)} differences\n" + "\n".join(lines[:40])


@contextmanager
def unchanged(*roots: Path) -> Iterator[None]:
    """Proves that nothing below `roots` is written inside the block: contents, metadata and ctime."""
    before = [manifest(root, ctime=True) for root in roots]
    yield
    for root, entries in zip(roots, before, strict=True):
        assert_same(manifest(root, ctime=True), entries, f"lower layer {root.name} was written to")
