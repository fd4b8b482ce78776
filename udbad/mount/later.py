"""What a mount process imports when it serves already, and so serves sooner.

All that its functions import when they are called, and that soon: a version that is installed while the mount goes on
must not bring parts of its own into this process (tests/t0_unit/test_imports.py looks for what is missing here).
"""

from __future__ import annotations

import logging

import trio

log = logging.getLogger(__name__)


def load() -> None:
    import udbad.coherence.notify
    import udbad.tools.explain
    import udbad.tools.mvdown
    import udbad.tools.syncdown  # noqa: F401  # so are they all


async def load_in_thread() -> None:
    """For the nursery of a mount that serves, which goes on whatever comes of this."""
    try:
        await trio.to_thread.run_sync(load, abandon_on_cancel=True)
    except ImportError as error:
        log.error("udbad was changed while it started; mount again: %s", error)
