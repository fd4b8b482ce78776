"""A real mount whose answers can be held back, to see what everything else does meanwhile.

While the file GATE exists, the requests named in words (operations, and `transfer`, the bytes of a copy-up) are
worked on but not answered: a thread answers later, as after a slow read. Each one that is held
adds a line to GATE.held. The word `no-epochs` makes the daemon believe that the kernel has no NOTIFY_INC_EPOCH,
`coarse` that its time stamps are no finer than a tick of the clock (before Linux 6.13), `unwatched` has `reval`
watch no directory, as where no file system sends events.

In a test: with slow_daemon(gate, …): every mount made by tests/helpers/mount.py is such a daemon.
"""

from __future__ import annotations

import functools
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final
from unittest import mock

from tests.helpers import mount as mount_module

NO_EPOCHS: Final = "no-epochs"
COARSE: Final = "coarse"
TRANSFER: Final = "transfer"
UNWATCHED: Final = "unwatched"
_POLL: Final = 0.005
"""Seconds between two looks at the gate."""


class Gate:
    """The test's side: a file that holds requests while it is there."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._held = path.with_name(path.name + ".held")
        self._held.touch()

    def close(self) -> None:
        """From now on requests are held; counting starts anew."""
        self._held.write_bytes(b"")
        self.path.touch()

    def open(self) -> None:
        self.path.unlink(missing_ok=True)

    def held(self) -> Counter[str]:
        """How many requests were held since `close`, by their word."""
        return Counter(self._held.read_text().splitlines())

    def wait_held(self, kinds: Iterable[str], count: int = 1) -> None:
        """Wait until that many of these kinds have been."""
        end = time.monotonic() + mount_module.DEADLINE
        while sum(self.held()[kind] for kind in kinds) < count:
            assert time.monotonic() < end, f"not {count} of {kinds}: {self.held()}"
            time.sleep(_POLL)


@contextmanager
def slow_daemon(gate: Gate | None, *words: str) -> Iterator[None]:
    """Mounts made meanwhile are served so; gate None: nothing is held."""
    path = os.devnull + "/none" if gate is None else str(gate.path)
    patch = f"from tests.helpers.slow_mount import patch; patch({path!r}, {list(words)!r})"
    with mock.patch.object(mount_module, "PATCH", patch):
        yield


# -- the daemon's side ------------------------------------------------------------------------


def _held(operation: Callable[..., Any], gate: str, what: str) -> Callable[..., Any]:
    """An operation of the table: the answer or error comes from a thread when the gate opens."""
    from udbad.edge.operations import Later
    from udbad.edge.waiting import RETRIED
    from udbad.union.superblock import NeedCopyUp

    def slow(*arguments: Any) -> Any:
        if not _closed(gate):
            return operation(*arguments)
        later: Callable[[], object]
        then: Callable[[Exception | None], object] | None = None
        try:
            later = functools.partial(_give, operation(*arguments))
        except Later as waits:
            later, then = functools.partial(waits.call, *waits.args), waits.then
        except NeedCopyUp:
            raise  # begins again
        except OSError as error:
            if error.errno in RETRIED:
                raise
            later = functools.partial(_raise, error)
        raise Later(True, _held_in_thread(later, gate, what), then=then)

    return slow


def _give(body: object) -> object:
    return body


def _raise(error: Exception) -> None:
    raise error


def _held_in_thread(function: Callable[..., Any], gate: str, what: str) -> Callable[..., Any]:
    def slow(*args: Any) -> Any:
        # A small copy-up is done on the event loop, which must never wait.
        if threading.current_thread() is not threading.main_thread() and _closed(gate):
            _count(gate, what)
            while _closed(gate):
                time.sleep(_POLL)
        return function(*args)

    return slow


def _closed(gate: str) -> bool:
    return os.path.exists(gate)


def _count(gate: str, what: str) -> None:
    fd = os.open(gate + ".held", os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
    try:
        os.write(fd, f"{what}\n".encode())
    finally:
        os.close(fd)


def patch(gate: str, words: list[str]) -> None:
    """Make this process, which is about to mount, a slow one."""
    from udbad.branch import branches
    from udbad.coherence import silence
    from udbad.edge import table, waiting
    from udbad.kernel.invalidator import Invalidator
    from udbad.mount import mountproc
    from udbad.union import copyup

    mock.patch.object(waiting, "READERS", 64).start()  # whoever is held must not keep others from being so
    for word in words:
        if word == NO_EPOCHS:
            mock.patch.object(mountproc, "Invalidator", lambda tell, *_: Invalidator(tell, False)).start()
        elif word == COARSE:
            mock.patch.object(branches, "MULTIGRAIN_KERNEL", False).start()
        elif word == UNWATCHED:
            mock.patch.object(silence, "tells", return_value=False).start()
        elif word == TRANSFER:
            mock.patch.object(copyup, "transfer", _held_in_thread(copyup.transfer, gate, TRANSFER)).start()
        else:
            rows = {opcode: row for opcode, row in table.TABLE.items() if row.name == word}
            assert rows, word
            for opcode, row in rows.items():
                table.TABLE[opcode] = row._replace(operation=_held(row.operation, gate, word))
