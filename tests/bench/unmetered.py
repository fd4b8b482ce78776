"""udbad without counters (python -m tests.bench.unmetered ARGUMENTS): what the cost of metrics is measured against.

What is left is the clock that is looked at twice a request, a call that does nothing, and one list element raised by
one for each name resolved (lookup depth).
"""

from udbad.cli import main
from udbad.kernel import boundary


class Uncounted(boundary.OpStats):
    """A subclass, as a method of a class that is compiled cannot be replaced."""

    def count(self, taken: float, number: int) -> None:
        pass


if __name__ == "__main__":
    _all: dict[str, Uncounted] = {}
    boundary.operation = lambda name: _all.setdefault(name, Uncounted())
    main()
