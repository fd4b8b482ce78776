"""Which branch receives a new object (create=) or a copy-up (cpup=); semantics 7, aufs(5) "Policies to Select One".

Pure functions over a `Facts` of what is known about NAME and its parent: no I/O, no
clock, no branch objects; the caller answers free space through a (caching) callable. The only state
is the position of a round robin.

Invariants of every `select`: the result is writable, and never an index at which something above
would hide the object (`Facts.limit`); where no branch will do it raises OSError(EROFS).

Differs from fs/aufs/wbr_policy.c on purpose:
- au_wbr_nonopq() clamps the index a policy has already chosen, which may give a read-only branch or
  one the policy would not have taken. Here a policy chooses among the usable branches only.
- a whiteout or opaque mark in a read-only (+wh) branch sends the object to the nearest writable
  branch above it, as the manual says; the code goes on with the policy and may hide the object.
- pmfs and pmfsrr fail only when no branch is usable; aufs makes them fail when tdp does.
- a copy-up never chooses the branch of the source, also when that is writable (immutable file).
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable
from typing import ClassVar, Final, NamedTuple, TypeVar

from udbad.branch.spec import suggestion
from udbad.errors import ExitCode, UserError, erofs

DEFAULT_CACHE_SECONDS: Final = 30
MAX_CACHE_SECONDS: Final = 3600


class Facts(NamedTuple):
    """What a policy may know about NAME in directory D; every index is a branch index, 0 on top.

    writable: per branch. Clear it as well for a branch that cannot take the object for another
    reason, e.g. because a non-directory has the name of D there.
    parent: where D exists as a directory, within its visible range (semantics 4.1); not empty.
    parent_top: the smallest of these.
    name_top: branch of the topmost NAME; None when NAME does not exist.
    whiteout: bwh, where a whiteout of NAME is known. opaque: bopq, where D is opaque.
    floor: the largest index that D's ancestors leave usable, being opaque or whited out ("nonopq");
    the last index when they do not restrict.
    free: bytes an unprivileged writer can still use (f_bavail * f_frsize) in a branch. May not
    raise: a branch whose statfs(2) fails counts as negative.
    is_dir: NAME is being made by mkdir(2).
    """

    writable: tuple[bool, ...]
    parent: Collection[int]
    parent_top: int
    name_top: int | None
    whiteout: int | None
    opaque: int | None
    floor: int
    free: Callable[[int], int]
    is_dir: bool = False

    @property
    def source(self) -> int:
        """NAME's own top branch, for a negative name its parent's: au_dbtop()."""
        return self.parent_top if self.name_top is None else self.name_top

    @property
    def limit(self) -> int:
        """The largest index where an object called NAME would be seen."""
        limit = min(self.floor, len(self.writable) - 1)
        for bound in (self.whiteout, self.opaque, self.name_top):
            if bound is not None and bound < limit:
                limit = bound
        return limit

    def usable(self) -> list[int]:
        """Every branch that may be chosen, top first."""
        return [index for index in range(self.limit + 1) if self.writable[index]]

    def nearest(self, index: int) -> int:
        """The first writable branch from `index` upwards: au_wbr_bu(). EROFS when there is none."""
        for candidate in range(min(index, self.limit), -1, -1):
            if self.writable[candidate]:
                return candidate
        raise erofs()


def _top_down_parent(facts: Facts, below: int) -> int:
    """The highest writable branch above index `below` that has the parent, else the nearest one above."""
    for index in range(facts.parent_top, min(below, facts.limit + 1)):
        if facts.writable[index] and index in facts.parent:
            return index
    return facts.nearest(below - 1)


def _most_free(facts: Facts, candidates: Iterable[int], tie: int) -> int | None:
    """The candidate with the most free bytes; among equals the lower (tie=1) or the upper one (tie=-1)."""
    return max(candidates, key=lambda index: (facts.free(index), tie * index), default=None)


# -- create= ----------------------------------------------------------------------------------


class CreatePolicy(ABC):
    """Chooses the branch for a new object.

    low: bytes that should stay free on a branch. cache_seconds: how long the caller may answer
    `Facts.free` from memory. A policy without these arguments ignores them.
    """

    takes_low: ClassVar[bool] = False
    takes_seconds: ClassVar[bool] = False
    exceptions_first: ClassVar[bool] = True
    parent_decides: ClassVar[bool] = False
    """It takes the top branch of the parent wherever that is writable and not below `Facts.limit`."""

    def __init__(self, low: int = 0, cache_seconds: int = DEFAULT_CACHE_SECONDS) -> None:
        self.low = low
        self.cache_seconds = cache_seconds

    def select(self, facts: Facts) -> int:
        """The branch index for a new NAME; OSError(EROFS) when there is none (semantics 7)."""
        # au_wbr_create_exp(): what hides NAME or its siblings decides before the policy does.
        if self.exceptions_first and (facts.whiteout is not None or facts.opaque is not None):
            return facts.nearest(facts.limit)
        return self._choose(facts)

    @abstractmethod
    def _choose(self, facts: Facts) -> int:
        """The policy proper, after the exceptions of semantics 7.1."""


class TopDownParent(CreatePolicy):
    """tdp: the top branch of the parent directory if it is writable, else the highest writable one above where the
    parent exists, else the nearest writable one above.

    EROFS exactly when neither that branch nor any above it is writable: writable branches that are
    all below a read-only top of the parent do not count (au_wbr_create_tdp()).
    """

    exceptions_first = False
    parent_decides = True

    def _choose(self, facts: Facts) -> int:
        own = min(facts.source, facts.limit)
        return own if facts.writable[own] else _top_down_parent(facts, own)


class TopDownMostFree(CreatePolicy):
    """tdmfs: the first branch from the top that has more than LOW bytes free, else as mfs.

    Ends with the last branch of the parent: it has its own form of the exceptions
    (au_wbr_create_tdmfs()).
    """

    takes_low = True
    takes_seconds = True
    exceptions_first = False

    def _choose(self, facts: Facts) -> int:
        tail = max(facts.parent)
        usable = facts.usable()
        for index in usable:
            if index <= tail and facts.free(index) > self.low:
                return index
        return _or_erofs(_most_free(facts, usable, tie=1))


class RoundRobin(CreatePolicy):
    """rr: the writable branches in turn, from the last one upwards; mkdir takes the current one and stays."""

    def __init__(self, low: int = 0, cache_seconds: int = DEFAULT_CACHE_SECONDS) -> None:
        super().__init__(low, cache_seconds)
        self._next = -1  # taken modulo the number of branches, which may change: -1 is the last one

    def _choose(self, facts: Facts) -> int:
        count = len(facts.writable)
        limit = facts.limit
        for step in range(count):
            index = (self._next - step) % count
            if index <= limit and facts.writable[index]:
                if not facts.is_dir:
                    self._next = index - 1
                return index
        raise erofs()


class MostFree(CreatePolicy):
    """mfs: the branch with the most free bytes, of equal ones the lower.

    au_wbr_create_mfs().
    """

    takes_seconds = True

    def _choose(self, facts: Facts) -> int:
        return _or_erofs(_most_free(facts, facts.usable(), tie=1))


class MostFreeRoundRobin(RoundRobin):
    """mfsrr: mfs, but rr once even that branch has less than LOW bytes free."""

    takes_low = True
    takes_seconds = True

    def _choose(self, facts: Facts) -> int:
        index = _or_erofs(_most_free(facts, facts.usable(), tie=1))
        return super()._choose(facts) if facts.free(index) < self.low else index


class ParentMostFree(CreatePolicy):
    """pmfs: of the branch tdp takes and those that have the parent the one with the most free bytes, of equal ones the
    upper; as mfs where neither kind is usable.

    au_wbr_create_pmfs().
    """

    takes_seconds = True

    def _choose(self, facts: Facts) -> int:
        return _parent_most_free(facts)


class ParentMostFreeRoundRobin(MostFreeRoundRobin):
    """pmfsrr: pmfs, but mfsrr whatever the parent once that branch has less than LOW bytes free."""

    def _choose(self, facts: Facts) -> int:
        index = _parent_most_free(facts)
        return super()._choose(facts) if facts.free(index) < self.low else index


def _parent_most_free(facts: Facts) -> int:
    usable = facts.usable()
    candidates = {index for index in usable if index in facts.parent}
    try:
        candidates.add(TopDownParent().select(facts))
    except OSError:
        pass  # EROFS of tdp alone: lower branches may still do
    return _or_erofs(_most_free(facts, candidates, tie=-1) if candidates else _most_free(facts, usable, tie=1))


def _or_erofs(index: int | None) -> int:
    if index is None:
        raise erofs()
    return index


# -- cpup= ------------------------------------------------------------------------------------


class CopyUpPolicy(ABC):
    """Chooses the branch that receives the copy of an existing NAME, always above its own."""

    takes_low: ClassVar[bool] = False
    takes_seconds: ClassVar[bool] = False
    cache_seconds: ClassVar[int] = DEFAULT_CACHE_SECONDS
    parent_decides: ClassVar[bool] = False
    """It takes the top branch of the parent wherever that is writable, above the source and not below `Facts.limit`."""

    @abstractmethod
    def select(self, facts: Facts) -> int:
        """A branch index smaller than `facts.source`; OSError(EROFS) when there is none (semantics 7.3)."""


class CopyUpTopDownParent(CopyUpPolicy):
    """tdp: the highest branch above the source that has the parent, else the nearest above the source."""

    parent_decides = True

    def select(self, facts: Facts) -> int:
        return _top_down_parent(facts, facts.source)


class CopyUpBottomUpParent(CopyUpPolicy):
    """bup: the nearest branch above the source that has the parent, else the nearest above the parent's top."""

    def select(self, facts: Facts) -> int:
        for index in range(min(facts.source - 1, facts.limit), facts.parent_top - 1, -1):
            if facts.writable[index] and index in facts.parent:
                return index
        return facts.nearest(facts.parent_top - 1)


