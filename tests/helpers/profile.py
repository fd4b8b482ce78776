"""How often the tests repeat what chance decides: enough to notice in `make test`, more in `make soak`.

UDBAD_TEST_PROFILE=soak makes the same tests run more rounds, examples and modes. No behaviour is tested only there.
"""

from __future__ import annotations

import os
from typing import Final, TypeVar

SOAK: Final = os.environ.get("UDBAD_TEST_PROFILE") == "soak"

T = TypeVar("T")


def scaled(usual: T, soak: T) -> T:
    """The value for this run."""
    return soak if SOAK else usual
