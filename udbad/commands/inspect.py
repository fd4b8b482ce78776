"""Looking into a mount, and changing it while it is mounted."""

from __future__ import annotations

import json
import os
import time
from typing import Any

import click

from udbad.commands.common import absolute_branch, ask_mount, for_terminal, run_dir_option, user_errors
from udbad.commands.completion import branches, files, mounts
from udbad.control import client
from udbad.errors import ExitCode, UserError

save_option = click.option("--save", is_flag=True, help="Write it to the configuration file, too.")
json_option = click.option("--json", "as_json", is_flag=True, help="For programs.")


def _ask_path(run_dir: str, operation: str, path: str) -> dict[str, Any]:
    """Ask about one path; only its name goes to the mount process, nobody touches it here."""
    entry, inside = client.locate(run_dir, path)
    return client.ask_mount(entry, {"op": operation, "path": inside})


def _change(run_dir: str, mount: str, request: dict[str, Any], save: bool) -> None:
    """Have MOUNT changed; print its branches when they are in the answer, and where the change was saved."""
    entry, _ = client.locate(run_dir, mount)
    if not save:
        answer = client.ask_mount(entry, request)
    elif not entry.supervised:
        text = f"{entry.label} was mounted by hand and is in no configuration file: nothing was changed"
        raise UserError(text, ExitCode.CONFIG)
    else:
        answer = client.ask_supervisor(run_dir, {"op": "change", "mount": entry.label, "request": request})
    for line in answer.get("branches", []):
        click.echo(line)
    if save:
        click.echo(f"saved to {answer['saved']}")


@click.command()
@run_dir_option
@json_option
@click.argument("path", shell_complete=files)
def where(run_dir: str, as_json: bool, path: str) -> None:
    """Which branch serves PATH, and every copy of it. Exit code 1 when the union has no such path."""
    with user_errors():
        answer = _ask_path(run_dir, "where", path)
    if as_json:
        click.echo(json.dumps(answer, indent=2))
    else:
        for copy in answer["copies"]:
            when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(copy["mtime"]))
            click.echo(f"{copy['role']:<7} {copy['path']}  {copy['kind']}, {copy['size']} bytes, {when}: {copy['why']}")
        if "data" in answer:
            click.echo(f"data    {answer['data']}")
        cached = answer.get("cached")
        if cached is not None and answer["exists"] and cached["branch"] != answer["branch"]:
            click.echo(f"cached  from {cached['branch']}, as long as udba=none lets it")
        if not answer["exists"]:
            click.echo(f"{path}: not in the union")
    if not answer["exists"]:
        raise SystemExit(int(ExitCode.FAILURE))


@click.command()
@run_dir_option
@json_option
@click.argument("path", shell_complete=files)
def why(run_dir: str, as_json: bool, path: str) -> None:
    """How PATH is resolved: name by name, what each branch has and what follows."""
    with user_errors():
        answer = _ask_path(run_dir, "why", path)
    if as_json:
        click.echo(json.dumps(answer, indent=2))
        return
    for step in answer["steps"]:
        click.echo(step["name"])
        for one in step["branches"]:
            marks = [mark for mark in ("whiteout", "opaque") if one[mark]]
            has = ", ".join([*([one["kind"]] if one["kind"] else []), *marks]) or "-"
            click.echo(f"  {one['branch']}: {has}: {one['role']}, {one['why']}")
    click.echo(f"created by {answer['create']}, copied up by {answer['cpup']}")


@click.command()
@run_dir_option
@click.argument("path", shell_complete=files)
def invalidate(run_dir: str, path: str) -> None:
    """Forget what is cached about PATH and everything below it."""
    with user_errors():
        click.echo(f"{_ask_path(run_dir, 'invalidate', path)['nodes']} objects forgotten")


@click.command()
@run_dir_option
@click.option("--all-hosts", is_flag=True, help="Also those made on other hosts, of which `udbad subscribe` hears.")
@click.option(
    "--timeout",
    type=click.FloatRange(0, 3600),
    default=30.0,
    show_default=True,
    metavar="SECONDS",
    help="How long other hosts have to answer.",
)
@click.argument("mount", shell_complete=mounts)
def flush(run_dir: str, all_hosts: bool, timeout: float, mount: str) -> None:
    """Return when every direct change made up to now is seen through MOUNT (its name, or a path in it).

    Exit code 1 when --all-hosts has to say which host has not answered.
    """
    with user_errors():
        if all_hosts:
            _catch_up(run_dir, mount, timeout)
        ask_mount(run_dir, mount, {"op": "flush"})


