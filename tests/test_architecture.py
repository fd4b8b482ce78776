"""The paths in docs/architecture.md are those of the code: each function is there, and refers to those under it.

Under a path's heading, `udbad.module.Class.function` at the beginning of a list item; an item that is further in is
called by the one it stands under. "through `TABLE`" in that one: by way of a table that its function or class uses, of
its module or imported into it, which names it.
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "architecture.md"
ITEM = re.compile(r"^(?P<indent> *)- `(?P<name>udbad\.[\w.]+)`:(?P<text>.*)$")
PATHS = ["a lookup", "a branch event", "a copy-up", "a request that is sent again", "what is known", "a reload"]


@dataclass(frozen=True)
class Step:
    """One item: name, how far in it stands, and the table that it calls what is under it through."""

    name: str
    indent: int
    table: str | None


def steps(text: str) -> dict[str, list[Step]]:
    """By heading of the page: what "## The path of X" lists."""
    found: dict[str, list[Step]] = {}
    for section in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        heading, _, body = section.partition("\n")
        if not heading.startswith("The path of "):
            continue
        items = found[heading.removeprefix("The path of ")] = []
        for line in body.splitlines():
            if line.lstrip().startswith("- "):
                match = ITEM.match(line)
                assert match is not None, f"not an item of a path: {line}"
                table = re.search(r"through `(\w+)`", match["text"])
                items.append(Step(match["name"], len(match["indent"]), table and table[1]))
    return found


@cache
def module_of(name: str) -> tuple[str, ast.Module]:
    """The longest prefix of a dotted name that is a module, parsed."""
    parts = name.split(".")
    for end in range(len(parts) - 1, 0, -1):
        path = ROOT.joinpath(*parts[:end]).with_suffix(".py")
        if path.is_file():
            return ".".join(parts[:end]), ast.parse(path.read_text())
    raise LookupError(f"{name}: no such module")


def definition(name: str) -> ast.FunctionDef | ast.AsyncFunctionDef:
    """The function of this dotted name. Raises LookupError."""
    module, scope = module_of(name)
    found: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef = scope
    for part in name.removeprefix(module + ".").split("."):
        for node in found.body:
            if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and node.name == part:
                found = node
                break
        else:
            raise LookupError(f"{name}: {module} has no {part} there")
    if isinstance(found, (ast.Module, ast.ClassDef)):
        raise LookupError(f"{name} is no function")
    return found


def mentions(scope: ast.AST, word: str) -> bool:
    """Whether code uses a name, as a variable, an attribute, or a string that is nothing but it."""
    for node in ast.walk(scope):
        if isinstance(node, ast.Name) and node.id == word:
            return True
        if isinstance(node, ast.Attribute) and node.attr == word:
            return True
        if isinstance(node, ast.Constant) and node.value in (word, word.lstrip("_")):
            return True
    return False


def outermost(name: str) -> ast.AST:
    """The class of a method, or the function itself."""
    module, scope = module_of(name)
    first = name.removeprefix(module + ".").partition(".")[0]
    return next(node for node in scope.body if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == first)


def home(table: str, name: str) -> ast.Module:
    """The module that the table is in which the module of `name` uses."""
    scope = module_of(name)[1]
    for node in scope.body:
        if isinstance(node, ast.ImportFrom) and any(alias.name == table for alias in node.names):
            return module_of(f"{node.module}.{table}")[1]
    return scope


def broken(path: list[Step]) -> list[str]:
    """What a path says that the code does not, one line each."""
    found = []
    above: list[Step] = []
    for step in path:
        while above and above[-1].indent >= step.indent:
            above.pop()
        try:
            definition(step.name)
        except LookupError as error:
            found.append(str(error))
            continue
        if above:
            caller = above[-1]
            scope: ast.AST = definition(caller.name)
            word = step.name.rpartition(".")[2]
            if (
                not mentions(scope, word)
                and caller.table is not None
                and mentions(outermost(caller.name), caller.table)
            ):
                scope = home(caller.table, caller.name)
            if not mentions(scope, word):
                found.append(f"{caller.name} does not call {step.name}")
        above.append(step)
    return found


@pytest.mark.parametrize("title", PATHS)
def test_the_path_is_that_of_the_code(title: str) -> None:
    path = steps(PAGE.read_text())[title]
    assert len(path) >= 5
    assert broken(path) == []


@pytest.mark.parametrize(
    "wrong",
    [
        ["udbad.union.lookup.no_such_function"],
        ["udbad.union.lookup.Found"],
        ["udbad.union.nowhere.lookup"],
        ["udbad.union.lookup.lookup", "udbad.union.copyup.begin"],
    ],
)
def test_the_checker_finds(wrong: list[str]) -> None:
    text = "## The path of x\n\n" + "".join(f"{'    ' * depth}- `{name}`: x\n" for depth, name in enumerate(wrong))
    assert len(broken(steps(text)["x"])) == 1
