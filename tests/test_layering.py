"""The layer order: a module of udbad imports only from its own level or from below.

Reads the sources with ast and imports nothing, so it also sees imports inside functions and under
TYPE_CHECKING. A new module gets its package's level; a new file directly in udbad/ must be given one here.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Low to high. The longest matching prefix counts, so a module named here leaves its package's level.
LEVELS: list[list[str]] = [
    ["udbad", "udbad.compiled", "udbad.types", "udbad.errors", "udbad.logs", "udbad.ourselves"],
    ["udbad.branch"],
    ["udbad.layers"],  # stores of layers: which branches there are, and what goes in and out of one
    ["udbad.settings", "udbad.metrics"],
    ["udbad.inodes"],
    # The read side of the union.
    [
        "udbad.union.changes",
        "udbad.union.superblock",
        "udbad.union.homes",
        "udbad.union.times",
        "udbad.union.redirects",
        "udbad.union.view",
        "udbad.union.creaddir",
        "udbad.union.resolve",
        "udbad.union.lookup",
        "udbad.union.readdir",
    ],
    ["udbad.union"],  # copyup, create, remove, rename, plink and what else changes branches
    ["udbad.coherence"],
    ["udbad.union.fs", "udbad.union.recall"],
    ["udbad.kernel"],
    ["udbad.edge"],
    ["udbad.tools"],  # what people run on a union; asks no kernel and no process
    ["udbad.control"],
    ["udbad.hosts"],  # changes told from host to host; neither it nor what it uses is in a mount process
    ["udbad.mount"],
    ["udbad.supervisor"],
    ["udbad.commands"],
    ["udbad.cli", "udbad.__main__"],
    ["udbad.manpages"],
]
LEVEL_OF = {prefix: level for level, prefixes in enumerate(LEVELS) for prefix in prefixes}

SYNC_CORE = ("udbad.branch", "udbad.layers", "udbad.inodes", "udbad.union", "udbad.tools")


def _within(module: str, *packages: str) -> bool:
    return any(module == package or module.startswith(package + ".") for package in packages)


# Who may import a library that is kept in one place.
FENCES: dict[str, Callable[[str], bool]] = {
    "pyfuse3": lambda module: module in ("udbad.edge.portable", "udbad.edge.portable_session"),
    "trio": lambda module: not _within(module, *SYNC_CORE),
    "asyncio": lambda module: not _within(module, *SYNC_CORE),
    "trio_asyncio": lambda module: module == "udbad.coherence.watcher",
    # The few directories of the configuration; not those of branches, whose mounts would wait for asyncio.
    "asyncinotify": lambda module: module == "udbad.supervisor.configwatch",
    "prometheus_client": lambda module: module == "udbad.metrics",
    "tomlkit": lambda module: module == "udbad.settings.edit",
    # Where a configuration file is read: what a command line says is understood without it (see test_imports.py).
    "nats": lambda module: module == "udbad.hosts.nats_bus",
    "redis": lambda module: module == "udbad.hosts.redis_bus",
    "pydantic": lambda module: module in ("udbad.settings.file", "udbad.settings.reference"),
}


def find_modules() -> dict[str, Path]:
    """Every module of the package: dotted name → file."""
    modules = {}
    for path in sorted((ROOT / "udbad").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return modules


MODULES = find_modules()


def level(module: str) -> int | None:
    """Index into LEVELS; None for a file directly in udbad/ that nobody has placed."""
    if module in LEVEL_OF:
        return LEVEL_OF[module]
    package = module.rpartition(".")[0]
    return None if package in ("", "udbad") else level(package)


def imports(tree: ast.AST, module: str, is_package: bool) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of everything the module imports, `from p import n` as p.n."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            source = node.module or ""
            if node.level:
                package = module.split(".")
                package = package[: len(package) - node.level + is_package]
                source = ".".join([*package, source] if source else package)
            for alias in node.names:
                yield node.lineno, f"{source}.{alias.name}"


def imported_module(name: str) -> str:
    """The module behind an imported name, its longest known prefix: udbad.types.Caller → udbad.types."""
    while name not in MODULES and name not in LEVEL_OF and "." in name:
        name = name.rpartition(".")[0]
    return name


def violations(source: str, module: str, is_package: bool = False) -> list[str]:
    """What the layer order forbids in this source, one line each."""
    own_level = level(module)
    if own_level is None:
        return [f"{module}: has no level, add it to LEVELS"]
    tree = ast.parse(source)
    found = []
    for line, name in imports(tree, module, is_package):
        library = name.partition(".")[0]
        if library != "udbad":
            if library in FENCES and not FENCES[library](module):
                found.append(f"{module}:{line}: may not import {library}")
            continue
        target = imported_module(name)
        target_level = level(target)
        if target_level is None or target_level > own_level:
            found.append(f"{module}:{line}: imports {target}, which is above it")
    if _within(module, *SYNC_CORE):
        for node in ast.walk(tree):
            if isinstance(node, (ast.Await, ast.AsyncFunctionDef, ast.AsyncFor, ast.AsyncWith)):
                found.append(f"{module}:{node.lineno}: {type(node).__name__} in the sync core")
    return found


@pytest.mark.parametrize("module", MODULES)
def test_imports_only_point_down(module: str) -> None:
    path = MODULES[module]
    found = violations(path.read_text(), module, path.name == "__init__.py")
    assert not found, "\n".join(found)


@pytest.mark.parametrize("module", ["udbad.supervisor.supervisor", "udbad.control.client"])
def test_supervisor_and_client_never_reach_pyfuse3(module: str) -> None:
    """A process that recovers wedged mounts must not depend on what wedges; followed through all imports."""
    seen: set[str] = set()
    queue = [module] if module in MODULES else []
    while queue:
        current = queue.pop()
        seen.add(current)
        path = MODULES[current]
        for _, name in imports(ast.parse(path.read_text()), current, path.name == "__init__.py"):
            target = imported_module(name)
            if target in MODULES and target not in seen:
                queue.append(target)
    assert not [name for name in seen if _within(name, "udbad.kernel", "udbad.edge")]


def hook_uses(source: str) -> list[int]:
    """Lines that take something from the coherence strategy, `….hooks.…`."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Attribute)
        and (
            (isinstance(node.value, ast.Attribute) and node.value.attr == "hooks")
            or (isinstance(node.value, ast.Name) and node.value.id == "hooks")
        )
    ]