class CopyUpBottomUp(CopyUpPolicy):
    """bu: the nearest branch above the source, whether it has the parent or not."""

    def select(self, facts: Facts) -> int:
        return facts.nearest(facts.source - 1)


# -- option text ------------------------------------------------------------------------------

CREATE_POLICIES: Final[dict[str, type[CreatePolicy]]] = {
    "tdp": TopDownParent,
    "top-down-parent": TopDownParent,
    "tdmfs": TopDownMostFree,
    "rr": RoundRobin,
    "round-robin": RoundRobin,
    "mfs": MostFree,
    "most-free-space": MostFree,
    "mfsrr": MostFreeRoundRobin,
    "pmfs": ParentMostFree,
    "pmfsrr": ParentMostFreeRoundRobin,
}

COPYUP_POLICIES: Final[dict[str, type[CopyUpPolicy]]] = {
    "tdp": CopyUpTopDownParent,
    "top-down-parent": CopyUpTopDownParent,
    "bup": CopyUpBottomUpParent,
    "bottom-up-parent": CopyUpBottomUpParent,
    "bu": CopyUpBottomUp,
    "bottom-up": CopyUpBottomUp,
}

# Twenty digits hold every 64-bit number, and int() of endless input is refused by Python itself.
_SIZE: Final = "(?ai)([0-9]{1,20})([KMGT]?)"
_SECONDS: Final = "[0-9]{1,4}"
_SHIFT: Final = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}

