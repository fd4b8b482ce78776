"""diff, mvdown and sync on real mounts, as people use them."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import carry_tree
from tests.helpers.carry_tree import LAYERS, listing
from tests.helpers.merge import diff, snapshot, temporary_names
from tests.helpers.profile import scaled
from tests.t5_daemon.daemon import COMMAND, DEADLINE, Daemon, until
from udbad.control import registry
from udbad.control.protocol import ask
from udbad.errors import ExitCode

pytestmark = pytest.mark.fuse

MODES = scaled(["reval", "notify"], ["none", "reval", "notify"])
WORDS = [f"{name}={perm}" for name, perm in LAYERS.items()]


def mounted(
    daemon: Daemon, udba: str = "reval", layers: list[str] = WORDS, build: bool = True, whiteouts: str = "aufs"
) -> Path:
    """A running mount `a` of the branches src, dst and low, with the tree of carry_tree in them."""
    # io: others leave alone what is open for writing
    path = daemon.add("a", layers, udba=udba, io="requests", whiteouts=whiteouts)
    if build:
        branches = [daemon.branch("a", name) for name in LAYERS]
        carry_tree.build(*branches)
        if whiteouts == "overlay":
            for branch in branches:
                carry_tree.as_overlay(branch)
    daemon.start()
    return path


def control(daemon: Daemon, **request: Any) -> dict[str, Any]:
    entry = registry.find(daemon.run_dir, "a")
    assert entry is not None
    return ask(entry[0].control, request, DEADLINE)


def sync(daemon: Daemon, mode: str, code: int = 0) -> str:
    return daemon.command("sync", mode, "a", *(str(daemon.branch("a", name)) for name in ("src", "dst")), code=code)


# -- sync -----------------------------------------------------------------------------------------------


OVERLAY_MODES = [(udba, "overlay") for udba in scaled(["notify"], MODES)]


@pytest.mark.parametrize(("udba", "whiteouts"), [*((udba, "aufs") for udba in MODES), *OVERLAY_MODES])
@pytest.mark.parametrize("mode", ["copy", "move"])
def test_the_mount_shows_the_same_tree_before_and_after(daemon: Daemon, udba: str, mode: str, whiteouts: str) -> None:
    mount = mounted(daemon, udba, whiteouts=whiteouts)
    before = snapshot(mount)  # and so the kernel has cached all of it
    numbers = {path: os.lstat(os.path.join(os.fsencode(mount), path)).st_ino for path in before}
    src = daemon.branch("a", "src")
    was = listing(src)
    said = sync(daemon, mode)
    assert "stays" not in said
    assert diff(before, snapshot(mount)) == []
    assert {path: os.lstat(os.path.join(os.fsencode(mount), path)).st_ino for path in before} == numbers
    assert listing(src) == ([] if mode == "move" else was)
    names = (os.fsencode(mount) + b"/mixed/one", os.fsencode(mount) + b"/both/two", os.fsencode(mount) + b"/new/three")
    assert len({os.lstat(name).st_ino for name in names}) == 1
    assert os.lstat(names[0]).st_nlink == 3
    if mode == "copy":
        # Then the upper branch is not needed: without it the mount shows the same.
        daemon.command("branch", "del", "a", str(src))
        assert diff(before, snapshot(mount)) == []
    daemon.stop()
    assert "Traceback" not in daemon.log()


@pytest.mark.parametrize("udba", MODES)
def test_what_happens_after_a_move_is_seen_as_ever(daemon: Daemon, udba: str) -> None:
    """Names, negative names, attributes and contents: the kernel believes nothing wrong of what has moved."""
    mount = mounted(daemon, udba)
    snapshot(mount)
    sync(daemon, "move")
    (mount / "both" / "src").write_text("written after")
    (mount / "new" / "er" / "file").unlink()
    (mount / "gone").write_text("made again")
    (mount / "becomes_file").chmod(0o600)
    assert (daemon.branch("a", "dst") / "both" / "src").read_text() == "written after"
    if udba != "none":
        (daemon.branch("a", "dst") / "opaque" / "mine").write_text("direct")
        (daemon.branch("a", "src") / "everywhere").write_text("direct, above")
        daemon.command("flush", "a")
        assert (mount / "opaque" / "mine").read_text() == "direct"
        assert (mount / "everywhere").read_text() == "direct, above"
    after = snapshot(mount)
    daemon.command("restart", "a")
    daemon.wait_for("a")
    assert diff(after, snapshot(mount)) == []
    assert (mount / "gone").read_text() == "made again"
    daemon.stop()


class Users:
    """Programs that use a mount while something is done to it. Each runs its rounds until `finish`."""

    def __init__(self) -> None:
        self.errors: list[str] = []
        self.rounds = 0
        self._done = threading.Event()
        self._threads: list[threading.Thread] = []

    def start(self, act: Callable[[int], None]) -> None:
        """act: one round, called with its number."""

        def run() -> None:
            number = 0
            while not self._done.is_set() and not self.errors:
                try:
                    act(number)
                except Exception as error:  # whatever it is, it is to be told
                    self.errors.append(f"{act.__qualname__} in round {number}: {error!r}")
                number += 1
                self.rounds += 1

        thread = threading.Thread(target=run)
        thread.start()
        self._threads.append(thread)

    def wait(self, rounds: int) -> None:
        """Until they have done this many more."""
        goal = self.rounds + rounds
        until(lambda: self.rounds >= goal or self.errors, f"{rounds} rounds of the users")

    def finish(self) -> None:
        self._done.set()
        for thread in self._threads:
            thread.join(DEADLINE)
        assert not self.errors, self.errors


@pytest.mark.parametrize("udba", MODES)
def test_programs_that_use_the_mount_lose_nothing(daemon: Daemon, udba: str) -> None:
    mount = mounted(daemon, udba)
    fixed = {name: (mount / name).read_bytes() for name in ("both/src", "opaque/mine", "new/er/file", "mixed/sparse")}
    gone = ["gone", "both/gone", "both/deep/gone", "gone_dir", "opaque/deep"]
    logged: dict[str, int] = {}
    kept = mount / "new" / "kept"
    kept.write_bytes(b"")
    keeper = os.open(kept, os.O_WRONLY | os.O_APPEND)

    def read(number: int) -> None:
        for name, content in fixed.items():
            assert (mount / name).read_bytes() == content, name
        for name in gone:
            assert not os.path.lexists(mount / name), name

    def append(number: int) -> None:
        for name in ("log", "both/log", "new/er/log"):
            with open(mount / name, "ab") as stream:
                stream.write(b"%d\n" % number)
            logged[name] = number + 1

    def keep(number: int) -> None:
        os.write(keeper, b"%d\n" % number)
        logged["new/kept"] = number + 1

    def replace(number: int) -> None:
        (mount / "mixed" / "next").write_text(f"{number}")
        os.rename(mount / "mixed" / "next", mount / "mixed" / "current")
        assert (mount / "mixed" / "current").read_text() == f"{number}"

    def churn(number: int) -> None:
        path = mount / "new" / f"dir{number % 3}"
        path.mkdir()
        (path / "file").write_text("x" * number)
        assert [name.name for name in path.iterdir()] == ["file"]
        (path / "file").unlink()
        path.rmdir()
        assert not path.exists()

    users = Users()
    for act in (read, append, keep, replace, churn):
        users.start(act)
    try:
        for _ in range(4):
            users.wait(30)
            # Some of their files may be in use just then, and stay.
            said = daemon.command(
                "sync", "move", "a", *(str(daemon.branch("a", name)) for name in ("src", "dst")), code=None
            )
            assert "names moved into" in said, said
    finally:
        users.finish()
        os.close(keeper)
    for name, count in logged.items():
        assert (mount / name).read_bytes() == b"".join(b"%d\n" % number for number in range(count)), name
    read(0)
    before = snapshot(mount)
    sync(daemon, "move")
    assert diff(before, snapshot(mount)) == []
    assert listing(daemon.branch("a", "src")) == []
    daemon.stop()
    assert "Traceback" not in daemon.log()


MANY = scaled(1_000, 8_000)
"""Names that take long enough to be interrupted amid."""


def many(branch: Path, count: int) -> None:
    for number in range(count):
        directory = branch / f"d{number % 20}"
        directory.mkdir(parents=True, exist_ok=True)
        (directory / f"f{number}").write_text(f"{number}")


def begin(daemon: Daemon) -> None:
    """Start moving, and return when some names have left the source and more are there."""
    branches = {word: str(daemon.branch("a", name)) for word, name in (("source", "src"), ("target", "dst"))}
    assert control(daemon, op="sync", mode="move", **branches)["ok"]
    until_moving(daemon)


def until_moving(daemon: Daemon) -> None:
    """The daemon's count, not the branch: a directory can go while a test lists it."""
    until(lambda: control(daemon, op="sync-status").get("moved"), "a name that has moved")


