"""Writing a change of a mount back to the file of the configuration that has it; everything else in it stays.

The change is made twice: in the text (tomlkit, which keeps comments, order and formatting) and in the settings
that were read. The new text is only used when reading it gives exactly the new settings: a form of the file that
the text edit does not master is refused, never spoilt.
"""

from __future__ import annotations

import json
import os
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import tomlkit
from tomlkit.exceptions import TOMLKitError
from tomlkit.items import AoT, Array, InlineTable, Item, Table

from udbad.branch.branches import BranchSpec
from udbad.branch.spec import format_branch, format_branches, parse_branches
from udbad.errors import ExitCode, UserError
from udbad.settings.branchlist import find_branch
from udbad.settings.file import Config, MountSettings, load
from udbad.types import Perm


@dataclass(frozen=True, slots=True)
class SetKey:
    """Give a mount option a value that is a string."""

    key: str
    value: str


@dataclass(frozen=True, slots=True)
class PutBranch:
    """Have a branch in the list: changed where it is, else added below the nearest of `above` that is in the list.

    above: paths of the branches over it, nearest first.
    """

    spec: BranchSpec
    above: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True)
class DropBranch:
    """Have no branch with this path in the list."""

    path: bytes


Change = SetKey | PutBranch | DropBranch


@dataclass(frozen=True, slots=True)
class Edited:
    """A file (symbolic links followed) and what it is to hold; settings: of the mount, as that text has them."""

    file: str
    before: str
    after: str
    settings: MountSettings


def edited(path: Path, name: str, changes: Sequence[Change], live: Mapping[bytes, Perm]) -> Edited:
    """Work out what a change of the mount `name` makes of the configuration `path`; writes nothing.

    live: permission of each branch by path; used for one that has none in the file and would get another by
    moving to the top or away from it. Raises UserError (CONFIG), one line: the configuration cannot be read, has
    no such mount, would be wrong, or has a form that cannot be edited.
    """
    before = _load(path, {})
    origin = before.origin.get(f"mounts.{name}")
    if origin is None:
        raise UserError(f"no file of the configuration has [mounts.{name}]", ExitCode.CONFIG)
    try:
        # newline: line ends stay as they are.
        with open(origin, encoding="utf-8", newline="") as stream:
            text = stream.read()
        document = tomlkit.parse(text)
        after, wanted = _apply(document, before.mounts[name], changes, live)
    except (OSError, TOMLKitError, UnicodeError) as error:
        raise UserError(f"{origin}: {error}", ExitCode.CONFIG) from None
    try:
        config = _load(path, {origin: after})
        same = replace(config, mounts={}) == replace(before, mounts={})
        good = same and dict(config.mounts) == {**before.mounts, name: wanted}
    except UserError:
        if _is_toml(after):
            raise
        good = False
    if not good:
        raise UserError(f"{origin}: [mounts.{name}] has a form that cannot be edited here", ExitCode.CONFIG)
    return Edited(os.path.realpath(origin), text, after, wanted)


def check_writable(file: str) -> None:
    """Raises UserError (CONFIG) when `write` would be refused, as far as that can be known before."""
    for place in (file, os.path.dirname(file)):
        if not os.access(place, os.W_OK):
            raise UserError(f"{place} is not writable", ExitCode.CONFIG)


def write(file: str, text: str) -> None:
    """Replace a file at once, keeping its mode and owner; on disk when this returns. Raises OSError."""
    st = os.stat(file)
    directory, name = os.path.split(file)
    # Not *.toml: what lies in conf.d under such a name is read.
    temporary = os.path.join(directory, f".{name}.{secrets.token_hex(4)}.new")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with open(fd, "w", encoding="utf-8", newline="") as stream:
            stream.write(text)
            stream.flush()
            os.fchown(fd, st.st_uid, st.st_gid)
            os.fchmod(fd, st.st_mode & 0o7777)
            os.fsync(fd)
        os.rename(temporary, file)
    except BaseException:
        os.unlink(temporary)
        raise
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _load(path: Path, texts: Mapping[str, str]) -> Config:
    try:
        return load(path, texts)
    except UserError as error:
        first, *more = error.message.splitlines()
        rest = f" (and {len(more)} more problems: udbad check-config)" if more else ""
        raise UserError(first + rest, ExitCode.CONFIG) from None


