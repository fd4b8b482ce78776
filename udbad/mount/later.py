"""What a mount process imports when it serves already, and so serves sooner.

First what it does beside requests, with trio, which takes as long to import as all that a request needs. Then all that
its functions import when they are called, and that soon: a version that is installed while the mount goes on must not
bring parts of its own into this process (tests/t0_unit/test_imports.py looks for what is missing here).
"""

from __future__ import annotations

import gc
import logging
import select
import threading
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Final

log = logging.getLogger(__name__)

_STRATEGY: Final = "udbad.coherence.notify"
_BESIDE: Final = "udbad.mount.beside"
_MODULES: Final = (
    "concurrent.futures.thread",  # an open copy may take the last descriptor
    _STRATEGY,
    "udbad.edge.replay",
    "udbad.tools.explain",
    "udbad.tools.mvdown",
    "udbad.tools.syncdown",
)
_QUIET_SECONDS: Final = 0.5
"""Longer than a container is left alone that does one thing and ends, and what is loaded was for nothing."""
PATIENCE_SECONDS: Final = 5.0
_AGAIN_SECONDS: Final = 1.0


def load() -> None:
    """Import all of it now."""
    for name in (_STRATEGY, _BESIDE, *_MODULES):
        import_module(name)


def load_compiled() -> None:
    """Import what of it is compiled: the strategy, which a process needs before it serves, or never."""
    import_module(_STRATEGY)


def load_in_thread(requests: Callable[[], int], wanted: Sequence[int], begin: Callable[[], object]) -> None:
    """Begin to import all of it, in a thread that ends by itself; the mount goes on whatever comes of this.

    requests: how many there have been. Nothing is loaded while they keep coming, for some seconds at most: who makes
    modules keeps the interpreter's lock for milliseconds, again and again, and a request would wait for it. wanted:
    descriptors; when one of them can be read, somebody waits for what is done beside requests. begin: called, in the
    thread, when that is there.
    """
    threading.Thread(target=_load, args=(requests, wanted, begin), name="udbad later", daemon=True).start()


def _load(requests: Callable[[], int], wanted: Sequence[int], begin: Callable[[], object]) -> None:
    poll = select.poll()
    for fd in wanted:
        poll.register(fd, select.POLLIN)
    end = time.monotonic() + PATIENCE_SECONDS
    _quiet(requests, end, poll)
    _import(_BESIDE)
    begin()
    for name in _MODULES:
        _quiet(requests, end)
        _import(name)
    gc.freeze()  # as what was imported sooner is: else a search for garbage looks at all of it beside requests


def _import(name: str) -> None:
    """Again and again until it can be: there may be no descriptor left for the file (for a module that is compiled an
    ImportError, of dlopen()), or it may be replaced just now."""
    said = False
    while True:
        try:
            import_module(name)
            return
        except (ImportError, OSError) as error:
            if not said:
                log.error("%s is not to be had, mount again if udbad was changed; tried again: %s", name, error)
            said = True
            time.sleep(_AGAIN_SECONDS)


def _quiet(requests: Callable[[], int], end: float, wanted: select.poll | None = None) -> None:
    """Return when there was none for a while, at the latest at `end` (time.monotonic()) or when somebody waits."""
    before = -1
    while before != (now := requests()) and time.monotonic() < end:
        before = now
        if wanted is None:
            time.sleep(_QUIET_SECONDS)
        elif wanted.poll(_QUIET_SECONDS * 1000):
            return