def test_killed_amid_a_move(daemon: Daemon) -> None:
    carry_tree.build(*(daemon.branch("a", name) for name in LAYERS))
    many(daemon.branch("a", "src"), MANY)
    mount = mounted(daemon, "notify", build=False)
    before = snapshot(mount)
    pid = daemon.state("a")["pid"]
    begin(daemon)
    os.kill(pid, signal.SIGKILL)
    daemon.wait_for("a", not_pid=pid)
    left = listing(daemon.branch("a", "src"))
    assert left, "it was done already"
    assert diff(before, snapshot(mount), ignore=["nlink"]) == []
    sync(daemon, "move")
    assert listing(daemon.branch("a", "src")) == []
    assert diff(before, snapshot(mount), ignore=["nlink"]) == []
    daemon.stop()


def test_unmounted_amid_a_move(daemon: Daemon) -> None:
    many(daemon.branch("a", "src"), MANY)
    mount = mounted(daemon, build=False)
    before = snapshot(mount)
    begin(daemon)
    daemon.command("restart", "a")
    daemon.wait_for("a")
    assert listing(daemon.branch("a", "src"))
    assert diff(before, snapshot(mount)) == []
    for name in ("src", "dst"):
        assert not temporary_names(daemon.branch("a", name))
    daemon.stop()
    assert "Traceback" not in daemon.log()


