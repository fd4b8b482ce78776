"""The documentation says what the code says, as far as that can be looked up; that all links lead somewhere in the
site is for mkdocs to find (`make docs`)."""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest

from tests.helpers.mount import REPOSITORY
from tests.t3_fuse.test_lookup_table import TABLE
from udbad import cli
from udbad.branch.spec import ATTRIBUTES
from udbad.control.protocol import NOT_ANSWERING
from udbad.errors import UserError
from udbad.metrics import COHERENCE_STATES
from udbad.mount.commands import LIVE
from udbad.settings import reference
from udbad.settings.branchlist import LIST_OPTIONS
from udbad.settings.file import INTERNAL
from udbad.settings.options import FIELDS, IGNORED, KNOWN, parse_mount_options
from udbad.supervisor.runner import State
from udbad.types import Perm

DOCS = REPOSITORY / "docs"
PAGES = sorted(DOCS.glob("*.md"))
SOURCES = [path for name in ("udbad", "tests") for path in sorted((REPOSITORY / name).rglob("*.py"))]
CITATION = re.compile(r"\b[Ss]emantics(?:\.md)?(?:\s+#?\s*section)?\s+(\d+(?:\.\d+)?(?:(?:, | and )\d+(?:\.\d+)?)*)")
HEADING = re.compile(r"^#+ (\d+(?:\.\d+)?) ", re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)")


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```$|`[^`\n]*`", "", text, flags=re.DOTALL | re.MULTILINE)


def slugs(page: Path) -> set[str]:
    """Anchors of a page, as code hosts and the site make them of its headings."""
    headings = re.findall(
        r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE), re.M
    )
    return {re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", heading.lower())) for heading in headings}


@pytest.mark.parametrize("page", [*sorted(REPOSITORY.glob("*.md")), *PAGES], ids=lambda page: page.name)
def test_links_lead_somewhere_in_the_repository(page: Path) -> None:
    """As somebody reads them who has no site, only the files."""
    for link in LINK.findall(without_code(page.read_text())):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in slugs(target), link


def test_every_section_that_is_cited_exists() -> None:
    headings = set(HEADING.findall((DOCS / "semantics.md").read_text()))
    cited: dict[str, str] = {}
    for path in SOURCES:
        for numbers in CITATION.findall(path.read_text()):
            cited |= dict.fromkeys(re.split(", | and ", numbers), str(path))
    assert len(cited) > 20
    assert {number: path for number, path in cited.items() if number not in headings} == {}


def rows_after(heading: str) -> Iterator[list[str]]:
    """The rows of a table in the semantics, by how its head begins, cells without code marks."""
    _, found, rest = (DOCS / "semantics.md").read_text().partition(f"{heading}\n")
    assert found
    for line in rest.split("\n\n")[0].splitlines()[1:]:
        yield [cell.strip().replace("`", "") for cell in line.strip("|").split("|")]


def cell_of(text: str) -> str:
    words = {"opq": "dir opq", ".wh.N is a directory or symlink": "wh=dir", "-": ""}
    return words.get(text, text.replace(".wh.N and ", "wh ").replace(".wh.N", "wh"))


def answer_of(text: str) -> str:
    if owner := re.fullmatch("([A-C])'s (file|directory)", text):
        return f"{'file' if owner[2] == 'file' else 'dir'} {owner[1]}"
    if "merged from" in text:
        return f"dir {''.join(re.findall('[A-C]', text.partition(':')[0]))}"
    return text.partition(",")[0]


def test_lookup_truth_table_is_the_one_that_is_tested() -> None:
    plain = {(tuple(map(cell_of, row[:3])), answer_of(row[3])) for row in rows_after("| A | B | C | NAME is |")}
    assert plain == {(one.cells, one.expect) for one in TABLE if not one.parents and "wh=symlink" not in one.cells}
    around = {
        (
            tuple(cell.replace("whited out", "wh") for cell in row[:3]),
            tuple(map(cell_of, row[3].split(", "))),
            answer_of(row[4]),
        )
        for row in rows_after("| around NAME: A | B | C | NAME in A, B, C | NAME is |")
    }
    assert around == {(one.parents, one.cells, one.expect) for one in TABLE if one.parents}


def log_lines() -> Iterator[str]:
    """Every warning and error that the code can log, with an ellipsis for each value."""
    for path in SOURCES:
        if not path.is_relative_to(REPOSITORY / "udbad"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.Call(
                    func=ast.Attribute(value=logger, attr="warning" | "error" | "exception" | "log" as level)
                ):
                    name = logger.attr if isinstance(logger, ast.Attribute) else getattr(logger, "id", "")
                    if name in ("log", "_log"):
                        yield re.sub(r"%[-.0-9]*[a-z]", "…", ast.literal_eval(node.args[level == "log"]))


def test_runbook_knows_every_warning_and_error() -> None:
    runbook = (DOCS / "runbook.md").read_text()
    lines = set(log_lines()) - {"…", "…: …"}  # what another line has announced, or quotes
    assert len(lines) > 30
    assert [line for line in sorted(lines) if f"`{line}`" not in runbook] == []


def test_configuration_files_are_quoted_as_they_are() -> None:
    quotes = re.findall(r"\[config/(\w+\.toml)\].*?```toml\n(.*?)```", (DOCS / "guide.md").read_text(), re.DOTALL)
    assert len(quotes) >= 3
    for name, text in quotes:
        assert text.strip() == (REPOSITORY / "config" / name).read_text().strip()


def site_hooks() -> Any:
    spec = importlib.util.spec_from_file_location("mkdocs_hooks", REPOSITORY / ".ci" / "mkdocs_hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_site_that_needs_another_host_is_found(tmp_path: Path) -> None:
    (tmp_path / "fine.html").write_text('<a href="https://example.org/">there</a><img src="x.png"><script src="a.js">')
    (tmp_path / "fine.css").write_text("a { background: url(x.png) }")
    (tmp_path / "one.html").write_text('<script src="https://example.org/a.js"></script>')
    (tmp_path / "two.html").write_text('<link rel="stylesheet" href="//example.org/a.css">')
    (tmp_path / "three.css").write_text("@import 'https://example.org/a.css';")
    found = [line.partition(" ")[0] for line in site_hooks().foreign_assets(tmp_path)]
    assert found == ["one.html", "three.css", "two.html"]


def test_tables_are_what_the_code_says() -> None:
    """`python -m udbad.settings.reference docs` mends it."""
    tables: set[str] = set()
    for page in PAGES:
        text = page.read_text()
        assert text == reference.brought_up_to_date(text), page.name
        tables |= set(re.findall(r"<!-- ([a-z-]+):begin -->", text))
    assert tables == reference.tables().keys()


def test_every_option_is_explained() -> None:
    options = reference.mount_options()
    assert {one.key for one in options if one.key} == FIELDS.keys() - INTERNAL - {"branches"}
    assert {word.rstrip("=") for one in options for word in one.words} | LIST_OPTIONS.keys() | IGNORED >= KNOWN - {
        "default_permissions",
    }
    assert all(one.meaning.endswith(".") and one.values for one in options)


def test_what_cannot_change_while_mounted_is_named() -> None:
    found = re.search(r"everything can change but (.*?): these", (DOCS / "configuration.md").read_text(), re.DOTALL)
    assert found is not None
    assert set(re.findall(r"`(\w+)`", found[1])) == FIELDS.keys() - LIVE - INTERNAL


def test_runbook_knows_every_state() -> None:
    runbook = (DOCS / "runbook.md").read_text()
    for state in [*(one.value for one in State), NOT_ANSWERING, *COHERENCE_STATES[1:]]:
        assert f"| `{state}` " in runbook


OTHERS = (DOCS / "coming-from.md").read_text()


def words_of_ours() -> list[str]:
    """What is in code marks in the second column of the tables for people who come from elsewhere."""
    rows = [line.split("|") for line in OTHERS.splitlines() if line.startswith("| ")]
    return [word for row in rows for word in re.findall(r"`([^`]+)`", row[2])]


def is_ours(word: str) -> bool:
    """Whether it is a command, a permission, an attribute, or an option with a value that it may have."""
    if word.startswith("udbad "):
        command: click.Command | None = cli.main
        for name in word.split()[1:]:
            command = command.commands.get(name) if isinstance(command, click.Group) else None
        return command is not None
    if word in {perm.value for perm in Perm}:
        return True
    if word.startswith("+"):
        return word[1:] in ATTRIBUTES
    branches = "" if word.startswith(("br=", "dirs=")) else "br=/a=rw:/b=ro"
    if word.startswith(("del=", "mod=")):
        branches += ":/c"
    try:
        parse_mount_options([part for part in (branches, word) if part])
    except UserError:
        return False
    return True


@pytest.mark.parametrize("word", sorted(set(words_of_ours())))
def test_what_others_are_told_exists(word: str) -> None:
    assert is_ours(word)


def test_words_of_others_are_found() -> None:
    for word in ("minfreespace=4G", "upperdir=/a", "create=epmfs", "udba=often", "+nc", "udbad branch swap", "nc"):
        assert not is_ours(word), word
    assert len(set(words_of_ours())) > 50


def test_tables_for_others_say_something_in_each_row() -> None:
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in OTHERS.splitlines() if line.startswith("| ")]
    assert [row for row in rows if len(row) != 3 or not row[0] or not row[1]] == []
    assert [row for row in rows if row[1] == "-" and not row[2].startswith(("not needed", "not available"))] == []
