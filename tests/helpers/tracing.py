"""Stops a thread of another process at its system calls, ptrace(2), to kill it between two of them.

x86_64 and aarch64 have other numbers for them, so calls are told apart by the names of `CALLS`. All of it is to be
called by one thread.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import signal
import struct
from collections.abc import Callable
from typing import Final

_libc: Final = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
_libc.ptrace.restype = ctypes.c_long
# linux/ptrace.h
_SYSCALL, _DETACH, _SEIZE, _INTERRUPT, _GET_SYSCALL_INFO = 24, 17, 0x4206, 0x4207, 0x420E
_O_TRACESYSGOOD: Final = 1
_WALL: Final = 0x40000000  # linux/wait.h
_ENTRY, _EXIT = 1, 2
_INFO: Final = struct.Struct("=B3xIQQQ6Q")
"""struct ptrace_syscall_info: op, arch, instruction and stack pointer; of an entry its number and arguments."""

_X86_64: Final = {
    "write": 1, "pwrite64": 18, "writev": 20, "sendfile": 40, "ftruncate": 77, "fchmod": 91, "fchown": 93,
    "setxattr": 188, "lsetxattr": 189, "fsetxattr": 190, "removexattr": 197, "lremovexattr": 198, "fremovexattr": 199,
    "openat": 257, "mkdirat": 258, "mknodat": 259, "fchownat": 260, "unlinkat": 263, "renameat": 264, "linkat": 265,
    "symlinkat": 266, "fchmodat": 268, "utimensat": 280, "fallocate": 285, "pwritev": 296, "renameat2": 316,
    "copy_file_range": 326, "pwritev2": 328,
}  # fmt: skip
_AARCH64: Final = {
    "setxattr": 5, "lsetxattr": 6, "fsetxattr": 7, "removexattr": 14, "lremovexattr": 15, "fremovexattr": 16,
    "mknodat": 33, "mkdirat": 34, "unlinkat": 35, "symlinkat": 36, "linkat": 37, "renameat": 38, "ftruncate": 46,
    "fallocate": 47, "fchmod": 52, "fchmodat": 53, "fchownat": 54, "fchown": 55, "openat": 56, "write": 64,
    "writev": 66, "pwrite64": 68, "pwritev": 70, "sendfile": 71, "utimensat": 88, "renameat2": 276,
    "copy_file_range": 285, "pwritev2": 287,
}  # fmt: skip
CALLS: Final = {number: name for name, number in (_AARCH64 if platform.machine() == "aarch64" else _X86_64).items()}
"""Those that may change something; openat(2) when it makes or truncates a file."""
_MAKING: Final = os.O_CREAT | os.O_TRUNC | (os.O_TMPFILE & ~os.O_DIRECTORY)


class Traced:
    """A thread that stands still at each of CALLS, before and after it."""

    def __init__(self, thread: int) -> None:
        """Raises OSError."""
        self._thread = thread
        self._is_entry = True
        self._call = ""
        self._ptrace(_SEIZE, _O_TRACESYSGOOD)
        self._ptrace(_INTERRUPT)
        os.waitpid(thread, _WALL)
        self._stopped = True

    def _ptrace(self, request: int, data: int = 0) -> None:
        if _libc.ptrace(request, self._thread, None, data) < 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))

    def next(self, over: Callable[[], bool]) -> str | None:
        """Go on until the next stop: which that is; None when there was none until `over`, which may wait a little."""
        while True:
            self._ptrace(_SYSCALL)
            self._stopped = False
            while True:
                pid, status = os.waitpid(self._thread, _WALL | os.WNOHANG)
                if pid:
                    break
                if over():
                    return None
            self._stopped = True
            assert os.WIFSTOPPED(status), "the thread has ended by itself"
            if os.WSTOPSIG(status) != signal.SIGTRAP | 0x80:
                continue  # no signals are sent to it but the tracer's own
            where = self._where()
            if where is not None:
                return where

    def _where(self) -> str | None:
        info = ctypes.create_string_buffer(_INFO.size)
        if _libc.ptrace(_GET_SYSCALL_INFO, self._thread, ctypes.c_void_p(_INFO.size), ctypes.addressof(info)) < 0:
            raise OSError(ctypes.get_errno(), "PTRACE_GET_SYSCALL_INFO")
        op, _, _, _, number, *arguments = _INFO.unpack(info.raw)
        if op == _ENTRY:
            name = CALLS.get(number, "")
            self._call = "" if name == "openat" and not arguments[2] & _MAKING else name
            return f"before {self._call}" if self._call else None
        return f"after {self._call}" if self._call else None

    def kill(self) -> None:
        """End its process where it stands."""
        os.kill(self._thread, signal.SIGKILL)
        os.waitpid(self._thread, _WALL)  # its parent is told after us

    def release(self) -> None:
        """Let it go on by itself."""
        if not self._stopped:
            try:
                self._ptrace(_INTERRUPT)
            except OSError as error:
                if error.errno != errno.ESRCH:
                    raise
                return
            os.waitpid(self._thread, _WALL)
        self._ptrace(_DETACH)
