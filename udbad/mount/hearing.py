"""What those who vouch for branches (leasing.py) say of the hosts that they hear, for the metrics alone."""

from __future__ import annotations

from typing import Any, Final, NamedTuple, Self

from udbad.control.protocol import Message, number_of
from udbad.errors import ExitCode, UserError

_HOSTS: Final = 64
"""Hosts of a branch that get numbers of their own: their names come from elsewhere, and each is a series."""
_NAME_LENGTH: Final = 64


class Heard(NamedTuple):
    """Of one branch. Moments are of `coherence.leases.now`.

    gaps: times that something may have been missed. hints: paths that the mount was told. last: when anything was
    heard of another host, 0: nothing yet. hosts: up to when each of them has told everything.
    """

    gaps: int
    hints: int
    last: float
    hosts: dict[str, float]

    @classmethod
    def of(cls, request: Message) -> Self | None:
        """The fields of a request; None when it has no "hosts": nobody listens any more. Raises UserError (OPTION)."""
        hosts: Any = request.get("hosts")
        if hosts is None:
            return None
        if not isinstance(hosts, dict):
            raise UserError("hosts must be an object", ExitCode.OPTION)
        moments = {
            str(name)[:_NAME_LENGTH].encode(errors="backslashreplace").decode(): number_of(hosts, name)
            for name in sorted(hosts)[:_HOSTS]
        }
        return cls(
            int(number_of(request, "gaps")), int(number_of(request, "told")), number_of(request, "last"), moments
        )
