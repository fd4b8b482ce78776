"""io=auto, the default: who reads and writes files follows from the branches and the mode."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.mount import UnionFactory

pytestmark = pytest.mark.fuse

POOL = {"a": "rw", "b": "rw"}
TREE = {"top": "rw", "base": "ro"}


@pytest.mark.parametrize(
    ("layers", "udba", "more", "io", "why"),
    [
        (POOL, "none", "", "passthrough", ""),
        (POOL, "reval", "", "passthrough", ""),
        (POOL, "notify", "", "passthrough", ""),
        (POOL, "notify", ",ro", "cached", ""),
        (TREE, "none", "", "cached", ""),
        (TREE, "notify", "", "cached", ""),
        (TREE, "reval", "", "requests", ""),
        ({"top": "rw", "base": "ro+coo_reg"}, "notify", "", "requests", ""),
        ({"a": "rw", "b": "rw+moo"}, "notify", "", "passthrough", "copied up when opened"),
        (TREE, "notify", ",edge=pyfuse3", "requests", ""),
    ],
)
def test_what_suits_the_branches(
    union: UnionFactory, tmp_path: Path, layers: dict[str, str], udba: str, more: str, io: str, why: str
) -> None:
    first = next(iter(layers))
    (tmp_path / first).mkdir()
    (tmp_path / first / "file").write_text("content")
    mount = union(layers, udba, f"io=auto{more}")
    assert (mount.path / "file").read_text() == "content"
    answer = mount.control({"op": "status"})
    assert answer["io"] == io
    assert [why in line for line in answer["io_fallbacks"]] == ([True] if why else [])
    assert all(mount.log().count(line) == 1 for line in answer["io_fallbacks"])
