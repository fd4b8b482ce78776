"""What a forked mount process does: get its job, mount, say so, serve. Imports what a mount needs, once."""

from __future__ import annotations

import json
import logging
import os
import socket
from pathlib import Path
from typing import Any

from udbad import logs
from udbad.edge import portable  # noqa: F401  # MountProcess imports it for some mounts only
from udbad.errors import UserError
from udbad.mount import forkserver, later, mountproc
from udbad.settings.options import parse_mount_options

log = logging.getLogger(__name__)


def main() -> int:
    """The exit code of the fork server, and of every mount process forked from it."""
    later.load()
    return forkserver.main(work)


def work(supervisor: socket.socket) -> int:
    """Serve one mount. A line of JSON comes in, the job; a line goes out when the mount serves or cannot."""
    with supervisor.makefile("rb") as stream:
        line = stream.readline()
    if not line.endswith(b"\n"):
        return 0  # whoever wanted the mount is gone
    job = json.loads(line)
    logs.set_up(job["log_level"], job["log_format"], job["label"])
    _show_name(job["label"])

    def ready(process: mountproc.MountProcess) -> None:
        control = process.control_path or None
        place = os.fsdecode(process.mount_point)
        words = {"ready": True, "connection": process.session.connection, "control": control, "mount_point": place}
        _answer(supervisor, words)

    try:
        mountproc.run(
            parse_mount_options(job["options"]),
            os.fsencode(job["mount_point"]),
            ready,
            mountproc.Identity(job["name"], job["run_dir"], supervised=True),
            job["configured"],
        )
    except UserError as error:
        if supervisor.fileno() < 0:  # it has its answer: this is the end of a mount that has served
            log.error("%s", error.message)
            return int(error.code)
        _answer(supervisor, {"ready": False, "error": error.message, "code": int(error.code)})
        return int(error.code)
    except Exception as error:
        _answer(supervisor, {"ready": False, "error": f"{type(error).__name__}: {error}", "code": 1})
        raise
    return 0


def _answer(supervisor: socket.socket, words: dict[str, Any]) -> None:
    """Tell the supervisor, once; it may have died meanwhile, which is no reason not to serve."""
    try:
        supervisor.sendall(json.dumps(words).encode() + b"\n")
    except OSError:
        pass
    finally:
        supervisor.close()


def _show_name(label: str) -> None:
    """What ps shows as the command, proc(5): at most 15 bytes."""
    Path("/proc/self/comm").write_bytes(b"udbad " + os.fsencode(label)[-9:])
