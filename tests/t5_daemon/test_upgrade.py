"""A new version takes over: mounts go on in their old processes, and change over when idle or forced."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pytest

from tests.helpers.killing import Kills
from tests.helpers.mount import REPOSITORY
from tests.helpers.profile import SOAK, scaled
from tests.stress.clients import make_lower
from tests.stress.test_survive_clients import start, under_kills
from tests.t5_daemon.daemon import COMMAND, DEADLINE, Daemon, until
from udbad import __version__
from udbad.control import registry
from udbad.mount import keeper

pytestmark = pytest.mark.fuse

NEW = "99.0"
NEXT: Final = {
    "__init__.py": [(f'__version__ = "{__version__}"', f'__version__ = "{NEW}"')],
    "inodes/record.py": [
        ("\nVERSION: Final = 1\n", "\nVERSION: Final = 2\n"),
        ("READ: Final = frozenset({VERSION})", "READ: Final = frozenset({1, 2})"),
        (
            "        entry = (_ENTRY.pack(",
            '        payload = (_other(self, b"".join(payload)),)\n        entry = (_ENTRY.pack(',
        ),
        (
            "        return self._half.entries()",
            "        return ((_other(self, one), count) for one, count in self._half.entries())",
        ),
        (
            "\nclass Record:\n",
            """
def _other(record: Record, payload: bytes) -> bytes:
    return bytes(255 - byte for byte in payload) if record.version == 2 else payload


