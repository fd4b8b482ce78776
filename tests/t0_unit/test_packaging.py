"""What packages say of udbad agrees with udbad."""

from __future__ import annotations

from pathlib import Path

from udbad import __version__

ROOT = Path(__file__).parents[2]


def test_debian_version() -> None:
    """The newest entry of debian/changelog is of this version."""
    assert (ROOT / "debian/changelog").read_text().startswith(f"udbad ({__version__}) ")
