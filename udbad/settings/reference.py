"""Options, keys and exit codes as people read them, from the models: for the pages in docs/ and for man pages.

What a thing means stands beside it, as the text below an attribute or the beginning of a policy's docstring; what its
value may be is the description of its field, which messages quote as well. Nothing is described here.

    python -m udbad.settings.reference docs     brings the tables in docs/*.md up to date

A table of a page stands between `<!-- NAME:begin -->` and `<!-- NAME:end -->`, NAME being one of `tables()`.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from udbad import metrics
from udbad.branch.policy import COPYUP_POLICIES, CREATE_POLICIES, CopyUpPolicy, CreatePolicy
from udbad.branch.spec import ATTRIBUTES
from udbad.errors import ExitCode
from udbad.settings.branchlist import LIST_OPTIONS
from udbad.settings.file import (
    INTERNAL,
    BranchTable,
    DaemonSettings,
    HostsSettings,
    MetricsSettings,
    MountKeys,
    allowed,
)
from udbad.settings.options import FIELDS, IGNORED, MountOptions, words_for
from udbad.types import Perm


@dataclass(frozen=True, slots=True)
class Entry:
    """An option or a key. In all texts `backticks` enclose what is written literally.

    key: in a table of the configuration file, "" where it has none there. words: after -o, `NAME=` with a value.
    values: what may be given. default: as TOML has it, "" for none. meaning: sentences.
    """

    key: str
    words: tuple[str, ...]
    values: str
    default: str
    meaning: str


def explained(cls: type) -> dict[str, str]:
    """The text below each attribute of a class, in one line."""
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(body, ast.ClassDef)
    found = {}
    for attribute, text in zip(body.body, body.body[1:], strict=False):
        match attribute, text:
            case (
                ast.AnnAssign(target=ast.Name(id=name)) | ast.Assign(targets=[ast.Name(id=name)]),
                ast.Expr(value=ast.Constant(value=str() as meaning)),
            ):
                found[name] = " ".join(meaning.split())
    return found


def entries(table: type[BaseModel | MountOptions]) -> list[Entry]:
    """The keys of a table, in the order of its class. Raises KeyError for one that nobody has explained."""
    meanings = explained(table)
    fields: Mapping[str, Any] = table.model_fields if issubclass(table, BaseModel) else FIELDS
    values = allowed(table)
    return [Entry(name, (), values[name], _default(one.default), meanings[name]) for name, one in fields.items()]


def mount_options() -> list[Entry]:
    """Every option of a mount but for the branches: those that are keys of the file and those that are not."""
    return [
        Entry("" if one.key in INTERNAL else one.key, words, one.values, one.default, one.meaning)
        for one in entries(MountOptions)
        if one.key != "branches" and (words := tuple(words_for(one.key)))
    ]


def list_options() -> list[tuple[tuple[str, ...], str, str]]:
    """What changes the list of branches: its words (`NAME=`), the form of the value, and what it does."""
    words: dict[tuple[str, str], list[str]] = {}
    for word, entry in LIST_OPTIONS.items():
        words.setdefault(entry, []).append(f"{word}=")
    return [(tuple(names), form, meaning) for (form, meaning), names in words.items()]


def policies(table: Mapping[str, type[CreatePolicy] | type[CopyUpPolicy]]) -> dict[str, str]:
    """How each policy is written, other names in brackets, and what it does."""
    names: dict[type[CreatePolicy] | type[CopyUpPolicy], list[str]] = {}
    for name, policy in table.items():
        names.setdefault(policy, []).append(name)
    found = {}
    for policy, (name, *others) in names.items():
        text = " ".join((policy.__doc__ or "").split("\n\n")[0].split())
        form = name + ":LOW" * policy.takes_low + "[:SEC]" * policy.takes_seconds
        found[", ".join([form, *others])] = text.removeprefix(f"{name}: ")
    return found


def exit_codes() -> dict[int, str]:
    meanings = explained(ExitCode)
    return {int(code): meanings[code.name] for code in ExitCode}


def _default(value: object) -> str:
    """As TOML has it; "" for what has no default, or an empty one."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return f'"{value}"'
    return f"{value:g}" if isinstance(value, int | float) else ""


