"""run and check-config, and what a running daemon can be told."""

from __future__ import annotations

import json
import time
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import click

from udbad import logs
from udbad.branch import capabilities
from udbad.commands.common import print_wide, run_dir_option, user_errors
from udbad.commands.completion import mounts
from udbad.control import client, registry
from udbad.control.protocol import NOT_ANSWERING
from udbad.errors import ExitCode, UserError

config_option = click.option(
    "-c", "--config", type=click.Path(path_type=Path), default=capabilities.config_file,
    show_default=capabilities.SYSTEM_CONFIG,
    help="The configuration file; conf.d/*.toml beside it is read too.",
)  # fmt: skip


@click.command()
@config_option
@click.option("--log-format", type=click.Choice(["plain", "json"]), help="Instead of daemon.log_format.")
def run(config: Path, log_format: str | None) -> None:
    """Run the daemon in the foreground: mount what the configuration says and keep it mounted."""
    from udbad.supervisor.workers import Pool

    pool = Pool()
    with user_errors(), closing(pool):
        with suppress(OSError):  # then it is tried again when it is needed
            pool.begin()  # it imports what a mount needs while we import the rest: who uses a mount may wait for both
        from udbad.supervisor import supervisor

        supervisor.run(config.absolute(), pool, log_format)


@click.command("check-config")
@config_option
def check_config(config: Path) -> None:
    """Say everything that is wrong with a configuration; exit code 0 when nothing is.

    What the files say, and what of it is there: branches and mount points are looked at as for a mount.
    """
    from udbad.settings.file import ConfigError, load
    from udbad.supervisor import check

    with user_errors():
        checked = load(config)
        found = list(check.problems(checked))
        if found:
            raise ConfigError(found)
        for mount in checked.mounts.values():
            state = "" if mount.enabled else " (not enabled)"
            click.echo(f"{mount.name}: {mount.mount_point}, {len(mount.options.branches)} branches{state}")
            for path in check.missing(mount) if mount.enabled else ():
                click.echo(f"{mount.name}: branch {path} does not exist; it will be waited for")
        click.echo(f"{config}: good, {len(checked.mounts)} mounts")


@click.command()
@run_dir_option
def reload(run_dir: str) -> None:
    """Have the daemon read its configuration again; says for each changed key what became of it."""
    with user_errors():
        verdicts = client.ask_supervisor(run_dir, {"op": "reload"})["verdicts"]
        for one in verdicts:
            name = f"{one['table']}.{one['key']}" if one["key"] else one["table"]
            click.echo(f"{name}: {one['outcome']}" + (f": {one['text']}" if one["text"] else ""))
        if not verdicts:
            click.echo("nothing has changed")
        if any(one["outcome"] == "rejected" for one in verdicts):
            raise SystemExit(int(ExitCode.CONFIG))


@click.command()
@run_dir_option
@click.option("--keep-mounts", is_flag=True, help="Leave the mounts to the next daemon, which adopts them.")
def stop(run_dir: str, keep_mounts: bool) -> None:
    """Stop the daemon, and with it every mount unless they are kept."""
    with user_errors():
        client.ask_supervisor(run_dir, {"op": "stop", "keep_mounts": keep_mounts})


@click.command()
@run_dir_option
@click.option("--force", is_flag=True, help="Also when it is in use or gives no answer; whoever uses it gets errors.")
@click.argument("mount", shell_complete=mounts)
def restart(run_dir: str, force: bool, mount: str) -> None:
    """Have another process go on with MOUNT, of the version that is installed now, which nobody notices.

    Where that cannot be, or options wait for the next mount: unmount it and mount it again, when nobody uses it; mount
    one that failed or was unmounted.
    """
    with user_errors():
        found = registry.find(run_dir, mount)
        if found is not None and not found[0].supervised:
            if force:
                raise UserError(f"{found[0].label} is none of the daemon's: umount, and mount it again")
            from udbad.mount import renewal  # which imports much

            renewal.renew(found[0])
            return
        client.ask_supervisor(run_dir, {"op": "restart", "mount": mount, "force": force})


@click.command("log-level")
@run_dir_option
@click.argument("level", type=click.Choice(logs.LEVELS))
@click.argument("mount", required=False, shell_complete=mounts)
def log_level(run_dir: str, level: str, mount: str | None) -> None:
    """Change how much is logged, by MOUNT or by the daemon and all its mounts, until the next start."""
    with user_errors():
        request = {"op": "log-level", "level": level}
        if mount is None:
            client.ask_supervisor(run_dir, request)
        else:
            client.ask_mount(client.locate(run_dir, mount)[0], request)


