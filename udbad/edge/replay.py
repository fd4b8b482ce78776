"""Showing direct changes to watchers of the union: requests of the helper, answered and never performed (`replay`).

The helper (mount/replayhelper.py) does on the union what was done on a branch, so that the kernel sends the event. Its
requests are told apart by their user id, which is nobody's. One that changes something is answered as if it had been
done, if it is the one that is expected now: with what the branches say. Any other is EIO, whatever it asks for: also
what another process of this mount expected, and has left unanswered when it was killed. So no branch is ever changed.

What is answered the kernel may not keep, so a replay cannot make it believe anything: how long it may keep a name is
for who looks it up afterwards.

Event loop only.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import stat as st_mod
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

import trio

from udbad.coherence.base import Coherence
from udbad.coherence.replays import Kind, Known, Replays, Step
from udbad.edge.native import REPLAY_UID
from udbad.edge.operations import Entry
from udbad.edge.table import NOTHING, TABLE, Body
from udbad.inodes.handles import backing_id
from udbad.inodes.node import Dir, Node
from udbad.inodes.paths import path_in
from udbad.kernel import wire
from udbad.kernel.received import Received

if TYPE_CHECKING:
    import subprocess

    from udbad.edge.native import Native

log = logging.getLogger(__name__)

A_SECOND: Final = 1000
"""Replays, at most; what comes faster has to wait, and becomes less by that."""
_GATHER_SECONDS: Final = 0.01
"""How long the first one waits for more of the same."""
_BURSTS: Final = 64
"""Of events, that are read before something is shown; in a storm they never end."""
_TRIES: Final = 8
_RETRY_SECONDS: Final = 0.002
"""How long after the first time, and as much longer after each: at once, or somebody looks it up in between."""
_LINGER_SECONDS: Final = 2.0
_CALM_SECONDS: Final = 0.1
_AT_ONCE, _PAUSE_SECONDS = 32, 0.002
"""How many directories are asked at once, and how long requests come first then."""
_PORTION: Final = 1000
"""Of all nodes there are, which are looked through for these."""
_PATIENCE_SECONDS: Final = 30.0
"""How long the helper may be at one change before another one is started."""

_OPENED: Final = wire.OPENED.pack(NOTHING, wire.DIRECT_IO | wire.KEEP_CACHE | wire.NO_FLUSH, 0)
"""It says nothing about what others may do with the file (fuse_file_io_open() in fs/fuse/iomode.c)."""
_FIRST_OF_STATUS: Final = ("st_mode", "st_ino", "st_dev", "st_nlink", "st_uid", "st_gid", "st_size")
_MORE_OF_STATUS: Final = (
    "st_atime", "st_mtime", "st_ctime", "st_atime_ns", "st_mtime_ns", "st_ctime_ns", "st_blksize", "st_blocks",
    "st_rdev",
)  # fmt: skip
_GHOSTS: Final = 1 << 62
"""Node ids from here on stand for what was removed and is not known any more; none is given twice."""

_READING: Final = frozenset(
    {wire.LOOKUP, wire.FORGET, wire.BATCH_FORGET, wire.INTERRUPT, wire.GETATTR, wire.STATX, wire.GETXATTR,
     wire.LISTXATTR, wire.READLINK, wire.STATFS}
)  # fmt: skip
"""What changes nothing, and is performed for whoever asks."""
_MADE: Final = (Kind.CREATE, Kind.RENAME)
_NAMED: Final = (*_MADE, Kind.DELETE)
_MAKING: Final = {wire.MKNOD, wire.MKDIR, wire.SYMLINK}


def _refused() -> OSError:
    return OSError(errno.EIO, os.strerror(errno.EIO))


class Replayer:
    """Replays of one mount, one at a time."""

    def __init__(self, words: str, native: Native, mounts_inside: Callable[[], bool]) -> None:
        """words: the option `replay`. mounts_inside: whether something is mounted inside the union."""
        self.done: Counter[Kind] = Counter()
        """Replays, by what they showed."""
        self._native = native
        self._operations = native.operations
        self._fs = native.fs
        self._mounts_inside = mounts_inside
        self._event = trio.Event()
        self.replays = Replays(words, lambda: self._event.set())
        self._idle = trio.Event()
        self._expected: Step | None = None
        self._came = False
        """The request that was expected has come."""
        self._looked_up: list[Node] = []
        """For the step that is being done."""
        self._ghosts = _GHOSTS
        self._doubted = trio.Event()
        self.replays.on_doubt = lambda: self._doubted.set()
        self._lost = 0
        self._ended = False

    @property
    def dropped(self) -> int:
        """Changes that no watcher was told of: too many, or not to be done."""
        return self.replays.dropped + self._lost

    # -- answering ------------------------------------------------------------------------------

    def take(self, request: Received) -> bool:
        """Answer a request of the helper; False for one that is to be performed as anybody's."""
        number = 0
        body: Body = b""
        entry: Entry | None = None
        try:
            answer = self._answer(request)
            if answer is None:
                return False
            if isinstance(answer, tuple):
                entry, body = answer, wire.entry(*answer)
            else:
                body = answer
        except OSError as error:
            number = error.errno or errno.EIO
        except Exception:
            log.exception("answering a replay failed")
            number = errno.EIO
        native = self._native
        native.keep(None, request.unique, number, body)
        if not native.send(request.unique, number, body) and entry is not None:
            self._operations.forget(entry[0].id, 1)
        return True

    def _answer(self, request: Received) -> Body | Entry | None:
        """Raises OSError."""
        opcode, step = request.opcode, self._expected
        if step is not None:
            one = step.replay
            if opcode == wire.LOOKUP and not self._came:
                return self._look(step, *TABLE[opcode].parse(request)[:2])
            if opcode in _MAKING and step.kind is Kind.CREATE:
                self._expect((one.parent.id, one.name), TABLE[opcode].parse(request)[:2])
                return self._entry_of(step)
            if opcode == wire.LINK and step.kind is Kind.CREATE:
                self._expect((one.parent.id, one.name), TABLE[opcode].parse(request)[1:])
                return self._entry_of(step)
            if opcode in (wire.UNLINK, wire.RMDIR) and step.kind is Kind.DELETE:
                self._expect((one.parent.id, one.name), TABLE[opcode].parse(request))
                return b""
            if opcode in (wire.RENAME, wire.RENAME2) and step.origin is not None:
                origin, name = step.origin.key
                self._expect((origin.id, name, one.parent.id, one.name), TABLE[opcode].parse(request)[:4])
                return b""
            if opcode == wire.SETATTR and step.kind in (Kind.ATTRIBUTES, Kind.CONTENT):
                return self._attributes(step, request)
            if opcode == wire.OPEN and step.kind is Kind.CONTENT:
                self._check_node(step, request.node)
                return _OPENED
            if opcode == wire.FLUSH and step.kind is Kind.CONTENT:
                return b""
        if opcode in _READING:
            return None
        raise _refused()

    def _expect(self, wanted: Sequence[object], came: Sequence[object]) -> None:
        if self._came or tuple(wanted) != tuple(came):
            raise _refused()
        self._came = True

    def _look(self, step: Step, parent: int, name: bytes) -> Entry | None:
        """LOOKUP, as it would have been before the change."""
        one = step.replay
        if (parent, name) == (one.parent.id, one.name):
            if step.kind not in _NAMED:
                return None
            if one.before is None or (one.before.perhaps and step.kind is not Kind.DELETE):
                raise OSError(errno.ENOENT, "")
            return self._removed(one.parent, one.before)
        if step.origin is not None and (parent, name) == (step.origin.parent.id, step.origin.name):
            return self._entry_of(step)
        return None

    def _entry_of(self, step: Step) -> Entry:
        """What is shown, which may be another one by now."""
        found = self._fs.lookup(step.replay.parent.id, step.replay.name)
        if found is None or step.now is None or found[0].kind != step.now.kind:
            raise _refused()
        step.now = found[0]
        return self._given(*found)

    def _given(self, node: Node, st: os.stat_result) -> Entry:
        if self._fs.table.nodes.get(node.id) is node:
            self._fs.table.refer(node)
        return node, st, 0.0, 0.0

    def _removed(self, parent: Dir, was: Known) -> Entry:
        """What was removed: the same inode for who watches it, and a link more than there are."""
        node = was.node
        if node is not None and self._fs.table.nodes.get(node.id) is node:
            if type(node) is not Dir:
                with suppress(OSError):
                    return self._given(node, _status(self._fs.sb.stat(node), 1))
            if node.parent is None:
                return self._given(node, _status(None, 1, node.kind))
        self._ghosts += 1
        kind = node.kind if node is not None else st_mod.S_IFDIR if was.directory else st_mod.S_IFREG
        ghost = Node(self._ghosts, kind, parent.branch, 0, 0)
        return self._given(ghost, _status(None, 1, kind))

    def _attributes(self, step: Step, request: Received) -> Body:
        node_id, changes, _, _ = TABLE[wire.SETATTR].parse(request)
        if (changes.mode, changes.uid, changes.gid, changes.size) != (None, None, None, None):
            raise _refused()
        node = self._check_node(step, node_id)
        self._came = True
        return wire.attributes(node, self._fs.sb.stat(node), 0.0)

    def _check_node(self, step: Step, node_id: int) -> Node:
        one = step.replay
        node = one.parent.children.get(one.name) if one.name else one.parent
        if node is None or node.id != node_id:
            raise _refused()
        return node

    # -- asking for it ---------------------------------------------------------------------------

    def attend(self, coherence: Coherence) -> None:
        """Direct changes that this strategy finds are replayed from now on."""
        coherence.replay_to(self.replays)
        self._doubted.set()

    async def attend_again(self) -> None:
        """Until cancelled: have directories watched in which watchers may be, after trust in them was lost.

        Others need not be: who uses one the next time asks what it is.
        """
        while not self._ended:
            await self._doubted.wait()
            await trio.sleep(_CALM_SECONDS)
            self._doubted = trio.Event()
            self._fs.table.read_all()
            directories: list[Dir] = []
            for number, node in enumerate(list(self._fs.table.nodes.values())):
                if number % _PORTION == _PORTION - 1:
                    await trio.lowlevel.checkpoint()  # there may be a million; after this, as below
                if type(node) is Dir and not node.trusted and self.replays.is_watched(node, b"*"):
                    directories.append(node)
            for number, node in enumerate(directories):
                # After this: a node may be gone, and trusted again.
                if number % _AT_ONCE == _AT_ONCE - 1:
                    await trio.sleep(_PAUSE_SECONDS)
                if not node.trusted and self._fs.table.nodes.get(node.id) is node:
                    with suppress(OSError):
                        self._fs.getattr(node.id)

    async def idle(self) -> None:
        """Return when everything that was found before has been shown, or dropped."""
        while self._event.is_set() and not self._ended:
            await self._idle.wait()

    async def run(self, start: Callable[[int, int], subprocess.Popen[bytes]]) -> None:
        """Replay until cancelled. start: the helper, with this descriptor of its own, and as this user."""
        while True:
            await self._event.wait()
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with theirs:
                helper = start(theirs.fileno(), REPLAY_UID)
            try:
                with trio.socket.from_stdlib_socket(ours) as channel:
                    number = await self._asked(channel)
                    if number != 0:
                        log.warning(
                            "no helper to be had (%s): watchers of the union are not told of direct changes",
                            "it has ended" if number is None else os.strerror(number),
                        )
                        self._ended = True
                        self._idle.set()
                        self._operations.coherence.replay_to(None)
                        return
                    await self._serve(channel)
            finally:
                self._expected = None
                helper.kill()
                # It ends with the request that it is at, which may wait for another one of ours.
                with trio.CancelScope(deadline=trio.current_time() + _LINGER_SECONDS, shield=True):
                    await trio.to_thread.run_sync(helper.wait, abandon_on_cancel=True)

    async def _asked(self, channel: trio.socket.SocketType) -> int | None:
        """The errno that the helper says; None when it has ended, or does not answer."""
        with trio.move_on_after(_PATIENCE_SECONDS):
            try:
                return int(await channel.recv(16))
            except (OSError, ValueError):
                pass
        return None

    async def _serve(self, channel: trio.socket.SocketType) -> None:
        """Until the helper has ended."""
        rest = float(A_SECOND)
        filled = trio.current_time()
        while True:
            self._idle.set()
            self._idle = trio.Event()
            await self._event.wait()
            await trio.sleep(_GATHER_SECONDS)
            while len(self.replays):
                now = trio.current_time()
                rest, filled = min(rest + (now - filled) * A_SECOND, A_SECOND), now
                if rest < 1:
                    await trio.sleep(0.1)
                rest -= 1
                if not await self._replay(channel):
                    return
            self._event = trio.Event()

    async def _replay(self, channel: trio.socket.SocketType) -> bool:
        """One step of the next one. False when the helper is of no use any more."""
        # What is looked up now should be no news to who reads the events.
        for _ in range(_BURSTS):
            if not self._operations.coherence.take_events():
                break
            await trio.lowlevel.checkpoint()
        one = self.replays.first()
        if one is None:
            return True
        step = message = None
        try:
            step = self.replays.step(one, self._node)
            message = None if step is None else self._message(step)
        except OSError:
            pass
        if step is None or message is None:
            self.replays.settled(one)
            self._let_go()
            return True
        self.replays.begun(step)
        self._expected, self._came = step, False
        try:
            await channel.send(message)
            number = await self._asked(channel)
        except OSError:
            number = None
        self._expected = None
        if number == 0 and (self._came or step.kind is Kind.CONTENT):
            self.done[step.kind] += 1
            self.replays.shown(step)
        else:
            await self._failed(step, number)
        self._let_go()
        return number is not None

    async def _failed(self, step: Step, number: int | None) -> None:
        """The kernel knew better: somebody has looked the name up since. It is made to ask, and then asked again."""
        one = step.replay
        one.tries += 1
        hopeless = number in (None, errno.EROFS, errno.ENODEV) or one.tries >= _TRIES
        # What is mounted on a name would be detached when the kernel is told that there is no such name.
        if hopeless or (step.kind in _MADE and await trio.to_thread.run_sync(self._mounts_inside)):
            self._lost += self.replays.given_up(step)
            return
        notifier = self._operations.coherence.notifier
        notifier.expire(one.parent.id, one.name)
        if step.origin is not None:
            notifier.expire(step.origin.parent.id, step.origin.name)
        await trio.sleep(_RETRY_SECONDS * one.tries)
        self.replays.again(step)

    def _message(self, step: Step) -> bytes | None:
        """What the helper is to do; None where no path leads to the name. Raises OSError."""
        if step.kind is Kind.DELETE:
            before = step.replay.before
            return _words(b"rmdir" if before is not None and before.directory else b"unlink", step)
        if step.now is None:
            return None
        if step.kind is Kind.CREATE:
            other = self._other_name(step)
            if other is not None and not step.replay.tries:
                return _words(b"link", step, *other)
            kind = step.now.kind
            word = {st_mod.S_IFDIR: b"mkdir", st_mod.S_IFLNK: b"symlink"}.get(kind, b"mknod")
            return _words(word, step, b"%d" % (kind | 0o600))
        if step.origin is not None:
            source, target = path_in(step.origin.parent), path_in(step.replay.parent)
            if source is None or target is None:
                return None
            return b"\0".join((b"rename", source or b".", step.origin.name, target or b".", step.replay.name))
        if step.kind is Kind.ATTRIBUTES:
            return _words(b"attributes", step)
        return self._content(step, step.now)

    @staticmethod
    def _other_name(step: Step) -> tuple[bytes, bytes] | None:
        """Directory and name by which what was made is known already: it is a hard link of that."""
        for parent, name in () if step.now is None else step.now.aliases or ():
            path = path_in(parent)
            if (parent, name) != step.replay.key and path is not None:
                return path or b".", name
        return None

    def _content(self, step: Step, node: Node) -> bytes | None:
        """A file that the kernel uses by itself cannot be opened otherwise, and one that is executed not be written."""
        if node.kind != st_mod.S_IFREG:
            return None
        closed = step.closed and not backing_id(node) and not self._fs.sb.stat(node).st_mode & 0o111
        if not closed and not step.modified:
            return None
        return _words(b"write" if closed and step.modified else b"close" if closed else b"modify", step)

    def _node(self, parent: Dir, name: bytes) -> Node | None:
        found = self._fs.lookup(parent.id, name)
        if found is None:
            return None
        self._looked_up.append(found[0])
        return found[0]

    def _let_go(self) -> None:
        """Of what was looked up, the kernel need not know anything."""
        for node in self._looked_up:
            if self._fs.table.nodes.get(node.id) is node:
                self._fs.table.not_sent(node)
        self._looked_up.clear()


