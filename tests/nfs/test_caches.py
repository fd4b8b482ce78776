"""What a client of NFS has cached, and that it is dealt with: udbad/hosts/freshen.py, on a kernel's own client.

Each case shows first that the client is wrong by itself; without that it would prove nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.helpers.network import hosts
from tests.helpers.profile import scaled
from tests.nfs.servers import Nfs, ext4
from udbad.hosts.freshen import freshen

OPTIONS = ("vers=4.2", "vers=4.1,actimeo=600", "vers=4.2,lookupcache=positive,actimeo=600")
"""The defaults; keeping what it can for long, so that nothing ends by itself; what is advised for names."""


@dataclass(frozen=True)
class Look:
    """make, change: in a directory on the server; see: there, and through the client. absent: that a name is absent is
    what may be cached; opened: the client asks its server by itself (close-to-open)."""

    id: str
    make: Callable[[Path], object]
    see: Callable[[Path], object]
    change: Callable[[Path], object]
    paths: tuple[str, ...]
    absent: bool = False
    opened: bool = False


def directory_to_file(here: Path) -> None:
    (here / "f/deep").rmdir()
    (here / "f").rmdir()
    (here / "f").touch()


def often(here: Path) -> None:
    for _ in range(50):
        (here / "f").touch()
        (here / "f").unlink()
    (here / "f").touch()


LOOKS = (
    Look("created", lambda d: None, lambda d: (d / "f").exists(), lambda d: (d / "f").touch(), ("f",), absent=True),
    Look("removed", lambda d: (d / "f").touch(), lambda d: (d / "f").exists(), lambda d: (d / "f").unlink(), ("f",)),
    Look(
        "longer", lambda d: (d / "f").write_text("old"), lambda d: (d / "f").stat().st_size,
        lambda d: (d / "f").write_text("longer"), ("f",),
    ),
    Look(
        "mode", lambda d: (d / "f").write_text("old"), lambda d: (d / "f").stat().st_mode,
        lambda d: (d / "f").chmod(0o600), ("f",),
    ),
    Look(
        "content", lambda d: (d / "f").write_text("old"), lambda d: (d / "f").read_text(),
        lambda d: (d / "f").write_text("new"), ("f",), opened=True,
    ),
    Look(
        "renamed", lambda d: (d / "f").touch(), lambda d: (d / "f").exists(), lambda d: (d / "f").rename(d / "g"),
        ("f", "g"),
    ),
    Look(
        "renamed over", lambda d: [(d / name).write_text(name) for name in "fg"],
        lambda d: ((d / "f").stat().st_ino, (d / "g").exists()), lambda d: (d / "g").rename(d / "f"), ("f", "g"),
    ),
    Look(
        "directory renamed", lambda d: (d / "f/deep").mkdir(parents=True), lambda d: (d / "f/deep").exists(),
        lambda d: (d / "f").rename(d / "g"), ("f", "g", "g/"),
    ),
    Look(
        "directory to file", lambda d: (d / "f/deep").mkdir(parents=True), lambda d: (d / "f").is_dir(),
        directory_to_file, ("f", "f/deep"),
    ),
    Look(
        "deep", lambda d: (d / "a/b").mkdir(parents=True), lambda d: (d / "a/b/f").exists(),
        lambda d: (d / "a/b/f").touch(), ("a/b/f",), absent=True,
    ),
    Look("listed", lambda d: None, lambda d: sorted(os.listdir(d)), lambda d: (d / "f").touch(), ("f",), opened=True),
    Look("often", lambda d: None, lambda d: (d / "f").exists(), often, ("f",), absent=True),
)  # fmt: skip


@dataclass
class Place:
    options: str
    export: Path
    here: Path


@pytest.fixture(scope="module", params=OPTIONS)
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    root = tmp_path_factory.mktemp("nfs")
    share = Nfs(request.param, 60.0)
    with ExitStack() as stack:
        server, client = stack.enter_context(hosts(1))
        export = stack.enter_context(ext4(root / "export"))
        stack.enter_context(share.serve(server, export))
        stack.enter_context(share.bring(client, root / "share"))
        yield Place(request.param, export, root / "share")


@pytest.mark.parametrize("look", LOOKS, ids=lambda look: look.id)
def test_what_was_changed_is_seen(place: Place, look: Look) -> None:
    name = look.id.replace(" ", "-")
    far, near = place.export / name, place.here / name
    far.mkdir()
    look.make(far)
    freshen(str(place.here), [name, *(f"{name}/{path}" for path in look.paths)])
    before = look.see(near)
    assert look.see(near) == before
    look.change(far)
    now = look.see(far)
    assert now != before
    if not look.opened and not (look.absent and "lookupcache=positive" in place.options):
        assert look.see(near) == before, "the client has not cached anything: nothing is proven"
    freshen(str(place.here), [f"{name}/{path}" for path in look.paths])
    assert look.see(near) == now


def test_each_of_many_changes_is_seen(place: Place) -> None:
    """One after the other, as fast as it goes: several within a tick of the server's clock."""
    far, near = place.export / "fast", place.here / "fast"
    far.mkdir()
    for number in range(scaled(20, 200)):
        (far / "f").write_text("x" * number)
        freshen(str(place.here), ["fast/f"])
        assert (near / "f").stat().st_size == number
        assert len((near / "f").read_text()) == number
        (far / "f").unlink()
        freshen(str(place.here), ["fast/f"])
        assert not (near / "f").exists()