def test_ctrl_c_stops_it_and_running_it_again_does_the_rest(daemon: Daemon) -> None:
    many(daemon.branch("a", "src"), MANY)
    mount = mounted(daemon, build=False)
    before = snapshot(mount)
    words = ["sync", "move", "a", str(daemon.branch("a", "src")), str(daemon.branch("a", "dst"))]
    # Whoever runs the tests in the background may have us ignore SIGINT, and what we start with us.
    client = subprocess.Popen(
        ["env", "--default-signal=INT", *COMMAND, *words],
        stderr=subprocess.PIPE, text=True, cwd="/", env=daemon.environment,
    )  # fmt: skip
    until_moving(daemon)
    client.send_signal(signal.SIGINT)
    _, said = client.communicate(timeout=DEADLINE)
    assert said == "udbad: sync: stopped; what is merged stays so, and running it again does the rest\n"
    assert client.returncode == ExitCode.FAILURE
    assert listing(daemon.branch("a", "src"))
    assert diff(before, snapshot(mount)) == []
    sync(daemon, "move")
    assert listing(daemon.branch("a", "src")) == []
    assert diff(before, snapshot(mount)) == []
    daemon.stop()


def test_to_another_file_system_that_is_full_at_first(daemon: Daemon) -> None:
    dst = daemon.branch("a", "dst")
    dst.mkdir()
    # The fixture takes it away at the end.
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "none", dst], check=True, timeout=DEADLINE)
    carry_tree.build(*(daemon.branch("a", name) for name in LAYERS))
    (daemon.branch("a", "src") / "mixed" / "big").write_bytes(os.urandom(12 << 20))
    mount = mounted(daemon, "notify", build=False)
    before = snapshot(mount)
    said = sync(daemon, "move", ExitCode.FAILURE)
    assert said == "udbad: sync: mixed/big: No space left on device; running it again does the rest\n"
    assert diff(before, snapshot(mount)) == []
    assert not temporary_names(dst)
    subprocess.run(["mount", "-o", "remount,size=64m", dst], check=True, timeout=DEADLINE)
    sync(daemon, "move")
    assert diff(before, snapshot(mount)) == []
    assert listing(daemon.branch("a", "src")) == []
    assert (dst / "mixed" / "big").stat().st_size == 12 << 20
    daemon.stop()


