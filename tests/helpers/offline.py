"""Looking at a mount of which a branch may not answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.helpers.mount import Mount


def number_of(call: Callable[..., Any], *arguments: Any) -> int | None:
    try:
        call(*arguments)
    except OSError as error:
        return error.errno
    return None


def offline(mount: Mount) -> list[str]:
    """The branches that do not answer, as its status says."""
    try:
        return list(mount.control({"op": "status"})["offline"])
    except (OSError, AssertionError):
        return ["?"]  # one process ends, the next begins
