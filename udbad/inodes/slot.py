"""One slot: what one mount process has noted of its operations, in memory that outlives it (edge/once.py, poison.py).

Numbers in the machine's order: words of 8 bytes, `_SEQUENCE`, …; from `_NAME_AT` on a name, from `_BODY_AT` on an
answer, from the word `_SEATS` on what threads do. What a word stands for is stored before it, as a process may be
killed between any two instructions. Compiled, each word is stored at once; it is for every mutation.
"""

from __future__ import annotations

import itertools
from threading import get_ident
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from udbad.inodes.handles import HandleTable

Word = int
"""Of 64 bits, without a sign."""
SLOT: Final = 4096
"""Bytes of a slot."""
RESENT: Final = 1 << 63
"""FUSE_UNIQUE_RESEND, in a unique number: the kernel has sent this request before."""
U64: Final = (1 << 64) - 1
"""A time before 1970 is noted modulo 2**64."""
_SEQUENCE, _INTENDED, _ANSWERED, _ERRNO, _SIZE, _HANDLE, _COUNT, _WORDS, _COPY = 0, 1, 2, 3, 4, 5, 6, 7, 14
"""Which process of the mount, from 1 on; unique number of what is intended, of what has a result; that, errno and
length of the answer; number that the next handle gets, how many words are noted, and these; node of a copy that was
about to be published, the length of its name, and seven words that `copy` says of it."""
CURRENT: Final = 23
"""Unique number of the request that is performed on the event loop, or was the last one; 0: that one waits now."""
_LOOP: Final = 24
"""The thread of the event loop, as threading.get_ident() names it."""
_COUNTS: Final = 25
"""How many requests were sent again, were decided by their rule, had an answer, and were refused: of all processes."""
_SEATS: Final = 256
"""From here on, for each thread its name and the unique number of the request that it has begun with last."""
_SEAT_COUNT: Final = 64
_NAME_AT: Final = 256
_BODY_AT: Final = 1024


class Slot:
    """Views of its memory."""

    def __init__(self, memory: memoryview, handles: HandleTable) -> None:
        """memory: SLOT bytes, from a multiple of 8 on. handles: of which the next one's number is noted."""
        self.memory = memory
        self.handles = handles
        self.words = memory.cast("Q")
        self.unique = 0
        """Of the operation under way."""
        self.noted = 0
        """Of an operation that has noted something, and has no result yet."""
        self._seats: dict[int, int] = {}
        """By thread: its word."""
        self._next_seat = itertools.count()

    @property
    def current(self) -> int:
        """CURRENT, without the bit that says that it was sent again; 0: none."""
        return self.words[CURRENT] & ~RESENT

    @property
    def sequence(self) -> int:
        """0 of one that nobody has used."""
        return self.words[_SEQUENCE]

    def begin(self, sequence: int, counts: tuple[int, int, int, int]) -> None:
        """Take it, whatever is in it, on the event loop. counts: those of the process before."""
        words = self.words
        words[_SEQUENCE] = words[_INTENDED] = words[_ANSWERED] = words[_COPY] = words[CURRENT] = 0
        for at in range(_SEATS, _SEATS + 2 * _SEAT_COUNT):
            words[at] = 0
        for at, count in enumerate(counts, _COUNTS):
            words[at] = count
        words[_LOOP] = get_ident()
        words[_SEQUENCE] = sequence

    # -- who is at what -----------------------------------------------------------------------------

    def begin_in_thread(self, unique: int) -> None:
        """This thread, which is not that of the event loop, begins with a request."""
        thread = get_ident()
        seat = self._seats.get(thread)
        if seat is None:
            seat = self._seats[thread] = _SEATS + 2 * (next(self._next_seat) % _SEAT_COUNT)
        words = self.words
        words[seat + 1] = unique
        words[seat] = thread

    def blame(self, thread: int) -> None:
        """What this thread has begun with last is what the process died of; not what the event loop was at, unless it
        is that. 0: nothing is."""
        words = self.words
        if thread != words[_LOOP]:
            seats = range(_SEATS, _SEATS + 2 * _SEAT_COUNT, 2)
            words[CURRENT] = next((words[seat + 1] for seat in seats if words[seat] == thread), 0)

    def counts(self) -> tuple[int, int, int, int]:
        """How many requests were sent again, were decided by their rule, had an answer, and were refused."""
        words = self.words
        return words[_COUNTS], words[_COUNTS + 1], words[_COUNTS + 2], words[_COUNTS + 3]

    def count(self, which: int) -> None:
        """One more; which: of `counts`."""
        self.words[_COUNTS + which] += 1

    # -- operations -------------------------------------------------------------------------------

    def intend(
        self, count: Word = 0, first: Word = 0, second: Word = 0, third: Word = 0, fourth: Word = 0, fifth: Word = 0,
        sixth: Word = 0,
    ) -> None:  # fmt: skip
        """The next system call of the operation under way is the one that counts: what it does cannot be done twice.

        count: of the words that follow, by which it can be told afterwards whether it was done, as the operation's
        rule in edge/once.py says.
        """
        words = self.words
        words[_INTENDED] = 0
        words[_HANDLE] = self.handles.next
        words[_COUNT] = count
        words[_WORDS] = first
        words[_WORDS + 1] = second
        words[_WORDS + 2] = third
        words[_WORDS + 3] = fourth
        words[_WORDS + 4] = fifth
        words[_WORDS + 5] = sixth
        words[_INTENDED] = self.unique
        self.noted = self.unique

    def result(self, unique: Word, number: Word, body: bytes | bytearray) -> None:
        """What has noted something is about to be answered, by an errno or a body."""
        if self.noted != unique:
            return
        self.noted = 0
        words = self.words
        words[_ANSWERED] = 0
        size = len(body)
        if size:
            self.memory[_BODY_AT : _BODY_AT + size] = body
        words[_ERRNO] = number
        words[_SIZE] = size
        words[_ANSWERED] = unique

    @property
    def intended(self) -> int:
        """The unique number of the last operation that has noted something; 0: none."""
        return self.words[_INTENDED]

    @property
    def answered(self) -> int:
        """The unique number of the last one that has a result."""
        return self.words[_ANSWERED]

    def read_intent(self) -> tuple[int, tuple[int, ...]]:
        """The number that the next handle had, and what was given to `intend`."""
        words = self.words
        return words[_HANDLE], tuple(words[_WORDS + at] for at in range(words[_COUNT]))

    def read_result(self) -> tuple[int, bytes]:
        """As given to `result`."""
        size = self.words[_SIZE]
        return self.words[_ERRNO], bytes(self.memory[_BODY_AT : _BODY_AT + size])

    # -- copies -----------------------------------------------------------------------------------

    def copy(self, node: int, name: bytes, said: tuple[int, ...]) -> None:
        """A copy of a node is about to get a name. said: seven words."""
        words = self.words
        words[_COPY] = 0
        self.memory[_NAME_AT : _NAME_AT + len(name)] = name
        words[_COPY + 1] = len(name)
        for at, each in enumerate(said, _COPY + 2):
            words[at] = each
        words[_COPY] = node

    def read_copy(self) -> tuple[int, bytes, tuple[int, ...]]:
        """As given to `copy`; node 0: there was none."""
        words = self.words
        size = words[_COPY + 1]
        said = tuple(words[at] for at in range(_COPY + 2, _COPY + 9))
        return words[_COPY], bytes(self.memory[_NAME_AT : _NAME_AT + size]), said
