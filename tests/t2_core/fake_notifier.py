"""Stand-ins for the two ends of the invalidator: what a strategy tells it, and what it writes to the kernel.

`FakeNotifier` takes the place of the invalidator (coherence.base.KernelNotifier) and only records.
`HeldWrite` takes the place of write(2) on /dev/fuse: it records each notification, taken apart again
after linux/fuse.h, and can keep the writing thread as a busy directory does. Nothing is imported
from udbad, so a wrong packing there is not repeated here.
"""

from __future__ import annotations

import os
import struct
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from udbad.kernel.protocol import NOTIFICATIONS

DEADLINE = 30.0
"""Seconds until a test gives up waiting for a thread."""

_NAMES_OF_CODES = {2: "inode", 3: "entry", 8: "epoch"}


@dataclass(frozen=True, order=True)
class Message:
    """One notification: kind entry, expire, attributes, data or epoch; node id (of the parent for an entry); name."""

    kind: str
    node: int = 0
    name: bytes = b""


def parse(raw: bytes) -> Message:
    """struct fuse_out_header{len, error=code, unique=0} and what follows it, linux/fuse.h."""
    length, code, unique = struct.unpack_from("<IiQ", raw)
    assert (length, unique) == (len(raw), 0)
    body = raw[16:]
    kind = _NAMES_OF_CODES[code]
    if kind == "inode":
        node, offset, size = struct.unpack("<Qqq", body)
        assert size == 0, "0: to the end of the file"
        # An offset below 0 leaves the pages alone (fuse_reverse_inval_inode).
        return Message("attributes" if offset < 0 else "data", node)
    if kind == "entry":
        parent, size, flags = struct.unpack_from("<QII", body)
        name = body[16:]
        assert name[-1:] == b"\0"
        assert len(name) == size + 1
        return Message({0: "entry", 1: "expire"}[flags], parent, name[:-1])
    assert not body
    return Message("epoch")


class HeldWrite:
    """A write to /dev/fuse that blocks while `hold` says so; thread-safe.

    entered, left: messages in the order in which their writes began and ended. fail_with: errno that
    every write raises when it ends, 0 for none.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._holds: Callable[[Message], bool] = lambda message: False
        self.entered: list[Message] = []
        self.left: list[Message] = []
        self.fail_with = 0

    def __call__(self, raw: bytes) -> None:
        message = parse(raw)
        with self._changed:
            self.entered.append(message)
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._holds(message))
            self.left.append(message)
            self._changed.notify_all()
            if self.fail_with:
                raise OSError(self.fail_with, os.strerror(self.fail_with))

    def tell(self, kind: str, node: int, name: bytes) -> None:
        """As Session.tell."""
        self(NOTIFICATIONS[kind](node, name))

    def hold(self, which: Callable[[Message], bool] = lambda message: True) -> None:
        """From now on keep the writes of these messages; those of others that were kept go on."""
        with self._changed:
            self._holds = which
            self._changed.notify_all()

    def release(self) -> None:
        self.hold(lambda message: False)

    def wait_entered(self, message: Message) -> None:
        """Wait until this message is being written or has been."""
        with self._changed:
            assert self._changed.wait_for(lambda: message in self.entered, DEADLINE), f"{message} is never written"

    def wait_left(self, message: Message) -> None:
        """Wait until this message has been written."""
        with self._changed:
            assert self._changed.wait_for(lambda: message in self.left, DEADLINE), f"{message} is never written"


class OneByOne(ABC):
    """What a KernelNotifier can be told of many, or at leisure, as if it were told of each at once."""

    @abstractmethod
    def expire(self, parent: int, name: bytes) -> None: ...

    @abstractmethod
    def attributes(self, node: int) -> None: ...

    @abstractmethod
    def data(self, node: int) -> None: ...

    def attributes_soon(self, node: int) -> None:
        self.attributes(node)

    def expire_all(self, parent: int, names: Iterable[bytes]) -> None:
        for name in names:
            self.expire(parent, name)

    def attributes_all(self, nodes: Iterable[int]) -> None:
        for node in nodes:
            self.attributes(node)

    def data_all(self, nodes: Iterable[int]) -> None:
        for node in nodes:
            self.data(node)


@dataclass
class FakeNotifier(OneByOne):
    """Implements coherence.base.KernelNotifier; `told` is everything it was told, in order."""

    epochs: bool = True
    since: float | None = None
    told: list[Message] = field(default_factory=list)

    def entry(self, parent: int, name: bytes) -> None:
        self.told.append(Message("entry", parent, name))

    def expire(self, parent: int, name: bytes) -> None:
        self.told.append(Message("expire", parent, name))

    def attributes(self, node: int) -> None:
        self.told.append(Message("attributes", node))

    def data(self, node: int) -> None:
        self.told.append(Message("data", node))

    def everything(self) -> bool:
        if self.epochs:
            self.told.append(Message("epoch"))
        return self.epochs
