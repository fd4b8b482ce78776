"""How long the turns of a thread on a processor are, as it asks for them (sched(7), Linux 6.12).

Who asks for short turns is not given more of a processor, but sooner (the deadlines of EEVDF, update_deadline() in
kernel/sched/fair.c): a turn is taken from who has had his, and not only at the next tick of the clock, 4 ms away.
"""

from __future__ import annotations

import ctypes
import os
import struct
from typing import Final

SHORTEST: Final = 100_000
"""Nanoseconds; the least that may be asked for."""

_SYS_SCHED_SETATTR, _SYS_SCHED_GETATTR = {
    "x86_64": (314, 315), "aarch64": (274, 275), "riscv64": (274, 275),
}.get(os.uname().machine, (None, None))  # fmt: skip
_ATTRIBUTES: Final = struct.Struct("=IIQiIQQQ")
"""struct sched_attr, the first version: size, policy, flags, nice, priority, runtime, deadline, period."""

_libc = ctypes.CDLL(None)


def take_turns(nanoseconds: int) -> None:
    """Ask for turns of this length from now on, for this thread, and the threads and processes that it makes; 0: the
    usual one. Policy and niceness stay. Does nothing before Linux 6.12, on unknown machines, for one that has another
    policy than other programs (SCHED_FIFO or SCHED_BATCH, for instance), and where it is forbidden (seccomp)."""
    had = ctypes.create_string_buffer(_ATTRIBUTES.size)
    if _SYS_SCHED_GETATTR is None or _libc.syscall(_SYS_SCHED_GETATTR, 0, had, len(had), 0):
        return
    _, policy, _, nice, *_ = _ATTRIBUTES.unpack(had.raw)
    if policy == os.SCHED_OTHER:
        wanted = _ATTRIBUTES.pack(_ATTRIBUTES.size, policy, 0, nice, 0, nanoseconds, 0, 0)
        _libc.syscall(_SYS_SCHED_SETATTR, 0, wanted, 0)
