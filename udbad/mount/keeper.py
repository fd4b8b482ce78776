"""The keeper: what a mount process has open outlives it.

A process that shares the descriptor table of the mount process (clone(2), CLONE_FILES), made before that has its first
thread. Whatever is opened later, the keeper has, too, and a SIGKILL closes nothing: /dev/fuse, so that the kernel lets
callers wait; files that were deleted, the locks of branches, the record of what is known. The next mount process takes
descriptors out of it by their numbers (pidfd_getfd(2)), makes a keeper of its own and ends this one, whose table then
has what nobody took.

A keeper never executes a program, which would give it a table of its own, and does nothing but wait and look whether
its mount process waits for a branch. It ends by itself
when its mount process has ended and nobody has taken over for `restart_timeout`: with the last descriptor of /dev/fuse
the connection is aborted, and who waits gets ENOTCONN.
"""

from __future__ import annotations

import ctypes
import errno
import gc
import mmap
import os
import re
import select
import signal
import time
from contextlib import suppress
from typing import Final, NoReturn, Protocol

_libc: Final = ctypes.CDLL(None, use_errno=True)
# The same numbers everywhere (arch/*/kernel/syscalls/syscall.tbl, scripts/syscall.tbl).
_SYS_CLONE3: Final = 435
_SYS_PIDFD_GETFD: Final = 438
_CLONE_FILES: Final = 0x400
_PR_SET_PDEATHSIG: Final = 1
_PR_SET_DUMPABLE: Final = 4
_PR_SET_NAME: Final = 15
_PR_GET_NAME: Final = 16
_NAME_SIZE: Final = 16
_PR_SET_CHILD_SUBREAPER: Final = 36
_PR_SET_PTRACER: Final = 0x59616D61  # linux/prctl.h
_ANY_PROCESS: Final = ctypes.c_ulong(-1)
_LEAST_KERNEL: Final = (6, 9, 4)
"""With FUSE_NOTIFY_RESEND (6.9), and without the fault that it had first (CVE-2024-38626)."""
END_SECONDS: Final = 5.0
"""For a keeper to end once it was killed."""
NAME: Final = "udbad keeper"
"""What ps shows, proc(5)."""

LEFT: Final = 75
"""Exit status of a mount process that has made room for another one."""

_AT_ONCE: Final = 3
_FIRST_DELAY: Final = 0.1
_LONGEST_DELAY: Final = 5.0

Left = tuple[int, int]
"""What a mount process leaves: the number of its keeper, and that of the record's descriptor there."""


def why_not(release: str = os.uname().release) -> str | None:
    """Why this kernel cannot have a mount go on in another process; None when it can."""
    found = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", release)
    version = tuple(int(number or 0) for number in found.groups()) if found else (0, 0, 0)
    return None if version >= _LEAST_KERNEL else f"Linux {release} cannot send requests again, 6.9.4 can"


def retry_delay(failed: int) -> float:
    """Seconds before another process tries to take a mount over, after so many in a row could not. The first ones do
    at once, as users of the mount wait, and whoever has killed the process before may have killed them, too."""
    return min(_FIRST_DELAY * 2.0 ** min(failed - _AT_ONCE - 1, 30), _LONGEST_DELAY) if failed > _AT_ONCE else 0.0


class Watcher(Protocol):
    """What a keeper does while its mount process lives (mount/watchdog.py)."""

    pause: float
    """Seconds between two looks."""

    def look(self, owner: int) -> bool:
        """True when it has killed process `owner`, of which a thread may never end."""


class Keeper:
    """The keeper of this process, which is its parent."""

    def __init__(self, patience: float, ended: int = -1, watcher: Watcher | None = None) -> None:
        """patience: seconds that it waits for somebody to take over, 0: for ever. ended: an eventfd that it writes to
        when the first thread of this process has ended, or `watcher` has killed it. Precondition: this process has no
        thread yet. Raises OSError.
        """
        # A keeper that waits has nothing to do with signals: those of a terminal are for its group.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            owner = os.getpid()
            name = ctypes.create_string_buffer(_NAME_SIZE)
            _libc.prctl(_PR_GET_NAME, name, 0, 0, 0)
            _libc.prctl(_PR_SET_NAME, NAME.encode(), 0, 0, 0)  # before: `Table` looks at it
            self._known = mmap.mmap(-1, 1)
            """Shared with it: a byte that is not 0 once somebody knows it."""
            self.pid = clone()
            if self.pid == 0:
                _keep(owner, patience, ended, watcher, self._known)
            _libc.prctl(_PR_SET_NAME, name, 0, 0, 0)
            _libc.prctl(_PR_SET_PTRACER, ctypes.c_ulong(self.pid), 0, 0, 0)  # Yama: it looks what we wait for
            # A crash ends this process at once. For a core dump it would wait for its other threads first
            # (coredump_wait() in fs/coredump.c), of which one may wait for what only the next process can answer.
            _libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
            self.pidfd = os.pidfd_open(self.pid)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def is_known(self) -> None:
        """Somebody has been told of it. Before that nobody could take over, and it ends with this process."""
        self._known[0] = 1

    def end(self) -> None:
        """Before an end that is none of a crash: nobody is to take over."""
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
        with suppress(ChildProcessError):
            os.waitpid(self.pid, 0)
        os.close(self.pidfd)


