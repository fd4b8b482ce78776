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
from udbad.coherence.replays import Kind, Replay, Replays, path_in
from udbad.edge.native import REPLAY_UID
from udbad.edge.operations import Entry
from udbad.edge.table import NOTHING, TABLE, Body
from udbad.inodes.handles import backing_id
from udbad.inodes.table import Dir, Node
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
_TRIES: Final = 8
_RETRY_SECONDS: Final = 0.01
_LINGER_SECONDS: Final = 2.0
_CALM_SECONDS: Final = 0.1
_AT_ONCE, _PAUSE_SECONDS = 32, 0.002
"""How many directories are asked at once, and how long requests come first then."""
_PATIENCE_SECONDS: Final = 30.0
"""How long the helper may be at one change before another one is started."""

_OPENED: Final = wire.OPENED.pack(NOTHING, wire.DIRECT_IO | wire.KEEP_CACHE | wire.NO_FLUSH, 0)
"""It says nothing about what others may do with the file (fuse_file_io_open() in fs/fuse/iomode.c)."""
_MORE_OF_STATUS: Final = ("st_atime_ns", "st_mtime_ns", "st_ctime_ns", "st_blksize", "st_blocks", "st_rdev")
_GHOSTS: Final = 1 << 62
"""Node ids from here on stand for what was removed and is not known any more; none is given twice."""

