"""Which system calls something makes, as the kernel sees them: strace(1), attached to this process or another one."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

_DEADLINE: Final = 30.0
_TRACE: Final = "trace=!futex,mmap,munmap,brk,madvise"
_CALL: Final = re.compile(r"^(?:\d+ +)?(\w+)\(", re.MULTILINE)


@contextmanager
def counted(pid: int | None = None) -> Iterator[Counter[str]]:
    """How often each system call was made meanwhile by a process (None: this thread), filled at the end.

    As few other things as possible should happen meanwhile; what the interpreter does for itself (memory, locks) is
    left out.
    """
    calls: Counter[str] = Counter()
    with tempfile.NamedTemporaryFile("r", prefix="udbad-strace-") as trace:
        whom = ["-f", "-p", str(pid)] if pid is not None else ["-p", str(threading.get_native_id())]
        strace = subprocess.Popen(
            ["strace", *whom, "-e", _TRACE, "-o", trace.name],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert strace.stderr is not None
        line = strace.stderr.readline()
        assert "attached" in line, line
        marks = 0
        try:
            if pid is None:
                os.getpgid(0)  # what is before it, reading the line above, is not the caller's
            yield calls
        finally:
            if pid is None:
                os.getpgid(0)
            strace.send_signal(signal.SIGINT)
            strace.communicate(timeout=_DEADLINE)
        for name in _CALL.findall(trace.read()):
            if pid is None and name == "getpgid":
                marks += 1
            elif pid is not None or marks == 1:
                calls[name] += 1