def clone() -> int:
    """As fork(2) of the system, without what Python and the C library do at one, and with the same descriptors; 0 in
    the new process."""
    # struct clone_args of linux/sched.h: flags, pidfd, child_tid, parent_tid, exit_signal, stack, stack_size, tls.
    arguments = (ctypes.c_uint64 * 8)(_CLONE_FILES, 0, 0, 0, signal.SIGCHLD, 0, 0, 0)
    pid: int = _libc.syscall(_SYS_CLONE3, arguments, ctypes.c_size_t(ctypes.sizeof(arguments)))
    if pid < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return pid


def _keep(owner: int, patience: float, ended: int, watcher: Watcher | None, known: mmap.mmap) -> NoReturn:
    """Its owner has ended when its first thread has, which says so by the signal. Another one may outlive a SIGKILL:
    one that tells the kernel to forget pages waits, uninterruptibly, for those that are being read
    (fuse_reverse_inval_inode()), and only the next process answers such a READ."""
    try:
        gc.disable()
        _libc.prctl(_PR_SET_PTRACER, _ANY_PROCESS, 0, 0, 0)  # Yama: the next mount process is no ancestor
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGUSR1, 0, 0, 0)
        if os.getppid() == owner:
            _wait_for_end(owner, watcher)
        if ended >= 0:
            os.eventfd_write(ended, 1)
        if known[0] and patience:
            time.sleep(patience)
        elif known[0]:
            signal.pause()
    finally:
        os._exit(0)


def _wait_for_end(owner: int, watcher: Watcher | None) -> None:
    if watcher is None:
        signal.sigwait({signal.SIGUSR1})
        return
    while signal.sigtimedwait({signal.SIGUSR1}, watcher.pause) is None:
        if watcher.look(owner):
            return


def end_with_parent() -> None:
    """Have this process killed when the thread that made it ends, prctl(2)."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def be_subreaper() -> None:
    """Have the orphans among our descendants become our children, prctl(2)."""
    _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


class Gone(OSError):
    """There is no keeper with that number any more."""


class Table:
    """The descriptors of a keeper whose mount process has ended, or stands still."""

    def __init__(self, pid: int) -> None:
        """Raises OSError: Gone when that process is no keeper."""
        try:
            self.pidfd = os.pidfd_open(pid)
        except ProcessLookupError as error:
            raise Gone(errno.ESRCH, f"process {pid} has ended") from error
        self.pid = pid
        try:
            # After the pidfd was made: it means the process that has this name.
            with open(f"/proc/{pid}/comm", "rb") as file:
                found = file.read().rstrip(b"\n") == NAME.encode()
        except OSError:
            found = False
        if not found:
            os.close(self.pidfd)
            raise Gone(errno.ESRCH, f"process {pid} is no keeper")

    def take(self, number: int) -> int:
        """A descriptor of our own for what it has under this number. Raises OSError: EBADF when there is nothing."""
        fd: int = _libc.syscall(_SYS_PIDFD_GETFD, self.pidfd, number, 0)
        if fd < 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code), f"descriptor {number} of process {self.pid}")
        return fd

    @property
    def ended(self) -> bool:
        """Whether the keeper is gone, and its descriptors with it."""
        return self._wait(0)

    def _wait(self, seconds: float) -> bool:
        poll = select.poll()
        poll.register(self.pidfd, select.POLLIN)
        return bool(poll.poll(seconds * 1000))

    def end(self) -> None:
        """Have what nobody took closed, soon."""
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)

    def close(self) -> None:
        """Forget it."""
        os.close(self.pidfd)
        with suppress(ChildProcessError):  # an orphan that was given to us
            os.waitpid(self.pid, os.WNOHANG)

    def join(self) -> None:
        """After `end`: return when it has ended, at the latest after END_SECONDS."""
        self._wait(END_SECONDS)


class Legacy:
    """What mount processes have left of one mount, for whoever has the next one started."""

    def __init__(self) -> None:
        self._tables: list[tuple[Left, Table]] = []

    def __bool__(self) -> bool:
        """Whether there is anything to take over."""
        self.prune()
        return bool(self._tables)

    def prune(self) -> None:
        """Forget what is closed."""
        for one in self._tables[:]:
            if one[1].ended:
                one[1].close()
                self._tables.remove(one)

    def pidfds(self) -> set[int]:
        """Readable when it is time to `prune`."""
        return {table.pidfd for _, table in self._tables}

    def add(self, left: Left) -> None:
        """To be told when a process begins, while that lives: the number cannot mean another one then."""
        with suppress(Gone):
            self._tables.insert(0, (left, Table(left[0])))

    def newest_first(self) -> list[Left]:
        return [left for left, _ in self._tables]

    def end(self) -> None:
        """Nobody is to take over: all is closed, /dev/fuse too, and who waits gets ENOTCONN."""
        for _, table in self._tables:
            table.end()
        self.forget()

    def forget(self) -> None:
        """Somebody else looks after the mount."""
        for _, table in self._tables:
            table.close()
        self._tables.clear()
