"""Who has files of a mount open or mapped, by /proc: for io=cached, where the kernel opens files without telling.

Nothing here asks anything of the mount, whose server we are: an open file's number and the mount it was opened through
are in /proc/PID/fdinfo, a mapping's device and number in /proc/PID/maps. What is opened while we look may be missed;
files that are on their way through a socket are, and processes of other pid namespaces than ours and those below it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator


def openers(connection: int, writing: bool = False) -> list[tuple[int, int]]:
    """(st_ino, pid) of what is open of the mount with this number (minor of its st_dev); writing: only what may be
    written to. To be called in a thread: it reads all of /proc, and waits for a process that is changing its
    mappings."""
    found: set[tuple[int, int]] = set()
    ids_of: dict[str, set[bytes]] = {}
    device = b"%02x:%02x" % (0, connection)
    for name in os.listdir("/proc"):
        if not name.isdigit() or int(name) == os.getpid():
            continue
        try:
            namespace = os.readlink(f"/proc/{name}/ns/mnt")
            if namespace not in ids_of:
                ids_of[namespace] = _mount_ids(name, connection)
            if ids_of[namespace]:
                for ino in (*_opened(name, ids_of[namespace], writing), *_mapped(name, device, writing)):
                    found.add((ino, int(name)))
        except OSError:
            continue  # it has ended
    return sorted(found)


def _lines(path: str) -> Iterator[bytes]:
    with open(path, "rb") as stream:
        yield from stream


def _mount_ids(pid: str, connection: int) -> set[bytes]:
    """Ids of the mounts of the connection in a process's namespace (mountinfo: id, parent, major:minor, …)."""
    device = b"0:%d" % connection
    fields = (line.split(b" ", 3) for line in _lines(f"/proc/{pid}/mountinfo"))
    return {each[0] for each in fields if each[2] == device}


def _opened(pid: str, ids: set[bytes], writing: bool) -> Iterator[int]:
    for fd in os.listdir(f"/proc/{pid}/fdinfo"):
        try:
            values = dict(line.split(b":", 1) for line in _lines(f"/proc/{pid}/fdinfo/{fd}") if b":" in line)
        except FileNotFoundError:
            continue  # closed meanwhile
        if values.get(b"mnt_id", b"").strip() not in ids:
            continue
        if not writing or int(values[b"flags"], 8) & os.O_ACCMODE != os.O_RDONLY:
            yield int(values.get(b"ino", b"0"))


def _mapped(pid: str, device: bytes, writing: bool) -> Iterator[int]:
    for line in _lines(f"/proc/{pid}/maps"):
        fields = line.split(None, 5)
        if fields[3] == device and (not writing or (fields[1].startswith(b"rw") and fields[1].endswith(b"s"))):
            yield int(fields[4])