_READING: Final = frozenset(
    {wire.LOOKUP, wire.FORGET, wire.BATCH_FORGET, wire.INTERRUPT, wire.GETATTR, wire.STATX, wire.GETXATTR,
     wire.LISTXATTR, wire.READLINK, wire.STATFS}
)  # fmt: skip
"""What changes nothing, and is performed for whoever asks."""
_NAMED: Final = (Kind.CREATE, Kind.RENAME)
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
        self._expected: Replay | None = None
        self._came = False
        """The request that was expected has come."""
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
        opcode, one = request.opcode, self._expected
        if one is not None:
            if opcode == wire.LOOKUP and not self._came:
                return self._look(one, *TABLE[opcode].parse(request)[:2])
            if opcode in _MAKING and one.kind is Kind.CREATE:
                self._expect((one.parent.id, one.name), TABLE[opcode].parse(request)[:2])
                return self._entry_of(one)
            if opcode == wire.LINK and one.kind is Kind.CREATE:
                self._expect((one.parent.id, one.name), TABLE[opcode].parse(request)[1:])
                return self._entry_of(one)
            if opcode in (wire.UNLINK, wire.RMDIR) and one.kind is Kind.DELETE:
                self._expect((one.parent.id, one.name), TABLE[opcode].parse(request))
                return b""
            if opcode in (wire.RENAME, wire.RENAME2) and one.kind is Kind.RENAME and one.origin is not None:
                origin, name = one.origin
                self._expect((origin.id, name, one.parent.id, one.name), TABLE[opcode].parse(request)[:4])
                return b""
            if opcode == wire.SETATTR and one.kind in (Kind.ATTRIBUTES, Kind.CONTENT):
                return self._attributes(one, request)
            if opcode == wire.OPEN and one.kind is Kind.CONTENT:
                self._check_node(one, request.node)
                return _OPENED
            if opcode == wire.FLUSH and one.kind is Kind.CONTENT:
                return b""
        if opcode in _READING:
            return None
        raise _refused()

    def _expect(self, wanted: Sequence[object], came: Sequence[object]) -> None:
        if self._came or tuple(wanted) != tuple(came):
            raise _refused()
        self._came = True

    def _look(self, one: Replay, parent: int, name: bytes) -> Entry | None:
        """LOOKUP, as it would have been before the change."""
        if (parent, name) == (one.parent.id, one.name):
            if one.kind is Kind.CREATE or (one.kind is Kind.RENAME and one.was is None):
                raise OSError(errno.ENOENT, "")
            if one.kind is Kind.DELETE or one.kind is Kind.RENAME:
                return self._removed(one)
        elif one.origin is not None and (parent, name) == (one.origin[0].id, one.origin[1]):
            return self._entry_of(one)
        return None

    def _entry_of(self, one: Replay) -> Entry:
        """What a name stands for now."""
        found = self._fs.lookup(one.parent.id, one.name)
        if found is None:
            raise _refused()
        return self._given(*found)

    def _given(self, node: Node, st: os.stat_result) -> Entry:
        if self._fs.table.nodes.get(node.id) is node:
            self._fs.table.refer(node)
        return node, st, 0.0, 0.0

    def _removed(self, one: Replay) -> Entry:
        """What was removed: the same inode for who watches it, and a link more than there are."""
        was = one.was
        if was is not None and self._fs.table.nodes.get(was.id) is was:
            if type(was) is not Dir:
                with suppress(OSError):
                    return self._given(was, _status(self._fs.sb.stat(was), 1))
            if was.parent is None:
                return self._given(was, _status(None, 1, was.kind))
        self._ghosts += 1
        kind = was.kind if was is not None else st_mod.S_IFDIR if one.directory else st_mod.S_IFREG
        ghost = Node(self._ghosts, kind, one.parent.branch, 0, 0)
        return self._given(ghost, _status(None, 1, kind))

    def _attributes(self, one: Replay, request: Received) -> Body:
        node_id, changes, _, _ = TABLE[wire.SETATTR].parse(request)
        if (changes.mode, changes.uid, changes.gid, changes.size) != (None, None, None, None):
            raise _refused()
        node = self._check_node(one, node_id)
        self._came = True
        return wire.attributes(node, self._fs.sb.stat(node), 0.0)

    def _check_node(self, one: Replay, node_id: int) -> Node:
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
            directories = [
                node
                for node in self._fs.table.nodes.values()
                if type(node) is Dir and not node.trusted and self.replays.is_watched(node, b"*")
            ]
            for number, node in enumerate(directories):
                # After this: the node may be gone, and trusted again.
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
            while (one := self.replays.take()) is not None:
                now = trio.current_time()
                rest, filled = min(rest + (now - filled) * A_SECOND, A_SECOND), now
                if rest < 1:
                    await trio.sleep(0.1)
                rest -= 1
                if not await self._replay(channel, one):
                    return
            self._event = trio.Event()

    async def _replay(self, channel: trio.socket.SocketType, one: Replay) -> bool:
        """False when the helper is of no use any more."""
        try:
            message = self._message(one)
        except OSError:
            message = None
        if message is None and one.kind is Kind.RENAME:
            self.replays.split(one)
        if message is None:
            return True  # overtaken: whatever came instead is replayed, if it is to be
        self._expected, self._came = one, False
        try:
            await channel.send(message)
            number = await self._asked(channel)
        except OSError:
            number = None
        self._expected = None
        if self._came or (number == 0 and one.kind is Kind.CONTENT):
            self.done[one.kind] += 1
        else:
            await self._failed(one, number)
        return number is not None

    async def _failed(self, one: Replay, number: int | None) -> None:
        """The kernel knew better: somebody has looked the name up since. It is made to ask, and then asked again."""
        one.tries += 1
        hopeless = number in (None, errno.EROFS, errno.ENODEV) or one.tries >= _TRIES
        # What is mounted on a name would be detached when the kernel is told that there is no such name.
        if hopeless or (one.kind in _NAMED and await trio.to_thread.run_sync(self._mounts_inside)):
            if one.kind is Kind.RENAME:
                self.replays.split(one)
            else:
                self._lost += 1
            return
        notifier = self._operations.coherence.notifier
        notifier.expire(one.parent.id, one.name)
        if one.origin is not None:
            notifier.expire(one.origin[0].id, one.origin[1])
        await trio.sleep(_RETRY_SECONDS)
        self.replays.put_back(one)

    def _message(self, one: Replay) -> bytes | None:
        """What the helper is to do; None when it is not so any more. Raises OSError."""
        if one.kind is Kind.DELETE:
            if not one.shown or self._kind_of(one):
                return None
            return self._words(b"rmdir" if one.directory else b"unlink", one)
        kind = self._kind_of(one)
        if not kind:
            return None
        if one.kind is Kind.CREATE:
            other = self._other_name(one)
            if other is not None and not one.tries:
                return self._words(b"link", one, *other)
            word = {st_mod.S_IFDIR: b"mkdir", st_mod.S_IFLNK: b"symlink"}.get(kind, b"mknod")
            return self._words(word, one, b"%d" % (kind | 0o600))
        if one.kind is Kind.RENAME and one.origin is not None:
            path = path_in(one.origin[0])
            if path is None or not self._is_renamed(one, *one.origin):
                return None
            return b"\0".join((b"rename", path or b".", one.origin[1], path_in(one.parent) or b".", one.name))
        if one.kind is Kind.ATTRIBUTES:
            return self._words(b"attributes", one)
        return self._content(one, kind)

    def _is_renamed(self, one: Replay, parent: Dir, name: bytes) -> bool:
        """Whether the new name is that of what was moved, and the old one of nothing, or of what is shown next."""
        node, _ = self._node_and_status(one)
        is_directory = type(node) is Dir
        fits = one.was is None or (type(one.was) is Dir) == is_directory
        free = self.replays.will_make(parent, name) or self._fs.lookup(parent.id, name) is None
        return node.identity == one.identity and fits and free

    @staticmethod
    def _other_name(one: Replay) -> tuple[bytes, bytes] | None:
        """Directory and name by which what was made is known already: it is a hard link of that."""
        node = one.parent.children.get(one.name)
        for parent, name in () if node is None else node.aliases or ():
            path = path_in(parent)
            if (parent, name) != (one.parent, one.name) and path is not None:
                return path or b".", name
        return None

    def _content(self, one: Replay, kind: int) -> bytes | None:
        """A file that the kernel uses by itself cannot be opened otherwise, and one that is executed not be written."""
        if kind != st_mod.S_IFREG:
            return None
        node, st = self._node_and_status(one)
        closed = one.closed and not backing_id(node) and not st.st_mode & 0o111
        if not closed and not one.modified:
            return None
        return self._words(b"write" if closed and one.modified else b"close" if closed else b"modify", one)

    def _node_and_status(self, one: Replay) -> tuple[Node, os.stat_result]:
        found = self._fs.lookup(one.parent.id, one.name)
        if found is None:
            raise OSError(errno.ENOENT, "")
        return found

    def _kind_of(self, one: Replay) -> int:
        """Type bits of what the name stands for now; 0 for nothing."""
        if not one.name:
            return st_mod.S_IFDIR
        found = self._fs.lookup(one.parent.id, one.name)
        return 0 if found is None else found[0].kind

    @staticmethod
    def _words(word: bytes, one: Replay, *more: bytes) -> bytes | None:
        path = path_in(one.parent)
        return None if path is None else b"\0".join((word, path or b".", one.name or b".", *more))


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
    first: list[float] = [kind | 0o600, *[0] * 9] if st is None else list(st)[:10]
    first[3] += more
    return os.stat_result(first, {name: 0 if st is None else getattr(st, name) for name in _MORE_OF_STATUS})
