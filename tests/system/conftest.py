"""Scenarios run beside other tests (.ci/test.sh), some of which lower the system's inotify limits for a moment."""

from __future__ import annotations

import os
from functools import partial

import pytest

from tests.helpers.mount import UnionFactory
from tests.system.support import OTHERS_LOG

collect_ignore = [] if os.environ.get("UDBAD_DEB") else ["test_package.py"]
"""Only `make deb-test` has a package to try."""


@pytest.fixture
def union(union: UnionFactory) -> UnionFactory:
    """The fixture `union`, whose daemon may say that it met such a limit: it is right all the same."""
    return partial(union, allow_log=OTHERS_LOG)