@pytest.mark.parametrize("module", [module for module in MODULES if _within(module, "udbad.union", "udbad.tools")])
def test_only_changes_tells_the_coherence_strategy(module: str) -> None:
    """An operation says once what it did; in which order view, table and strategy follow is for one module to know."""
    lines = hook_uses(MODULES[module].read_text())
    assert bool(lines) == (module == "udbad.union.changes"), lines


@pytest.mark.parametrize("source", ["sb.hooks.own_change(node, name)", "hooks = sb.hooks\nhooks.own_data(node)"])
def test_a_use_of_the_strategy_is_found(source: str) -> None:
    assert len(hook_uses(source)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("udbad.branch.accept", "from udbad.settings.options import Config"),
        ("udbad.branch.accept", "import udbad.settings.options"),
        ("udbad.inodes.table", "from udbad.union import lookup"),
        ("udbad.union.lookup", "from udbad.union.copyup import CopyUp"),
        ("udbad.union.lookup", "from .copyup import CopyUp"),
        ("udbad.union.copyup", "from udbad.union import fs"),
        ("udbad.union.copyup", "from . import fs"),
        ("udbad.coherence.none", "def late():\n    from udbad.union.fs import Fs"),
        ("udbad.kernel.session", "from ..edge import native"),
        ("udbad.edge.native", "from ..mount import mountproc"),
        ("udbad.edge.native", "import pyfuse3"),
        ("udbad.control.trioserver", "from udbad.supervisor.supervisor import run"),
        ("udbad.control.client", "import udbad.cli"),
        ("udbad.types", "from udbad.branch.branches import Branch"),
        ("udbad.stray", "import os"),
        ("udbad.mount.mountproc", "import pyfuse3"),
        ("udbad.union.fs", "from trio import sleep"),
        ("udbad.inodes.table", "import asyncio"),
        ("udbad.kernel.session", "import trio_asyncio"),
        ("udbad.coherence.watcher", "from asyncinotify import Inotify"),
        ("udbad.supervisor.supervisor", "from asyncinotify import Inotify"),
        ("udbad.cli", "from prometheus_client import Counter"),
        ("udbad.branch.spec", "import pydantic"),
        ("udbad.settings.options", "from pydantic import BaseModel"),
        ("udbad.union.fs", "async def read(): ..."),
    ],
)
def test_the_checker_finds(module: str, source: str) -> None:
    assert len(violations(source, module)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("udbad.settings.options", "from udbad.branch.policy import parse"),
        ("udbad.branch.branches", "from udbad.types import Perm"),
        ("udbad.union.lookup", "from udbad.branch.whiteout import PREFIX"),
        ("udbad.union.fs", "from udbad.coherence.base import Coherence"),
        ("udbad.union.fs", "from udbad.union import copyup, lookup"),
        ("udbad.edge.portable", "import pyfuse3\nimport trio\nfrom udbad.union.fs import Fs"),
        ("udbad.coherence.watcher", "import trio_asyncio, trio"),
        ("udbad.supervisor.supervisor", "import asyncio\nfrom udbad.union import fsck"),
        ("udbad.cli", "from udbad import __version__\nfrom udbad.daemon import supervisor, mountproc"),
        ("udbad.metrics", "import prometheus_client"),
    ],
)
def test_the_checker_allows(module: str, source: str) -> None:
    assert violations(source, module) == []