@click.command()
@run_dir_option
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def status(run_dir: str, as_json: bool) -> None:
    """Every mount: who serves it, since when, with which branches. Exit code 1 unless all of them serve."""
    with user_errors():
        answer = collect_status(run_dir)
    if as_json:
        click.echo(json.dumps(answer, indent=2))
    else:
        _print_status(answer)
    if any(mount["state"] != "serving" for mount in answer["mounts"]):
        raise SystemExit(int(ExitCode.FAILURE))


def collect_status(run_dir: str) -> dict[str, Any]:
    """What the daemon says, and the mounts that no daemon looks after. Raises UserError when there is neither."""
    try:
        answer = client.ask_supervisor(run_dir, {"op": "status"}, timeout=10.0)
    except UserError as error:
        if error.code is not ExitCode.NO_DAEMON:
            raise
        answer = {"pid": None, "udbad": None, "config": [], "mounts": []}
    # A process of another pid namespace may have the number of one of the daemon's.
    known = {(mount["pid"], mount["connection"]) for mount in answer["mounts"]}
    for entry in registry.entries(run_dir):
        if (entry.pid, entry.connection) in known or (entry.supervised and answer["pid"] is not None):
            continue
        mount: dict[str, Any] = {
            "name": entry.name, "label": entry.label, "mount_point": entry.mount_point, "state": "serving",
            "reason": "", "since": entry.started, "restarts": 0, "pid": entry.pid, "connection": entry.connection,
            "si": entry.id, "pending": [],
        }  # fmt: skip
        try:
            mount["process"] = client.ask_mount(entry, {"op": "status"}, timeout=2.0)
            mount["restarts"] = mount["process"].get("restarts", 0)
        except client.NoAnswer as error:
            mount["state"], mount["reason"] = NOT_ANSWERING, error.message
        except UserError as error:
            mount["state"], mount["reason"] = "dead", error.message
        answer["mounts"].append(mount)
    return answer


def _print_status(answer: dict[str, Any]) -> None:
    pid = answer["pid"]
    click.echo(f"daemon: process {pid}, version {answer['udbad']}" if pid else "daemon: none runs")
    if not answer["mounts"]:
        click.echo("no mounts")
        return
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("MOUNT", "STATE", "MOUNT POINT", "PID", "SINCE", "RESTARTS", "UDBA", "IO", "BRANCHES"):
        table.add_column(column, overflow="fold")
    for mount in answer["mounts"]:
        process = mount.get("process", {})
        table.add_row(
            mount["label"], mount["state"], mount["mount_point"], str(mount["pid"] or "-"),
            _duration(time.time() - mount["since"]), str(mount["restarts"]), _coherence(process),
            process.get("io", "-"), "\n".join(process.get("branches", ["-"])),
        )  # fmt: skip
    print_wide(table)
    for mount in answer["mounts"]:
        if mount["reason"]:
            click.echo(f"{mount['label']}: {mount['reason']}")
        process = mount.get("process", {})
        for line in process.get("io_fallbacks", ()):
            click.echo(f"{mount['label']}: {line}")
        for branch, since in process.get("offline", {}).items():
            click.echo(f"{mount['label']}: {branch} has not answered for {_duration(time.time() - since)}")
        if process.get("mortal", "") not in ("", "survive=off"):
            click.echo(f"{mount['label']}: ends with its process: {process['mortal']}")
        served_by = process.get("udbad", answer["udbad"])
        if answer["udbad"] is not None and served_by != answer["udbad"]:
            click.echo(f"{mount['label']}: still served by version {served_by}; udbad restart {mount['label']}")
        if process.get("lacks"):
            click.echo(f"{mount['label']}: served through {process['edge']}, without {'; '.join(process['lacks'])}")
        if mount["pending"]:
            click.echo(f"{mount['label']}: at the next mount: {', '.join(mount['pending'])}")


def _coherence(process: dict[str, Any]) -> str:
    """The mode, and how far it is not kept."""
    words = [process.get("udba", "-")]
    found = process.get("coherence", {})
    if found.get("state", "healthy") != "healthy":
        words.append(found["state"])
    if found.get("degraded_directories", 0):
        words.append(f"{found['degraded_directories']} as reval")
    return "\n".join(words)


def _duration(seconds: float) -> str:
    whole = int(seconds)
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60)):
        if whole >= size:
            return f"{whole // size}{unit}{whole % size * 60 // size:02d}" if unit != "d" else f"{whole // size}d"
    return f"{whole}s"
