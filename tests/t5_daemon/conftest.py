"""The fixture `daemon`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.t5_daemon.daemon import Daemon


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    """A daemon below tmp_path, not started; at the end nothing of it is left."""
    running = Daemon(tmp_path)
    try:
        yield running
    finally:
        running.destroy()
