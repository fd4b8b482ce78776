"""The rule that says which branches a name is made of, and that whoever knows it by heart applies the same one."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from udbad.branch.branches import Branch, BranchSet
from udbad.branch.layers import End, Held, Part, look, merge
from udbad.branch.policy import parse_copyup, parse_create
from udbad.inodes.node import Dir
from udbad.tools import explain, homecheck
from udbad.types import Perm
from udbad.union import resolve, view
from udbad.union.superblock import Superblock, UnionOptions

# What a branch has under a name: "f" file, "l" symlink, "d" directory, "-" nothing; and "w" its whiteout, "o" an
# opaque mark in the directory.
TABLE = [
    (["f", "f", "d"], ["top", "covered", "covered"], ["object", None, None]),
    (["-", "f", "-"], ["nothing", "top", "nothing"], [None, "object", None]),
    (["d", "d", "d"], ["top", "merged", "merged"], [None, None, None]),
    (["d", "f", "d"], ["top", "skipped", "merged"], [None, None, None]),
    (["d", "fw", "d"], ["top", "skipped", "covered"], [None, "whiteout", None]),
    (["-w", "d", "d"], ["nothing", "covered", "covered"], ["whiteout", None, None]),
    (["dw", "d", "d"], ["top", "covered", "covered"], ["whiteout", None, None]),
    (["do", "d", "f"], ["top", "covered", "covered"], ["opaque", None, None]),
    (["d", "dow", "d"], ["top", "merged", "covered"], [None, "opaque", None]),
    (["d", "-w", "d"], ["top", "nothing", "covered"], [None, "whiteout", None]),
    (["fw", "-", "-"], ["top", "nothing", "nothing"], ["object", None, None]),
    (["l", "d", "-"], ["top", "covered", "nothing"], ["object", None, None]),
    (["-", "-", "-w"], ["nothing", "nothing", "nothing"], [None, None, "whiteout"]),
]  # fmt: skip


def fill(directory: Path, name: str, what: str, overlay: bool = False) -> None:
    """overlay: marks as overlayfs makes them; a whiteout beside its name, which it cannot have, as fuse-overlayfs."""
    if what[0] == "f":
        (directory / name).touch()
    elif what[0] == "l":
        (directory / name).symlink_to("nowhere")
    elif what[0] == "d":
        (directory / name).mkdir()
    if what == "-w" and overlay:
        os.mknod(directory / name, stat.S_IFCHR)
    elif "w" in what:
        (directory / f".wh.{name}").touch()
    if "o" in what and overlay:
        os.setxattr(directory / name, "trusted.overlay.opaque", b"y")
    elif "o" in what:
        (directory / name / ".wh..wh..opq").touch()


def looked(directories: Sequence[Path], name: bytes, marks: Sequence[tuple[bool, bool]]) -> list[Held]:
    """marks: of each branch, as the arguments of `look`."""
    found = []
    for directory, (counts, overlay) in zip(directories, marks, strict=True):
        fd = os.open(directory, os.O_PATH)
        found.append(look(fd, name, counts, overlay))
        os.close(fd)
        if found[-1].fd >= 0:
            os.close(found[-1].fd)
    return found


@pytest.mark.parametrize("overlay", [False, True], ids=["aufs", "overlay"])
@pytest.mark.parametrize(("branches", "parts", "ends"), TABLE, ids=lambda value: "_".join(map(str, value)))
def test_the_table(
    tmp_path: Path, branches: list[str], parts: list[str], ends: list[str | None], overlay: bool
) -> None:
    directories = [tmp_path / str(index) for index in range(len(branches))]
    for directory, what in zip(directories, branches, strict=True):
        directory.mkdir()
        fill(directory, "n", what, overlay)
    found = list(merge(looked(directories, b"n", [(True, overlay)] * len(branches))))
    assert [part.value for part, _ in found] == parts
    assert [None if end is None else end.value for _, end in found] == ends


@pytest.mark.parametrize("overlay", [False, True], ids=["aufs", "overlay"])
def test_marks_that_do_not_count(tmp_path: Path, overlay: bool) -> None:
    fill(tmp_path, "n", "dow", overlay)
    (held,) = looked([tmp_path], b"n", [(False, False)])
    assert held.end is None
    assert held.st is not None
    assert stat.S_ISDIR(held.st.st_mode)


def test_a_name_that_the_file_system_cannot_have(tmp_path: Path) -> None:
    (held,) = looked([tmp_path], b"n" * 300, [(True, True)])
    assert (held.st, held.end) == (None, None)


# -- the others -------------------------------------------------------------------------------------

WHATS = st.sampled_from(["-", "f", "l", "d", "d", "-w", "fw", "lw", "dw", "do", "dow"])
BRANCHES = st.lists(st.tuples(st.booleans(), st.booleans(), WHATS, WHATS), min_size=1, max_size=4)
"""Of each branch: whether its marks count, whether they are those of overlayfs, and what it has as `d` and, where that
is a directory, as `d/n`."""


@contextmanager
def union_of(root: Path, spec: Sequence[tuple[bool, bool, str, str]]) -> Iterator[tuple[Superblock, list[Path]]]:
    directories = []
    branches = []
    for index, (counts, overlay, outer, inner) in enumerate(spec):
        directory = root / str(index)
        directory.mkdir()
        fill(directory, "d", outer, overlay)
        if outer[0] == "d":
            fill(directory / "d", "n", inner, overlay)
        fd = os.open(directory, os.O_RDONLY)
        branches.append(
            Branch(
                index, index, os.fsencode(directory), Perm.RO, frozenset({"wh"} if counts else ()), None,
                root_fd=fd, anchor_fd=os.dup(fd), dev=os.fstat(fd).st_dev, fs_type="", unmarked=overlay,
            )
        )  # fmt: skip
        directories.append(directory)
    try:
        yield (
            Superblock(BranchSet(tuple(branches)), UnionOptions(parse_create("tdp"), parse_copyup("tdp")), 1),
            directories,
        )
    finally:
        for branch in branches:
            branch.close()


def resolved(sb: Superblock, parent: Dir, name: bytes, closing: ExitStack) -> Any:
    """What `resolve.resolve` finds, None for nothing."""
    found: Any = resolve.resolve(sb, parent, name)
    if found is None or not hasattr(found, "layers"):
        return None
    for layer in found.layers or ():
        closing.callback(os.close, layer.fd)
    return found


def in_parts(found: Any) -> list[int]:
    """Indices of the branches that what was found is made of."""
    if found is None:
        return []
    return [found.branch.index] if found.layers is None else [layer.branch.index for layer in found.layers]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])  # expect_log is for all examples
@given(spec=BRANCHES)
@example(spec=[(True, False, "dw", "-"), (True, False, "d", "f")])
@example(spec=[(True, True, "d", "-w"), (True, True, "do", "f"), (True, True, "d", "f")])
def test_lookup_and_listing_and_explanation_follow_the_rule(
    expect_log: Callable[[str], None], spec: list[tuple[bool, bool, str, str]]
) -> None:
    """Each name of a path, asked for by name, listed, and explained."""
    expect_log("and its whiteout are both in branch")
    with tempfile.TemporaryDirectory() as root, union_of(Path(root), spec) as (sb, directories), ExitStack() as closing:
        places = list(range(len(spec)))
        parent = sb.root
        path: list[bytes] = []
        for name in (b"d", b"n"):
            here = [directories[index].joinpath(*map(os.fsdecode, path)) for index in places]
            held = looked(here, name, [(sb.branches[index].whable, sb.branches[index].overlay) for index in places])
            rule = list(zip(places, merge(held), strict=True))
            made_of = [index for index, (part, _) in rule if part in (Part.TOP, Part.MERGED)]
            ends = {end: index for index, (_, end) in rule if end is not None and index != places[-1]}

            found = resolved(sb, parent, name, closing)
            assert in_parts(found) == made_of
            if found is not None and found.layers is not None:
                assert found.opaque == next((i for i, (_, end) in rule if end is End.OPAQUE), None)
                assert found.whited == ends.get(End.WHITEOUT)

            hit = view.scan(sb, parent).get(name, ())
            listed = [hit] if isinstance(hit, int) else list(hit or ())
            # A listing does not look into the directories that it names.
            opaque = any(end is End.OPAQUE for _, (_, end) in rule)
            assert (listed[: len(made_of)] if opaque else listed) == made_of

            path.append(name)
            copies = explain.where(sb, path)["copies"]
            assert [copy["index"] for copy in copies if copy["role"] in ("serves", "merged")] == made_of
            if found is None or found.layers is None:
                return
            parent = Dir(0, found.layers)
            places = made_of


@given(WHATS, WHATS)
def test_what_covers_the_home_of_a_pseudo_link_follows_the_rule(outer: str, inner: str) -> None:
    """Whether a lower branch's d/n is to be seen below a branch that may have something there."""
    with tempfile.TemporaryDirectory() as root, union_of(
        Path(root), [(True, False, outer, inner), (True, False, "d", "f")]
    ) as (
        sb, _,
    ), ExitStack() as closing:  # fmt: skip
        directory = resolved(sb, sb.root, b"d", closing)
        found = None
        if directory is not None and directory.layers is not None:
            found = resolved(sb, Dir(0, directory.layers), b"n", closing)
        assert homecheck._covered(sb.branches[0].root_fd, b"d/n") == (in_parts(found) != [1])
