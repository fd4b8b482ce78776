"""A client that storms a directory with creates, renames, unlinks and copy-ups, and a model of it.

As a program (python -m tests.system.storm ROOT JOURNAL SEED SECONDS) it performs random operations
below ROOT. Before each one it appends what it is about to do to JOURNAL, which lies outside of the
mount, and after the call has returned, how it ended. So after a crash of the mount the journal tells
the state exactly, but for one operation of which either all or nothing may have happened.

The model is a plain dictionary and knows nothing of layers, whiteouts or the daemon.
"""

from __future__ import annotations

import errno
import json
import os
import random
import stat
import sys
import time
from dataclasses import dataclass
from pathlib import Path

DEAD = {errno.ENOTCONN, errno.ECONNABORTED}
"""What the kernel answers when the process behind a FUSE mount is gone."""

NAMES = [f"n{n}" for n in range(8)]
DIRECTORIES = [f"d{n}" for n in range(4)]
RECORD = 1024
"""Bytes that one write replaces; small enough to travel in one request."""


@dataclass(frozen=True)
class Node:
    """One object: a directory has content None, a symlink its text and mode None."""

    content: bytes | None
    mode: int | None


State = dict[str, Node]
"""Path relative to the root (without it) → object."""


@dataclass(frozen=True)
class Operation:
    """kind and its arguments; `text` is a token from which the bytes to write are made."""

    kind: str
    path: str
    target: str = ""
    text: str = ""
    mode: int = 0

    def to_json(self) -> str:
        return json.dumps(self.__dict__)