def test_one_at_a_time_and_the_branches_stay(daemon: Daemon) -> None:
    many(daemon.branch("a", "src"), MANY)
    mounted(daemon, build=False)
    begin(daemon)
    src, dst = (str(daemon.branch("a", name)) for name in ("src", "dst"))
    refused = [
        daemon.command("branch", "del", "a", src, code=ExitCode.REFUSED),
        daemon.command("sync", "copy", "a", src, dst, code=ExitCode.REFUSED),
    ]
    assert refused == [
        "udbad: a sync is under way: wait for its end, or stop it\n",
        "udbad: another sync is under way\n",
    ]
    assert "moved" in sync(daemon, "move")  # joins the one under way
    assert listing(daemon.branch("a", "src")) == []
    daemon.command("branch", "del", "a", src)
    daemon.stop()


def test_what_cannot_be_merged(daemon: Daemon) -> None:
    mounted(daemon)
    src, dst, low = (str(daemon.branch("a", name)) for name in LAYERS)
    between = "is between the two and would hide what is merged down; merge into that first"
    for words, reason in (
        (("move", "a", dst, low), f"{low} is ro; udbad branch mod MOUNT {low}=rw makes it writable"),
        (
            ("copy", "a", src, low),
            f"{dst} {between}",
        ),
        (("copy", "a", dst, src), f"{src} is not below {dst}"),
    ):
        assert daemon.command("sync", *words, code=ExitCode.REFUSED) == f"udbad: {reason}\n"
    missing = daemon.command("sync", "copy", "a", src, "/nowhere", code=ExitCode.OPTION)
    assert missing == "udbad: /nowhere is not a branch\n"
    daemon.stop()


def test_branches_are_named_by_any_path_that_leads_there(daemon: Daemon) -> None:
    """As in `udbad branch`: a symbolic link, or a way round."""
    mount = mounted(daemon)
    link = daemon.tmp_path / "link"
    link.symlink_to(daemon.branch("a", "src"))
    dst = daemon.branch("a", "dst")
    before = snapshot(mount)
    moved = str(mount / "both" / "src")
    assert "copied" in daemon.command("mvdown", "--keep-upper", "--from", str(link), moved)
    assert "bytes are in" in daemon.command("sync", "copy", "a", f"{link}/", f"{dst}/both/..")
    assert diff(before, snapshot(mount)) == []
    daemon.stop()


def test_a_branch_named_by_a_path_in_the_mount_itself(daemon: Daemon) -> None:
    """Which the process that serves it must not look up, as it would wait for itself."""
    mount = mounted(daemon)
    path = str(mount / "both" / "src")
    for words in (
        ("busy", "a", path),
        ("branch", "del", "a", path),
        ("branch", "del", "--save", "a", path),
        ("sync", "copy", "a", path, path),
        ("mvdown", "--from", path, path),
    ):
        said = daemon.command(*words, code=ExitCode.OPTION)
        assert said.endswith(f"{path} is not a branch\n"), words
    request = {"op": "remount", "options": f"mod={path}=ro"}
    assert control(daemon, **request)["error"].endswith(f"{path} is not a branch")
    daemon.stop()


