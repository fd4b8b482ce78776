"""Attributes of overlayfs' own names, on a branch where they mean something and through the union."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import pytest

from tests.t2_core.core import core
from tests.t3_fuse.live import errno_of

RECORDS = ("trusted.overlay.opaque", "trusted.overlay.redirect", "user.overlay.origin", "user.fuseoverlayfs.opaque")
LAYERS = {"top": "rw", "base": "ro+wh"}


@pytest.mark.parametrize("key", RECORDS)
def test_records_of_a_layer_are_not_seen(tmp_path: Path, key: str) -> None:
    """Neither those of the branch that is written to, nor those of a lower one."""
    for name in ("top/mine", "base/theirs"):
        (tmp_path / name).mkdir(parents=True)
        os.setxattr(tmp_path / name, key, b"/x")
        os.setxattr(tmp_path / name, "user.kept", b"kept")
    with core(tmp_path, LAYERS, whiteouts="overlay") as at:
        for name in ("mine", "theirs"):
            number = at.find(name).id
            assert at.fs.listxattr(number, at.caller) == [b"user.kept"]
            assert errno_of(partial(at.fs.getxattr, number, key.encode())) == "ENODATA"
        assert errno_of(lambda: at.fs.removexattr(at.find("mine").id, key.encode(), at.caller)) == "ENODATA"
        assert os.getxattr(tmp_path / "top/mine", key) == b"/x"


@pytest.mark.parametrize("key", RECORDS)
def test_those_of_an_object_are_escaped(tmp_path: Path, key: str) -> None:
    """As an overlayfs within a container needs it; what it writes means nothing to us, and survives a copy-up."""
    escaped = key.replace("overlay.", "overlay.overlay.").replace("fuseoverlayfs.", "fuseoverlayfs.overlay.")
    (tmp_path / "base/dir").mkdir(parents=True)
    (tmp_path / "base/dir/file").write_text("lower")
    (tmp_path / "base/copied").mkdir()
    os.setxattr(tmp_path / "base/copied", escaped, b"y")
    with core(tmp_path, LAYERS, whiteouts="overlay") as at:
        number, name = at.find("dir").id, key.encode()
        at.run(lambda: at.fs.setxattr(number, name, b"y", at.caller))
        assert os.listxattr(tmp_path / "top/dir") == [escaped]
        assert at.fs.listxattr(number, at.caller) == [name]
        assert at.fs.getxattr(number, name) == b"y"
        assert at.names("dir") == ["file"]
        at.fs.removexattr(number, name, at.caller)
        assert os.listxattr(tmp_path / "top/dir") == []
        assert errno_of(lambda: at.fs.setxattr(number, name + b"x" * 240, b"y", at.caller)) == "EOPNOTSUPP"

        copied = at.find("copied").id
        at.run(lambda: at.fs.setxattr(copied, b"user.more", b"", at.caller))
        assert at.fs.getxattr(copied, name) == b"y"
        assert os.getxattr(tmp_path / "top/copied", escaped) == b"y"
