"""User and group ids that a union shows as others: `uidmapping=`, `squash_to_uid=` and the like.

The rule is that of fuse-overlayfs. An id of a branch is shown by the first range that has it; one that no range has is
shown as the overflow id. The other way, for who creates something or gives it away, ids that no range has have none on
a branch. Squashing shows all as one, and changes nothing of what is made.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Final, NamedTuple

FORM: Final = "FIRST:SHOWN:COUNT[:FIRST:SHOWN:COUNT...]"
MOST: Final = 0xFFFFFFFE
"""The largest id; the one above it says that there is none."""
OVERFLOW: Final = 65534
"""/proc/sys/kernel/overflowuid, where nobody has changed it."""

Ranges = tuple[tuple[int, int, int], ...]
"""First id on the branches, first id shown, how many."""

_FORM: Final = "[0-9]{1,10}:[0-9]{1,10}:[0-9]{1,10}(?::[0-9]{1,10}:[0-9]{1,10}:[0-9]{1,10})*"


def parse(text: str) -> Ranges:
    """Raises ValueError for another form, an id that is none, and ranges with an id that is in two of them."""
    if re.fullmatch(_FORM, text) is None:
        raise ValueError
    numbers = [int(number) for number in text.split(":")]
    ranges = tuple(zip(numbers[::3], numbers[1::3], numbers[2::3], strict=True))
    if any(not count or max(first, shown) + count - 1 > MOST for first, shown, count in ranges):
        raise ValueError
    for side in (0, 1):
        starts = sorted((one[side], one[2]) for one in ranges)
        if any(first + count > after for (first, count), (after, _) in pairwise(starts)):
            raise ValueError
    return ranges


class Ids(NamedTuple):
    """Of users, or of groups. ranges: none shows every id as it is. squash: what all are shown as, -1: nothing."""

    ranges: Ranges = ()
    squash: int = -1

    def shown(self, number: int) -> int:
        """What an id of a branch is shown as."""
        if self.squash >= 0:
            return self.squash
        if not self.ranges:
            return number
        return _find(number, self.ranges, OVERFLOW)

    def kept(self, number: int) -> int:
        """The id of a branch that is meant by one that is shown, -1: none."""
        if not self.ranges:
            return number
        return _find(number, [(shown, first, count) for first, shown, count in self.ranges], -1)


SAME: Final = Ids()
"""Shows every id as it is."""


def _find(number: int, ranges: Sequence[tuple[int, int, int]], otherwise: int) -> int:
    for first, other, count in ranges:
        if first <= number < first + count:
            return other + number - first
    return otherwise


def of(text: str | None, squash: int) -> Ids:
    """From mount options."""
    return Ids(() if text is None else parse(text), squash)
