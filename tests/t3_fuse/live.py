"""What the tests of a live mount share: modes, further file systems, and looking at what is left on a branch."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pytest

from tests.helpers.merge import temporary_names

MODES: Final = ("none", "reval", "notify")
modes: Final = pytest.mark.parametrize("udba", MODES)

PAST: Final = 1_000_000_000_123_456_789
"""Time stamp of everything made before the mount, ns."""

_ADMINISTRATION: Final = (b".wh..wh.aufs", b".wh..wh.plnk", b".wh..wh.orph", b".wh..wh.udbad")


def errno_of(call: Callable[[], object]) -> str:
    """The name of the errno that `call` fails with, "" when it does not fail."""
    try:
        call()
    except OSError as error:
        # ENOTSUP and EOPNOTSUPP are one number on Linux; people know the second name.
        return "EOPNOTSUPP" if error.errno == errno.EOPNOTSUPP else errno.errorcode[error.errno or 0]
    return ""


def as_nobody(call: Callable[[], object]) -> None:
    """In a child, which must not fail."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            call()
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def names(branch: Path) -> list[str]:
    """What is in a branch directory, its own administration aside."""
    return sorted(name for name in os.listdir(branch) if os.fsencode(name) not in _ADMINISTRATION)


def debris(branch: Path) -> list[bytes]:
    """Temporary names anywhere on a branch, and what lies in its orphan directory."""
    found = temporary_names(branch)
    for directory, subdirectories, files in os.walk(os.fsencode(branch)):
        if os.path.basename(directory) == b".wh..wh.orph":
            found += [os.path.join(directory, name) for name in (*subdirectories, *files)]
    return found


@contextmanager
def file_system(path: Path, kind: str, options: str = "", megabytes: int = 512) -> Iterator[Path]:
    """Mount a new file system at the directory `path`, made if missing: tmpfs, or a sparse image of the other kinds."""
    path.mkdir(exist_ok=True)
    source = "none"
    if kind != "tmpfs":
        image = path.with_name(f"{path.name}.{kind}")
        with image.open("xb") as stream:
            stream.truncate(megabytes << 20)
        subprocess.run([f"mkfs.{kind}", "-q", str(image)], check=True, capture_output=True, timeout=60)
        source = str(image)
        options = ",".join(filter(None, ("loop", options)))
    words = ["mount", "-t", kind, *(["-o", options] if options else []), source, str(path)]
    done = subprocess.run(words, check=False, capture_output=True, text=True, timeout=60)
    if done.returncode != 0:
        raise OSError(errno.EINVAL, done.stderr.strip())
    try:
        yield path
    finally:
        # -l: the daemon of a failed test may still hold it
        subprocess.run(["umount", "-l", str(path)], check=True, timeout=60)


@contextmanager
def opened(path: Path, flags: int) -> Iterator[int]:
    fd = os.open(path, flags, 0o644)
    try:
        yield fd
    finally:
        os.close(fd)


def lower(tmp_path: Path, content: bytes = b"0123456789abcdef", name: str = "d/f") -> Path:
    """A file of the branch that will be read-only, with its directory, all of it old."""
    path = tmp_path / "base" / name
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    for entry in (path, path.parent):
        os.utime(entry, ns=(PAST, PAST))
    return path