_P = TypeVar("_P", CreatePolicy, CopyUpPolicy)


def parse_create(text: str) -> CreatePolicy:
    """The policy object for the value of create=, e.g. "mfsrr:10G:60" (semantics 7.2).

    Arguments: LOW in bytes with an optional suffix K, M, G, T (powers of 1024), SEC in seconds,
    0 to 3600. UserError(OPTION) names the offender and, for an unknown policy, the closest name or all of them.
    """
    policy, arguments = _split("create", text, CREATE_POLICIES)
    low = _low(text, arguments.pop(0)) if policy.takes_low else 0
    seconds = _seconds(text, arguments.pop(0)) if arguments else DEFAULT_CACHE_SECONDS
    return policy(low, seconds)


def parse_copyup(text: str) -> CopyUpPolicy:
    """The policy object for the value of cpup= (semantics 7.3); UserError(OPTION) as in `parse_create`."""
    return _split("cpup", text, COPYUP_POLICIES)[0]()


def _split(option: str, text: str, table: dict[str, type[_P]]) -> tuple[type[_P], list[str]]:
    """The class that `text` names and its arguments, their number checked."""
    name, *arguments = text.split(":")
    policy = table.get(name)
    if policy is None:
        raise _bad(f"{option}={text}", f"unknown policy {name!r}{suggestion(name, table)}")
    least, most = int(policy.takes_low), policy.takes_low + policy.takes_seconds
    if not least <= len(arguments) <= most:
        usage = name + ":LOW" * policy.takes_low + "[:SEC]" * policy.takes_seconds
        raise _bad(f"{option}={text}", f"wrong number of arguments for policy {name!r}, write {usage!r}")
    return policy, arguments


def _low(text: str, argument: str) -> int:
    match = re.fullmatch(_SIZE, argument)
    if match is None:
        raise _bad(f"create={text}", f"bad argument {argument!r}, LOW is a number of bytes, K, M, G or T may follow")
    return int(match[1]) << _SHIFT[match[2].upper()]


def _seconds(text: str, argument: str) -> int:
    if re.fullmatch(_SECONDS, argument) is None or int(argument) > MAX_CACHE_SECONDS:
        raise _bad(f"create={text}", f"bad argument {argument!r}, SEC is a number from 0 to {MAX_CACHE_SECONDS}")
    return int(argument)


def _bad(option: str, reason: str) -> UserError:
    shown = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in option)
    return UserError(f"{shown}: {reason}", ExitCode.OPTION)
