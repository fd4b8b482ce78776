"""What a forked mount process does: get its job, mount, say so, serve. Imports what a mount needs, once."""

from __future__ import annotations

import json
import logging
import os
import socket
from contextlib import suppress
from pathlib import Path
from typing import Any

from udbad import logs
from udbad.edge import portable  # noqa: F401  # MountProcess imports it for some mounts only
from udbad.errors import ExitCode, UserError
from udbad.mount import forkserver, handover, keeper, later, life
from udbad.mount.mountproc import MountProcess
from udbad.mount.presence import Identity
from udbad.settings.options import parse_mount_options

log = logging.getLogger(__name__)


def main() -> int:
    """The exit code of the fork server, and of every mount process forked from it."""
    later.load()
    return forkserver.main(work)


def work(supervisor: socket.socket, ended: int) -> int:
    """Serve one mount. A line of JSON comes in, the job; lines go out: what will be left of this process (keeper.Left),
    where another could go on, and at last that the mount serves or cannot. ended: as in life.Guard."""
    with supervisor.makefile("rb") as stream:
        line = stream.readline()
    if not line.endswith(b"\n"):
        return 0  # whoever wanted the mount is gone
    job = json.loads(line)
    logs.set_up(job["log_level"], job["log_format"], job["label"])
    _show_name(job["label"])

    def told(left: keeper.Left) -> None:
        with suppress(OSError):
            supervisor.sendall(json.dumps({"keeper": left[0], "record": left[1]}).encode() + b"\n")

    def ready(process: MountProcess) -> None:
        control = process.presence.control_path or None
        place = os.fsdecode(process.mount_point)
        words = {"ready": True, "connection": process.session.connection, "control": control, "mount_point": place}
        _answer(supervisor, words)

    if job.get("look"):
        _answer(supervisor, _look(job))
        return 0
    try:
        life.run(
            parse_mount_options(job["options"]),
            os.fsencode(job["mount_point"]),
            ready,
            Identity(job["name"], job["run_dir"], supervised=True),
            job["configured"],
            life.Guard(told, [(pid, record) for pid, record in job["left"]], job["died"], ended),
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


def _look(job: dict[str, Any]) -> dict[str, Any]:
    try:
        handover.look([(pid, record) for pid, record in job["left"]], os.fsencode(job["mount_point"]))
    except (OSError, UserError) as error:
        return {"ready": False, "error": str(error) or "nothing is left", "code": int(ExitCode.FAILURE)}
    return {"ready": True}


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
