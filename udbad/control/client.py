"""Asking the supervisor and the mount processes; for commands. Paths are resolved outside of mounts only."""

from __future__ import annotations

import os

from udbad.control import registry
from udbad.control.protocol import Message, ask
from udbad.control.registry import Entry
from udbad.errors import ExitCode, UserError

SECONDS = 60.0
"""For an answer to a command; unmounting and changing branches take a while."""


class NoAnswer(UserError):
    """Somebody is there and does not answer."""


def _checked(answer: Message) -> Message:
    if answer.get("ok"):
        return answer
    try:
        code = ExitCode(answer.get("code", ExitCode.FAILURE))
    except ValueError:  # of a newer version
        code = ExitCode.FAILURE
    raise UserError(str(answer.get("error")), code)


def ask_supervisor(run_dir: str, request: Message, timeout: float = SECONDS) -> Message:
    """Raises UserError: NO_DAEMON when there is none; what the supervisor refuses."""
    path = os.path.join(run_dir, registry.SOCKET_NAME)
    try:
        return _checked(ask(path, request, timeout))
    except (FileNotFoundError, ConnectionRefusedError):
        raise UserError(f"no daemon runs here ({path})", ExitCode.NO_DAEMON) from None
    except TimeoutError:
        raise UserError(f"the daemon has not answered for {timeout:g} s", ExitCode.NO_DAEMON) from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}", ExitCode.NO_DAEMON) from None


def ask_mount(entry: Entry, request: Message, timeout: float = SECONDS) -> Message:
    """Raises UserError: NO_DAEMON when the mount process is gone or silent (then NoAnswer); what it refuses."""
    try:
        return _checked(ask(entry.control, request, timeout))
    except TimeoutError:
        text = f"{entry.label}: process {entry.pid} has not answered for {timeout:g} s"
        raise NoAnswer(text, ExitCode.NO_DAEMON) from None
    except OSError as error:
        text = f"{entry.label}: {entry.control}: {error.strerror or error}"
        raise UserError(text, ExitCode.NO_DAEMON) from None


def locate(run_dir: str, where: str) -> tuple[Entry, str]:
    """The mount that a path is in (or of this name or si_<id>), and the path inside it. Raises UserError."""
    found = registry.find(run_dir, where)
    if found is None:
        known = ", ".join(entry.label for entry in registry.entries(run_dir))
        raise UserError(f"{where} is in no union{f'; there are {known}' if known else ''}", ExitCode.NOT_MOUNTED)
    return found