def record(token: str) -> bytes:
    """RECORD bytes that only this token makes."""
    line = f"{token}\n".encode()
    return (line * (RECORD // len(line) + 1))[:RECORD]


def read_state(root: Path) -> State:
    """The state of a real directory."""
    state: State = {}
    top = os.fsencode(root)
    # fwalk and descriptors: a mount that is asked for every step of a path is slow on whole paths.
    for directory, directories, files, fd in os.fwalk(top):
        for name in directories + files:
            relative = os.fsdecode(os.path.relpath(os.path.join(directory, name), top))
            mode = os.lstat(name, dir_fd=fd).st_mode
            if stat.S_ISLNK(mode):
                state[relative] = Node(os.readlink(name, dir_fd=fd), None)
            elif stat.S_ISDIR(mode):
                state[relative] = Node(None, stat.S_IMODE(mode))
            else:
                with open(os.open(name, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=fd), "rb") as file:
                    state[relative] = Node(file.read(), stat.S_IMODE(mode))
    return state


# -- the model --------------------------------------------------------------------------------


def apply(state: State, operation: Operation) -> tuple[State, int]:
    """The state after the operation and the errno it ends with, 0 for success (then 0 alone changes it).

    The order of the checks is the one of the Linux name space code (fs/namei.c).
    """
    path, target = operation.path, operation.target
    node = state.get(path)
    parent = os.path.dirname(path)
    if parent and not _is_directory(state.get(parent)):
        return state, errno.ENOENT if parent not in state else errno.ENOTDIR
    match operation.kind:
        case "create" | "mkdir" | "symlink":
            if node is not None:
                return state, errno.EEXIST
            made = {
                "create": Node(b"", operation.mode),
                "mkdir": Node(None, operation.mode),
                "symlink": Node(operation.text.encode(), None),
            }
            return {**state, path: made[operation.kind]}, 0
        case "rename":
            return _rename(state, path, target)
    if node is None:
        return state, errno.ENOENT
    match operation.kind:
        case "write" | "append" | "truncate":
            # The client opens with O_NOFOLLOW.
            if node.content is None or node.mode is None:
                return state, errno.EISDIR if node.content is None else errno.ELOOP
            new = record(operation.text)
            contents = {"write": new + node.content[RECORD:], "append": node.content + new, "truncate": b""}
            return {**state, path: Node(contents[operation.kind], node.mode)}, 0
        case "chmod":
            # On a symlink the client changes nothing.
            return ({**state, path: Node(node.content, operation.mode)}, 0) if node.mode is not None else (state, 0)
        case "unlink":
            return (_without(state, path), 0) if not _is_directory(node) else (state, errno.EISDIR)
        case "rmdir":
            if not _is_directory(node):
                return state, errno.ENOTDIR
            return (_without(state, path), 0) if not _below(state, path) else (state, errno.ENOTEMPTY)
    raise ValueError(operation.kind)


def _rename(state: State, source: str, target: str) -> tuple[State, int]:
    node, old = state.get(source), state.get(target)
    parent = os.path.dirname(target)
    if parent and not _is_directory(state.get(parent)):
        return state, errno.ENOENT if parent not in state else errno.ENOTDIR
    if node is None:
        return state, errno.ENOENT
    if target.startswith(source + "/"):
        return state, errno.EINVAL
    if source.startswith(target + "/"):
        return state, errno.ENOTEMPTY
    if source == target:
        return state, 0
    if old is not None:
        if _is_directory(node) and not _is_directory(old):
            return state, errno.ENOTDIR
        if _is_directory(old) and not _is_directory(node):
            return state, errno.EISDIR
        if _below(state, target):
            return state, errno.ENOTEMPTY
    moved = {target + path[len(source) :]: state[path] for path in [source, *_below(state, source)]}
    return {**_without(_without(state, source), target), **moved}, 0


def _is_directory(node: Node | None) -> bool:
    return node is not None and node.content is None


def _below(state: State, path: str) -> list[str]:
    return [other for other in state if other.startswith(path + "/")]


def _without(state: State, path: str) -> State:
    gone = {path, *_below(state, path)}
    return {other: node for other, node in state.items() if other not in gone}


# -- the client -------------------------------------------------------------------------------


def choose(random_: random.Random, state: State, serial: int) -> Operation:
    """A random operation, mostly one that will succeed."""
    directories = [path for path, node in state.items() if node.content is None]
    files = [path for path, node in state.items() if node.content is not None]
    existing = directories + files

    def somewhere() -> str:
        parent = random_.choice([*directories, ""])
        name = random_.choice(NAMES)
        return f"{parent}/{name}" if parent.count("/") < 2 and parent else name

    def some(paths: list[str]) -> str:
        return random_.choice(paths) if paths and random_.random() < 0.95 else somewhere()

    kinds = {
        "create": 14,
        "write": 16,
        "append": 8,
        "truncate": 3,
        "chmod": 6,
        "unlink": 14,
        "rename": 22,
        "mkdir": 7,
        "rmdir": 5,
        "symlink": 4,
    }
    kind = random_.choices(list(kinds), list(kinds.values()))[0]
    token = f"{serial}.{random_.getrandbits(32):08x}"
    mode = random_.choice((0o600, 0o644, 0o640, 0o755, 0o4711))
    match kind:
        case "create" | "symlink":
            return Operation(kind, somewhere(), text=token, mode=mode)
        case "mkdir":
            # Names that were directories in a lower layer, too: they must come back empty.
            path = random_.choice(DIRECTORIES) if random_.random() < 0.5 else somewhere()
            return Operation(kind, path, mode=mode & 0o777 | 0o700)
        case "rename":
            return Operation(kind, some(existing), target=somewhere() if random_.random() < 0.6 else some(files))
        case "unlink" | "write" | "append" | "truncate":
            return Operation(kind, some(files), text=token)
        case "rmdir":
            # An empty one if there is one; else a step towards emptying one.
            empty = [path for path in directories if not _below(state, path)]
            return Operation(kind, some(empty or directories))
    path = some(existing)
    return Operation(kind, path, mode=mode | (0o700 if path in directories else 0))


def perform(operation: Operation) -> None:
    """The operation as system calls in the working directory; what was written is fsynced. Raises OSError."""
    path = operation.path
    match operation.kind:
        case "create":
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, operation.mode)
            _sync_close(fd)
        case "write" | "append" | "truncate":
            append = os.O_APPEND if operation.kind == "append" else 0
            fd = os.open(path, os.O_WRONLY | os.O_NOFOLLOW | append)
            try:
                if operation.kind == "truncate":
                    os.ftruncate(fd, 0)
                else:
                    count = os.write(fd, record(operation.text))
                    assert count == RECORD
            except BaseException:
                os.close(fd)
                raise
            _sync_close(fd)
        case "chmod":
            if not os.path.islink(path):
                os.chmod(path, operation.mode)
        case "unlink":
            os.unlink(path)
        case "rename":
            os.rename(path, operation.target)
        case "mkdir":
            os.mkdir(path, operation.mode)
        case "rmdir":
            os.rmdir(path)
        case "symlink":
            os.symlink(operation.text, path)
        case _:
            raise ValueError(operation.kind)


def _sync_close(fd: int) -> None:
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def is_dead() -> bool:
    """Whether the process behind the working directory is gone, asked by a request that no cache answers.

    SIGKILL in the moment of copying a reply ends that request alone with EIO, before all others are
    aborted (fs/fuse/dev.c, fuse_dev_do_write).
    """
    try:
        os.statvfs(".")
    except OSError as error:
        if error.errno in DEAD:
            return True
        raise
    return False


def storm(root: Path, journal: Path, seed: int, seconds: float) -> None:
    """Perform random operations until the mount dies or `seconds` are over."""
    os.umask(0)
    # A working directory stays in the dead mount; a path would lead below it once that is unmounted.
    os.chdir(root)
    random_ = random.Random(seed)
    state = read_state(Path())
    end = time.monotonic() + seconds
    fd = os.open(journal, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o600)
    serial = 0
    while time.monotonic() < end:
        serial += 1
        operation = choose(random_, state, serial)
        os.write(fd, f"{operation.to_json()}\n".encode())
        number = 0
        try:
            perform(operation)
        except OSError as error:
            number = error.errno or 0
            if number in DEAD or (number == errno.EIO and is_dead()):
                return
        os.write(fd, f"{number}\n".encode())
        if number == 0:
            state, _ = apply(state, operation)


def replay(state: State, journal: Path) -> tuple[State, State, Operation | None]:
    """What a journal says of the state: (without, with) the operation in doubt, and that operation.

    Raises AssertionError when an operation ended otherwise than the model says. Only a rename of a
    directory may be EXDEV, where it has parts in lower layers (semantics 6.6).
    """
    lines = journal.read_text().splitlines() if journal.exists() else []
    pending: Operation | None = None
    for number, line in enumerate(lines):
        if pending is None:
            pending = Operation(**json.loads(line))
            continue
        after, expected = apply(state, pending)
        actual = int(line)
        is_exdev = actual == errno.EXDEV and pending.kind == "rename" and _is_directory(state.get(pending.path))
        if is_exdev:
            after = state
        elif actual != expected:
            said, meant = errno.errorcode.get(actual, "success"), errno.errorcode.get(expected, "success")
            raise AssertionError(f"line {number} of {journal.name}: {pending} ended with {said}, not with {meant}")
        state, pending = after, None
    if pending is None:
        return state, state, None
    return state, apply(state, pending)[0], pending


if __name__ == "__main__":
    storm(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]))
