"""where and why: what they say of a path is what the mount does with it."""

from __future__ import annotations

import itertools
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.mount import Mount, UnionFactory
from tests.t5_daemon.daemon import Daemon

pytestmark = pytest.mark.fuse

THREE = {"a": "rw", "b": "ro+wh", "c": "ro"}


def make(branch: Path, what: str, label: str, overlay: bool) -> None:
    """In a directory of the branch `label`, named x: nothing, file, dir, opaque (dir), wh, file+wh, dir+wh.

    overlay: marks are made as overlayfs does; beside its name it has no whiteout.
    """
    if what == "wh" and overlay:
        os.mknod(branch / "x", stat.S_IFCHR)
    elif "wh" in what:
        (branch / ".wh.x").touch()
    if "file" in what:
        (branch / "x").write_text(label)
    if "dir" in what or "opaque" in what:
        (branch / "x").mkdir()
        (branch / "x" / f"in_{label}").touch()
    if "opaque" in what and overlay:
        os.setxattr(branch / "x", "trusted.overlay.opaque", b"y")
    elif "opaque" in what:
        (branch / "x" / ".wh..wh..opq").touch()


def ask(mount: Mount, operation: str, path: str) -> dict[str, Any]:
    answer = mount.control({"op": operation, "path": path})
    assert answer["ok"], answer
    return answer


@pytest.mark.parametrize("whiteouts", ["aufs", "overlay"])
def test_every_combination_is_explained_as_it_is_served(union: UnionFactory, tmp_path: Path, whiteouts: str) -> None:
    top = ["nothing", "file", "dir", "opaque", "wh", "file+wh", "dir+wh"]
    cases = list(itertools.product(top, top, ["nothing", "file", "dir"]))
    for number, case in enumerate(cases):
        for branch, what in zip("abc", case, strict=True):
            directory = tmp_path / branch / str(number)
            directory.mkdir(parents=True)
            make(directory, what, branch, whiteouts == "overlay")
    mount = union(THREE, "reval", f"whiteouts={whiteouts}")
    for number, case in enumerate(cases):
        path = mount.path / str(number) / "x"
        answer = ask(mount, "where", f"{number}/x")
        why = ask(mount, "why", f"{number}/x")
        assert answer["exists"] == why["exists"] == os.path.lexists(path), (case, why)
        roles = {Path(copy["branch"]).name: copy["role"] for copy in answer["copies"]}
        held = [branch for branch, what in zip("abc", case, strict=True) if what not in ("nothing", "wh")]
        assert set(roles) == set(held)
        last = {Path(one["branch"].partition("=")[0]).name: one["role"] for one in why["steps"][-1]["branches"]}
        assert {branch: role for branch, role in last.items() if role != "absent"} == roles, case
        if not answer["exists"]:
            assert set(roles.values()) <= {"hidden"}, case
            continue
        serving = next(branch for branch, role in roles.items() if role == "serves")
        assert answer["branch"] == str(tmp_path / serving)
        if path.is_dir():
            visible = {f"in_{branch}" for branch, role in roles.items() if role in ("serves", "merged")}
            assert set(os.listdir(path)) == visible, (case, answer)
        else:
            assert path.read_text() == serving, case


def test_what_is_below_a_hidden_directory_is_hidden(union: UnionFactory, tmp_path: Path) -> None:
    for branch in "abc":
        (tmp_path / branch / "d" / "e").mkdir(parents=True)
        (tmp_path / branch / "d" / "e" / f"only_{branch}").touch()
    (tmp_path / "b" / "d" / ".wh.e").touch()
    mount = union(THREE, "reval")
    answer = ask(mount, "where", "d/e/only_c")
    assert (answer["exists"], [copy["role"] for copy in answer["copies"]]) == (False, ["hidden"])
    assert answer["copies"][0]["why"] == f"the whiteout on {tmp_path / 'b'} hides it"
    assert ask(mount, "where", "d/e/only_b")["branch"] == str(tmp_path / "b")
    assert ask(mount, "where", "")["copies"][0]["role"] == "serves"
    assert ask(mount, "where", "no/such/path")["copies"] == []
    refused = mount.control({"op": "where", "path": "d/../e"})
    assert (refused["ok"], refused["error"]) == (False, "a path with '..' is not looked up here")


def test_stale_belief_in_mode_none_is_shown_and_invalidated(union: UnionFactory, tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "f").write_text("lower")
    (tmp_path / "c" / "d").mkdir()
    (tmp_path / "c" / "d" / "f").write_text("deep")
    mount = union(THREE, "none")
    assert (mount.path / "f").read_text() == "lower"
    assert (mount.path / "d" / "f").read_text() == "deep"
    (mount["a"] / "f").write_text("upper")
    (mount["a"] / "d").mkdir()
    (mount["a"] / "d" / "f").write_text("upper deep")
    assert (mount.path / "f").read_text() == "lower"
    answer = ask(mount, "where", "f")
    assert (answer["branch"], answer["cached"]["branch"]) == (str(mount["a"]), str(mount["c"]))
    assert ask(mount, "invalidate", "f")["nodes"] == 1
    assert (mount.path / "f").read_text() == "upper"
    ask(mount, "invalidate", "d")
    assert (mount.path / "d" / "f").read_text() == "upper deep"


def test_commands_find_their_mount_without_touching_it(daemon: Daemon) -> None:
    point = daemon.add("a")
    (daemon.branch("a", "base") / "file").write_text("base")
    daemon.start()
    link = daemon.tmp_path / "link"
    link.symlink_to(point)
    for path in (point / "file", link / "file", link / ".." / point.name / "file"):
        assert f"serves  {daemon.branch('a', 'base')}/file  file, 4 bytes" in daemon.command("where", str(path))
    assert "not in the union" in daemon.command("where", str(point / "none"), code=1)
    assert "is in no union; there are a" in daemon.command("where", "/etc", code=8)
    why = daemon.command("why", str(point / "file"))
    assert why.splitlines()[3:6] == [
        "file",
        f"  {daemon.branch('a', 'top')}=rw: -: absent, nothing is here",
        f"  {daemon.branch('a', 'base')}=ro: file: serves, the first branch that has it",
    ]
    assert "objects forgotten" in daemon.command("invalidate", str(point))
    daemon.command("flush", str(point))
    daemon.command("top", "--count", "2", "--delay", "0.1")
    daemon.stop()
