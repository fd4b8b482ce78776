"""What a daemon and its mounts leave on disk can be written to by nobody else, whatever their umask was."""

from __future__ import annotations

import os
import stat
import subprocess
from pathlib import Path

import pytest

from tests.t5_daemon.daemon import DEADLINE, Daemon

pytestmark = pytest.mark.fuse


def writable_by_others(*trees: Path) -> list[str]:
    """Everything below that group or others may write to; symbolic links have no mode of their own."""
    found = []
    for tree in trees:
        below = (Path(here, name) for here, *names in os.walk(tree) for name in (*names[0], *names[1]))
        for path in (tree, *below):
            try:
                mode = path.lstat().st_mode
            except FileNotFoundError:  # a mount that ends takes away what is its own
                continue
            if not stat.S_ISLNK(mode) and mode & 0o022:
                found.append(f"{path} {stat.S_IMODE(mode):04o}")
    return found


def test_nothing_is_writable_by_others(daemon: Daemon) -> None:
    point = daemon.add("a", ["top=rw", "base=ro"], plink=True)
    base = daemon.branch("a", "base")
    (base / "d").mkdir()
    for name in ("gone", "changed", "one", "d/x"):
        (base / name).write_text(name)
    os.link(base / "one", base / "two")
    hand = daemon.tmp_path / "hand.mnt"
    hand.mkdir()
    (daemon.tmp_path / "own").mkdir()
    before = os.umask(0)
    try:
        daemon.start()
        daemon.command("mount", "-o", f"br={daemon.tmp_path}/own=rw:{base}=ro", "none", str(hand))
    finally:
        os.umask(before)
    for path in daemon.tmp_path.iterdir():
        if path.is_file():  # the configuration and the log, which this test has made
            path.chmod(0o644)
    (point / "changed").write_text("changed")  # copy-up
    (point / "one").write_text("one")  # with a pseudo-link
    (point / "gone").unlink()  # whiteout
    (point / "d" / "x").unlink()
    (point / "d").rmdir()
    (point / "d").mkdir()  # opaque
    (point / "made").touch()
    extra = daemon.tmp_path / "extra"
    extra.mkdir()
    daemon.command("branch", "add", "--save", "a", f"{extra}=rw")
    daemon.command("udba", "--save", "a", "notify")
    assert sorted(os.listdir(daemon.branch("a", "top") / ".wh..wh.plnk")), "a pseudo-link was made"
    assert writable_by_others(daemon.tmp_path, Path(daemon.run_dir)) == []
    daemon.kill()  # and what is left when nobody cleans up
    subprocess.run(["umount", hand], check=True, timeout=DEADLINE)
    assert writable_by_others(daemon.tmp_path, Path(daemon.run_dir)) == []


def test_a_run_directory_of_somebody_else_is_refused(daemon: Daemon) -> None:
    daemon.add("a")
    daemon.write()
    os.chmod(daemon.run_dir, 0o777)
    output = daemon.command("run", "-c", str(daemon.config), code=1)
    assert output == f"udbad: {daemon.run_dir}: can be written to by others, its mode is 0777\n"
    os.chmod(daemon.run_dir, 0o700)
