"""Direct changes in lower layers below directories that have another name in the union, on the way to them, and of the
redirects themselves, with the kernel having cached what was there before; on real mounts, in all modes."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.mount import Mount, UnionFactory

pytestmark = pytest.mark.fuse

KEY = "trusted.overlay.redirect"
LAYERS = {"top": "rw", "mid": "ro+wh", "base": "ro"}


def shown(directory: Path) -> dict[str, str | None]:
    """Every path below a directory, by listings; of a file its content."""
    found: dict[str, str | None] = {}
    for above, directories, files in os.walk(directory):
        found |= dict.fromkeys(os.path.relpath(os.path.join(above, name), directory) for name in directories)
        for name in files:
            path = os.path.join(above, name)
            found[os.path.relpath(path, directory)] = Path(path).read_text()
    return found


def by_name(directory: Path, names: set[str]) -> set[str]:
    """Which of these paths there are, each asked for."""
    return {name for name in names if os.path.lexists(directory / name)}


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def fill(root: Path) -> None:
    write(root / "base/p/old/a", "a")
    write(root / "base/p/old/sub/b", "b")
    write(root / "base/p/other/c", "c")
    write(root / "mid/p/old/m", "m")


BEFORE: dict[str, str | None] = {"a": "a", "sub": None, "sub/b": "b", "m": "m"}
Change = Callable[[Path], object]
CHANGES: dict[str, tuple[Change, dict[str, str | None]]] = {
    "a file is changed": (lambda root: write(root / "base/p/old/a", "changed"), {**BEFORE, "a": "changed"}),
    "a file comes": (lambda root: write(root / "base/p/old/sub/n", "n"), {**BEFORE, "sub/n": "n"}),
    "a file goes": (
        lambda root: (root / "base/p/old/sub/b").unlink(),
        {name: text for name, text in BEFORE.items() if name != "sub/b"},
    ),
    "a whiteout comes": (
        lambda root: write(root / "mid/p/old/.wh.a", ""),
        {name: text for name, text in BEFORE.items() if name != "a"},
    ),
    "an opaque mark comes": (lambda root: write(root / "mid/p/old/.wh..wh..opq", ""), {"m": "m"}),
    "it is hidden": (lambda root: write(root / "mid/p/.wh.old", ""), {"m": "m"}),
    "the way is hidden": (lambda root: write(root / "mid/.wh.p", ""), {"m": "m"}),
    "it is moved away": (lambda root: (root / "base/p/old").rename(root / "base/p/x"), {"m": "m"}),
    "the way is moved away": (lambda root: (root / "base/p").rename(root / "base/q"), {"m": "m"}),
    "the upper part of it goes": (
        lambda root: shutil.rmtree(root / "mid/p"),
        {name: text for name, text in BEFORE.items() if name != "m"},
    ),
    "the redirect is another one": (lambda root: os.setxattr(root / "top/new", KEY, b"/p/other"), {"c": "c"}),
    "the redirect goes": (lambda root: os.removexattr(root / "top/new", KEY), {}),
    "another directory gets its own name": (lambda root: write(root / "base/new/z", "z"), BEFORE),
    "a file is put on top": (lambda root: write(root / "top/new/sub/t", "t"), {**BEFORE, "sub/t": "t"}),
}


def settle(mount: Mount, udba: str) -> None:
    if udba == "notify":
        mount.flush()
    elif udba == "none":
        mount.remount()


def warm(directory: Path, names: set[str]) -> None:
    for _ in range(3):
        assert shown(directory) == BEFORE
        by_name(directory, names)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("udba", ["none", "reval", "notify"])
def test_a_direct_change(tmp_path: Path, union: UnionFactory, udba: str, change: str) -> None:
    fill(tmp_path)
    act, after = CHANGES[change]
    mount = union(LAYERS, udba, "dirren=on")
    (mount.path / "p/old").rename(mount.path / "new")
    names = {*BEFORE, *after}
    warm(mount.path / "new", names)
    act(tmp_path)
    settle(mount, udba)
    for _ in range(2):
        assert by_name(mount.path / "new", names) == set(after)
        assert shown(mount.path / "new") == after
    mount.remount()
    assert shown(mount.path / "new") == after


@pytest.mark.parametrize("udba", ["none", "reval", "notify"])
def test_what_comes_where_a_redirect_leads(tmp_path: Path, union: UnionFactory, udba: str) -> None:
    fill(tmp_path)
    mount = union(LAYERS, udba, "dirren=on")
    (mount.path / "p/old").rename(mount.path / "new")
    (tmp_path / "base/p").rename(tmp_path / "base/q")
    (tmp_path / "mid/p/old").rename(tmp_path / "mid/p/x")
    settle(mount, udba)
    for _ in range(3):
        assert shown(mount.path / "new") == {}
        assert not os.path.lexists(mount.path / "new/a")
    (tmp_path / "base/q").rename(tmp_path / "base/p")
    settle(mount, udba)
    assert shown(mount.path / "new") == {name: text for name, text in BEFORE.items() if name != "m"}


@pytest.mark.parametrize("udba", ["none", "reval", "notify"])
def test_what_is_shown_in_two_places_is_two(tmp_path: Path, union: UnionFactory, udba: str) -> None:
    """The whiteout at its old name goes: the lower part is shown there again, as it is below the new name."""
    fill(tmp_path)
    mount = union(LAYERS, udba, "dirren=on")
    old, new = mount.path / "p/old", mount.path / "new"
    old.rename(new)
    warm(new, set(BEFORE))
    (tmp_path / "top/p/.wh.old").unlink()
    settle(mount, udba)
    for _ in range(2):
        for name in (".", "sub", "a", "sub/b"):
            assert os.lstat(old / name).st_ino != os.lstat(new / name).st_ino
        assert shown(old) == shown(new) == BEFORE
    write(old / "sub/b", "changed")
    (old / "made").mkdir()
    (new / "sub").rename(old / "made/sub")
    (new / "a").unlink()
    assert (old / "a").stat().st_nlink == 1
    assert (old / "sub/b").read_text() == "changed"
    assert shown(old / "made") == {"sub": None, "sub/b": "b"}
    assert shown(new) == {"m": "m"}
    (tmp_path / "base/p/old/sub/n").touch()
    settle(mount, udba)
    assert (old / "sub/n").exists()
    assert (old / "made/sub/n").exists()


@pytest.mark.parametrize("udba", ["none", "notify"])
def test_what_has_not_changed_is_asked_for_once(tmp_path: Path, union: UnionFactory, udba: str) -> None:
    fill(tmp_path)
    mount = union(LAYERS, udba, "dirren=on")
    (mount.path / "p/old").rename(mount.path / "new")
    warm(mount.path / "new", set(BEFORE))

    def asked() -> int:
        requests = mount.requests()
        return requests.get("lookup", 0) + requests.get("getattr", 0)

    for _ in range(2):
        before = asked()
        for name in BEFORE:
            os.lstat(mount.path / "new" / name)
        requests = asked() - before
    assert requests == 0


@pytest.mark.parametrize("udba", ["none", "reval", "notify"])
def test_numbers_and_open_files_stay(tmp_path: Path, union: UnionFactory, udba: str) -> None:
    fill(tmp_path)
    mount = union(LAYERS, udba, "dirren=on")
    old, new = mount.path / "p/old", mount.path / "new"

    def numbers(directory: Path) -> dict[str, int]:
        found = {name: os.lstat(directory / name).st_ino for name in BEFORE}
        for above, _, _ in os.walk(directory):
            with os.scandir(above) as entries:
                for entry in entries:
                    assert entry.inode() == found[os.path.relpath(entry.path, directory)]
        return {**found, ".": os.lstat(directory).st_ino}

    before = numbers(old)
    with open(old / "sub/b", "r+") as file:
        here = os.open(old / "sub", os.O_RDONLY)
        try:
            old.rename(new)
            assert numbers(new) == before
            assert os.listdir(here) == ["b"]
            file.write("B")
            file.flush()
            assert (new / "sub/b").read_text() == "B"
            assert numbers(new) == before
        finally:
            os.close(here)
    assert (tmp_path / "base/p/old/sub/b").read_text() == "b"


@pytest.mark.parametrize("udba", ["none", "reval", "notify"])
def test_git_moves_a_directory(tmp_path: Path, union: UnionFactory, udba: str) -> None:
    def git(*words: str, at: Path) -> str:
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "safe.directory=*"]
        done = subprocess.run(["git", *identity, *words], cwd=at, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout

    base = tmp_path / "base"
    for number in range(30):
        write(base / f"lib/part{number % 3}/file{number}", str(number))
    git("init", "-q", at=base)
    git("add", ".", at=base)
    git("commit", "-qm", "first", at=base)
    mount = union({"top": "rw", "base": "ro"}, udba, "dirren=auto")
    git("mv", "lib", "src", at=mount.path)
    git("mv", "src/part1", "part", at=mount.path)
    assert git("status", "--porcelain", at=mount.path).count("R  ") == 30
    git("commit", "-qm", "moved", at=mount.path)
    assert git("status", "--porcelain", at=mount.path) == ""
    assert not list((tmp_path / "top").rglob("file*")), "nothing was copied"
    git("checkout", "-q", "HEAD~1", at=mount.path)
    assert (mount.path / "lib/part1/file1").read_text() == "1"
    assert git("status", "--porcelain", at=mount.path) == ""
    git("fsck", "--strict", at=mount.path)
