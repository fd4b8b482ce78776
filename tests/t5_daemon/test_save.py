"""--save: the live mount and its configuration change together, and a reload then finds nothing to do."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.t5_daemon.daemon import DEADLINE, Daemon
from udbad.control import registry

pytestmark = pytest.mark.fuse


@pytest.fixture
def point(daemon: Daemon) -> Path:
    """The mount point of a running daemon's one mount `a`, whose configuration has comments; extra is a directory."""
    mount_point = daemon.add("a")
    daemon.branch("a", "extra").mkdir()
    daemon.write()
    text = daemon.config.read_text()
    top, base = (f'"{daemon.branch("a", name)}=' for name in ("top", "base"))
    list_ = f'[{top}rw", {base}ro"]'
    assert list_ in text
    many = f'[\n    {top}rw",\n    {base}ro", # the shared tree\n]'
    written = "# by hand\n" + text.replace(list_, many) + 'udba = "reval" # slow\n'
    daemon.write = lambda: daemon.config.write_text(written)  # type: ignore[method-assign, assignment]
    daemon.start()
    del daemon.write
    return mount_point


def lines(daemon: Daemon) -> list[str]:
    return daemon.config.read_text().splitlines()


def test_branches_and_mode_are_saved(daemon: Daemon, point: Path) -> None:
    extra = daemon.branch("a", "extra")
    (extra / "more").write_text("more")
    before = lines(daemon)
    output = daemon.command("branch", "add", "--save", "a", f"{extra}=ro+wh")
    assert output.splitlines() == [
        f"{daemon.branch('a', 'top')}=rw", f"{daemon.branch('a', 'base')}=ro", f"{extra}=ro+wh",
        f"saved to {daemon.config}",
    ]  # fmt: skip
    assert (point / "more").read_text() == "more"
    assert [line for line in lines(daemon) if line not in before] == [f'    "{extra}=ro+wh",']
    assert daemon.command("udba", "--save", str(point), "notify") == f"saved to {daemon.config}\n"
    assert lines(daemon)[-1] == 'udba = "notify" # slow'
    daemon.command("branch", "mod", "--save", "a", f"{extra}=ro")
    assert f'    "{extra}=ro",' in lines(daemon)
    # Nothing is left to do for a reload, nor for a daemon that starts now.
    assert daemon.command("reload") == "nothing has changed\n"
    entry = registry.entries(daemon.run_dir)[0]
    assert entry.configured == entry.options
    assert daemon.state("a")["pending"] == []
    daemon.command("branch", "del", "--save", "a", str(extra))
    daemon.command("udba", "--save", "a", "reval")
    assert lines(daemon) == before
    assert not (point / "more").exists()
    assert "has changed: reloading" not in daemon.log()
    daemon.stop()


def test_a_branch_by_another_way_there(daemon: Daemon, point: Path) -> None:
    """The mount has a branch without symbolic links, the file as it was written: each finds its own."""
    extra, link, second = (daemon.branch("a", name) for name in ("extra", "link", "second"))
    link.symlink_to("a.extra")
    second.symlink_to("a.extra")
    (extra / "more").write_text("more")
    before = lines(daemon)
    assert f"{extra}=ro" in daemon.command("branch", "add", "--save", "a", f"{link}=ro").splitlines()
    assert f'    "{link}=ro",' in lines(daemon) or f'    "{extra}=ro",' in lines(daemon)
    assert daemon.command("busy", "a", str(second)) == ""
    assert f"{extra}=ro+wh" in daemon.command("branch", "mod", "--save", "a", f"{second}=ro+wh").splitlines()
    assert len([line for line in lines(daemon) if line not in before]) == 1
    daemon.command("branch", "del", "--save", "a", str(second))
    assert lines(daemon) == before
    assert not (point / "more").exists()
    # In the file only: taken out of that. In neither: said. The last one: said.
    daemon.command("branch", "add", "--save", "a", f"{extra}=ro")
    daemon.command("branch", "del", "a", str(link))
    assert lines(daemon) != before
    output = daemon.command("branch", "del", "--save", "a", str(link))
    assert (lines(daemon), output.splitlines()[-1]) == (before, f"saved to {daemon.config}")
    error = f"udbad: nothing was changed: del={extra}: {extra} is not a branch\n"
    assert daemon.command("branch", "del", "--save", "a", str(extra), code=3) == error
    daemon.command("branch", "del", "a", str(daemon.branch("a", "base")))
    error = "the last branch cannot be removed: a union has at least one\n"
    top = str(daemon.branch("a", "top"))
    assert daemon.command("branch", "del", "a", top, code=3) == f"udbad: {error}"
    assert daemon.command("branch", "del", "--save", "a", top, code=3) == f"udbad: nothing was changed: {error}"
    assert (lines(daemon), daemon.state("a")["process"]["branches"]) == (before, [f"{top}=rw"])
    daemon.stop()


def test_what_was_not_saved_stays_out(daemon: Daemon, point: Path) -> None:
    extra, other = daemon.branch("a", "extra"), daemon.branch("a", "other")
    other.mkdir()
    daemon.command("branch", "add", "-i", "1", "a", f"{other}=ro")
    daemon.command("branch", "add", "-i", "2", "--save", "a", f"{extra}=ro")
    assert str(other) not in daemon.config.read_text()
    assert f'{daemon.branch("a", "top")}=rw",\n    "{extra}=ro",\n' in daemon.config.read_text()
    # Removing what the file never had changes the mount only.
    before = daemon.config.read_text()
    daemon.command("branch", "del", "--save", "a", str(other))
    assert (daemon.config.read_text(), daemon.command("reload")) == (before, "nothing has changed\n")
    daemon.stop()