def _words(word: bytes, step: Step, *more: bytes) -> bytes | None:
    path = path_in(step.replay.parent)
    return None if path is None else b"\0".join((word, path or b".", step.replay.name or b".", *more))


def helper(program: str, mount_point: bytes, mount_id: int) -> Callable[[int, int], subprocess.Popen[bytes]]:
    """How the helper is started. program: where its text is; read now, as another version may be there later."""
    import subprocess  # not for everybody

    text = Path(program).read_bytes()

    def start(fd: int, uid: int) -> subprocess.Popen[bytes]:
        words = [sys.executable, "-I", "-S", "-", "udbad-replay"]
        numbers = str(fd), str(mount_id), str(os.getpid()), str(uid)
        process = subprocess.Popen(
            [*words, os.fsdecode(mount_point), *numbers], stdin=subprocess.PIPE, pass_fds=[fd], cwd="/"
        )
        assert process.stdin is not None
        with suppress(BrokenPipeError), process.stdin as pipe:  # which has room for it
            pipe.write(text)
        return process

    return start


def _status(st: os.stat_result | None, more: int, kind: int = 0) -> os.stat_result:
    """A status with so many links more; of something of this kind where there is none."""
    first: list[float] = [kind | 0o600, *[0] * 6]
    if st is not None:
        first = [getattr(st, name) for name in _FIRST_OF_STATUS]  # where it is compiled, it is no sequence
    first[3] += more
    first += [0] * 3 if st is None else [st[at] for at in (7, 8, 9)]
    return os.stat_result(first, {name: 0 if st is None else getattr(st, name) for name in _MORE_OF_STATUS})
