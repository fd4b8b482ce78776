"""What the site of docs/ needs beyond mkdocs: links that leave docs/, and that no page needs a network to be read.

A page may link to any file of the repository (../config/pool.toml, ../SECURITY.md), which a code host shows. For the
site such a file is added as it is under `repository/`; Markdown among them becomes a page. A link to a file that does
not exist is left alone, so that the strict build names it. A page that loads something from another host is a warning,
too, and a warning fails the build.
"""

from __future__ import annotations

import logging
import posixpath
import re
from html.parser import HTMLParser
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

log = logging.getLogger("mkdocs.hooks.udbad")

REPOSITORY = Path(__file__).resolve().parent.parent
PREFIX = "repository/"
HOST = re.compile(r"(?:[a-z]+:)?//", re.IGNORECASE)
CSS_URL = re.compile(r"(?:url\(|@import)\s*[\"']?(?:[a-z]+:)?//", re.IGNORECASE)
LINK = re.compile(r"(\]\()([^)#\s]+)")


def repository_path(source: str) -> str:
    """Where the text of a page of the site is in the repository."""
    return source.removeprefix(PREFIX) if source.startswith(PREFIX) else f"docs/{source}"


def site_path(path: str) -> str:
    """The other way round."""
    return path.removeprefix("docs/") if path.startswith("docs/") else PREFIX + path


def linked_files(text: str, path: str) -> dict[str, str]:
    """Each link of the text in the file `path` that leads to a file, and the path of that in the repository."""
    found = {}
    for _, link in LINK.findall(text):
        target = posixpath.normpath(posixpath.join(posixpath.dirname(path), link))
        if not target.startswith("..") and (REPOSITORY / target).is_file():
            found[link] = target
    return found


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what pages link to outside of docs/, and what that links to in turn."""
    todo = [f"docs/{file.src_uri}" for file in files.documentation_pages()]
    seen = set(todo)
    while todo:
        path = todo.pop()
        for target in linked_files((REPOSITORY / path).read_text(), path).values():
            if target in seen or target.startswith("docs/"):
                continue
            seen.add(target)
            files.append(
                File.generated(
                    config,
                    site_path(target),
                    abs_src_path=str(REPOSITORY / target),
                    inclusion=InclusionLevel.NOT_IN_NAV,
                )
            )
            if target.endswith(".md"):
                todo.append(target)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let the links lead to where the files are in the site."""
    source = page.file.src_uri
    links = linked_files(markdown, repository_path(source))

    def replaced(match: re.Match[str]) -> str:
        target = links.get(match[2])
        if target is None:
            return match[0]
        return match[1] + posixpath.relpath(site_path(target), posixpath.dirname(source) or ".")

    return LINK.sub(replaced, markdown)


class Assets(HTMLParser):
    """What a page loads by itself from another host. What it links to with <a> is the reader's choice."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for key, value in attrs:
            loads = key in ("src", "srcset", "data", "poster") or (tag == "link" and key == "href")
            if loads and value and HOST.match(value) and not (tag == "link" and ("rel", "canonical") in attrs):
                self.found.append(value)


def foreign_assets(site: Path) -> list[str]:
    """A line for each file of a built site that loads something from another host."""
    lines = []
    for file in sorted(site.rglob("*")):
        if file.suffix == ".html":
            lines += [f"{file.relative_to(site)} loads {asset}" for asset in Assets(file.read_text()).found]
        elif file.suffix == ".css" and CSS_URL.search(file.read_text()):
            lines.append(f"{file.relative_to(site)} loads something from another host")
    return lines


def on_post_build(config: MkDocsConfig) -> None:
    """A page has to be readable without a network."""
    for line in foreign_assets(Path(config.site_dir)):
        log.warning(line)
