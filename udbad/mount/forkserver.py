"""The process that mount processes are forked from: everything is imported once, so a new one is there at once.

Talks to the supervisor over stdin, a SOCK_SEQPACKET socket. A request is the format of the log, plain or json, and
carries two descriptors: a socket over which the new process gets its job and answers, and an eventfd for its keeper.
The reply carries a pidfd of that process. A number of a process alone says that it will be killed, and is sent back:
its end is not worth a word then. Ends when the supervisor does; mount processes go on, as children of init. Until then
what a mount process leaves, its keeper above all, is a child of ours. Runs no event loop and no thread: what is forked
must not be in the middle of anything.
"""

from __future__ import annotations

import gc
import logging
import os
import signal
import socket
from collections.abc import Callable

from udbad import logs
from udbad.mount.keeper import be_subreaper

log = logging.getLogger(__name__)

_forking = False
"""Whether there is a child that is not among `_children` yet."""
_children: set[int] = set()
_expected: set[int] = set()
"""Children that the supervisor is about to kill, and says why."""


def main(work: Callable[[socket.socket, int], int]) -> int:
    """Fork a process for each request; in it, `work` is called with the socket of its job, and an eventfd for the
    keeper (life.Guard). Returns an exit code."""
    global _forking
    supervisor = socket.socket(fileno=os.dup(0))
    signal.signal(signal.SIGCHLD, _reap)
    be_subreaper()  # in a container pid 1 may be a program that waits for nobody's children
    log_format = b""
    gc.collect()
    gc.freeze()  # the children share what is there now
    while True:
        request, descriptors, _, _ = socket.recv_fds(supervisor, 16, 2)
        if not request:
            return 0
        if not descriptors:
            _expected.add(int(request))
            try:
                supervisor.send(request)
            except OSError:
                return 0
            continue
        if request != log_format:
            log_format = request
            logs.set_up("info", log_format.decode())
        _forking = True
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            supervisor.close()
            os.dup2(os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC), 0)
            os.setsid()  # neither Ctrl-C nor the end of the supervisor's terminal is for a mount
            return work(socket.socket(fileno=descriptors[0]), descriptors[1])
        for fd in descriptors:
            os.close(fd)
        pidfd = os.pidfd_open(pid)  # cannot fail: nobody has waited for it yet
        try:
            socket.send_fds(supervisor, [str(pid).encode()], [pidfd])
        except OSError:
            return 0
        finally:
            os.close(pidfd)
        _children.add(pid)
        _forking = False
        _reap(0, None)


def _reap(number: int, frame: object) -> None:
    while not _forking:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if not pid:
            return
        if pid not in _children:
            continue  # what a mount process has left
        _children.discard(pid)
        if pid in _expected:
            _expected.discard(pid)
            continue
        code = os.waitstatus_to_exitcode(status)
        if code < 0:
            log.warning("process %d was killed by %s", pid, signal.Signals(-code).name)
        elif code > 0:
            log.debug("process %d ended with code %d", pid, code)  # it has said why, and so does the supervisor