class Record:
""",
        ),
    ],
    "inodes/journal.py": [("record.quick = cjournal.Writer(table, handles, inomap)", "pass  # that writes version 1")],
}
"""A version to come, which writes each entry of the state in another way, and reads and writes both."""
SAYS_MORE: Final = {
    "__init__.py": NEXT["__init__.py"],
    "mount/handover.py": [
        (
            "        **said(branch.values(), Branch.DEFAULTS),\n",
            '        **said(branch.values(), Branch.DEFAULTS),\n        "colour": "red",\n',
        ),
        ('"needs": sorted(', '"needs": ["colour"] * any(b"needed" in one.path for one in branches.branches) + sorted('),
        ("- set(Branch.FIELDS)", '- set(Branch.FIELDS) - {"colour"}'),
        ("        **process.offline.facts(),", '        **process.offline.facts(),\n        "weather": ["fine"],'),
    ],
}
"""A version to come, which knows more of a branch, and of some that whoever serves it has to know it."""
CHANGES = int(os.environ.get("UDBAD_CHANGES", scaled("2", "100")))
"""Of the version, under load."""


def install(daemon: Daemon, directory: Path) -> None:
    """From now on what is started is the new version: sitecustomize comes before any import of ours."""
    directory.mkdir()
    (directory / "sitecustomize.py").write_text(f"import udbad\nudbad.__version__ = {NEW!r}\n")
    daemon.environment["PYTHONPATH"] = f"{directory}{os.pathsep}{REPOSITORY}"
    daemon.executed = True


def copied(tree: Path, changes: Mapping[str, Sequence[tuple[str, str]]]) -> Path:
    """Another version of udbad. changes: by file, what is replaced by what."""
    shutil.copytree(REPOSITORY / "udbad", tree / "udbad", ignore=shutil.ignore_patterns("__pycache__"))
    for name, pairs in changes.items():
        path = tree / "udbad" / name
        source = path.read_text()
        for old, new in pairs:
            assert source.count(old) == 1, old
            source = source.replace(old, new)
        path.write_text(source)
    return tree


def install_next(daemon: Daemon, tree: Path) -> None:
    """What is started is the version that lies there, another one than this."""
    daemon.environment["PYTHONPATH"] = str(tree)
    daemon.executed = True


def install_previous(daemon: Daemon) -> None:
    """This one again."""
    daemon.environment["PYTHONPATH"] = str(REPOSITORY)
    daemon.executed = True


def wait_for_version(daemon: Daemon, version: str) -> None:
    until(lambda: versions(daemon) == {"used": version}, "the other version")


def leave_mounts(daemon: Daemon) -> None:
    """The daemon goes, its mounts stay."""
    daemon.command("stop", "--keep-mounts")
    assert daemon.process is not None
    assert daemon.process.wait(DEADLINE) == 0


def versions(daemon: Daemon) -> dict[str, str]:
    return {entry.label: entry.version for entry in registry.entries(daemon.run_dir)}


@pytest.mark.parametrize("end", ["--keep-mounts", "killed"])
def test_a_new_version_takes_over(daemon: Daemon, tmp_path: Path, end: str) -> None:
    points = {name: daemon.add(name) for name in ("busy", "forced", "idle")}
    daemon.start()
    pids = {name: daemon.state(name)["pid"] for name in points}
    with (points["busy"] / "open").open("w") as file, (points["forced"] / "open").open("w") as lost:
        # The old daemon goes, its mounts stay.
        if end == "killed":
            daemon.kill()
        else:
            leave_mounts(daemon)
        install(daemon, tmp_path / "new")
        file.write("written while no daemon ran, ")
        file.flush()
        daemon.start()

        # The new one adopts them as they are, and says what is left to do.
        status = json.loads(daemon.command("status", "--json"))
        assert status["udbad"] == NEW
        assert {mount["label"]: mount["process"]["udbad"] for mount in status["mounts"]} == dict.fromkeys(
            points, __version__
        )
        assert {name: daemon.state(name)["pid"] for name in points} == pids
        for name in points:
            assert f"{name}: is served by version {__version__}; when idle: udbad restart {name}" in daemon.log()
            assert f"{name}: still served by version {__version__}; udbad restart {name}" in daemon.command("status")

        # What is idle changes over at once; what is used only by force, and then its users get errors.
        daemon.command("restart", "idle")
        daemon.wait_for("idle", not_pid=pids["idle"])
        assert "busy" in daemon.command("restart", "busy", code=1)
        assert "busy" in daemon.command("restart", "forced", code=1)
        daemon.command("restart", "--force", "forced")
        daemon.wait_for("forced", not_pid=pids["forced"])
        with pytest.raises(OSError, match=r"not connected|aborted"):
            os.fstat(lost.fileno())
        assert daemon.state("busy")["pid"] == pids["busy"]
        assert versions(daemon) == {"busy": __version__, "forced": NEW, "idle": NEW}
        file.write("and by the old process under the new daemon")
        file.flush()
        assert [line for line in daemon.command("status").splitlines() if "still served" in line] == [
            f"busy: still served by version {__version__}; udbad restart busy"
        ]

    # A crash changes over, too: what is started is the new version.
    os.kill(pids["busy"], 9)
    daemon.wait_for("busy", not_pid=pids["busy"])
    assert versions(daemon)["busy"] == NEW
    assert "still served" not in daemon.command("status")
    expected = "written while no daemon ran, and by the old process under the new daemon"
    assert (points["busy"] / "open").read_text() == expected
    daemon.stop()


def test_an_entry_of_another_version_with_more_in_it_is_not_taken_for_none(daemon: Daemon) -> None:
    """A version to come may write more into mount.json; what is known of it is enough to adopt the mount."""
    point = daemon.add("a")
    daemon.start()
    pid = daemon.state("a")["pid"]
    path = next(Path(daemon.run_dir).glob("si_*/mount.json"))
    path.write_text(json.dumps({**json.loads(path.read_text()), "new_in_99": [1]}))
    daemon.kill()
    daemon.start()
    assert daemon.state("a")["pid"] == pid
    assert os.listdir(point) == []
    daemon.stop()


@pytest.mark.skipif(keeper.why_not() is not None, reason=str(keeper.why_not()))
def test_a_mount_that_survives_changes_over_by_itself(daemon: Daemon, tmp_path: Path) -> None:
    point = daemon.add("used", survive=True)
    daemon.start()
    pid = daemon.state("used")["pid"]
    with (point / "open").open("w") as file:
        leave_mounts(daemon)
        install(daemon, tmp_path / "new")
        file.write("written while no daemon ran, ")
        file.flush()
        daemon.start()
        until(lambda: versions(daemon) == {"used": NEW}, "the new version")
        daemon.wait_for("used", not_pid=pid)
        file.write("and in a process of the new version")
    assert (point / "open").read_text() == "written while no daemon ran, and in a process of the new version"
    daemon.stop()


@pytest.mark.skipif(keeper.why_not() is not None, reason=str(keeper.why_not()))
@pytest.mark.parametrize("udba", ["notify"] if not SOAK else ["none", "reval", "notify"])
def test_there_and_back_again_under_load(daemon: Daemon, tmp_path: Path, udba: str) -> None:
    """Two checkouts: the version to come, whose state is another one, and this one; no client meets an error."""
    point = daemon.add("used", survive=True, udba=udba)
    make_lower(daemon.branch("used", "base"))
    new = copied(tmp_path / "new", NEXT)
    install_previous(daemon)
    daemon.start()
    clients = start(("appended", "renamed", "deleted", "mapped", "copied", "listed", "locked"), point)
    try:
        for number in range(CHANGES):
            assert all(client.poll() is None for client in clients.values())
            daemon.command("stop", "--keep-mounts")
            assert daemon.process is not None
            assert daemon.process.wait(DEADLINE) == 0
            if number % 2 == 0:
                install_next(daemon, new)
            else:
                install_previous(daemon)
            daemon.start()
            wait_for_version(daemon, NEW if number % 2 == 0 else __version__)
    finally:
        rounds = under_kills(Kills(), clients, 0)
    print(f"{CHANGES} changes of the version; rounds: {', '.join(rounds)}")
    daemon.stop()


@pytest.mark.skipif(keeper.why_not() is not None, reason=str(keeper.why_not()))
def test_a_version_that_cannot_read_the_state_leaves_the_mount_as_it_is(daemon: Daemon, tmp_path: Path) -> None:
    point = daemon.add("used", survive=True)
    install_next(daemon, copied(tmp_path / "new", NEXT))
    record = tmp_path / "new/udbad/inodes/record.py"
    record.write_text(record.read_text().replace("frozenset({1, 2})", "frozenset({2})"))
    daemon.start()
    pid = daemon.state("used")["pid"]
    with (point / "open").open("w") as file:
        leave_mounts(daemon)
        install_previous(daemon)
        daemon.start()
        assert "none of the versions 1 can be written" in daemon.command("restart", "used", code=1)
        assert daemon.state("used")["pid"] == pid
        file.write("written all the same")
    assert (point / "open").read_text() == "written all the same"
    daemon.stop()


@pytest.mark.skipif(keeper.why_not() is not None, reason=str(keeper.why_not()))
def test_what_a_version_does_not_know_is_passed_over_unless_it_has_to(daemon: Daemon, tmp_path: Path) -> None:
    points = {name: daemon.add(name, survive=True) for name in ("passed-over", "needed")}
    install_next(daemon, copied(tmp_path / "new", SAYS_MORE))
    daemon.start()
    pid = daemon.state("needed")["pid"]
    with (points["passed-over"] / "open").open("w") as passed, (points["needed"] / "open").open("w") as needed:
        leave_mounts(daemon)
        install_previous(daemon)
        daemon.start()
        until(lambda: versions(daemon)["passed-over"] == __version__, "the version before")
        problem = "it has branches with colour, of which this version knows nothing"
        assert problem in daemon.command("restart", "needed", code=1)
        assert (daemon.state("needed")["pid"], versions(daemon)["needed"]) == (pid, NEW)
        for file in (passed, needed):
            file.write("written all the same")
    for point in points.values():
        assert (point / "open").read_text() == "written all the same"
    daemon.stop()


@contextmanager
def mounted_by_hand(tree: Path, point: Path, options: str, run_dir: Path) -> Iterator[int]:
    """In the foreground, by the udbad of a tree; the number of the process that was started."""
    read_fd, write_fd = os.pipe()
    with open(read_fd, "rb") as ready, (run_dir / "log").open("wb") as log:
        command = [*COMMAND, "mount", "-f", "--ready-fd", str(write_fd), "-o", options, "none", str(point)]
        process = subprocess.Popen(
            command, stderr=log, env=of_tree(tree, run_dir), cwd="/", pass_fds=[write_fd], stdin=subprocess.DEVNULL
        )
        os.close(write_fd)
        try:
            assert ready.readline() == b"READY\n", (run_dir / "log").read_text()
            yield process.pid
            process.terminate()
            assert process.wait(DEADLINE) == 0, (run_dir / "log").read_text()
        finally:
            process.terminate()
            process.wait(DEADLINE)


def of_tree(tree: Path, run_dir: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(tree), "UDBAD_RUN_DIR": str(run_dir)}


def restart(tree: Path, point: Path, run_dir: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, "restart", str(point)], check=False, capture_output=True, text=True, timeout=DEADLINE, cwd="/",
        env=of_tree(tree, run_dir),
    )  # fmt: skip


@pytest.mark.skipif(keeper.why_not() is not None, reason=str(keeper.why_not()))
def test_a_mount_by_hand(tmp_path: Path, daemon: Daemon) -> None:
    """Its guardian is of the new version as well, with the same number. What cannot read the state changes nothing."""
    version = f'__version__ = "{__version__}"'
    new = copied(tmp_path / "new", {"__init__.py": [(version, f'__version__ = "{NEW}"')]})
    reads = "READ: Final = frozenset({"
    strange = copied(tmp_path / "strange", {"inodes/record.py": [(f"{reads}VERSION", f"{reads}7")]})
    point, top = tmp_path / "mnt", tmp_path / "top"
    point.mkdir()
    top.mkdir()
    run_dir = Path(daemon.run_dir)

    def entry() -> registry.Entry:
        (found,) = registry.entries(daemon.run_dir)
        return found

    def wait_for_successor(pid: int) -> None:
        until(lambda: entry().pid != pid, "another process")

    with mounted_by_hand(REPOSITORY, point, f"br={top}=rw,survive=on", run_dir) as guardian:
        with (point / "open").open("w") as file:
            file.write("written in the old version, ")
            file.flush()
            before = entry()
            refused = restart(strange, point, run_dir)
            assert refused.returncode == 1
            assert "cannot be written for another version" in refused.stderr
            assert entry() == before
            for tree, expected in ((new, NEW), (REPOSITORY, __version__)):
                pid = entry().pid
                done = restart(tree, point, run_dir)
                assert done.returncode == 0, done.stderr
                assert (entry().version, entry().pid != pid) == (expected, True)
                killed = entry().pid
                os.kill(killed, signal.SIGKILL)
                file.write(f"in {expected}, ")
                file.flush()
                wait_for_successor(killed)  # which is made by the guardian
                assert entry().version == expected
                assert Path(f"/proc/{entry().pid}/stat").read_text().split()[3] == str(guardian)
        assert (top / "open").read_text() == f"written in the old version, in {NEW}, in {__version__}, "
    assert not registry.entries(daemon.run_dir)
