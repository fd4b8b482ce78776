"""What a mount process imports when it serves already, and so serves sooner.

All that its functions import when they are called, and that soon: a version that is installed while the mount goes on
must not bring parts of its own into this process (tests/t0_unit/test_imports.py looks for what is missing here).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from importlib import import_module

import trio

log = logging.getLogger(__name__)

_MODULES = (
    "udbad.coherence.notify",
    "udbad.edge.replay",
    "udbad.tools.explain",
    "udbad.tools.mvdown",
    "udbad.tools.syncdown",
)
_QUIET_SECONDS = 0.2
_PATIENCE_SECONDS = 5.0


def load() -> None:
    for name in _MODULES:
        import_module(name)


async def load_in_thread(requests: Callable[[], int]) -> None:
    """For the nursery of a mount that serves, which goes on whatever comes of this.

    requests: how many there have been. Nothing is loaded while they keep coming, for some seconds at most: who makes
    modules keeps the interpreter's lock for milliseconds, again and again, and a request would wait for it.
    """
    try:
        with trio.move_on_after(_PATIENCE_SECONDS):
            for name in _MODULES:
                await _quiet(requests)
                await trio.to_thread.run_sync(import_module, name, abandon_on_cancel=True)
            return
        await trio.to_thread.run_sync(load, abandon_on_cancel=True)
    except ImportError as error:
        log.error("udbad was changed while it started; mount again: %s", error)


async def _quiet(requests: Callable[[], int]) -> None:
    """Return when there was none for a while."""
    before = -1
    while before != (now := requests()):
        before = now
        await trio.sleep(_QUIET_SECONDS)