def test_refused_by_the_mount_means_nothing_is_written(daemon: Daemon, point: Path) -> None:
    before = daemon.config.read_text()
    base = daemon.branch("a", "base")
    (base / "file").write_text("x")
    with (point / "file").open():
        assert "is in use" in daemon.command("branch", "del", "--save", "a", str(base), code=4)
    assert "does not exist" in daemon.command("branch", "add", "--save", "a", "/nowhere=ro", code=4)
    assert daemon.config.read_text() == before
    daemon.stop()


def test_refused_by_the_file_means_nothing_is_changed(daemon: Daemon, point: Path) -> None:
    extra = daemon.branch("a", "extra")
    daemon.settings["watch"] = False
    good = daemon.config.read_text()
    add = ("branch", "add", "--save", "a", f"{extra}=ro")

    def refused(message: str) -> None:
        output = daemon.command(*add, code=10)
        assert output.startswith("udbad: nothing was changed: "), output
        assert (message in output, output.count("\n")) == (True, 1), output
        assert len(daemon.state("a")["process"]["branches"]) == 2

    # Written over in place by hand, and not there long enough to be noticed or without effect: it is broken.
    daemon.config.write_text(good + "[mounts.b\n")
    refused("not TOML")
    daemon.config.write_text(good + '[mounts.b]\nmount_point = "/m"\nbranches = 3\n')
    refused("mounts.b.branches: found 3")
    daemon.config.write_text(good + f'[mounts.b]\nmount_point = "/m"\nenabled = true\nbranches = "{point}/x=ro"\n')
    refused("a union cannot be a branch")
    daemon.config.write_text(good)
    shared = daemon.config.with_name("udbad.toml.bak")
    daemon.config.rename(shared)
    refused("No such file")
    shared.rename(daemon.config)
    subprocess.run(["mount", "--bind", "-o", "ro", daemon.config.parent, daemon.config.parent], check=True)
    try:
        refused("is not writable")
    finally:
        subprocess.run(["umount", "-l", daemon.config.parent], check=True)
    daemon.command(*add)
    daemon.stop()


def test_a_change_that_cannot_be_saved_any_more_is_said(daemon: Daemon, point: Path) -> None:
    """The file breaks between the trial and the write: a full file system does it without a race."""
    extra = daemon.branch("a", "extra")
    small = daemon.tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "none", small], check=True, timeout=DEADLINE)
    try:
        (small / "udbad.toml").write_text(daemon.config.read_text())
        daemon.config.unlink()
        daemon.config.symlink_to(small / "udbad.toml")
        with pytest.raises(OSError, match="No space"):
            (small / "fill").write_bytes(b"x" * 20000)
        output = daemon.command("branch", "add", "--save", "a", f"{extra}=ro", code=10)
        expected = f"udbad: a was changed, but that was not saved: {small}/udbad.toml: No space left on device\n"
        assert output == expected
        assert len(daemon.state("a")["process"]["branches"]) == 3
        assert sorted(os.listdir(small)) == ["fill", "udbad.toml"]
        (small / "fill").unlink()
        assert "saved to" in daemon.command("branch", "mod", "--save", "a", f"{extra}=ro")
        assert str(extra) in (small / "udbad.toml").read_text()
        assert daemon.command("reload") == "nothing has changed\n"
        daemon.stop()
    finally:
        subprocess.run(["umount", "-l", small], check=True, timeout=DEADLINE)


def test_mounted_by_hand(daemon: Daemon, point: Path) -> None:
    for name in ("hand", "alone"):
        for directory in (f"{name}.top", f"{name}.mnt"):
            (daemon.tmp_path / directory).mkdir()
    hand, alone = daemon.tmp_path / "hand.mnt", daemon.tmp_path / "alone.mnt"
    answer = daemon.ask("mount", mount_point=str(hand), options=f"br={daemon.tmp_path}/hand.top")
    assert answer["ok"], answer
    daemon.command("mount", "-o", f"br={daemon.tmp_path}/alone.top", "none", str(alone))
    try:
        for mount_point in (hand, alone):
            output = daemon.command("udba", "--save", str(mount_point), "none", code=10)
            text = f"{mount_point} was mounted by hand and is in no configuration file: nothing was changed"
            assert output == f"udbad: {text}\n"
            assert '"udba": "reval"' in daemon.command("status", "--json")
    finally:
        daemon.command("umount", str(alone))
    daemon.kill()
    assert "no daemon runs here" in daemon.command("udba", "--save", "a", "none", code=11)
    daemon.start()
    daemon.stop()


def test_a_relative_path_is_that_of_the_caller(daemon: Daemon, point: Path) -> None:
    extra = daemon.branch("a", "extra")
    # `command` runs in /.
    daemon.command("branch", "add", "--save", "a", f"{str(extra).lstrip('/')}=ro")
    assert f"{extra}=ro" in daemon.config.read_text()
    daemon.command("branch", "del", "a", str(extra).lstrip("/"))
    daemon.stop()


def test_requests_that_cannot_be_saved(daemon: Daemon, point: Path) -> None:
    for inner in (None, {}, {"op": "stop"}, {"op": "branches"}, {"op": "branches", "edits": [5]}):
        answer = daemon.ask("change", mount="a", request=inner)
        assert (answer["ok"], answer["code"]) == (False, 3), (inner, answer)
    daemon.stop()
