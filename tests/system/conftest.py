"""Scenarios run beside other tests (.ci/test.sh), some of which lower the system's inotify limits for a moment."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.helpers.mount import UnionFactory
from tests.system.debian import debootstrap
from tests.system.support import OTHERS_LOG, require

collect_ignore = [] if os.environ.get("UDBAD_DEB") else ["test_package.py"]
"""Only `make deb-test` has a package to try."""


@pytest.fixture
def union(union: UnionFactory) -> UnionFactory:
    """The fixture `union`, whose daemon may say that it met such a limit: it is right all the same."""
    return partial(union, allow_log=OTHERS_LOG)


@pytest.fixture(scope="session")
def debian(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A minimal Debian system, made once and never written to again; removed at the end."""
    require("debootstrap", "chroot", "unshare")
    root = tmp_path_factory.mktemp("debian") / "base"
    try:
        debootstrap(root)
        yield root
    finally:
        shutil.rmtree(root)
