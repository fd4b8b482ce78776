"""Random operations against the model of layers, by a client whose mount process is killed in the middle of them.

It is killed at a system call of the event loop, before or after it, or at any time, and its successor sometimes as
well, while it takes over. Each operation must have the outcome that the model predicts, and be done once; after it the
names it was about, the directories they are in, and what is open must be as the model says. UDBAD_STORM_SEED repeats a
run as far as threads and times allow, UDBAD_KILL_OPERATIONS is the number of operations of each.
"""

from __future__ import annotations

import errno
import os
import pickle
import random
import select
import signal
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import pytest

from tests.helpers import model as m
from tests.helpers import model_ops as ops
from tests.helpers.killing import workers
from tests.helpers.merge import Tree, diff, merge, snapshot, temporary_names
from tests.helpers.model import Model, Node, PathT
from tests.helpers.model_ops import Op
from tests.helpers.mount import DEADLINE, Mount, mounted
from tests.helpers.profile import scaled
from tests.helpers.tracing import Traced
from tests.stress.test_storm import SEED
from tests.t5_daemon.daemon import until
from udbad.mount import keeper

pytestmark = [
    pytest.mark.fuse,
    pytest.mark.stress,
    pytest.mark.skipif(keeper.why_not() is not None, reason=str(keeper.why_not())),
]

OPERATIONS: Final = int(os.environ.get("UDBAD_KILL_OPERATIONS", scaled("50", "4000")))
EPOCH: Final = 200
"""Operations after which a mount is compared, and another one with other layers is begun."""
STEPS: Final = 14
"""Stops of one operation after which its process is no longer killed."""
SUCCESSION_STEPS: Final = 60
SUCCESSION_SECONDS: Final = 0.08
KILLED: Final = 0.4
"""Share of the operations."""
KILLED_AGAIN: Final = 0.25
"""Share of these in which the successor is killed, too."""
HELD: Final = 4
"""Files that are open at the same time."""
ALLOWED: Final = r"another one takes over|lost branch events|whiteout|\.wh\.|nobody could take"


@dataclass
class Held:
    """An open file: its object, by which name it was opened, and what fstat(2) says of it that must not change."""

    node: Node
    path: PathT
    number: int


class Client:
    """A process that uses the mount, and holds what is open there: a page fault stops all threads of one."""

    def __init__(self, root: Path) -> None:
        self._ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._pid = os.fork()
        if self._pid == 0:
            self._ours.close()
            try:
                _use(root, theirs)
            finally:
                os._exit(0)
        theirs.close()
        self._poll = select.poll()
        self._poll.register(self._ours, select.POLLIN)

    def ask(self, *words: object) -> None:
        self._ours.send(pickle.dumps(words))

    def answered(self, milliseconds: float = 1) -> bool:
        return bool(self._poll.poll(milliseconds))

    def answer(self) -> Any:
        assert self.answered(DEADLINE * 1000), "the client hangs"
        return pickle.loads(self._ours.recv(1 << 16))

    def end(self) -> None:
        os.kill(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)
        self._ours.close()


def _use(root: Path, commands: socket.socket) -> None:
    """In the client, until its parent ends."""
    held: list[int] = []
    while words := commands.recv(1 << 16):
        what, *arguments = pickle.loads(words)
        answer: object = None
        try:
            if what == "do":
                answer = arguments[0].on_disk(root)
            elif what == "look":
                answer = [ops.outcome(partial(os.lstat, ops.real(root, path))) for path in arguments[0]]
            elif what == "list":
                answer = sorted(os.listdir(ops.real(root, arguments[0])))
            elif what == "hold":
                held.append(os.open(ops.real(root, arguments[0]), arguments[1] | os.O_NONBLOCK))
                answer = os.fstat(held[-1]).st_ino
            elif what == "append":
                answer = os.write(held[arguments[0]], arguments[1])
            elif what == "held":
                st = os.fstat(held[arguments[0]])
                answer = os.pread(held[arguments[0]], st.st_size + 1, 0), st.st_size, st.st_ino
            elif what == "release":
                os.close(held.pop(arguments[0]))
        except OSError as error:
            answer = errno.errorcode[error.errno or 0]
        commands.send(pickle.dumps(answer))


