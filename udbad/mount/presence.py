"""How others find a mount: by its mount point, which it claims, its directory under the run directory, its socket."""

from __future__ import annotations

import errno
import logging
import os
from contextlib import suppress
from typing import TYPE_CHECKING, Final, NamedTuple

from udbad.control import registry
from udbad.control.protocol import ask, bind, go_on
from udbad.errors import ExitCode, UserError
from udbad.kernel.mounts import lying
from udbad.mount import handover, kernelside
from udbad.mount.handover import Predecessor

if TYPE_CHECKING:
    import socket

log = logging.getLogger(__name__)


class Identity(NamedTuple):
    """Who a mount process is to others.

    name: of the mount in the configuration. run_dir: where to be found (registry.py), None: nowhere.
    supervised: somebody restarts this mount; then a union that lies on the mount point is a dead one.
    """

    name: str = ""
    run_dir: str | None = None
    supervised: bool = False


NOBODY: Final = Identity()


class Presence:
    """registration: the directory of the mount, once it has one. control_path: of the socket that is served, "": none
    is; control_fd: its descriptor, -1."""

    def __init__(self, mount_point: bytes, identity: Identity, control: str | None) -> None:
        """mount_point: from registry.real_mount_point(). control: path of the socket; None: in the directory."""
        self.registration: registry.Registration | None = None
        self.control_path = ""
        self.control_fd = -1
        self._mount_point = mount_point
        self._identity = identity
        self._asked_control = control
        self._claim: registry.Claim | None = None

    def claim(self) -> int:
        """Keep others from mounting here until they can see that we serve; returns how many dead unions lie there.

        Raises UserError: a living union does, or another process is mounting, or what is no union lies over dead ones,
        which is nobody's to take away.
        """
        if self._identity.run_dir is None:
            return 0
        try:
            self._claim = registry.Claim(self._identity.run_dir, self._mount_point)
        except OSError as error:
            if error.errno == errno.EBUSY:
                text = f"another process is mounting on {os.fsdecode(self._mount_point)}"
                raise UserError(text, ExitCode.MOUNT_POINT) from None
            # No room in the run directory is no reason not to mount; _register says so.
        return self._dead_mounts(self._identity.run_dir)

    def _dead_mounts(self, run_dir: str) -> int:
        try:
            there = lying(self._mount_point)
        except OSError as error:
            raise UserError(f"{os.fsdecode(self._mount_point)}: {error.strerror}", ExitCode.MOUNT_POINT) from None
        if not there:
            return 0
        entry = registry.read(registry.directory(run_dir, self._mount_point))
        if entry is not None and _is_served(entry):
            raise UserError(f"{entry.mount_point} is mounted already, by process {entry.pid}", ExitCode.MOUNT_POINT)
        known = entry is not None and entry.connection == there[0].connection
        return len(there) if known or self._identity.supervised else 0

    def release_claim(self) -> None:
        """Others can see now that we serve."""
        if self._claim is not None:
            self._claim.release()

    def listen(self, predecessor: Predecessor | None) -> socket.socket | None:
        """Have a place where to be found, and listen there; go on with what `predecessor` listened on.

        Returns None without a control socket. Raises UserError when one was asked for that cannot be had.
        """
        path = self._register(alone=predecessor is not None)
        if path is None:
            return None
        try:
            taken = -1 if predecessor is None else handover.control(predecessor, path)
            listener = bind(path) if taken < 0 else go_on(taken)
            self.control_path = path
            self.control_fd = listener.fileno()
            return listener
        except OSError as error:
            if self._asked_control:
                raise UserError(f"control socket {path}: {error.strerror}", ExitCode.FAILURE) from error
            log.warning("no control socket, %s: %s", path, error.strerror)
            return None

    def _register(self, alone: bool) -> str | None:
        """Returns the path of the control socket. Without room for the mount's directory the mount still serves.
        alone: somebody waits for us, and what other mounts have left has time."""
        if self._identity.run_dir is None:
            return self._asked_control
        try:
            if not alone:
                registry.sweep(self._identity.run_dir, kernelside.unions())
            self.registration = registry.Registration(self._identity.run_dir, self._mount_point)
        except OSError as error:
            log.warning("not registered in %s: %s", self._identity.run_dir, error.strerror)
        if self._asked_control:
            return self._asked_control
        return None if self.registration is None else os.path.join(self.registration.path, "control")

    def leave(self) -> None:
        """As the end of the process would: what others can read stays, for the next process."""
        self.control_path = ""
        if self.registration is not None:
            self.registration.release()
            self.registration = None

    def close(self) -> None:
        """The mount has ended in order, or never began: nothing of it is left to be found."""
        if self._claim is not None:
            self._claim.withdraw()
        try:
            if self.registration is not None:
                self.registration.remove()
            if self._asked_control and self.control_path == self._asked_control:
                with suppress(FileNotFoundError):  # our predecessor was killed while it ended in order
                    os.unlink(self._asked_control)
        except OSError as error:
            log.warning("cannot remove the control socket: %s", error)


def _is_served(entry: registry.Entry) -> bool:
    """Whether the process of an entry is there; one that does not answer is."""
    try:
        ask(entry.control, {"op": "ping"}, timeout=10.0)
    except TimeoutError:
        return True
    except OSError:
        return False
    return True
