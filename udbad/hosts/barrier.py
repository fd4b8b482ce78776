"""`udbad flush --all-hosts`: both ends of the question whether a mount has heard everything up to now.

A subscriber answers it on a socket of its own. Where that is, it tells the mount with each lease; so that of one which
was killed is still known there, and asked in vain: a branch that nobody answers for is never passed over.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import json
import os
import socket
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final

from udbad.control import private, protocol
from udbad.control.protocol import Message, number_of
from udbad.control.server import Command
from udbad.errors import ExitCode, UserError
from udbad.hosts.subscriber import Subscriber

_BESIDE: Final = 2.0
"""Seconds that a subscriber has for its answer, beyond those that it waits for publishers."""

_ENDING: Final = 5.0
"""Seconds that the process before this one has to end."""
_PAUSE: Final = 0.05


def socket_path(run_dir: str, mount: str, branches: Mapping[str, str]) -> str:
    """The same each time, so that nothing is left of those that were killed. branches: paths by their names."""
    which = json.dumps([mount, sorted(branches.items())]).encode()
    return os.path.join(run_dir, f"hosts-{hashlib.blake2b(which, digest_size=8).hexdigest()}.sock")


def listen(path: str) -> socket.socket:
    """Raises UserError: another process subscribes to the same, and does not end; or no socket can be made there."""
    end = time.monotonic() + _ENDING
    while True:
        try:
            with private.directory(os.path.dirname(path), make=True):
                return protocol.bind(path)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or time.monotonic() > end:
                raise UserError(f"{path}: {error.strerror or error}", ExitCode.FAILURE) from None
        time.sleep(_PAUSE)


def commands(subscribers: Sequence[Subscriber]) -> dict[str, Command]:
    """What is answered there."""

    async def catch_up(request: Message) -> dict[str, Any]:
        """Who has not told everything after "seconds": publishers by the name of the branch, "behind"."""
        seconds = number_of(request, "seconds")
        behind = await asyncio.gather(*(one.catch_up(seconds) for one in subscribers))
        return {"behind": {one.branch: names for one, names in zip(subscribers, behind, strict=True) if names}}

    return {"catch_up": catch_up}


def ask(sockets: Mapping[str, str], seconds: float) -> list[str]:
    """Have subscribers catch up, one after the other; what has not come after so long, for people.

    sockets: of the subscribers, by the path of the branch.
    """
    missing: list[str] = []
    for path in dict.fromkeys(sockets.values()):
        try:
            answer = protocol.ask(path, {"op": "catch_up", "seconds": seconds}, seconds + _BESIDE)
        except OSError:
            branches = ", ".join(branch for branch, one in sockets.items() if one == path)
            missing.append(f"{branches}: `udbad subscribe` does not answer")
            continue
        if not answer.get("ok"):
            missing.append(str(answer.get("error")))
            continue
        missing += [f"{branch}: {', '.join(names)}" for branch, names in answer["behind"].items()]
    return missing
