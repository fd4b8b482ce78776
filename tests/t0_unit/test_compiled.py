"""Which form of the hot modules runs, and that a compiled one is never older than its source."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import traceback
from collections.abc import Callable
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest

from udbad import compiled
from udbad.branch.branches import Branch
from udbad.inodes.node import Dir, Layer, Node
from udbad.inodes.table import InodeTable
from udbad.types import Perm

ROOT = Path(__file__).parents[2]
HOT = "udbad.branch.state"
SOURCE = "branch/state.py"
BUILT = SOURCE.removesuffix(".py") + EXTENSION_SUFFIXES[0]
EXTENSION = """
#include <Python.h>
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "state"};
PyMODINIT_FUNC PyInit_state(void) { return PyModule_Create(&module); }
"""
"""Stands for a compiled module: compiling a real one takes seconds."""


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A copy of `udbad`, one of whose hot modules looks compiled, from the sources that lie there."""
    copy = tmp_path / "udbad"
    shutil.copytree(ROOT / "udbad", copy, ignore=shutil.ignore_patterns("*.so", "__pycache__", compiled.STAMP))
    source = tmp_path / "state.c"
    source.write_text(EXTENSION)
    include = sysconfig.get_paths()["include"]
    command = ["gcc", "-shared", "-fPIC", "-I", include, "-o", str(copy / BUILT), str(source)]
    subprocess.run(command, check=True, timeout=60)
    (copy / compiled.STAMP).write_text(compiled.fingerprint(str(copy)))
    return copy


def imported(package: Path, **environment: str) -> tuple[str, str]:
    """(file name, `why_not`) of the hot module, as a new process imports it."""
    script = f"import {HOT}; from udbad import compiled; print({HOT}.__file__); print(compiled.why_not())"
    variables = {key: value for key, value in os.environ.items() if key != "UDBAD_PURE"}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=package.parent, env={**variables, **environment},
        capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    path, reason = done.stdout.splitlines()
    return os.path.basename(path), reason


def test_what_was_compiled_from_these_sources_is_used(package: Path) -> None:
    assert imported(package) == (os.path.basename(BUILT), "")
    assert imported(package, UDBAD_PURE="0") == (os.path.basename(BUILT), "")


def test_the_sources_run_where_they_are_wanted(package: Path) -> None:
    assert imported(package, UDBAD_PURE="1") == ("state.py", "UDBAD_PURE is set")


@pytest.mark.parametrize("changed", [SOURCE, "union/lookup.py", "inodes/table.pxd"])
def test_a_change_of_any_hot_source_has_all_of_them_run(package: Path, changed: str) -> None:
    """Compiled modules know each other's memory layout: none is used beside an uncompiled one."""
    with (package / changed).open("a") as file:
        file.write("# changed\n")
    assert imported(package) == ("state.py", "the sources are not those that were compiled")


def test_a_change_elsewhere_does_not(package: Path) -> None:
    with (package / "cli.py").open("a") as file:
        file.write("# changed\n")
    assert imported(package)[1] == ""


def test_an_interrupted_build_is_none(package: Path) -> None:
    (package / compiled.STAMP).unlink()
    assert imported(package) == ("state.py", "not compiled")


def test_no_time_is_spent_where_no_hot_module_is_imported() -> None:
    script = "import sys, udbad.errors; from udbad import compiled; print(compiled.why_not.cache_info().misses)"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout == "0\n"


@pytest.mark.skipif(os.environ.get("CI") != "true", reason="ok: whoever works on udbad need not compile it")
def test_what_is_tested_is_compiled_unless_it_is_not_to_be() -> None:
    assert (compiled.why_not() == "") == compiled.wanted()


@pytest.mark.parametrize("name", compiled.MODULES)
def test_each_module_is_of_the_form_that_is_said(name: str) -> None:
    module = __import__(name, fromlist=["_"])
    assert module.__file__ is not None
    assert module.__file__.endswith(".py") == bool(compiled.why_not())


def branch() -> Branch:
    return Branch(0, 0, b"/", Perm.RO, frozenset(), None, -1, -1, 0, "ext4")


def line_of(source: str, words: str) -> int:
    lines = (ROOT / source).read_text().splitlines()
    return next(number for number, line in enumerate(lines, 1) if words in line)


def test_a_traceback_names_the_line_of_the_source() -> None:
    table = InodeTable(Dir(1, [Layer(branch(), 1, 2, 2, -1)]), 10)
    with pytest.raises(OSError, match="Stale") as caught:
        table.node(99)
    last = traceback.extract_tb(caught.value.__traceback__)[-2 if caught.traceback[-1].name == "os_error" else -1]
    frames = [frame for frame in traceback.extract_tb(caught.value.__traceback__) if "table.py" in frame.filename]
    # What is `cpdef` has one more frame where it is called from Python: that of the call.
    assert {frame.name.rpartition(".")[2] for frame in frames} == {"node"}
    assert (frames[-1].lineno, frames[-1].line) == (
        line_of("udbad/inodes/table.py", "raise estale()"),
        "raise estale()",
    ), last


@pytest.mark.parametrize(
    "misuse",
    [
        lambda node: node.parent.children,
        lambda node: node.nothing,
    ],
)
def test_a_mistake_is_an_exception(misuse: Callable[[Node], object]) -> None:
    with pytest.raises(AttributeError):
        misuse(Node(5, 0o100000, branch(), 1, 2))