# -- mvdown -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("udba", "whiteouts"), [*((udba, "aufs") for udba in MODES), *OVERLAY_MODES])
def test_a_file_moves_and_nobody_sees_it(daemon: Daemon, udba: str, whiteouts: str) -> None:
    mount = mounted(daemon, udba, whiteouts=whiteouts)
    path = mount / "big"
    content = os.urandom(3 << 20)
    path.write_bytes(content)
    os.setxattr(path, "user.word", b"value")
    os.utime(path, ns=(10**18, 10**18 + 1))
    before, number = snapshot(mount), path.stat().st_ino
    seen = 0

    def look(_: int) -> None:
        nonlocal seen
        assert path.stat().st_ino == number
        assert "big" in os.listdir(mount)
        assert os.path.getsize(path) == len(content)
        seen += 1

    users = Users()
    users.start(look)
    users.wait(3)
    said = daemon.command("mvdown", str(path))
    users.wait(3)
    users.finish()
    src, dst = daemon.branch("a", "src"), daemon.branch("a", "dst")
    assert said == f"moved from {src} to {dst}, {len(content)} bytes\n"
    assert not (src / "big").exists()
    assert (dst / "big").read_bytes() == content
    assert diff(before, snapshot(mount)) == []
    with open(path, "ab") as stream:
        stream.write(b"more")
    assert path.read_bytes() == content + b"more"
    assert (dst / "big").stat().st_size == len(content) + 4
    daemon.stop()


def test_an_open_file_stays(daemon: Daemon) -> None:
    mount = mounted(daemon, "notify")
    with open(mount / "both" / "src") as stream:
        said = daemon.command("mvdown", str(mount / "both" / "src"), code=ExitCode.REFUSED)
        assert said == f"udbad: /both/src: it is open, by process {os.getpid()}\n"
        assert stream.read() == "only here"
    until(lambda: "moved" in daemon.command("mvdown", str(mount / "both" / "src"), code=None), "the file is closed")
    daemon.stop()


def refuse_directory(src: Path, dst: Path, low: Path) -> str:
    (src / "x").mkdir()
    return "not a regular file"


def refuse_links(src: Path, dst: Path, low: Path) -> str:
    (src / "x").touch()
    os.link(src / "x", src / "y")
    return "it has 2 names; only a file with one can be moved"


def refuse_whiteout(src: Path, dst: Path, low: Path) -> str:
    (src / "x").touch()
    (src / ".wh.x").touch()
    return f"a whiteout on branch {src} hides branch {dst}"


def refuse_existing(src: Path, dst: Path, low: Path) -> str:
    (src / "x").touch()
    (dst / "x").touch()
    return f"branch {dst} has a copy already (--overwrite-lower replaces it)"


def refuse_other(src: Path, dst: Path, low: Path) -> str:
    (src / "x").touch()
    (dst / "x").mkdir()
    return f"branch {dst} has something else of that name"


def refuse_missing(src: Path, dst: Path, low: Path) -> str:
    return "not in the union"


def refuse_no_lower(src: Path, dst: Path, low: Path) -> str:
    (dst / "x").touch()
    return f"no writable branch is below branch {dst} (--read-only-lower takes the next one)"


def refuse_bottom(src: Path, dst: Path, low: Path) -> str:
    (low / "x").touch()
    return f"branch {low} is not writable (--read-only-upper moves all the same)"


@pytest.mark.parametrize(
    "case",
    [
        refuse_directory, refuse_links, refuse_whiteout, refuse_existing, refuse_other, refuse_missing,
        refuse_no_lower, refuse_bottom,
    ],
)  # fmt: skip
def test_rules_of_mvdown(daemon: Daemon, case: Callable[[Path, Path, Path], str]) -> None:
    mount = mounted(daemon, build=False)
    reason = case(*(daemon.branch("a", name) for name in LAYERS))
    before = snapshot(mount), [listing(daemon.branch("a", name)) for name in LAYERS]
    said = daemon.command("mvdown", str(mount / "x"), code=ExitCode.REFUSED)
    assert said == f"udbad: /x: {reason}\n"
    assert (snapshot(mount), [listing(daemon.branch("a", name)) for name in LAYERS]) == before
    daemon.stop()


