"""A mount that runs the Python sources of the hot modules works, and says so once."""

from __future__ import annotations

import pytest

from tests.helpers.mount import UnionFactory

pytestmark = pytest.mark.fuse


def test_the_log_says_so(union: UnionFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.helpers.mount.EXECUTED", True)
    monkeypatch.setenv("UDBAD_PURE", "1")
    mount = union({"top": "rw", "base": "ro"}, "notify")
    (mount.path / "file").write_text("content")
    assert (mount["top"] / "file").read_text() == "content"
    assert mount.log().count("runs uncompiled, which takes more CPU time: UDBAD_PURE is set") == 1