TRUST = {"trusted", "ttl"}
"""Of inodes.table.Dir: what lets the kernel keep what it was told."""
GIVES_TRUST = ("udbad.coherence.base",)


def assignments(source: str, names: set[str]) -> list[int]:
    """Lines on which an attribute with one of these names is set, on anything but self."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, (ast.Store, ast.Del)) and node.attr in names:
            if not (isinstance(node.value, ast.Name) and node.value.id == "self"):
                found.append(node.lineno)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "setattr":
            found.append(node.lineno)
    return found


@pytest.mark.parametrize("module", MODULES)
def test_trust_is_given_and_lost_in_one_place(module: str) -> None:
    """Which has the kernel forget in the same step (coherence/base.py)."""
    found = assignments(MODULES[module].read_text(), TRUST)
    assert bool(found) == (module in GIVES_TRUST), f"{module}: lines {found}"


@pytest.mark.parametrize("source", ["node.trusted = False", "a.b.ttl = 0.0", "setattr(node, 'x', 1)", "del node.ttl"])
def test_the_checker_finds_assignments(source: str) -> None:
    assert assignments(source, TRUST) == [1]


def telling_functions(source: str) -> set[str]:
    """Functions of a module that say a change, so that the strategy is told, themselves or through others of it."""
    calls: dict[str, set[str]] = {}
    tells = set()
    for function in ast.parse(source).body:
        if isinstance(function, ast.FunctionDef):
            parts = list(ast.walk(function))
            calls[function.name] = {part.id for part in parts if isinstance(part, ast.Name)}
            if any(isinstance(part, ast.Attribute) and part.attr == "changes" for part in parts):
                tells.add(function.name)
    while more := {name for name, called in calls.items() if called & tells} - tells:
        tells |= more
    return tells


def used_of(module: str, source: str) -> set[str]:
    return {
        part.attr
        for part in ast.walk(ast.parse(source))
        if isinstance(part, ast.Attribute) and isinstance(part.value, ast.Name) and part.value.id == module
    }


def test_no_strategy_is_called_back_by_what_it_asks() -> None:
    """An event makes a strategy ask the union; were the answer told to the strategy as well, calls would go round."""
    telling = telling_functions(MODULES["udbad.union.lookup"].read_text())
    assert {"adopt", "intern", "refresh", "update"} <= telling
    assert not telling_functions(MODULES["udbad.union.resolve"].read_text())
    used = {
        name: used_of("lookup", path.read_text()) for name, path in MODULES.items() if _within(name, "udbad.coherence")
    }
    assert {"remember", "set_layers"} <= set.union(*used.values())
    assert not {name: found for name, names in used.items() if (found := names & telling)}


def stored(source: str) -> dict[str, set[str]]:
    """By class of a module: the attributes that its methods give `self`."""
    found: dict[str, set[str]] = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef):
            found[node.name] = {
                part.attr
                for part in ast.walk(node)
                if isinstance(part, ast.Attribute)
                and isinstance(part.ctx, ast.Store)
                and isinstance(part.value, ast.Name)
                and part.value.id == "self"
            }
    return found


def declared(pxd: str) -> dict[str, set[str]]:
    """By `cdef class`: its attributes, and those of its bases."""
    found: dict[str, set[str]] = {}
    for head, base, body in re.findall(r"^cdef class (\w+)(?:\((\w+)\))?:\n((?:    .*\n)*)", pxd, re.MULTILINE):
        names = found[head] = set(found.get(base, set()))
        for line in re.findall(r"^    cdef (?:public|readonly) (.*)$", body, re.MULTILINE):
            first, *others = line.split(", ")
            names.update(re.sub(r"\W.*", "", name.split()[-1]) for name in (first, *others))
    return found


DECLARATIONS = [path for path in sorted((ROOT / "udbad").rglob("*.pxd")) if path.with_suffix(".py").exists()]


@pytest.mark.parametrize("path", DECLARATIONS, ids=lambda path: str(path.relative_to(ROOT)))
def test_attributes_are_declared_for_the_compiler(path: Path) -> None:
    """A class that a .pxd declares is compiled with exactly the attributes that stand there."""
    classes = stored(path.with_suffix(".py").read_text())
    for name, attributes in declared(path.read_text()).items():
        missing = classes[name] - attributes
        assert not missing, f"{path.name}: class {name} needs a line `cdef public object {', '.join(sorted(missing))}`"


def test_the_checker_finds_what_is_not_declared() -> None:
    source = (
        "class A:\n def f(self):\n  self.b = self.c = 1\n  self.d.e = 2\nclass B(A):\n def f(self): self.g: int = 1"
    )
    pxd = "cdef class A:\n    cdef public int b, c\ncdef class B(A):\n    cdef public unsigned long long g\n"
    assert stored(source) == {"A": {"b", "c"}, "B": {"g"}}
    assert declared(pxd) == {"A": {"b", "c"}, "B": {"b", "c", "g"}}
