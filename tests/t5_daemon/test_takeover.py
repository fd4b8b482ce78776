"""Mount processes that are killed at a certain step: what is counted of it, and what is left."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.mount import Mount, UnionFactory
from tests.t5_daemon.daemon import Daemon, until
from tests.t5_daemon.test_survive import TAKEN_OVER, kill
from udbad.mount import keeper

pytestmark = [
    pytest.mark.fuse,
    pytest.mark.skipif(keeper.why_not() is not None, reason=str(keeper.why_not())),
]

DIES = """
import os, signal
from udbad.branch import syscalls
from udbad.edge import native
from udbad.mount import keeper
from udbad.mount.mountproc import MountProcess
from udbad.union import create

made = []

def dies(where):
    try:
        os.rmdir(os.path.join(OUTSIDE, where))
    except FileNotFoundError:
        return
    os.kill(os.getpid(), signal.SIGKILL)

def mkdir(sb, creds, parent, name, *rest, make=create.mkdir):
    if name == b"not noted":
        dies("not noted")
    return make(sb, creds, parent, name, *rest)

def mkdir_at(dirfd, name, *rest, make=syscalls.mkdir_at):
    if name == b"not done":
        dies("not done")
    make(dirfd, name, *rest)
    if name == b"not recorded":
        dies("not recorded")
    made.append(name)

def answer(*arguments, send=native.answer):
    if made and made.pop() == b"not answered":
        dies("not answered")
    return send(*arguments)

def keep(*arguments, make=keeper.Keeper):
    made = make(*arguments)
    dies("not announced")
    return made

def take_over(self, predecessor, take=MountProcess._take_over):
    dies("not taken over")
    take(self, predecessor)

create.mkdir, syscalls.mkdir_at, native.answer, MountProcess._take_over = mkdir, mkdir_at, answer, take_over
keeper.Keeper = keep
"""
"""At the places that directories in OUTSIDE say, once each."""


@pytest.fixture
def dying(union: UnionFactory, patch_daemon: Callable[[str], None], tmp_path: Path) -> Mount:
    (tmp_path / "outside").mkdir()
    patch_daemon(f"OUTSIDE = {os.fspath(tmp_path / 'outside')!r}\n" + DIES)
    return union(options="survive=on,restart_timeout=0", allow_log=TAKEN_OVER)


def test_what_is_counted(dying: Mount, tmp_path: Path) -> None:
    """Of requests that are sent again, one is performed as if it came first, two are decided by what is on the branch,
    and one has an answer."""
    for number, name in enumerate(("not noted", "not done", "not recorded", "not answered"), 1):
        (tmp_path / "outside" / name).mkdir()
        os.mkdir(dying.path / name)
        numbers = dying.control({"op": "metrics"})["metrics"]
        assert numbers["udbad_requests_resent_total"] == [[[], number]]
        assert sorted(numbers["udbad_requests_recovered_total"]) == [
            [["answered"], max(number - 3, 0)], [["decided"], min(number - 1, 2)],
        ]  # fmt: skip
        assert numbers["udbad_requests_refused_total"] == [[[], 0]]
        *buckets, seconds = numbers["udbad_takeover_duration_seconds"][0][1]
        assert sum(buckets) == dying.control({"op": "status"})["restarts"] == number
        assert seconds > 0
    assert not os.listdir(tmp_path / "outside")
    assert len(os.listdir(dying.path)) == 4


@pytest.mark.parametrize("place", ["not taken over", "not announced"])
def test_nothing_is_left_of_those_before(dying: Mount, tmp_path: Path, place: str) -> None:
    """One that is killed when it has said what the mount is, but not yet ended the keeper before its own; and one whose
    own nobody has heard of. Without `restart_timeout` they would wait for ever."""

    def keepers() -> int:
        children = Path(f"/proc/{dying.process.pid}/task/{dying.process.pid}/children").read_text().split()
        return sum(Path(f"/proc/{pid}/comm").read_text().rstrip("\n") == keeper.NAME for pid in children)

    (tmp_path / "outside" / place).mkdir()
    kill(dying)
    os.mkdir(dying.path / "made")
    restarts = {"not taken over": 2, "not announced": 1}[place]  # which is known by what the one before has said
    assert dying.control({"op": "status"})["restarts"] == restarts
    assert not os.listdir(tmp_path / "outside")
    until(lambda: not keepers(), "the end of the keepers before")  # that of now is a child of its mount process


def test_the_delay_of_restarts_is_not_for_takeovers(daemon: Daemon, tmp_path: Path) -> None:
    """One that is killed before it has taken over, of a daemon that waits before it starts a mount again: users of this
    one wait as well, no longer than `restart_timeout`."""
    (tmp_path / "outside/not taken over").mkdir(parents=True)
    daemon.patch = f"OUTSIDE = {os.fspath(tmp_path / 'outside')!r}\n" + DIES
    daemon.settings |= {"restart_delay": 60, "restart_delay_max": 60}
    point = daemon.add("used", survive=True)
    daemon.start()
    pid = daemon.state("used")["pid"]
    os.kill(pid, signal.SIGKILL)
    (point / "made").mkdir()
    assert not os.listdir(tmp_path / "outside")
    assert daemon.state("used")["pid"] != pid
    daemon.stop()


def test_only_the_first_attempts_follow_at_once() -> None:
    assert [keeper.retry_delay(failed) for failed in range(1, 12)] == [
        0, 0, 0, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0
    ]  # fmt: skip
    assert keeper.retry_delay(10**6) == 5.0


PREPARES = """
import os
from udbad.mount import held, later

later.PATIENCE_SECONDS = 1e6

def fill(self, fill=held.Held.fill):
    yield from fill(self)
    os.mkdir(os.path.join(OUTSIDE, str(os.getpid())))

held.Held.fill = fill
"""


def test_whoever_has_made_a_second_process_prepares_for_the_third(
    union: UnionFactory, patch_daemon: Callable[[str], None], tmp_path: Path
) -> None:
    """And not only when nothing has happened for a while: kills may follow one another."""
    outside = tmp_path / "outside"
    outside.mkdir()
    patch_daemon(f"OUTSIDE = {os.fspath(outside)!r}\n" + PREPARES)
    mount = union(options="survive=on", allow_log=TAKEN_OVER)
    mount.control({"op": "status"})
    assert not os.listdir(outside)
    kill(mount)
    until(lambda: os.listdir(outside), "the guardian has all that is imported")
    assert os.listdir(outside) == [str(mount.process.pid)]