def _is_toml(text: str) -> bool:
    try:
        tomlkit.parse(text)
    except TOMLKitError:
        return False
    return True


# -- the change, in the settings and in the text --------------------------------------------------


def _apply(
    document: tomlkit.TOMLDocument, settings: MountSettings, changes: Sequence[Change], live: Mapping[bytes, Perm]
) -> tuple[str, MountSettings]:
    table = document["mounts"][settings.name]
    values: dict[str, Any] = {}
    specs = list(settings.options.branches)
    for change in changes:
        if isinstance(change, SetKey):
            if getattr(settings.options, change.key) != change.value:
                _set_key(table, change.key, change.value)
            values[change.key] = change.value
    branch_changes = [change for change in changes if not isinstance(change, SetKey)]
    if branch_changes:
        _change_branches(specs, _entries(table), branch_changes, live)
        values["branches"] = tuple(specs)
    options = settings.options.but(**values)
    return tomlkit.dumps(document), replace(settings, options=options)


def _set_key(table: Any, key: str, value: str) -> None:
    if key in table or not isinstance(table, Table) or table.is_super_table():
        table[key] = value  # what follows the old value on its line stays
        return
    # tomlkit would put it at the end of the table, below comments that are about the next one.
    last = [item for known, item in table.value.body if known is not None and not isinstance(item, (Table, AoT))][-1]
    last.trivia.trail = f"{last.trivia.trail or chr(10)}{last.trivia.indent}{key} = {_quoted(value)}\n"


def _change_branches(
    specs: list[BranchSpec],
    entries: _Entries,
    changes: Sequence[PutBranch | DropBranch],
    live: Mapping[bytes, Perm],
) -> None:
    top = specs[0]
    for change in changes:
        path = change.path if isinstance(change, DropBranch) else change.spec.path
        place = find_branch(specs, path)
        if isinstance(change, DropBranch):
            if place is not None:
                del specs[place]
                entries.delete(place)
        elif place is not None:
            spec, path = change.spec, specs[place].path
            if os.path.normpath(spec.path) != os.path.normpath(path):  # another way there: it stays as it is written
                spec = spec._replace(path=path)
            if specs[place] != spec:
                specs[place] = spec
                entries.replace(place, spec)
        else:
            found = (find_branch(specs, above) for above in change.above)
            place = next((index + 1 for index in found if index is not None), 0)
            specs.insert(place, change.spec)
            entries.insert(place, change.spec)
    # A branch without a permission has one by its place, and nobody wanted to change that.
    for index, spec in enumerate(specs):
        if spec.perm is None and (index == 0) != (spec == top):
            fixed = spec._replace(perm=live.get(os.path.normpath(spec.path), Perm.RW if spec == top else Perm.RO))
            specs[index] = fixed
            entries.replace(index, fixed)


class _Entries(Protocol):
    """The branches of a mount in the text; indices as in the settings."""

    def insert(self, index: int, spec: BranchSpec) -> None: ...
    def replace(self, index: int, spec: BranchSpec) -> None: ...
    def delete(self, index: int) -> None: ...


def _entries(table: Any) -> _Entries:
    value = table["branches"]
    if isinstance(value, AoT):
        return _Tables(value)
    return _List(value) if isinstance(value, Array) else _String(table)