# -- tables of the pages ----------------------------------------------------------------------------

_LINKS = {
    ": see Modes": ": [Modes](modes.md)",
    ": see Create policies": ": [Create policies](#create-policies)",
    ": see Copy-up policies": ": [Copy-up policies](#copy-up-policies)",
    ": see Without root": ": [Without root](guide.md#without-root)",
    ": see What happens when…": ": [What happens when…](operations.md#what-happens-when)",
    ": see Durability": ": [Durability](modes.md#durability)",
    ": see Watching the union": ": [Watching the union](modes.md#watching-the-union)",
    ": see Containers": ": [Containers](containers.md)",
    ": see Many hosts": ": [Many hosts](hosts.md)",
}
"""Where in docs/ that is which a meaning sends its reader to."""


def tables() -> dict[str, str]:
    """Every table that a page may have, by the name in its marks, as Markdown."""
    perms = explained(Perm)
    return {
        "permissions": _table(("perm", "meaning"), ((f"`{perm.value}`", perms[perm.name]) for perm in Perm)),
        "attributes": _table(
            ("attribute", "on", "meaning"),
            ((f"`{word}`", _permissions(one.valid_on), one.meaning) for word, one in ATTRIBUTES.items()),
        ),
        "list-options": _table(
            ("option", "value", "meaning"),
            ((_literal(words), _literal([form]), meaning) for words, form, meaning in list_options()),
        ),
        "mount-options": _table(
            ("after `-o`", "key in a file", "value", "default", "meaning"),
            (
                (_literal(one.words), _literal([one.key]), one.values, _literal([one.default]), _linked(one.meaning))
                for one in mount_options()
            ),
        ),
        "create-policies": _policies(CREATE_POLICIES),
        "copyup-policies": _policies(COPYUP_POLICIES),
        "ignored": " ".join(f"`{word}`" for word in sorted(IGNORED)) + "\n",
        "daemon-keys": _keys(DaemonSettings),
        "metrics-keys": _keys(MetricsSettings),
        "hosts-keys": _keys(HostsSettings),
        "mount-keys": _keys(MountKeys),
        "branch-keys": _keys(BranchTable),
        "exit-codes": _table(("code", "meaning"), ((str(code), text) for code, text in exit_codes().items())),
        "metrics": metrics.markdown_table(),
    }


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = tuple(head)
    lines = [head, ["---"] * len(head), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def _linked(meaning: str) -> str:
    for words, link in _LINKS.items():
        meaning = meaning.replace(words, link)
    return meaning


def _permissions(perms: Iterable[Perm]) -> str:
    words = [f"`{perm.value}`" for perm in Perm if perm in perms]
    return "any" if len(words) == len(Perm) else ", ".join(words)


def _literal(words: Iterable[str]) -> str:
    return " ".join(f"`{word}`" for word in words if word)


def _keys(model: type[BaseModel]) -> str:
    return _table(
        ("key", "value", "default", "meaning"),
        ((f"`{one.key}`", one.values, _literal([one.default]), one.meaning) for one in entries(model)),
    )


def _policies(table: Mapping[str, type[CreatePolicy] | type[CopyUpPolicy]]) -> str:
    rows = ((_literal(form.split(", ")), meaning) for form, meaning in policies(table).items())
    return _table(("policy", "which branch"), rows)


_MARKED = re.compile(r"(<!-- ([a-z-]+):begin -->\n).*?(<!-- \2:end -->)", re.DOTALL)


def brought_up_to_date(page: str) -> str:
    """The text of a page with its tables as they have to be. Raises KeyError for the name of no table."""
    known = tables()
    return _MARKED.sub(lambda mark: f"{mark[1]}\n{known[mark[2]]}\n{mark[3]}", page)


def main(directory: Path) -> None:
    for path in sorted(directory.glob("*.md")):
        path.write_text(brought_up_to_date(path.read_text()))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
