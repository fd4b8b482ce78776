"""Changing a mount and its configuration in one: `--save` of udbad branch and udbad udba.

The supervisor does it, not the client: it alone knows which files it was started with, can keep a reload from
coming between, and knows that the change it then finds in the file is its own. First everything is tried
without doing it, then the mount is changed, then the file, from what it holds by then.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from udbad.branch.branches import BranchSpec
from udbad.branch.spec import format_branch, parse_branch, parse_path
from udbad.control.protocol import Message, edits_of, text_of
from udbad.errors import ExitCode, UserError
from udbad.settings import edit as configedit
from udbad.settings.branchlist import edit_branches, find_branch
from udbad.settings.edit import Change, DropBranch, Edited, PutBranch, SetKey
from udbad.supervisor.runner import Runner
from udbad.types import Perm


async def change_and_save(path: Path, runner: Runner, request: Message) -> tuple[Message, Edited]:
    """Have a mount process do `request` ("branches" with edits, or "udba"), and write it to the configuration `path`.

    Returns its answer and what became of the file. Raises UserError, which says whether the mount was changed;
    OSError when the mount process does not answer.
    """
    label = runner.label
    if runner.transient:
        raise UserError(
            f"{label} was mounted by hand and is in no configuration file: nothing was changed", ExitCode.CONFIG
        )
    if runner.worker is not None:
        runner.refresh(runner.worker.pid)
    branches = list(runner.active.options.branches)
    try:
        edits = _edits(request)
        if edits and runner.settings.options.source is not None:
            raise UserError("the branches are those of its source", ExitCode.CONFIG)
        # In a thread, here and below: a path may lead into a mount that hangs, and all mounts with it.
        live, planned = await asyncio.to_thread(_plan, path, runner, request, branches, edits)
        configedit.check_writable(planned.file)
    except UserError as error:
        raise UserError(f"nothing was changed: {error.message}", error.code) from None
    answer = await runner.request({**request, "edits": live} if edits else request)
    if not answer["ok"]:
        raise UserError(str(answer["error"]), ExitCode(answer.get("code", ExitCode.FAILURE)))
    specs = [parse_branch(text) for text in answer.get("specs", map(format_branch, branches))]
    try:
        done = await asyncio.to_thread(_edited, path, runner, request, specs)
        if done.after != done.before:
            await asyncio.to_thread(configedit.write, done.file, done.after)
    except UserError as error:
        raise UserError(f"{label} was changed, but that was not saved: {error.message}", error.code) from None
    except OSError as error:
        text = f"{label} was changed, but that was not saved: {planned.file}: {error.strerror}"
        raise UserError(text, ExitCode.CONFIG) from None
    return answer, done


def _edits(request: Message) -> list[tuple[str, str]]:
    """Raises UserError (OPTION) unless the request is one that can be saved."""
    edits = edits_of(request)
    if request.get("op") == ("branches" if edits else "udba"):
        return edits
    raise UserError("only a mode or edits of the branches can be saved", ExitCode.OPTION)


def _plan(
    path: Path, runner: Runner, request: Message, branches: Sequence[BranchSpec], edits: Sequence[tuple[str, str]]
) -> tuple[list[tuple[str, str]], Edited]:
    """The edits that are for the mount, and what the file is going to be."""
    # What only the file has can only be taken out of that.
    live = [edit for edit in edits if edit[0] != "del" or not _only_in_file(runner, parse_path(edit[1]))]
    return live, _edited(path, runner, request, edit_branches(branches, live))


def _edited(path: Path, runner: Runner, request: Message, specs: Sequence[BranchSpec]) -> Edited:
    """specs: the branches of the mount after the change."""
    live: Mapping[bytes, Perm] = {os.path.normpath(spec.path): spec.perm for spec in specs if spec.perm is not None}
    if request["op"] == "udba":
        changes: list[Change] = [SetKey("udba", text_of(request, "mode"))]
    else:
        changes = [_change(key, value, specs) for key, value in _edits(request)]
    return configedit.edited(path, runner.settings.name, changes, live)


def _change(key: str, value: str, specs: Sequence[BranchSpec]) -> Change:
    """One edit as the file has to follow it: what was changed by hand before and not saved stays out of it."""
    if key == "del":
        return DropBranch(parse_path(value))
    text = value.partition(":")[2] if key in ("add", "ins") else value
    path = parse_branch(text).path
    index = find_branch(specs, path)
    if index is None:
        return DropBranch(path)  # a later edit has removed it
    return PutBranch(specs[index], tuple(above.path for above in specs[:index])[::-1])


def _only_in_file(runner: Runner, path: bytes) -> bool:
    """Whether a branch is in the configuration and not in the mount."""
    configured, active = runner.settings.options.branches, runner.active.options.branches
    return find_branch(active, path) is None and find_branch(configured, path) is not None
