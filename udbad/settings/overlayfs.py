"""The command line of fuse-overlayfs, said in mount options: what containers/storage asks a `mount_program` for.

Nothing that was asked for is left out: a word is one that this module knows, or one line refuses it. Those without
an effect are known because nothing shows whether they are followed (_UNSEEN).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Final, NoReturn

from udbad.branch.spec import escape, shown, split_escaped, suggestion, unescape
from udbad.errors import ExitCode, UserError
from udbad.settings.options import KERNEL_WORDS, MountOptions, parse_mount_options

FSNAME: Final = "udbad-overlay"
"""First column of /proc/mounts."""

_LAYERS: Final = frozenset({"lowerdir", "upperdir", "workdir"})
_OWNERS: Final = frozenset(
    {"user.containers.override_stat", "user.fuseoverlayfs.override_stat", "security.fuseoverlayfs.override_stat"}
)
"""Attributes of a layer's root that say that owners and modes are not those of its files, but in such attributes."""
_ALWAYS: Final = frozenset({"rw", "allow_other", "default_permissions"})
"""What is so anyway; without an upper directory the mount is read-only."""
_UNSEEN: Final = frozenset({"timeout", "threaded", "fast_ino", "writeback", "max_threads", "max_idle_threads"})
"""How fuse-overlayfs works inside, and how long it answers from memory. Layers are private and what is remembered of
them is right, so that nobody could tell."""
_OWN: Final = frozenset(
    {
        "udba", "io", "edge", "survive", "restart_timeout", "branch_timeout", "metrics", "control", "fsname",
        "uidmapping", "gidmapping", "squash_to_uid", "squash_to_gid",
    }
)  # fmt: skip
"""KEY=VALUE that mount options have under the same name."""
_WORDS: Final = {
    "ro": "ro",
    "volatile": "volatile",
    "fsync=0": "volatile",
    "noacl": "noacl",
    "acl=0": "noacl",
    "noxattrs": "noxattrs",
    "noxattrs=1": "noxattrs",
    "squash_to_root": "squash_to_uid=0,squash_to_gid=0",
    "allow_idmap": "allow_idmap",
    "labels": "labels",
    "redirect_dir=on": "dirren=on",
}
"""What stands for other mount options."""
_NO_CHANGE: Final = frozenset(
    {
        "acl=1", "noxattrs=0", "fsync=1", "xattr_permissions=0", "static_nlink=0", "redirect_dir=off",
        "redirect_dir=follow", "metacopy=off",
        "index=off", "nfs_export=off",
    }
)  # fmt: skip
"""What is so here; the same words with another value are refused."""
_KNOWN: Final = frozenset(
    {*_LAYERS, *_ALWAYS, *_UNSEEN, *_OWN, *(word.partition("=")[0] for word in (*_WORDS, *_NO_CHANGE)), *KERNEL_WORDS}
)

# Set-id programs, devices and programs are what they are in the image, as in overlayfs, wherever the layers lie;
# containers/storage says so where it is to be otherwise.
_FIRST: Final = "suid,dev,exec,nowarn,udba=none,whiteouts=overlay,dirren=off,fsname=" + FSNAME
_LOWER: Final = "ro+wh"
_UPPER: Final = "rw"


def mount_options(texts: Sequence[str]) -> MountOptions:
    """What the arguments of -o ask for.

    texts: in order; of a word that comes twice the last one counts. In a path, a backslash takes the meaning from `,`,
    `:` and itself. Relative paths are those of this process. Raises UserError (OPTION): one line that names the word.
    """
    layers: dict[str, str] = {}
    words = [_FIRST]
    for item in (item for text in texts for item in split_escaped(text, ",")):
        key, equals, raw = item.partition("=")
        if not item or item in _ALWAYS or key in _UNSEEN or item in _NO_CHANGE:
            continue
        if equals and key in _LAYERS:
            layers[key] = raw
        elif item in _WORDS:
            words.append(_WORDS[item])
        elif (key in _OWN) if equals else (key in KERNEL_WORDS):
            words.append(item)
        else:
            _refuse(item, key)
    return parse_mount_options(",".join([*words, *_branches(layers)]))


def _branches(layers: dict[str, str]) -> list[str]:
    """The words that say which branches there are."""
    lower = split_escaped(layers.get("lowerdir", ""), ":")
    if lower == [""]:
        raise UserError("lowerdir= is missing", ExitCode.OPTION)
    if "" in lower:
        where = "data-only lower layers (::) are not supported" if "" in lower[1:-1] else "an empty path"
        raise UserError(f"lowerdir={shown(layers['lowerdir'])}: {where}", ExitCode.OPTION)
    branches = [_branch(path, _LOWER) for path in lower]
    for path in (*lower, *filter(None, [layers.get("upperdir")])):
        _check_owners(_path(path))
    upper, work = layers.get("upperdir"), layers.get("workdir")
    if not upper:
        if work:
            raise UserError("workdir= without upperdir=", ExitCode.OPTION)
        return ["ro", "br=" + ":".join(branches)]
    if not work:
        raise UserError("upperdir= without workdir=", ExitCode.OPTION)
    _check_work(_path(upper), _path(work))
    return ["br=" + ":".join([_branch(upper, _UPPER), *branches])]


def _path(text: str) -> str:
    """As whoever calls us means it: the mount process is in another directory."""
    return os.path.abspath(unescape(text))


def _branch(text: str, permission: str) -> str:
    return f"{escape(_path(text))}={permission}"


def _check_owners(path: str) -> None:
    """fuse-overlayfs shows what these attributes say also where it is not asked to; here everybody would be shown
    another owner than was meant. Raises UserError."""
    try:
        found = _OWNERS.intersection(os.listxattr(path))
    except OSError:
        return  # there are no attributes, or no such layer, which somebody else says
    if found:
        raise UserError(f"{shown(path)}: has {min(found)} (force_mask=, xattr_permissions=): not supported",
                        ExitCode.BRANCH)  # fmt: skip


def _check_work(upper: str, work: str) -> None:
    try:
        devices = {os.stat(path).st_dev for path in (upper, work)}
    except OSError as error:
        raise UserError(f"{shown(os.fsdecode(error.filename))}: {error.strerror}", ExitCode.BRANCH) from None
    if len(devices) != 1:
        raise UserError(f"workdir={shown(work)}: is not on the file system of upperdir", ExitCode.BRANCH)


def _refuse(item: str, key: str) -> NoReturn:
    known = "" if key in _KNOWN else suggestion(key, _KNOWN)
    raise UserError(f"{shown(item)}: not supported{known}", ExitCode.OPTION)
