"""A mount process that waits for its job: how the supervisor starts mounts.

Everything is imported first, so that a process kept ready takes over a dead mount within milliseconds.
Then one line of JSON comes on stdin, the job; one line goes out on stdout when the mount serves, or
when it cannot. End of file instead of a job: the supervisor is gone, and so are we.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from udbad.config import parse_mount_options
from udbad.daemon import logs, mountproc
from udbad.errors import UserError


def main() -> int:
    """Serve one mount; the exit code of the process."""
    line = sys.stdin.buffer.readline()
    if not line.endswith(b"\n"):
        return 0
    job = json.loads(line)
    logs.set_up(job["log_level"], job["log_format"], job["label"])
    _show_name(job["label"])
    try:
        mountproc.run(
            parse_mount_options(job["options"]),
            os.fsencode(job["mount_point"]),
            lambda process: _answer(
                {"ready": True, "connection": process.session.connection, "control": process.control_path or None}
            ),
            mountproc.Identity(job["name"], job["run_dir"], supervised=True),
            job["configured"],
        )
    except UserError as error:
        _answer({"ready": False, "error": error.message, "code": int(error.code)})
        return int(error.code)
    except Exception as error:
        _answer({"ready": False, "error": f"{type(error).__name__}: {error}", "code": 1})
        raise
    return 0


def _answer(words: dict[str, Any]) -> None:
    """Tell the supervisor; it may have died meanwhile, which is no reason not to serve."""
    try:
        os.write(sys.stdout.fileno(), json.dumps(words).encode() + b"\n")
    except OSError:
        return


def _show_name(label: str) -> None:
    """What ps shows as the command, proc(5): at most 15 bytes."""
    Path("/proc/self/comm").write_bytes(b"udbad " + os.fsencode(label)[-9:])
