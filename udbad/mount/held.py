"""The code of modules that a guardian keeps for the mount processes to come, and does not import.

These must be of the version that it is itself (guardian.py). Imported they would take 8 MiB, and 3 more as that writes
to pages which a guardian shares with the keeper: trio is most of it, and no process needs it before it serves. So a
child imports them, writes down their code, 1 MiB as it is compressed, and ends.
"""

from __future__ import annotations

import logging
import marshal
import os
import struct
import sys
from collections.abc import Iterator, Sequence
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.util import spec_from_file_location
from types import CodeType, ModuleType
from typing import Final, NoReturn

from udbad.mount import keeper, later

log = logging.getLogger(__name__)

NAME: Final = "udbad modules"
"""Of the child, in /proc/PID/comm (proc(5))."""
_INDEX_AT: Final = struct.Struct("=Q")
"""At the beginning: where the index is, 0 until everything is there."""
_FASTEST: Final = 1

_Found = tuple[int, int, str, bool]
"""Where the code of a module is, how many bytes, the path of its source, whether it is a package."""


class _Loader(SourceFileLoader):
    """As from its file, but for the code."""

    def __init__(self, name: str, path: str, code: bytes) -> None:
        super().__init__(name, path)
        self._compressed = code

    def get_code(self, fullname: str) -> CodeType:
        import zlib  # a mount begins without it

        code: CodeType = marshal.loads(zlib.decompress(self._compressed))
        return code


class Held:
    """Once it is filled and installed, imports take from it what it has; a finder of modules (sys.meta_path)."""

    def __init__(self) -> None:
        self._fd = -1
        self._index: dict[str, _Found] = {}

    def fill(self) -> Iterator[None]:
        """Have all written down that a mount process imports when it serves; in steps, to be taken now and then until
        there is none any more. What is compiled has no code to be kept: it is imported here, and is small. Raises
        OSError when there is no descriptor or no process to be had.
        """
        later.load_compiled()
        yield
        fd = os.memfd_create(NAME, os.MFD_CLOEXEC)
        os.pwrite(fd, bytes(_INDEX_AT.size), 0)  # here: the child may be killed before it has written anything
        child = os.fork()
        if child == 0:
            _be_child(fd)
        while not _has_ended(child):
            yield
        self._fd = fd

    def install(self) -> None:
        """In the process that is to import from it."""
        if self._fd < 0:
            return
        (at,) = _INDEX_AT.unpack(os.pread(self._fd, _INDEX_AT.size, 0))
        if at:
            self._index = marshal.loads(os.pread(self._fd, os.fstat(self._fd).st_size - at, at))
            sys.meta_path.insert(0, self)

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """importlib.abc.MetaPathFinder"""
        found = self._index.get(name)
        if found is None:
            return None
        at, size, origin, is_package = found
        loader = _Loader(name, origin, os.pread(self._fd, size, at))
        places = [os.path.dirname(origin)] if is_package else None
        return spec_from_file_location(name, origin, loader=loader, submodule_search_locations=places)


def _be_child(fd: int) -> NoReturn:
    try:
        keeper.end_with_parent()
        with open("/proc/self/comm", "w") as comm:
            comm.write(NAME)
        before = set(sys.modules)
        later.load()
        _write(fd, sorted(set(sys.modules) - before))
    except Exception:
        log.exception("cannot be kept for the next mount process, which takes it from the disk")
    finally:
        os._exit(0)


def _write(fd: int, names: Sequence[str]) -> None:
    """The code of these modules, as far as they are of Python."""
    import zlib  # as above

    index: dict[str, _Found] = {}
    at = _INDEX_AT.size
    for name in names:
        spec = sys.modules[name].__spec__
        if spec is None or spec.origin is None or not isinstance(spec.loader, SourceFileLoader):
            continue
        code = zlib.compress(marshal.dumps(spec.loader.get_code(spec.name)), _FASTEST)
        index[name] = at, len(code), spec.origin, spec.submodule_search_locations is not None
        at += os.pwrite(fd, code, at)
    os.pwrite(fd, marshal.dumps(index), at)
    os.pwrite(fd, _INDEX_AT.pack(at), 0)


def _has_ended(child: int) -> bool:
    try:
        return os.waitpid(child, os.WNOHANG)[0] != 0
    except ChildProcessError:  # somebody else has seen it (Guardian._reap_others)
        return True
