"""A branch to come that does not answer holds up the change alone: the mount serves on."""

from __future__ import annotations

import signal
import threading
from pathlib import Path

import pytest

from tests.helpers.mount import UnionFactory
from tests.t5_daemon.daemon import until

pytestmark = pytest.mark.fuse


def test_a_branch_that_hangs(union: UnionFactory) -> None:
    """Its directory is on a FUSE file system whose process is stopped, so that looking it up waits."""
    mount = union()
    other = union({"other": "rw"}, mount_point="other.mnt")
    (other["other"] / "sub").mkdir()
    answers: list[dict[str, object]] = []

    def add() -> None:
        answers.append(mount.control({"op": "branches", "edits": [["append", f"{other.path}/sub=ro"]]}))

    adding = threading.Thread(target=add)
    other.process.send_signal(signal.SIGSTOP)
    try:
        adding.start()
        pid = mount.process.pid
        until(lambda: _waits_in_a_thread(pid), "a thread of the mount waits for the branch")
        assert mount.control({"op": "ping"})["ok"]
        (mount.path / "file").write_text("served")
        assert (mount["top"] / "file").read_text() == "served"
        mount.flush()
        assert not answers
    finally:
        other.process.send_signal(signal.SIGCONT)
        adding.join()
    assert [answer["ok"] for answer in answers] == [False]
    assert "is in a udbad mount itself" in str(answers[0]["error"])


def _waits_in_a_thread(pid: int) -> bool:
    """Whether a thread beside the first one waits for an answer over FUSE, proc_pid_wchan(5)."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return any((task / "wchan").read_text() == "request_wait_answer" for task in tasks if task.name != str(pid))
