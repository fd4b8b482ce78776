"""Having a mount that was made by hand go on in this version, without anybody who uses it noticing.

Asked for by `udbad restart`, which is of the new version: it can tell whether it reads what the mount process knows
before anything is changed. The guardian becomes one of this version, and makes the next mount process (guardian.py).
"""

from __future__ import annotations

import os
import time
from typing import Final

from udbad.control import client, registry
from udbad.errors import ExitCode, UserError
from udbad.inodes.record import READ
from udbad.mount import handover
from udbad.ourselves import COMMAND, environment

_LOOK_SECONDS: Final = 0.02


def renew(entry: registry.Entry) -> None:
    """Return when another process serves. Raises UserError; then the one before goes on, if it can."""
    if not entry.keeper:
        raise UserError(f"{entry.label} ends with its process: umount, and mount it again", ExitCode.FAILURE)
    client.ask_mount(entry, {"op": "write-state", "reads": sorted(READ)})
    try:
        handover.look([(entry.keeper, entry.record)], os.fsencode(entry.mount_point))
    except OSError as error:
        raise UserError(f"{entry.label}: {error.strerror or error}", ExitCode.FAILURE) from None
    client.ask_mount(entry, {"op": "renew", "command": list(COMMAND), "path": environment()["PYTHONPATH"]})
    end = time.monotonic() + client.SECONDS
    while True:
        now = registry.read(entry.directory)
        if now is not None and now.pid != entry.pid:
            return
        if time.monotonic() > end:
            raise UserError(f"{entry.label}: no other process serves it after {client.SECONDS:g} s", ExitCode.FAILURE)
        time.sleep(_LOOK_SECONDS)