class Killer:
    """Kills the mount process of a mount made by hand while its client waits for an answer."""

    def __init__(self, mount: Mount, client: Client, draw: random.Random) -> None:
        self._guardian, self._client, self._draw = mount.process.pid, client, draw
        self._killed = 0
        self.count = 0

    def _next(self) -> int:
        """The process that serves or will, another one than was killed last: that may be ending."""
        there: list[int] = until(
            lambda: [pid for pid in workers(self._guardian) if pid != self._killed], "the next process"
        )
        return there[0]

    def kill(self) -> str:
        """Some of it, or nothing when the client has its answer first; what was done, for the report."""
        done = self._one(self._next(), STEPS, 0.003)
        while done and self._draw.random() < KILLED_AGAIN and not self._client.answered(0):
            again = self._one(self._next(), SUCCESSION_STEPS, SUCCESSION_SECONDS)
            if not again:
                break
            done += f", then {again}"
        return done

    def _one(self, pid: int, steps: int, seconds: float) -> str:
        if self._draw.random() < 0.3:
            time.sleep(self._draw.uniform(0, seconds))
            os.kill(pid, signal.SIGKILL)  # its number is its own until its guardian has waited for it
            self._killed, self.count = pid, self.count + 1
            return "at some time"
        wanted = self._draw.randint(1, steps)
        traced, stop = Traced(pid), None
        for _ in range(wanted):
            stop = traced.next(self._client.answered)
            if stop is None:
                traced.release()
                return ""
        traced.kill()
        self._killed, self.count = pid, self.count + 1
        return f"{stop} ({wanted})"


class Run:
    """One mount beside its model."""

    def __init__(self, mount: Mount, model: Model, draw: random.Random) -> None:
        self.mount, self.model, self.draw = mount, model, draw
        self.client = Client(mount.path)
        self.killer = Killer(mount, self.client, draw)
        self.held: list[Held] = []
        self.history: list[str] = []

    def asked(self, *words: object) -> Any:
        """The answer of the client, while the mount process is killed or not."""
        self.history.append(" ".join(map(str, words)))
        self.client.ask(*words)
        if self.draw.random() < KILLED:
            self.history[-1] += f" -- killed {self.killer.kill() or 'not at all'}"
        return self.client.answer()

    def step(self) -> None:
        choice = self.draw.random()
        if choice < 0.1 and len(self.held) < HELD:
            self.hold()
        elif choice < 0.15 and self.held:
            self.append(self.draw.randrange(len(self.held)))
        elif choice < 0.2 and self.held:
            self.release(self.draw.randrange(len(self.held)))
        else:
            self.operate(ops.random_op(self.draw.choice, self.model))
        for number in range(len(self.held)):
            self.check(number)

    def operate(self, op: Op) -> None:
        expected, came = op.on_model(self.model), self.asked("do", op)
        assert came == expected, f"{name_of(came)}, expected {name_of(expected)}"
        paths = (op.path, op.other)
        want = [ops.outcome(partial(self.model.existing, path)) for path in paths]
        assert self.asked("look", paths) == want
        parent = op.path[:-1]
        node = self.model.get(parent)
        if node is not None and node.is_dir:
            assert self.asked("list", parent) == self.model.names(parent)

    def hold(self) -> None:
        files = [path for path, view in sorted(self.model.visible().items()) if view[0] == stat.S_IFREG]
        if not files:
            return
        path: PathT = tuple(self.draw.choice(files).split(b"/"))
        writes = self.draw.random() < 0.5
        number = self.asked("hold", path, os.O_RDWR | os.O_APPEND if writes else os.O_RDONLY)
        assert isinstance(number, int), number
        self.held.append(Held(self.model.hold(path), path, number if writes else -1))

    def release(self, number: int) -> None:
        self.model.release(self.held.pop(number).node)
        assert self.asked("release", number) is None

    def append(self, number: int) -> None:
        """By each open file that was opened for it; the others say so."""
        held = self.held[number]
        if held.number < 0:
            assert self.asked("append", number, b"no") == "EBADF"
            return
        assert self.asked("append", number, b"more") == 4
        self.model.write_open(held.node, held.path, lambda node: setattr(node, "data", node.data + b"more"))

    def check(self, number: int) -> None:
        held = self.held[number]
        data = held.node.final().data
        content, size, inode = self.asked("held", number)
        assert (content, size) == (data, len(data))
        assert held.number in (-1, inode)

    def compare(self) -> None:
        seen = snapshot(self.mount.path)
        assert m.tree_view(seen) == self.model.visible()
        assert diff(self.merged(), seen) == []

    def merged(self) -> Tree:
        layers = zip(self.mount.branches, self.model.layers, strict=True)
        return merge([(branch, layer.whable) for branch, layer in layers])


