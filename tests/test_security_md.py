"""SECURITY.md: every line that says what somebody can or cannot do names tests, and they exist."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TEST = re.compile(r"`(tests/[\w/]+\.py)::(test_\w+)`")


def items(text: str) -> list[str]:
    """The list items; a line that is indented goes on with the one before."""
    found: list[str] = []
    for line in text.splitlines():
        if line.startswith("- "):
            found.append(line)
        elif line.startswith("  ") and found:
            found[-1] += line
    return found


LINES = items((ROOT / "SECURITY.md").read_text())


@cache
def defined_in(path: str) -> frozenset[str]:
    tree = ast.parse((ROOT / path).read_text())
    return frozenset(node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


@pytest.mark.parametrize("line", LINES, ids=lambda line: line[2:50])
def test_each_line_has_a_test_that_exists(line: str) -> None:
    named = TEST.findall(line)
    assert named, "a promise without a test"
    missing = [f"{path}::{name}" for path, name in named if not (ROOT / path).is_file() or name not in defined_in(path)]
    assert missing == []
    assert line.count("::") == len(named), "something that looks like a test and is none"


def test_every_section_says_something() -> None:
    sections = re.split(r"^## ", (ROOT / "SECURITY.md").read_text(), flags=re.MULTILINE)[1:]
    assert [section.splitlines()[0] for section in sections if not items(section)] == []
    assert len(sections) >= 4


def test_the_check_finds() -> None:
    assert items("- a\n  b\n\nc\n- d") == ["- a  b", "- d"]
    assert TEST.findall("- nothing") == []
    assert "test_the_check_finds" in defined_in("tests/test_security_md.py")
