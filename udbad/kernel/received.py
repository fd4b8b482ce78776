"""The request that is being served, as it came from /dev/fuse: its header in numbers, and the buffer."""

from __future__ import annotations

from udbad.kernel.protocol import MAX_REQUEST
from udbad.kernel.wire import REQUEST


class Received:
    """The request that was read last. The buffer holds it up to `size`, and behind that what earlier ones have left."""

    __slots__ = ("buffer", "gid", "length", "node", "opcode", "pid", "size", "uid", "unique")

    def __init__(self, room: int = MAX_REQUEST + 4096) -> None:
        """room: bytes of the buffer."""
        self.buffer = bytearray(room)
        self.size = 0
        """Bytes that came."""
        self.length = 0
        """Bytes that it says it has."""
        self.opcode = 0
        self.unique = 0
        self.node = 0
        self.uid = 0
        self.gid = 0
        self.pid = 0


def take_header(request: Received, size: int) -> None:
    """Have the fields say what the header in the buffer does, of a request of which `size` bytes came."""
    request.size = size
    (
        request.length, request.opcode, request.unique, request.node, request.uid, request.gid, request.pid
    ) = REQUEST.unpack_from(request.buffer)  # fmt: skip