def name_of(number: object) -> str:
    return errno.errorcode.get(number, "success") if isinstance(number, int) else str(number)


@contextmanager
def running(root: Path, permissions: tuple[str, ...], udba: str, io: str, draw: random.Random) -> Iterator[Run]:
    model = Model([ops.random_layer(draw.choice, permission) for permission in permissions], io=io)
    root.mkdir()
    branches = [root / f"{number}-{permission}" for number, permission in enumerate(permissions)]
    for branch, layer in zip(branches, model.layers, strict=True):
        branch.mkdir()
        layer.materialise(branch)
    read_only = {
        branch: snapshot(branch) for branch, layer in zip(branches, model.layers, strict=True) if not layer.writable
    }
    words = [f"{branch}={permission}" for branch, permission in zip(branches, permissions, strict=True)]
    options = f"dirren=off,survive=on,io={io}"
    with mounted(words, root / "mnt", udba, options, allow_log=ALLOWED, watchdog=7200) as mount:
        run = Run(mount, model, draw)
        try:
            yield run
            run.compare()
        except BaseException as error:
            error.add_note("\n".join(["-- what was done last:", *run.history[-30:]]))
            raise
        finally:
            run.client.end()
        until(lambda: swept(mount), "the end of sweeping")
        before = snapshot(mount.path)
        mount.remount()
        after = snapshot(mount.path)
        assert diff(before, after) == []
        assert diff(run.merged(), after) == []
        for branch, tree in read_only.items():
            assert diff(tree, snapshot(branch)) == []
        for branch in branches:
            assert not temporary_names(branch), "temporary names left"


def swept(mount: Mount) -> bool:
    """Whether the last process has taken away what those before it have left."""
    _, found, last = mount.log().rpartition("goes on in process")
    return not found or last.count(": swept ") == sum(branch.name.endswith("-rw") for branch in mount.branches)


@pytest.mark.parametrize(
    ("permissions", "udba", "io"),
    [
        (("rw", "ro"), "notify", "requests"),
        (("rw", "ro+wh", "ro"), "reval", "passthrough"),
        (("rw", "ro+wh", "rw"), "none", "cached"),
    ],
    ids=lambda value: value if isinstance(value, str) else ":".join(value),
)
def test_random_operations(tmp_path: Path, permissions: tuple[str, ...], udba: str, io: str) -> None:
    print(f"UDBAD_STORM_SEED={SEED}")
    done = kills = 0
    while done < OPERATIONS:
        draw = random.Random(f"{SEED} {done} {permissions} {udba} {io}")
        with running(tmp_path / f"{done}", permissions, udba, io, draw) as run:
            for _ in range(min(EPOCH, OPERATIONS - done)):
                run.step()
                done += 1
        kills += run.killer.count
    print(f"{done} operations, {kills} kills")