class _String:
    """branches = "/a=rw:/b=ro"."""

    def __init__(self, table: Any) -> None:
        self._table = table
        self._specs = parse_branches(str(table["branches"]))

    def insert(self, index: int, spec: BranchSpec) -> None:
        self._specs.insert(index, spec)
        self._write()

    def replace(self, index: int, spec: BranchSpec) -> None:
        self._specs[index] = spec
        self._write()

    def delete(self, index: int) -> None:
        del self._specs[index]
        self._write()

    def _write(self) -> None:
        literal = self._table["branches"].as_string().startswith("'")
        self._table["branches"] = _value(_quoted(format_branches(self._specs), literal))


class _List:
    """branches = [...], of strings and inline tables."""

    def __init__(self, array: Array) -> None:
        self._array = array

    def insert(self, index: int, spec: BranchSpec) -> None:
        neighbour = self._array[max(index - 1, 0)] if len(self._array) else None
        item = _value(_entry(spec, neighbour))
        # The last line has a comma, and a comment after it: append() would not see the comma.
        lines = re.search(r"\n([ \t]*)[^\s\]#].*,[^\S\n]*(#[^\n]*)?\n(\s*#[^\n]*\n)+\s*\]$", self._array.as_string())
        if index == len(self._array) and lines is not None:
            self._array.add_line(item, indent=lines[1])
        elif index == 0 and len(self._array) and "\n" not in self._array.as_string():
            # insert() at the beginning of a line leaves out the space after the comma.
            self._array.insert(1, _value(self._array[0].as_string()))
            self._array[0] = item
        else:
            self._array.insert(index, item)

    def replace(self, index: int, spec: BranchSpec) -> None:
        self._array[index] = _value(_entry(spec, self._array[index]))

    def delete(self, index: int) -> None:
        del self._array[index]


class _Tables:
    """[[mounts.NAME.branches]]."""

    def __init__(self, tables: AoT) -> None:
        self._tables = tables

    def insert(self, index: int, spec: BranchSpec) -> None:
        table = tomlkit.table()
        for key, text in _keys(spec).items():
            table[key] = _value(text)
        self._tables.insert(index, table)

    def replace(self, index: int, spec: BranchSpec) -> None:
        table = self._tables[index]
        wanted = _keys(spec)
        for key in [key for key in table if key not in wanted]:
            del table[key]
        for key, text in wanted.items():
            if key not in table or table[key] != _value(text):
                table[key] = _value(text)

    def delete(self, index: int) -> None:
        del self._tables[index]


# -- values as TOML has them ----------------------------------------------------------------------


def _value(text: str) -> Item:
    item = tomlkit.parse(f"x = {text}\n")["x"]
    assert isinstance(item, Item)
    return item


def _quoted(text: str, literal: bool = False) -> str:
    """A string, with '...' when asked for and possible. Raises UserError for what is no text: TOML is UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{text!r} is not UTF-8 and cannot be in a TOML file", ExitCode.CONFIG) from None
    return f"'{text}'" if literal and text.isprintable() and "'" not in text else json.dumps(text, ensure_ascii=False)


def _keys(spec: BranchSpec) -> dict[str, str]:
    """Keys of a branch table and their values, as text."""
    keys = {"path": _quoted(os.fsdecode(spec.path))}
    if spec.perm is not None:
        keys["perm"] = _quoted(spec.perm.value)
    if spec.attrs:
        keys["attributes"] = "[" + ", ".join(map(_quoted, sorted(spec.attrs))) + "]"
    if spec.udba is not None:
        keys["udba"] = _quoted(spec.udba)
    if spec.watch is not None:
        keys["watch"] = _quoted(spec.watch)
    return keys


def _entry(spec: BranchSpec, like: Any) -> str:
    """A branch in the form of another entry: a table with the keys in its order, or a string."""
    if not isinstance(like, InlineTable):
        return _quoted(format_branch(spec), isinstance(like, Item) and like.as_string().startswith("'"))
    keys = _keys(spec)
    order = sorted(keys, key=lambda key: list(like).index(key) if key in like else len(keys))
    space = " " if like.as_string().startswith("{ ") else ""
    return "{" + space + ", ".join(f"{key} = {keys[key]}" for key in order) + space + "}"