def _catch_up(run_dir: str, mount: str, seconds: float) -> None:
    """Have MOUNT hear what other hosts have changed. Raises UserError: who has not told it."""
    from udbad.hosts import barrier  # not for the other commands

    sockets = ask_mount(run_dir, mount, {"op": "subscribers"})["subscribers"]
    if not sockets:
        raise UserError(f"{mount}: hears of no other host (udbad subscribe)", ExitCode.FAILURE)
    missing = barrier.ask(sockets, seconds)
    if missing:
        raise UserError(f"{mount}: not heard within {seconds:g} s: {'; '.join(missing)}", ExitCode.FAILURE)


@click.command()
@run_dir_option
@click.argument("mount", shell_complete=mounts)
@click.argument("mode", type=click.Choice(["none", "reval", "notify"]))
@save_option
def udba(run_dir: str, mount: str, mode: str, save: bool) -> None:
    """Change how MOUNT follows direct changes of its branches."""
    with user_errors():
        _change(run_dir, mount, {"op": "udba", "mode": mode}, save)


@click.command()
@run_dir_option
@json_option
@click.argument("mount", shell_complete=mounts)
@click.argument("branch", shell_complete=branches)
def busy(run_dir: str, as_json: bool, mount: str, branch: str) -> None:
    """Who uses BRANCH of MOUNT, which keeps it from being removed. Exit code 1 when somebody does."""
    with user_errors():
        users = ask_mount(run_dir, mount, {"op": "busy", "branch": os.path.abspath(branch)})["users"]
    if as_json:
        click.echo(json.dumps(users, indent=2))
    else:
        for user in users:
            click.echo(for_terminal(f"{user['pid']} {user['command'] or '?'}: {user['what']} {user['path']}"))
    if users:
        raise SystemExit(int(ExitCode.FAILURE))


@click.group()
def branch() -> None:
    """List, add, remove and change the branches of a mount while it is mounted."""


def _edit(run_dir: str, mount: str, edits: list[list[str]], save: bool = False) -> None:
    with user_errors():
        _change(run_dir, mount, {"op": "branches", "edits": edits}, save)


@branch.command("list")
@run_dir_option
@click.argument("mount", shell_complete=mounts)
def branch_list(run_dir: str, mount: str) -> None:
    """The branches of MOUNT, top first."""
    _edit(run_dir, mount, [])


@branch.command("add")
@run_dir_option
@click.option("-i", "--index", type=click.IntRange(min=0), help="Place, 0 is the top. Default: at the bottom.")
@click.argument("mount", shell_complete=mounts)
@click.argument("branch", metavar="PATH[=PERM[+ATTR...]]", shell_complete=files)
@save_option
def branch_add(run_dir: str, index: int | None, mount: str, branch: str, save: bool) -> None:
    """Add a branch to MOUNT."""
    branch = absolute_branch(branch)
    _edit(run_dir, mount, [["append", branch] if index is None else ["add", f"{index}:{branch}"]], save)


@branch.command("del")
@run_dir_option
@click.argument("mount", shell_complete=mounts)
@click.argument("path", shell_complete=branches)
@save_option
def branch_del(run_dir: str, mount: str, path: str, save: bool) -> None:
    """Remove a branch from MOUNT; refused while it is in use (udbad busy says by whom)."""
    _edit(run_dir, mount, [["del", absolute_branch(path)]], save)


@branch.command("mod")
@run_dir_option
@click.argument("mount", shell_complete=mounts)
@click.argument("branch", metavar="PATH=PERM[+ATTR...]", shell_complete=branches)
@save_option
def branch_mod(run_dir: str, mount: str, branch: str, save: bool) -> None:
    """Change permission and attributes of a branch of MOUNT."""
    if "=" not in branch:
        raise click.UsageError(str(UserError("say which permission: PATH=PERM[+ATTR...]")))
    _edit(run_dir, mount, [["mod", absolute_branch(branch)]], save)
