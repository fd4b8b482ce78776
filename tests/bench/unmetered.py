"""udbad without counters (python -m tests.bench.unmetered ARGUMENTS): what the cost of metrics is measured against.

Puts an error boundary that neither counts nor times in the place of kernel/boundary.handler, before kernel/ops.py
takes it from there. What is left is one list element raised by one for each name resolved (lookup depth).
"""

import errno
import functools
from collections.abc import Awaitable, Callable
from typing import Any

import pyfuse3

from udbad.cli import main
from udbad.kernel import boundary


def handler(function: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    @functools.wraps(function)
    async def wrapper(self: object, *args: Any) -> Any:
        try:
            return await function(self, *args)
        except pyfuse3.FUSEError:
            raise
        except OSError as error:
            raise pyfuse3.FUSEError(error.errno or errno.EIO) from None

    return wrapper


if __name__ == "__main__":
    boundary.OpStats.count = lambda self, taken, number: None  # type: ignore[method-assign]
    boundary.handler = handler  # type: ignore[assignment]  # the type variable of the real one
    main()
