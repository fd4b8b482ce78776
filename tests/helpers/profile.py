"""How often the tests repeat what chance decides: enough to notice in `make test`, more in `make soak`.

UDBAD_TEST_PROFILE=soak makes the same tests run more rounds, examples and modes. No behaviour is tested only there.
UDBAD_TEST_PROFILE=quick, of `make check`, takes fewer steps of the longest tests that go through all of them.
"""

from __future__ import annotations

import os
from typing import Final, TypeVar

_PROFILE: Final = os.environ.get("UDBAD_TEST_PROFILE")
SOAK: Final = _PROFILE == "soak"

T = TypeVar("T")


def scaled(usual: T, soak: T, quick: T | None = None) -> T:
    """The value for this run; quick: None where that is the usual one."""
    if _PROFILE == "quick" and quick is not None:
        return quick
    return soak if SOAK else usual
