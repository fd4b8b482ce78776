"""The end of a mount process, as the process that it was forked from sees it (mount/forkserver.py)."""

from __future__ import annotations

import os

import pytest

from udbad.mount import forkserver


def test_another_end_is_told_of_while_one_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python calls the handler of SIGCHLD between any two steps of itself."""
    waitpid = os.waitpid
    pids = [os.posix_spawn("/bin/true", ["true"], os.environ) for _ in range(2)]
    for pid in pids:
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    monkeypatch.setattr(forkserver, "_children", set(pids))

    def of_ours(pid: int, options: int) -> tuple[int, int]:
        """No other child of this process."""
        assert pid == -1
        if not pids:
            raise ChildProcessError
        return waitpid(pids.pop(), options)

    def interrupted(pid: int, options: int) -> tuple[int, int]:
        monkeypatch.setattr(os, "waitpid", of_ours)
        forkserver._reap(0, None)
        return of_ours(pid, options)

    monkeypatch.setattr(os, "waitpid", interrupted)
    forkserver._reap(0, None)
    assert forkserver._children == set()