def test_more_rules_and_the_options_of_mvdown(daemon: Daemon) -> None:
    """One mount of four branches: src=rw, between=ro+wh, dst=rw, low=ro."""
    mount = daemon.add("a", ["src=rw", "between=ro+wh", "dst=rw", "low=ro"], udba="reval")
    src, between, dst, low = (daemon.branch("a", name) for name in ("src", "between", "dst", "low"))
    for name in ("whited", "opaque/x", "twice", "plain", "kept", "linked", "down"):
        (src / name).parent.mkdir(exist_ok=True)
        (src / name).write_text("upper")
    (between / ".wh.whited").touch()
    (between / "opaque").mkdir()
    (between / "opaque" / ".wh..wh..opq").touch()
    for name in ("twice", "only"):
        (between / name).write_text("between")
    for name in ("plain", "linked"):
        (dst / name).write_text("lower")
    os.link(dst / "linked", dst / "other")
    daemon.start()

    def refused(name: str, *words: str) -> str:
        said = daemon.command("mvdown", *words, str(mount / name), code=ExitCode.REFUSED)
        return re.sub(r"^udbad: /\S+: ", "", said).rstrip("\n")

    assert refused("whited") == f"a whiteout on branch {between} hides branch {dst}"
    assert (
        refused("opaque/x")
        == f"its directory on branch {between} is opaque, whited out or renamed, which hides branch {dst}"
    )
    assert refused("twice") == f"another copy is between, on branch {between}"
    assert refused("twice", "--from", str(between)) == f"an upper copy is on branch {src}"
    assert refused("only", "--from", str(src)) == f"branch {src} has no copy of it"
    assert refused("only") == f"branch {between} is not writable (--read-only-upper moves all the same)"
    assert refused("linked", "--overwrite-lower") == f"its copy on branch {dst} has 2 names"
    daemon.command("mvdown", "--read-only-upper", str(mount / "only"))
    assert not (between / "only").exists()
    assert (dst / "only").read_text() == (mount / "only").read_text() == "between"
    daemon.command("mvdown", "--overwrite-lower", str(mount / "plain"))
    assert not (src / "plain").exists()
    assert (dst / "plain").read_text() == (mount / "plain").read_text() == "upper"
    assert daemon.command("mvdown", "--keep-upper", str(mount / "kept")).startswith("copied from")
    assert (src / "kept").read_text() == (dst / "kept").read_text() == "upper"
    daemon.command("mvdown", "--read-only-lower", str(mount / "down"))
    assert not (src / "down").exists()
    assert (between / "down").read_text() == (mount / "down").read_text() == "upper"
    (low / "one").write_text("pseudo-linked")
    os.link(low / "one", low / "two")
    with open(mount / "one", "a") as stream:
        stream.write("!")
    assert refused("one") == "it is pseudo-linked, that is it has other names on lower branches"
    daemon.stop()


# -- diff ---------------------------------------------------------------------------------------------------


def changes(daemon: Daemon, *words: str) -> dict[bytes, tuple[str, str, str]]:
    found = json.loads(daemon.command("diff", "--json", *words))
    return {os.fsencode(one["path"]): (one["change"], one["type"], one["detail"]) for one in found}


