"""Stores of layers, as Docker's aufs graph driver has them: what is in one, and making, filling and removing layers."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Any

import click

from udbad.branch import mountinfo
from udbad.commands.common import print_wide, user_errors
from udbad.commands.inspect import json_option
from udbad.commands.tools import change_rows, print_changes
from udbad.errors import ExitCode, UserError

if TYPE_CHECKING:
    from udbad.layers.store import Store

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


@contextmanager
def _store(root: str, make: bool = False) -> Iterator[Store]:
    """The store, and every error as one line."""
    from udbad.layers import store

    with user_errors():
        try:
            with store.opened(os.path.abspath(root), make) as found:
                yield found
        except OSError as error:
            place = f"{os.fsdecode(error.filename)}: " if error.filename else ""
            raise UserError(f"{root}: {place}{error.strerror}", ExitCode.FAILURE) from None


@click.command()
@json_option
@click.argument("root")
def layers(root: str, as_json: bool) -> None:
    """The layers of the store ROOT: which lies on which, and how much is in each."""
    with _store(root) as store:
        found = [
            {
                "id": one.id,
                "parent": one.parents[0] if one.parents else None,
                "depth": len(one.parents) + 1,
                "size": store.size(one.id) if one.present else None,
                "mounted": _is_mounted(store, one.id),
            }
            for one in store.layers()
        ]
    if as_json:
        click.echo(json.dumps(found, indent=2))
    elif found:
        _draw(found)
    else:
        click.echo("no layers")


def _draw(found: list[dict[str, Any]]) -> None:
    from rich.console import Group
    from rich.text import Text
    from rich.tree import Tree

    nodes = {one["id"]: Tree(Text(one["id"])) for one in found}
    roots: list[Tree] = []
    for one in found:
        node, parent = nodes[one["id"]], one["parent"]
        size = _size(one["size"]) if one["size"] is not None else "its branch is missing"
        missing = f"  on {parent}, which is missing" if parent is not None and parent not in nodes else ""
        node.label = Text.assemble(one["id"], (f"  {size}", "cyan"), ("  mounted" * one["mounted"], "green"), missing)
        (nodes[parent].children if parent in nodes else roots).append(node)
    print_wide(Group(*roots))


def _size(size: int) -> str:
    value = float(size)
    for unit in _UNITS:
        if value < 1024 or unit == _UNITS[-1]:
            break
        value /= 1024
    return f"{value:.1f} {unit}" if unit != "B" else f"{size} B"


@click.group()
def layer() -> None:
    """Make, fill and remove layers of a store ROOT."""


@layer.command()
@click.option("--parent", metavar="ID", help="The layer that it lies on; default: none.")
@click.argument("root")
@click.argument("layer_id", metavar="ID")
def create(root: str, layer_id: str, parent: str | None) -> None:
    """Make an empty layer. ROOT is an existing directory; what makes it a store is made with the first layer."""
    with _store(root, make=True) as store:
        store.create(layer_id, parent)


@layer.command()
@click.argument("root")
@click.argument("layer_id", metavar="ID")
def remove(root: str, layer_id: str) -> None:
    """Unmount a layer, if it is mounted at its place in the store, and remove it.

    Exit code 12 when another layer lies on it, 1 when its mount is busy.
    """
    from udbad.kernel.mounts import unmount_top

    with _store(root) as store:
        if _is_mounted(store, layer_id):
            unmount_top(_mount_point(store, layer_id), lazy=False)
        store.remove(layer_id)


@layer.command()
@json_option
@click.option("--all", "show_all", is_flag=True, help="Also copies that differ in nothing from what they cover.")
@click.argument("root")
@click.argument("layer_id", metavar="ID")
def changes(root: str, layer_id: str, as_json: bool, show_all: bool) -> None:
    """What a layer adds, changes and deletes, as udbad diff has it."""
    from udbad.layers.source import Source
    from udbad.layers.store import branches
    from udbad.tools import branchdiff

    with _store(root) as store:
        top, *lowers = branches(Source(store.root, layer_id), ro=True)
        with branchdiff.opened(top, lowers) as (one, others):
            found = change_rows(branchdiff.changes(one, others), show_all)
    print_changes(found, as_json)


@layer.command()
@click.option(
    "-o", "--output", type=click.File("wb", atomic=True), default="-", metavar="FILE",
    help="Where to; default: standard output.",
)  # fmt: skip
@click.argument("root")
@click.argument("layer_id", metavar="ID")
def diff(root: str, layer_id: str, output: IO[bytes]) -> None:
    """Write what is in a layer as a tar archive, as layers of OCI images are."""
    from udbad.layers import pack

    with _store(root) as store:
        if output.isatty():
            raise UserError("an archive is not written to a terminal: use -o FILE, or a pipe")
        fd = store.open_layer(layer_id)
        try:
            pack.pack(fd, output)
            output.flush()
        finally:
            os.close(fd)


@layer.command()
@click.option("--devices", is_flag=True, help="Make device nodes, too.")
@click.option(
    "--whiteouts", type=click.Choice(["aufs", "overlay"]), default="aufs", show_default=True,
    help="How deletions are written: as aufs does, or as overlayfs does.",
)  # fmt: skip
@click.argument("root")
@click.argument("layer_id", metavar="ID")
@click.argument("archive", type=click.File("rb"), default="-")
def apply(root: str, layer_id: str, archive: IO[bytes], devices: bool, whiteouts: str) -> None:
    """Fill an empty layer from ARCHIVE, or from standard input: the tar archive of a layer, plain or compressed by
    gzip, bzip2 or xz.

    All or nothing. Exit code 12 when it holds what a layer may not hold, such as a path that leads out of it.
    """
    from udbad.layers import unpack

    with _store(root) as store, store.replacing(layer_id) as fd:
        done = unpack.unpack(fd, archive, devices, whiteouts == "overlay")
    click.echo(f"{done.names} names, {done.size} bytes", err=True)


def _mount_point(store: Store, layer_id: str) -> bytes:
    """Where a layer is mounted, as the kernel has it; the mount itself is not asked."""
    return os.path.join(os.path.realpath(os.path.join(os.fsencode(store.root), b"mnt")), os.fsencode(layer_id))


def _is_mounted(store: Store, layer_id: str) -> bool:
    place = _mount_point(store, layer_id)
    return any(mount.point == place and mount.fs_type == mountinfo.FS_TYPE for mount in mountinfo.read())
