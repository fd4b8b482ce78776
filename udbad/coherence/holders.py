"""Who has a watch: an inode has one (inotify_add_watch(2)), and so has a handle, whoever wants to know of it.

While a directory moves from one node to another, both have its watch: the one that lets go must not take it from the
other.
"""

from __future__ import annotations

from typing import TypeVar

Watch = TypeVar("Watch", int, bytes)


def hold(holders: dict[Watch, list[object]], watch: Watch, holder: object) -> None:
    of_watch = holders.get(watch)
    if of_watch is None:
        holders[watch] = [holder]  # with room for no more: there may be a million
    else:
        of_watch.append(holder)


def let_go(holders: dict[Watch, list[object]], watch: Watch, holder: object) -> bool:
    """Whether nobody has it any more; False for who did not have it."""
    of_watch = holders.get(watch)
    if of_watch is None or holder not in of_watch:
        return False
    of_watch.remove(holder)
    if of_watch:
        return False
    del holders[watch]
    return True