@pytest.mark.parametrize("whiteouts", ["aufs", "overlay"])
def test_diff_tells_what_the_top_branch_changes(daemon: Daemon, whiteouts: str) -> None:
    mount = mounted(daemon, whiteouts=whiteouts)
    src = daemon.branch("a", "src")
    offline = changes(daemon, *(str(daemon.branch("a", name)) for name in LAYERS))
    found = changes(daemon, str(mount))
    assert found == offline == changes(daemon, "a")
    assert found == {
        b"becomes_dir": ("type", "directory", "was a file"),
        b"becomes_dir/in": ("added", "file", ""),
        b"becomes_file": ("type", "file", "was a directory"),
        b"both/deep/gone": ("deleted", "file", ""),
        b"both/everywhere": ("changed", "file", "content, time"),
        b"both/gone": ("deleted", "file", ""),
        b"both/src": ("added", "file", ""),
        b"both/two": ("added", "file", ""),
        b"chmodded": ("metadata", "file", "mode"),
        b"everywhere": ("changed", "file", "content, time"),
        b"gone": ("deleted", "file", ""),
        b"gone_dir": ("deleted", "directory", ""),
        b"gone_here": ("deleted", "file", ""),
        b"mixed/\xff\n\x01 odd": ("added", "file", ""),
        b"mixed/fifo": ("added", "fifo", ""),
        b"mixed/link": ("added", "symlink", ""),
        b"mixed/one": ("added", "file", ""),
        b"mixed/sparse": ("added", "file", ""),
        b"new": ("added", "directory", ""),
        b"new/empty": ("added", "directory", ""),
        b"new/er": ("added", "directory", ""),
        b"new/er/file": ("added", "file", ""),
        b"new/three": ("added", "file", ""),
        b"opaque": ("metadata", "directory", "opaque"),
        b"opaque/deep": ("deleted", "directory", ""),
        b"opaque/mine": ("added", "file", ""),
        b"opaque/sub/mine": ("added", "file", ""),
        b"opaque/sub/new": ("added", "directory", ""),
        b"opaque/sub/of_dst": ("deleted", "file", ""),
        b"opaque/sub/of_low": ("deleted", "file", ""),
        b"pair": ("metadata", "directory", "opaque"),
        b"pair/mine": ("added", "file", ""),
        b"pair/of_dst": ("deleted", "file", ""),
        b"pair/of_low": ("deleted", "file", ""),
        b"pair_file": ("changed", "file", "content, time"),
    }
    # What it calls deleted and added is what appears and goes with the branch.
    with_it = snapshot(mount).keys()
    daemon.command("branch", "del", "a", str(src))
    without = snapshot(mount).keys()
    added = {path for path, change in found.items() if change[0] == "added"}
    assert added <= with_it - without
    assert {path for path, change in found.items() if change[0] == "deleted"} <= without - with_it
    daemon.stop()


def test_diff_of_a_part_identical_copies_and_the_table(daemon: Daemon) -> None:
    mount = mounted(daemon)
    assert changes(daemon, str(mount / "both" / "deep")) == {b"both/deep/gone": ("deleted", "file", "")}
    assert changes(daemon, "--all", str(mount / "same")) == {b"same": ("identical", "file", "")}
    assert changes(daemon, str(mount / "same")) == {}
    said = daemon.command("diff", str(mount))
    assert re.search(r"^added +file +mixed/\\xff\\n\\x01 odd *$", said, re.MULTILINE), said
    assert re.search(r"^metadata +file +chmodded +mode *$", said, re.MULTILINE), said
    assert said.splitlines()[-1] == "17 added, 3 changed, 3 metadata, 2 type, 10 deleted"
    sync(daemon, "copy")
    assert "deleted" not in daemon.command("diff", str(mount))
    daemon.stop()


def test_diff_without_a_mount_and_wrong_words(daemon: Daemon, tmp_path: Path) -> None:
    for name in ("top", "base"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a:b").write_text("same size")
    (tmp_path / "base" / ".wh.hidden").touch()
    words = [str(tmp_path / name) for name in ("top", "base")]
    assert daemon.command("diff", *words) in ("no changes\n",) or changes(daemon, *words)[b"a:b"][2] == "time"
    shutil.copy2(tmp_path / "base" / "a:b", tmp_path / "top" / "a:b")
    assert daemon.command("diff", *words) == "no changes\n"
    alone = daemon.command("diff", words[0], code=ExitCode.NOT_MOUNTED)
    assert alone == f"udbad: {words[0]} is in no union; to compare a branch, name the lower ones too\n"
    missing = daemon.command("diff", words[0], str(tmp_path / "nothing"), code=ExitCode.BRANCH)
    assert missing == f"udbad: {tmp_path}/nothing: No such file or directory\n"
