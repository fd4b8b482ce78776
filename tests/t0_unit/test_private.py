"""State that root acts upon: who can have written it, under any umask, and who can keep it locked."""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from udbad.control import private, registry

STRANGER = 65534


@pytest.fixture(autouse=True)
def _umask() -> Iterator[None]:
    """As in a mount process."""
    before = os.umask(0)
    yield
    os.umask(before)


def entry(path: str, pid: int = 0) -> registry.Entry:
    return registry.Entry(
        name="", mount_point="/m", asked="/m", options="br=/a", configured="br=/a", pid=pid or os.getpid(),
        connection=1, supervised=True, version="1", started=0.0, directory=path,
    )  # fmt: skip


@pytest.fixture
def registered(tmp_path: Path) -> Iterator[Path]:
    """The directory of a mount in the run directory tmp_path/above/run, registered and claimed."""
    run_dir = str(tmp_path / "above" / "run")
    claim = registry.Claim(run_dir, b"/m")
    registration = registry.Registration(run_dir, b"/m")
    registration.write(entry(registration.path))
    registration.write_branches(["/a=rw", "/b=ro"])
    yield Path(registration.path)
    claim.release()
    registration.release()


def test_modes_do_not_follow_the_umask(registered: Path) -> None:
    found = {
        str(path.relative_to(registered.parents[2])): oct(stat.S_IMODE(path.lstat().st_mode))
        for path in (registered.parents[1], *registered.parents[1].rglob("*"))
    }
    place = f"above/run/{registered.name}"
    assert found == {
        "above": "0o755", "above/run": "0o755", place: "0o755", f"{place}/mount.json": "0o644",
        f"{place}/br0": "0o644", f"{place}/br1": "0o644", f"{place}/alive": "0o600", f"{place}/claim": "0o600",
    }  # fmt: skip


CHANGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "writable file": (lambda path: (path / "mount.json").chmod(0o666), "mode is 0666"),
    "group-writable file": (lambda path: (path / "mount.json").chmod(0o664), "mode is 0664"),
    "foreign file": (lambda path: os.chown(path / "mount.json", STRANGER, 0), f"belongs to uid {STRANGER}"),
    "writable directory": (lambda path: path.chmod(0o777), "mode is 0777"),
    "foreign directory": (lambda path: os.chown(path, STRANGER, 0), f"belongs to uid {STRANGER}"),
    "writable run directory": (lambda path: path.parent.chmod(0o1777), "mode is 1777"),
    "foreign run directory": (lambda path: os.chown(path.parent, STRANGER, 0), f"belongs to uid {STRANGER}"),
    "linked file": (lambda path: _behind_a_link(path / "mount.json"), "is a symbolic link"),
    "linked directory": (lambda path: _behind_a_link(path), "is a symbolic link"),
    "linked run directory": (lambda path: _behind_a_link(path.parent), "is a symbolic link"),
}


def _behind_a_link(path: Path) -> None:
    path.rename(path.with_name("real"))
    path.symlink_to("real")


@pytest.mark.parametrize("what", CHANGES)
def test_what_others_may_have_written_is_passed_over(
    registered: Path, expect_log: Callable[[str], None], what: str
) -> None:
    run_dir = str(registered.parent)
    assert [one.mount_point for one in registry.entries(run_dir)] == ["/m"]
    change, why = CHANGES[what]
    change(registered)
    expect_log(f"{registered} is passed over: .*{why}")
    assert registry.entries(run_dir) == []
    assert registry.find(run_dir, "/m/file") is None


@pytest.mark.parametrize("what", [what for what in CHANGES if "directory" in what])
def test_nothing_is_written_where_others_may_write(registered: Path, what: str) -> None:
    change, why = CHANGES[what]
    change(registered)
    for call in (registry.Claim, registry.Registration):
        with pytest.raises(private.NotPrivate, match=why):
            call(str(registered.parent), b"/m")


def test_a_temporary_that_somebody_has_open_is_not_used(registered: Path) -> None:
    with (registered / ".mount.json.new").open("w") as theirs:
        (registered / ".mount.json.new").chmod(0o666)
        with private.directory(str(registered)) as dirfd:
            private.write(dirfd, "mount.json", b"ours")
        theirs.write("theirs")
    assert (registered / "mount.json").read_text() == "ours"
    assert stat.S_IMODE((registered / "mount.json").stat().st_mode) == 0o644


def test_a_strangers_lock_keeps_nobody_out(tmp_path: Path) -> None:
    """Whoever can open a directory can lock it; the claim is on a file that only root can open."""
    run_dir = str(tmp_path / "run")
    claim = registry.Claim(run_dir, b"/m")
    place = registry.directory(run_dir, b"/m")
    claim.release()
    descriptors = [os.open(path, os.O_RDONLY) for path in (run_dir, place)]
    for fd in descriptors:
        fcntl.flock(fd, fcntl.LOCK_EX)
    claim = registry.Claim(run_dir, b"/m", 0)
    with pytest.raises(OSError, match="busy"):
        registry.Claim(run_dir, b"/m", 0)
    claim.release()
    registry.Claim(run_dir, b"/m", 0).release()
    for fd in descriptors:
        os.close(fd)


def test_a_claim_is_not_taken_away_by_the_end_of_the_mount_before(tmp_path: Path) -> None:
    run_dir = str(tmp_path / "run")
    registration = registry.Registration(run_dir, b"/m")
    registration.write(entry(registration.path))
    claim = registry.Claim(run_dir, b"/m", 0)
    registration.remove()  # whoever has the claim will say what is so then
    with pytest.raises(OSError, match="busy"):
        registry.Claim(run_dir, b"/m", 0)
    claim.release()
    registration = registry.Registration(run_dir, b"/m")
    registration.remove()
    assert os.listdir(run_dir) == []
