"""The hot modules, compiled or not: which there are, and whether the compiled ones are used.

`setup.py` compiles `MODULES` with Cython, from the same files that the interpreter can run; a `.pxd` beside one of them
gives types of C. A compiled module lies beside its source, where Python takes it first. That would be a trap: whoever
changes the source, or goes to another commit, would run what was there before. So the build leaves a fingerprint of all
sources, and compiled modules are imported only while they are those of the sources that lie here. All or none of them:
they know each other's memory layout.

Imported by `udbad` itself, before any of them. Nothing is read before the first one is asked for.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES, ModuleSpec
from types import ModuleType
from typing import Final

MODULES: Final = (
    "udbad.branch.copydata",
    "udbad.branch.credentials",
    "udbad.branch.policy",
    "udbad.branch.state",
    "udbad.branch.whiteout",
    "udbad.coherence.base",
    "udbad.coherence.events",
    "udbad.coherence.none",
    "udbad.coherence.notify",
    "udbad.coherence.sent",
    "udbad.coherence.watcher",
    "udbad.coherence.watches",
    "udbad.edge.loop",
    "udbad.edge.native",
    "udbad.edge.once",
    "udbad.edge.operations",
    "udbad.edge.table",
    "udbad.edge.waiting",
    "udbad.inodes.handles",
    "udbad.inodes.inomap",
    "udbad.inodes.node",
    "udbad.inodes.record",
    "udbad.inodes.slot",
    "udbad.inodes.table",
    "udbad.kernel.boundary",
    "udbad.kernel.received",
    "udbad.union.changes",
    "udbad.union.copydirs",
    "udbad.union.copyup",
    "udbad.union.create",
    "udbad.union.fs",
    "udbad.union.kept",
    "udbad.union.lookup",
    "udbad.union.readdir",
    "udbad.union.remove",
    "udbad.union.rename",
    "udbad.union.resolve",
    "udbad.union.superblock",
    "udbad.union.times",
    "udbad.union.view",
    "udbad.union.xattrs",
)
"""Dotted names; each is a Python source that runs uncompiled as well."""

IN_C: Final = (
    "udbad.branch.ccalls",
    "udbad.branch.clisting",
    "udbad.branch.cstat",
    "udbad.coherence.cechoes",
    "udbad.inodes.cbyid",
    "udbad.inodes.cjournal",
    "udbad.inodes.cnames",
    "udbad.inodes.cunread",
    "udbad.kernel.cdevice",
    "udbad.kernel.cwire",
    "udbad.union.creaddir",
)
"""What is used in the place of functions of Python, system calls and structures of C; there only when compiled."""

STAMP: Final = "compiled.txt"
"""In the package: the fingerprint of what the compiled modules were made from. Written last, removed first."""

PACKAGE: Final = os.path.dirname(os.path.abspath(__file__))


def sources(package: str = PACKAGE) -> list[str]:
    """The files that the compiled modules are made from; package: the directory of `udbad`."""
    found = []
    for module in MODULES + IN_C:
        path = os.path.join(package, *module.split(".")[1:])
        found += [path + (".py" if module in MODULES else ".pyx")]
        if os.path.exists(path + ".pxd"):
            found.append(path + ".pxd")
    return found


def fingerprint(package: str = PACKAGE) -> str:
    """Of all sources, as they are now, and of the Python that they are compiled for. By the hash that Python itself has
    for sources (PEP 552), as hashlib loads all of OpenSSL. Raises OSError."""
    from importlib.util import source_hash  # not for a command, which imports none of these modules

    hashed = [EXTENSION_SUFFIXES[0].encode()]
    for path in sources(package):
        with open(path, "rb", buffering=0) as file:
            content = file.readall()
        hashed += [b"%s %d\n" % (os.path.basename(path).encode(), len(content)), content]
    return source_hash(b"".join(hashed)).hex()


def wanted() -> bool:
    """Whether compiled modules may be used: not with UDBAD_PURE=1 in the environment."""
    return os.environ.get("UDBAD_PURE", "") in ("", "0")


@cache
def why_not() -> str:
    """Why this process runs the Python sources; empty when it runs what was compiled from them."""
    if not wanted():
        return "UDBAD_PURE is set"
    try:
        with open(os.path.join(PACKAGE, STAMP)) as file:
            made_from = file.read()
        if made_from != fingerprint():
            return "the sources are not those that were compiled"
    except FileNotFoundError:
        return "not compiled"
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return ""


class _Finder:
    """Leads to the source of a module of `MODULES` where what lies beside it, compiled, is not to be used."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name not in MODULES + IN_C or not why_not():
            return None  # Python's own finder, which prefers a compiled one
        if name in IN_C:
            raise ModuleNotFoundError(f"{name}: {why_not()}", name=name)
        from importlib.util import spec_from_file_location

        return spec_from_file_location(name, os.path.join(PACKAGE, *name.split(".")[1:]) + ".py")


def install() -> None:
    """Have imports of the hot modules go the right way; once in a process."""
    sys.meta_path.insert(0, _Finder)
