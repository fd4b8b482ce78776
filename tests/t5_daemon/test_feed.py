"""`udbad feed`: what lines of standard input may look like. What they do is in t4_coherence/test_feed.py."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.t5_daemon.daemon import COMMAND, Daemon, until
from udbad.control import registry
from udbad.control.protocol import ask

pytestmark = pytest.mark.fuse


@pytest.fixture
def point(daemon: Daemon) -> Iterator[Path]:
    point = daemon.add("a", udba="none", survive=True)
    for name in ("d", "e"):
        (daemon.branch("a", "base") / name).mkdir()
    daemon.start()
    yield point
    daemon.stop()


def feed(daemon: Daemon, text: str, *words: str, code: int = 0) -> tuple[str, str]:
    """Run the command; what it says on standard output and on the other one."""
    command = [*COMMAND, "feed", *words, "a"]
    done = subprocess.run(
        command, input=text.encode(), capture_output=True, env=daemon.environment, cwd="/", check=False, timeout=60
    )
    assert done.returncode == code, done
    return done.stdout.decode(), done.stderr.decode()


@pytest.mark.parametrize("end", ["\n", "\0"])
def test_paths(daemon: Daemon, point: Path, end: str) -> None:
    """Relative, on a branch, below the mount point, and as another host has it."""
    below = daemon.branch("a", "base") / "d"
    told = ["d/one", str(below / "two"), str(point / "d/three"), "/export/share/d/four"]
    paths = [point / "d" / name for name in ("one", "two", "three", "four", "five")]
    assert not any(path.exists() for path in paths)
    for path in paths:
        (below / path.name).touch()
    assert not any(path.exists() for path in paths), "nobody has told it yet"
    text = end.join([*told, "/elsewhere/x", "", "d/../e", "/export/sharex"]) + end
    said, _ = feed(daemon, text, "--strip", "/export/share/", *(["-0"] if end == "\0" else []))
    assert said == "7 hints, 4 of them on what is cached, 3 elsewhere\n"
    assert [path.exists() for path in paths] == [True, True, True, True, False]


def test_json(daemon: Daemon, point: Path) -> None:
    base = daemon.branch("a", "base")
    (base / "d/f").touch()
    old, new = point / "d/f", point / "e/moved"
    assert (old.exists(), new.exists()) == (True, False)
    os.rename(base / "d/f", base / "e/moved")
    said, _ = feed(daemon, json.dumps({"path": "d/f", "to": "e/moved", "kind": "rename", "at": 1.5}), "--json")
    assert said == "2 hints, 2 of them on what is cached, 0 elsewhere\n"
    assert (old.exists(), new.exists()) == (False, True)


def test_a_kind_spares_the_rest(daemon: Daemon, point: Path) -> None:
    """What is only said to have other attributes is not looked up again."""
    base = daemon.branch("a", "base")
    (base / "d/f").touch(0o644)
    assert (point / "d/f").stat().st_mode & 0o777 == 0o644
    (base / "d/f").chmod(0o600)
    before = requests_of(daemon)
    feed(daemon, json.dumps({"path": "d/f", "kind": "ATTRIB"}), "--json")
    assert (point / "d/f").stat().st_mode & 0o777 == 0o600
    after = requests_of(daemon)
    assert (after["lookup"] - before["lookup"], after["getattr"] - before["getattr"]) == (0, 1)


def requests_of(daemon: Daemon) -> dict[str, int]:
    (entry,) = registry.entries(daemon.run_dir)
    requests: dict[str, int] = ask(entry.control, {"op": "stats"}, 60.0)["requests"]
    return requests


def test_lines_that_are_no_hints(daemon: Daemon, point: Path) -> None:
    text = '{"path": "d/a"}\nno\n{"kind": "create"}\n["d"]\n{"path": 3}\n{"path": "d\\u0000"}\n{"path": "d/b"}'
    said, errors = feed(daemon, text, "--json", code=1)
    assert [line.split(":")[1].strip() for line in errors.splitlines()] == [f"line {n}" for n in (2, 3, 4, 5, 6)]
    assert said.startswith("2 hints,")


def test_it_goes_on_with_the_mount(daemon: Daemon, point: Path) -> None:
    """The process of the mount is killed between two lines."""
    base = daemon.branch("a", "base")
    with subprocess.Popen(
        [*COMMAND, "feed", "a"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=daemon.environment
    ) as command:
        assert command.stdin is not None
        assert command.stdout is not None
        for number in range(3):
            path = point / "d" / str(number)
            assert not path.exists()
            (base / "d" / str(number)).touch()
            command.stdin.write(b"d/%d\n" % number)
            command.stdin.flush()
            until(path.exists, "what was told is seen")
            (entry,) = registry.entries(daemon.run_dir)
            os.kill(entry.pid, signal.SIGKILL)
        command.stdin.close()
        assert command.stdout.read().startswith(b"3 hints,")
        assert command.wait(60) == 0


def test_no_such_mount(daemon: Daemon, point: Path) -> None:
    command = [*COMMAND, "feed", "b"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, env=daemon.environment, check=False)
    assert (done.returncode, done.stderr) == (8, b"udbad: b is in no union; there are a\n")
