"""Whatever is not to be had of inotify and fanotify: what `watch=` makes of it, and that nothing is believed which
nobody watches. Silent branches are in tests/t4_coherence/test_degrade.py, as they need a file system."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

import pytest

from tests.helpers.inprocess import notify_union
from udbad.branch import fanotify, listing
from udbad.coherence import watches
from udbad.types import ROOT_ID, Perm

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="fanotify takes CAP_SYS_ADMIN")

LACKS = {
    "nothing": (),
    "watches": ("watches",),
    "fanotify": ("fanotify",),
    "handles": ("handles",),
    "watches and fanotify": ("watches", "fanotify"),
    "watches and handles": ("watches", "handles"),
    "instance": ("instance",),
}
"""What the kernel refuses."""
REFUSED = {
    "watches": (listing, "watch", errno.ENOSPC),
    "fanotify": (fanotify, "open_group", errno.EPERM),
    "handles": (fanotify, "mark", errno.EOPNOTSUPP),
    "instance": (listing, "inotify", errno.EMFILE),
}
STATES = {
    # lacks: state with inotify, fanotify, auto
    "nothing": ("healthy", "healthy", "healthy"),
    "watches": ("limited", "healthy", "healthy"),
    "fanotify": ("healthy", "healthy", "healthy"),
    "handles": ("healthy", "healthy", "healthy"),
    "watches and fanotify": ("limited", "limited", "limited"),
    "watches and handles": ("limited", "limited", "limited"),
    "instance": ("degraded", "degraded", "degraded"),
}


@pytest.mark.parametrize("watch", ["inotify", "fanotify", "auto"])
@pytest.mark.parametrize("lacks", LACKS)
def test_what_is_not_watched_is_not_believed(
    tmp_path: Path, watch: str, lacks: str, expect_log: Callable[[str], None]
) -> None:
    base = tmp_path / "base"
    (base / "d").mkdir(parents=True)
    state = STATES[lacks][("inotify", "fanotify", "auto").index(watch)]
    if state != "healthy":
        expect_log(f"coherence {state}")
    with ExitStack() as refused:
        for what in LACKS[lacks]:
            module, name, number = REFUSED[what]
            refused.enter_context(patch.object(module, name, side_effect=OSError(number, os.strerror(number))))
        with notify_union([(base, Perm.RO)], tmp_path / "mnt", watch=watch) as union:
            directory = union.look_up(ROOT_ID, b"d")
            found = union.coherence.statistics()
            assert found.state == union.coherence.state_of(union.fs.sb.branches[0]) == state
            assert found.degraded_directories == (0 if state == "healthy" else 2)
            assert union.fs.table.directory(directory).trusted == (state == "healthy")
            by_fanotify = (
                state == "healthy"
                and not {"fanotify", "handles"} & set(LACKS[lacks])
                and (watch == "fanotify" or (watch == "auto" and lacks == "watches"))
            )
            assert (found.handles, found.watches) == ((2, 0) if by_fanotify else (0, 2 if state == "healthy" else 0))
            (base / "d/new").touch()
            union.coherence.drain()
            assert union.look_up(directory, b"new")
            if state != "limited":
                return
            refused.close()
            # Room that others have taken is looked for anew when the limit is another one, or after a minute.
            with patch.object(watches, "_HEALED_SECONDS", 0.0):
                for _ in range(2):
                    union.look_up(ROOT_ID, b"d")
                    union.look_up(directory, b"new")
            found = union.coherence.statistics()
            assert (found.state, found.degraded_directories) == ("healthy", 0)


@pytest.mark.parametrize(
    ("watch", "top", "base", "found"),
    [
        # directories and files by inotify, by fanotify: 2 and a file with two names on top, 4 on base
        ("inotify", None, None, (7, 0)),
        ("inotify", "fanotify", None, (4, 3)),
        ("inotify", None, "fanotify", (3, 4)),
        ("fanotify", "inotify", None, (3, 4)),
        ("auto", "fanotify", "inotify", (4, 3)),
        ("fanotify", "auto", "auto", (7, 0)),
    ],
)
def test_each_branch_is_watched_in_its_way(
    tmp_path: Path, watch: str, top: str | None, base: str | None, found: tuple[int, int]
) -> None:
    for name in ("top/d", "base/d", "base/e", "base/f"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "top/d/two").touch()
    os.link(tmp_path / "top/d/two", tmp_path / "top/names")
    branches = [(tmp_path / "top", Perm.RW), (tmp_path / "base", Perm.RO)]
    with notify_union(branches, tmp_path / "mnt", watch=watch, own=(top, base)) as union:
        directory, e, f = (union.look_up(ROOT_ID, name) for name in (b"d", b"e", b"f"))
        union.look_up(directory, b"two")
        said = union.coherence.statistics()
        assert (said.state, said.degraded_directories) == ("healthy", 0)
        assert (said.watches, said.handles) == found
        for node, name in ((directory, "top/d"), (directory, "base/d"), (e, "base/e"), (f, "base/f")):
            new = name.replace("/", "-")
            assert not union.look_up(node, new.encode())
            (tmp_path / name / new).touch()
            union.coherence.drain()
            assert union.look_up(node, new.encode())


def test_what_takes_no_watch_of_inotify_makes_no_room(tmp_path: Path, expect_log: Callable[[str], None]) -> None:
    """When one branch has no more watches, directories of another one keep what they have."""
    expect_log("coherence limited")
    for name in ("top/d", "base/e"):
        (tmp_path / name).mkdir(parents=True)
    branches = [(tmp_path / "top", Perm.RW), (tmp_path / "base", Perm.RO)]
    with notify_union(branches, tmp_path / "mnt", watch="inotify", own=("fanotify", None)) as union:
        nodes = [union.fs.table.directory(union.look_up(ROOT_ID, b"d"))]
        nodes[0].hot = False
        with patch.object(listing, "watch", side_effect=OSError(errno.ENOSPC, "")):
            nodes.append(union.fs.table.directory(union.look_up(ROOT_ID, b"e")))
        assert [node.trusted for node in nodes] == [True, False]


def test_lost_events_of_whole_file_systems(tmp_path: Path, expect_log: Callable[[str], None]) -> None:
    """The queue has no limit but memory: everything is asked again."""
    expect_log("lost branch events")
    base = tmp_path / "base"
    (base / "d").mkdir(parents=True)
    with notify_union([(base, Perm.RO)], tmp_path / "mnt", watch="fanotify") as union:
        node = union.fs.table.directory(union.look_up(ROOT_ID, b"d"))
        trusted = [node.trusted]
        lost = [(b"", fanotify.Q_OVERFLOW, b"", 0)]
        with patch("udbad.coherence.marks.fanotify.events", return_value=(1, lost)):
            (base / "d/new").touch()
            union.coherence.drain()
        trusted.append(node.trusted)
        assert union.coherence.statistics().overflows == 1
        assert union.look_up(node.id, b"new")
        trusted.append(node.trusted)
        assert trusted == [True, False, True]
