"""How this very program is started again, as another process.

Of the same interpreter and the same version, installed or not; and whatever the current directory of the caller is,
nothing in it is taken for one of our modules: `python -m` alone would look there first, and we are root.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Final

COMMAND: Final = (sys.executable, "-P", "-m", "udbad")


def environment() -> dict[str, str]:
    """Ours, with the place of this version first; for a COMMAND."""
    path = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
