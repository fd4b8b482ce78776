"""What the kernel says of the turns of a thread on its processor: sched_getattr(2)."""

from __future__ import annotations

import ctypes
import os
from typing import Final

from udbad.kernel.scheduling import _ATTRIBUTES, _SYS_SCHED_GETATTR

CAN_BE_ASKED_FOR: Final = (
    _SYS_SCHED_GETATTR is not None and tuple(map(int, os.uname().release.split(".")[:2])) >= (6, 12)
)  # fmt: skip


def turns(thread: int = 0) -> tuple[int, int, int]:
    """Policy, niceness and turns (ns) of a thread, 0: the calling one."""
    had = ctypes.create_string_buffer(_ATTRIBUTES.size)
    assert not ctypes.CDLL(None).syscall(_SYS_SCHED_GETATTR, thread, had, len(had), 0)
    _, policy, _, nice, _, runtime, _, _ = _ATTRIBUTES.unpack(had.raw)
    return policy, nice, runtime
