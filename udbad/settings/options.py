"""What a mount is asked to be: MountOptions, from `-o` strings or a table of the configuration file.

Parses and checks only: opens no file and knows no default that depends on a file system (branch/accept.py
does). It sits above branch/, whose parsers of branches and policies it calls, so branch/ must not import it.

Invariants: a MountOptions is complete, valid and frozen; parse_mount_options(format_options(o)) == o but
for the notices; the description of each field says what is allowed, and messages quote it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Literal, NamedTuple, NoReturn

from udbad.branch.branches import BranchSpec
from udbad.branch.spec import (
    UDBA_MODES,
    WATCH_WAYS,
    escape,
    format_branches,
    parse_branch,
    parse_branches,
    parse_path,
    shown,
    split_escaped,
    suggestion,
    unescape,
)
from udbad.errors import ExitCode, UserError
from udbad.layers import source as layer_source
from udbad.settings import ids
from udbad.settings.branchlist import DIGITS, LIST_OPTIONS, edit_branch, edit_branches, find_branch, no_branch_left

# -- what the value of an option may be ------------------------------------------------------------


class Wrong(NamedTuple):
    """What is wrong about one key of a table: it is none, is missing, or has a value that it may not have."""

    key: str
    kind: Literal["unknown", "missing", "value"]
    value: object = None


class WrongOptions(ValueError):
    """A table that makes no MountOptions; `wrong` is everything that is wrong with it, never empty."""

    def __init__(self, wrong: Sequence[Wrong]) -> None:
        super().__init__(wrong)
        self.wrong = wrong


Take = Callable[[object], object]
"""A value as somebody wrote it to the one that is kept. Raises ValueError unless it is allowed."""


_MISSING: Final = object()
"""Instead of a default."""


class _Option(NamedTuple):
    """A field of MountOptions; allowed: says what `take` takes, in the words of messages and of the documentation."""

    default: Any
    allowed: str
    take: Take


def _option(default: object, allowed: str, take: Take) -> Any:
    return _Option(default, allowed, take)


def _only_if(right: bool, value: object) -> Any:
    if not right:
        raise ValueError
    return value


def _switch(default: bool) -> Any:
    return _option(default, "true or false", lambda value: _only_if(isinstance(value, bool), value))


def _number(default: int, least: int, most: int, allowed: str) -> Any:
    return _option(default, allowed, lambda value: _only_if(type(value) is int and least <= value <= most, value))


def _text(default: str | None, allowed: str, is_right: Callable[[str], object] = bool) -> Any:
    return _option(default, allowed, lambda value: _only_if(isinstance(value, str) and bool(is_right(value)), value))


def _one_of(default: object, allowed: str, words: Mapping[Any, object]) -> Any:
    """words: what may be written, and the value it means."""

    def take(value: object) -> object:
        return words[_only_if(isinstance(value, (str, bool)) and value in words, value)]

    return _option(default, allowed, take)


def _branches(value: object) -> object:
    """A configuration file has a string for each branch, or one string for all of them."""
    if isinstance(value, str):
        return tuple(parse_branches(value))
    items = _only_if(isinstance(value, (list, tuple)) and len(value) > 0, value)
    return tuple(parse_branch(_only_if(isinstance(item, str), item)) if not isinstance(item, BranchSpec) else item
                 for item in items)  # fmt: skip


def _percentage(value: object) -> object:
    """`10%` as well as 10."""
    if isinstance(value, str) and re.fullmatch("[0-9]{1,3}%", value):
        value = int(value[:-1])
    return _only_if(type(value) is int and 0 <= value <= 100, value)


def _replay(value: object) -> str:
    """A configuration file may have true, false, or a list of patterns."""
    if isinstance(value, bool):
        return "on" if value else "off"
    words = value if isinstance(value, (list, tuple)) else [value]
    patterns = ":".join(_only_if(isinstance(word, str), word) for word in words)
    return str(_only_if(re.fullmatch("on|off|/[^:]+(:/[^:]+)*", patterns) is not None, patterns))


def _is_create_policy(value: str) -> bool:
    """Raises UserError."""
    from udbad.branch.policy import parse_create  # compiled: its sources are hashed, for which not every command waits

    parse_create(value)
    return True


def _is_copyup_policy(value: str) -> bool:
    """Raises UserError."""
    from udbad.branch.policy import parse_copyup  # as above

    parse_copyup(value)
    return True


def _is_address(value: str) -> bool:
    match = re.fullmatch(r"(?:\[[0-9A-Fa-f:.]+\]|[^\[\]:\s]+):([0-9]{1,5})", value)
    return match is not None and int(match[1]) <= 65535


KERNEL_FLAGS: Final = (
    "nosuid", "nodev", "noexec", "suid", "dev", "exec", "noatime", "nodiratime", "relatime", "strictatime", "lazytime",
    "sync", "dirsync",
)  # fmt: skip
"""mount(2) flags, under the names mount(8) gives them. suid, dev and exec: whatever the branches are mounted with."""

IO_MODES: Final = {mode: mode for mode in ("auto", "requests", "passthrough", "cached")}

_PERMITTED: Final = {"suid": "nosuid", "dev": "nodev", "exec": "noexec"}
"""What is asked for, and the flag that a union does not take from its branches then."""


def _flags(value: object) -> object:
    flags = _only_if(isinstance(value, (list, tuple, set, frozenset)), value)
    return frozenset(_only_if(flag in KERNEL_FLAGS, flag) for flag in flags)


class MountOptions:
    """The options of one mount (semantics 2), defaults as in aufs; made by `checked`, or from another one by `but`.

    What stands with a field says what its value may be, the text below it what it means; settings/reference.py makes
    documentation of both. Not pydantic's, as the tables of a file are: importing that takes as long as a mount; nor a
    dataclass: making one takes 4 ms, and importing dataclasses another 8.
    """

    branches: tuple[BranchSpec, ...] = _option(_MISSING, "a list of PATH[=PERM[+ATTR...]]", _branches)
    """Top first, never empty: see Branches."""
    source: str | None = _text(None, layer_source.FORM, layer_source.parse)
    """In place of branches: a layer of a store, and those below it: see Containers."""
    udba: str = _one_of("reval", "none, reval or notify", UDBA_MODES)
    """Which direct changes of the branches are seen, and when: see Modes."""
    io: str = _one_of("auto", "auto, requests, passthrough or cached", IO_MODES)
    """Who reads and writes files: this process, or the kernel where that can be; auto: by the branches: see Modes."""
    create: str = _text("tdp", "a create policy", _is_create_policy)
    """Which branch gets a new object: see Create policies."""
    cpup: str = _text("tdp", "a copy-up policy", _is_copyup_policy)
    """Which branch receives a copy-up: see Copy-up policies."""
    plink: bool = _switch(True)
    """One file with names on several branches stays one file after a copy-up."""
    xino: bool = _switch(True)
    """Without an effect: inode numbers are computed, nothing is stored."""
    shwh: bool = _switch(False)
    """Whiteouts are listed and can be read."""
    dirwh: int = _number(3, 0, 1 << 63, "a whole number, 0 or more")
    """A removed directory with more whiteouts than this is cleaned up in the background."""
    diropq: str = _one_of(
        "whiteouted", "always (a) or whiteouted (w)",
        {"always": "always", "a": "always", "whiteouted": "whiteouted", "w": "whiteouted"},
    )  # fmt: skip
    """When a new directory gets an opaque mark: always, or where it takes the place of a whiteout."""
    dirren: str = _one_of(
        "auto", "auto, on or off (true or false in a file)",
        {"auto": "auto", "on": "on", "off": "off", True: "on", False: "off"},
    )  # fmt: skip
    """Whether a directory can be renamed that has parts on lower branches: these stay where they are, and a redirect
    says where (see Branches on disk); auto: where no lower branch is written to, and not in a layer of a store. Else
    EXDEV."""
    whiteouts: str = _one_of("auto", "auto, aufs or overlay", {word: word for word in ("auto", "aufs", "overlay")})
    """How whiteouts are written: as aufs does, or as overlayfs does, which then shows the same tree; auto: as in the
    branch so far: see Layers of overlayfs."""
    watch: str = _one_of("auto", "auto, inotify or fanotify", WATCH_WAYS)
    """How `notify` hears of direct changes: a watch for each directory (inotify), or of all that happens on a whole
    file system (fanotify), which takes CAP_SYS_ADMIN; auto: inotify until no more watches are to be had, then fanotify
    for the rest. What has no fanotify is watched with inotify."""
    replay: str = _option("off", "on, off, or patterns of paths like /in/**:/etc/*", _replay)
    """Whether watchers of the union (inotify, fanotify) get the events of direct changes, or of those of these paths
    (`*` and `?` stand for no slash, `**` does). Needs `udba=notify`: see Watching the union."""
    watch_reserve: int = _option(10, "a percentage from 0% to 100%", _percentage)
    """For `notify`: the share of fs.inotify.max_user_watches that is left to other programs of the same user."""
    rdcache: int = _number(10, 0, 3600, "a whole number of seconds from 0 to 3600")
    """Without an effect: listings are never older than the mode allows."""
    dirperm1: bool = _switch(False)
    """Without an effect, for it is always so: the top directory's permissions count, and branches are read as root."""
    warn_perm: bool = _switch(True)
    """A notice at mount when a branch root's owner or mode differs from the first one's."""
    sum: bool = _switch(False)
    """statfs adds up all distinct branch file systems instead of showing the first branch."""
    acl: bool = _switch(True)
    """POSIX ACLs of the top copy are enforced and shown."""
    xattrs: bool = _switch(True)
    """Extended attributes, and with them ACLs and file capabilities, are shown and can be set; without this there are
    none (ENOTSUP), which saves asking for them. Copy-ups keep them."""
    labels: bool = _switch(False)
    """Files without an SELinux label say so (ENODATA) also on a machine without SELinux, as setfiles(8) needs it.
    Without this they say there that there are no labels (ENOTSUP), so that `ls -l` asks one file, not each."""
    dio: bool = _switch(True)
    """O_DIRECT goes to the branch; without this it is EINVAL."""
    edge: str = _one_of("auto", "auto, native or pyfuse3", {"auto": "auto", "native": "native", "pyfuse3": "pyfuse3"})
    """How requests come in: over a /dev/fuse of our own (native), or through pyfuse3 and fusermount3, as an ordinary
    user has to; auto: whichever is possible. What pyfuse3 lacks: see Without root."""
    verbose: bool = _switch(False)
    """Without an effect."""
    ro: bool = _switch(False)
    """Every change is EROFS, branches are not touched at all."""
    kernel_flags: frozenset[str] = _option(frozenset(), f"a list of {', '.join(KERNEL_FLAGS)}", _flags)
    """As in mount(8), enforced by the kernel. A union with a branch that is mounted `nosuid`, `nodev` or `noexec` is
    so, too, unless `suid`, `dev` or `exec` says otherwise; a notice tells it. The flags of access times hold on the
    branches that are written to (without one, what their own mounts have), for reads that the kernel has not cached."""
    fsname: str = _text("none", "a name that is not empty")
    """First column of /proc/mounts, for `findmnt -S NAME`, `umount NAME`, `udbad umount NAME`. Where it is not given:
    SOURCE of the mount command, or the name in the configuration."""
    allow_other: Literal[True] = _one_of(True, "true: others may always enter, as in any file system", {True: True})
    """Always on, as `default_permissions` is."""
    fsync_copyup: bool = _one_of(
        True, "on or off (true or false in a file)", {"on": True, "off": False, True: True, False: False}
    )
    """The content of a copy-up is on disk before it is visible: see Durability."""
    volatile: bool = _switch(False)
    """fsync(2) and sync(2) return at once, and copy-ups are not synced: after a crash of the machine the writable
    branches are worth nothing. A remount does not change it."""
    uidmapping: str | None = _text(None, ids.FORM, ids.parse)
    """Users of the branches as others: the first id there, the first one here, how many: see Containers."""
    gidmapping: str | None = _text(None, ids.FORM, ids.parse)
    """The same of groups."""
    squash_to_uid: int = _number(-1, -1, ids.MOST, "a user id; -1: none")
    """Everything is shown as this user's, whoever's it is on its branch."""
    squash_to_gid: int = _number(-1, -1, ids.MOST, "a group id; -1: none")
    """The same of groups."""
    allow_idmap: bool = _switch(False)
    """The union can be mounted once more with other ids (`X-mount.idmap=` of mount(8)), Linux 6.12: see Containers."""
    survive: bool = _one_of(
        True, "on or off (true or false in a file)", {"on": True, "off": False, True: True, False: False}
    )
    """Who uses the mount goes on when its process is killed: see What happens when…. Where the kernel can
    (Linux 6.9.4), and not through pyfuse3; `udbad status` says why not."""
    restart_timeout: int = _number(60, 0, 86400, "a whole number of seconds from 0 to 86400")
    """How long who uses the mount waits for a process that takes it over, and then gets an error; 0: for ever."""
    branch_timeout: int = _number(20, 0, 86400, "a whole number of seconds from 0 to 86400")
    """How long a branch has to answer, before the mount goes on without it; 0: for ever. Needs `survive`: see A branch
    that does not answer."""
    metrics: str | None = _text(None, "HOST:PORT, PORT from 0 to 65535, an IPv6 HOST in []", _is_address)
    """Serve Prometheus metrics of this mount. Not in a file, where [metrics] is for all mounts."""
    control: str | None = _text(None, "the path of a socket")
    """A control socket for this mount; the commands of udbad do not know the mount then. Not in a file."""
    notices: tuple[str, ...] = _option((), "", lambda value: _only_if(isinstance(value, tuple), value))
    """Lines for the user about what was accepted and has no effect."""

    def __init__(self, **values: Any) -> None:
        """values: by the names of `FIELDS`; as `checked` and another one have them, no value is looked at. Raises
        TypeError for a field that there is not."""
        if not values.keys() <= FIELDS.keys():
            raise TypeError(values.keys() - FIELDS.keys())
        for name, one in FIELDS.items():
            self.__dict__[name] = values.get(name, one.default)

    def but(self, **changes: Any) -> MountOptions:
        """The same, but for some fields. Raises TypeError for one that there is not."""
        return MountOptions(**{**self.__dict__, **changes})

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError(f"{name} cannot be set: options are never changed")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, MountOptions) and self.__dict__ == other.__dict__

    __hash__ = None  # type: ignore[assignment]  # as Python has it for what is compared by its values

    def __repr__(self) -> str:
        return f"MountOptions({self.__dict__})"

    def mount_flags(self, restrictions: frozenset[str]) -> frozenset[str]:
        """All of mount(2), under the names of mount(8).

        restrictions: those of nosuid, nodev and noexec that some branch is mounted with. The union has them, too (a
        setuid program on a stick is none in a live system either), unless suid, dev or exec was asked for.
        """
        permitted = {_PERMITTED[flag] for flag in self.kernel_flags if flag in _PERMITTED}
        flags = self.kernel_flags - _PERMITTED.keys() | restrictions - permitted
        return flags | {"ro"} if self.ro else flags

    @classmethod
    def checked(cls, table: Mapping[str, object]) -> MountOptions:
        """From what was written for each field. Raises WrongOptions; UserError (OPTION) for a bad branch or policy."""
        kept: dict[str, Any] = {}
        wrong = []
        table = {**table, **_branches_of(table)}
        for name, one in FIELDS.items():
            if name not in table:
                if one.default is _MISSING:
                    wrong.append(Wrong(name, "missing"))
                continue
            value = table[name]
            try:
                # None where it says that nothing was written: options as they are come back here for a remount.
                kept[name] = None if value is None and one.default is None else one.take(value)
            except ValueError:
                wrong.append(Wrong(name, "value", value))
        wrong += [Wrong(name, "unknown", value) for name, value in table.items() if name not in FIELDS]
        if wrong:
            raise WrongOptions(wrong)
        return cls(**kept)


FIELDS: Final = {name: one for name, one in vars(MountOptions).items() if isinstance(one, _Option)}


def _branches_of(table: Mapping[str, object]) -> dict[str, object]:
    """With a source, the branch that is known without reading what that names (sources.py has the others)."""
    if table.get("source") is None:
        return {}
    named = layer_source.parse(str(table["source"]))
    # A branch for one that is wrong, so that it is not said that there is none as well.
    return {"branches": (BranchSpec(b"/") if named is None else named.top(table.get("ro") is True),)}


# -- what may be written after -o (semantics 2; mount(8) for the generic ones) -----------------

_SWITCHES: Final = (
    "plink",
    "shwh",
    "dirperm1",
    "warn_perm",
    "sum",
    "acl",
    "xattrs",
    "labels",
    "dio",
    "verbose",
    "xino",
    "volatile",
    "allow_idmap",
)

_FLAGS: Final[dict[str, tuple[str, bool]]] = {
    **{name: (name, True) for name in _SWITCHES},
    **{"no" + name: (name, False) for name in _SWITCHES},
    "copyup_fsync": ("fsync_copyup", True),
    "nocopyup_fsync": ("fsync_copyup", False),
    "dirren": ("dirren", True),
    "nodirren": ("dirren", False),
    "nowarn": ("warn_perm", False),
    "v": ("verbose", True),
    **dict.fromkeys(("quiet", "q", "silent"), ("verbose", False)),
    "ro": ("ro", True),
    "rw": ("ro", False),
    "allow_other": ("allow_other", True),
}
"""Words without a value, and the field they set."""

_NO_CHANGE: Final = frozenset({"default_permissions"})
"""Words without a value that ask for what is always so."""

_VALUES: Final = {
    **{
        name: name
        for name in (
            "source",
            "udba",
            "io",
            "dirwh",
            "diropq",
            "rdcache",
            "dirren",
            "whiteouts",
            "watch",
            "replay",
            "watch_reserve",
            "fsname",
            "metrics",
            "control",
            "edge",
            "survive",
            "restart_timeout",
            "branch_timeout",
            "uidmapping",
            "gidmapping",
            "squash_to_uid",
            "squash_to_gid",
        )
    },
    **dict.fromkeys(("create", "create_policy"), "create"),
    **dict.fromkeys(("cpup", "copyup", "copyup_policy"), "cpup"),
    "copyup_fsync": "fsync_copyup",  # without a value: on
}
"""Words with a value, and the field it goes to."""

_ATIMES: Final = frozenset({"noatime", "relatime", "strictatime"})
_KERNEL: Final[dict[str, tuple[frozenset[str], frozenset[str]]]] = {
    **{"no" + name: (frozenset({"no" + name}), frozenset({name})) for name in _PERMITTED},
    **{name: (frozenset({name}), frozenset({"no" + name})) for name in _PERMITTED},
    "nodiratime": (frozenset({"nodiratime"}), frozenset({"nodiratime"})),
    **{name: (frozenset({name}), _ATIMES) for name in _ATIMES},
    **{name: (frozenset({name}), frozenset({name})) for name in ("lazytime", "sync", "dirsync")},
    **{name: (frozenset(), frozenset({"no" + name})) for name in ("atime", "diratime")},
    **{"no" + name: (frozenset(), frozenset({name})) for name in ("relatime", "strictatime", "lazytime")},
    "async": (frozenset(), frozenset({"sync"})),
    # mount(8): "implies the options ..., unless overridden by subsequent options".
    **dict.fromkeys(("user", "users"), (frozenset({"nosuid", "nodev", "noexec"}), frozenset(_PERMITTED))),
    **dict.fromkeys(("owner", "group"), (frozenset({"nosuid", "nodev"}), frozenset({"suid", "dev"}))),
}
"""Words for mount(2): the flags they set and the ones they clear (before they set)."""

IGNORED: Final = frozenset(
    {
        "trunc_xino", "notrunc_xino", "trunc_xino_path", "itrunc_xino", "trunc_xib", "notrunc_xib",
        "rdblk", "rdhash", "fhsm_sec", "si", "wsum", "list_plink", "clean_plink", "nodlgt", "debug", "delete", "imap",
        "droplvl", "ephemeral",
        "defaults", "nouser", "_netdev", "nofail", "noauto", "auto", "comment",
        "mand", "nomand", "iversion", "noiversion", "loud",
    }
)  # fmt: skip
"""Words that mean nothing here, with a value or without; one notice lists them."""

KERNEL_WORDS: Final = frozenset(_KERNEL)
"""Words for mount(2)."""
KNOWN: Final = frozenset({*_FLAGS, *_NO_CHANGE, *_VALUES, *LIST_OPTIONS, *_KERNEL, *IGNORED})
"""Every word that may be written, but for those that begin with x-."""


def words_for(field: str) -> list[str]:
    """What may be written after -o for a field of MountOptions, other spellings included; `NAME=` takes a value."""
    if field == "branches":
        return [f"{word}=" for word in LIST_OPTIONS]
    if field == "kernel_flags":
        return sorted(_KERNEL)
    values = [f"{word}=" for word, target in _VALUES.items() if target == field]
    return values + [word for word, (target, _) in _FLAGS.items() if target == field]


def parse_mount_options(text: str | Sequence[str]) -> MountOptions:
    """The options of one or several `-o` arguments, in the order given; the last word on a subject wins.

    Commas separate, a backslash takes the meaning from a comma (and, see branch/spec.py, from `:` `=` `\\`).
    The branch list is what all br= and dirs= give together, then add, ins, append, prepend, del and mod are
    applied to it from left to right; permissions left out get their default by the place in the final list.
    Raises UserError (OPTION), one line that names the option, its value and what is allowed.
    """
    texts = [text] if isinstance(text, str) else text
    reader = _Reader()
    for item in (item for part in texts for item in split_escaped(part, ",")):
        if item:
            reader.take(item)
    return reader.result()


def parse_remount(text: str, current: MountOptions) -> MountOptions:
    """What a mount with the options `current` is to become by `-o remount,TEXT` (semantics 2).

    br= and dirs= mean nothing there, and a branch to del that is not one is done already. Raises UserError
    as parse_mount_options(); what cannot change while mounted is for the caller to find.
    """
    reader = _Reader()
    reader.kernel = current.kernel_flags
    for item in split_escaped(text, ","):
        if item and item != "remount":
            reader.take(item)
    branches = list(current.branches)
    for key, raw in reader.edits:
        if key != "del" or find_branch(branches, parse_path(raw)) is not None:
            edit_branch(branches, key, raw)
    if not branches:
        raise no_branch_left()
    reader.initial = branches
    reader.edits = []
    same = {name: getattr(current, name) for name in FIELDS if name not in ("branches", "notices")}
    reader.values = {**same, **reader.values}
    return reader.result()


class _Reader:
    """Collects options; `values` are fields of MountOptions, `spelled` the option that set each."""

    def __init__(self) -> None:
        self.values: dict[str, object] = {}
        self.spelled: dict[str, str] = {}
        self.initial: list[BranchSpec] = []
        self.edits: list[tuple[str, str]] = []
        self.kernel: frozenset[str] = frozenset()
        self.ignored: list[str] = []

    def take(self, item: str) -> None:
        """One option. The raw value keeps its escapes for the branch parser."""
        key, equals, raw = item.partition("=")
        head, colon, tail = item.partition(":")
        if colon and head in LIST_OPTIONS:
            key, equals, raw = head, "=", tail
        if key == "xino" and equals:
            # A place for the table: there is none in a file here, but asking for it turns the numbers on.
            self.ignored.append("xino=")
            self.values["xino"] = True
        elif key in LIST_OPTIONS:
            self._take_branches(_needs_value(key, raw), raw)
        elif key in _VALUES and (equals or key not in _FLAGS):
            self._set(_VALUES[key], _needs_value(key, raw), _typed(_VALUES[key], unescape(raw)))
        elif key in IGNORED or key.startswith(("x-", "X-")):
            self.ignored.append(key)
        elif key not in KNOWN:
            raise UserError(f"unknown option {key!r}{suggestion(key, KNOWN)}", ExitCode.OPTION)
        elif equals and key != "user":  # mount(8) notes who mounted as user=NAME
            raise UserError(f"{shown(item)}: {key} takes no value", ExitCode.OPTION)
        elif key in _FLAGS:
            self._set(_FLAGS[key][0], key, _FLAGS[key][1])
        elif key in _KERNEL:
            added, removed = _KERNEL[key]
            self.kernel = self.kernel - removed | added

    def _set(self, field: str, key: str, value: object) -> None:
        self.values[field] = value
        self.spelled[field] = key

    def _take_branches(self, key: str, raw: str) -> None:
        if key in ("br", "dirs"):
            self.initial += parse_branches(raw)
        else:
            self.edits.append((key, raw))

    def result(self) -> MountOptions:
        branches = edit_branches(self.initial, self.edits)
        if self.values.get("source") is not None:
            if self.initial or self.edits:
                raise UserError("source= stands for all branches: no br=, add=, append= or the like", ExitCode.OPTION)
        elif not branches:
            raise UserError("no branch given: use -o br=PATH[=PERM][:PATH[=PERM]...]", ExitCode.OPTION)
        notices = [f"accepted without effect here: {', '.join(dict.fromkeys(self.ignored))}"] if self.ignored else []
        table = {**self.values, "branches": branches, "kernel_flags": self.kernel, "notices": tuple(notices)}
        try:
            return MountOptions.checked(table)
        except WrongOptions as error:
            raise UserError(message_of(error.wrong[0], self.spelled), ExitCode.OPTION) from None


def _needs_value(key: str, raw: str) -> str:
    if not raw:
        raise UserError(
            f"{key} needs a value: {_allowed(_VALUES[key]) if key in _VALUES else LIST_OPTIONS[key][0]}",
            ExitCode.OPTION,
        )
    return key


def _typed(field: str, value: str) -> str | int:
    """Decimal digits become a number where the field is one; everything else is for `checked` to refuse."""
    return int(value) if MountOptions.__annotations__[field] == "int" and re.fullmatch(DIGITS, value) else value


def _allowed(field: str) -> str:
    return str(FIELDS[field].allowed)


def message_of(wrong: Wrong, spelled: Mapping[str, str]) -> str:
    """One line: key, value, what is allowed.

    `spelled` gives the name the user wrote for a field where that is not the field's own.
    """
    key = spelled.get(wrong.key, wrong.key)
    if wrong.kind == "unknown":
        return f"unknown option {key!r}{suggestion(wrong.key, FIELDS)}"
    if wrong.kind == "missing":
        return f"{key} is missing: must be {_allowed(wrong.key)}"
    return f"{key}={shown(str(wrong.value))}: must be {_allowed(wrong.key)}"


# -- printing -------------------------------------------------------------------------------------


_SWITCHED: Final = {"fsync_copyup": "copyup_fsync", "survive": "survive"}
"""Fields that are written as WORD=on or WORD=off."""
_ITEM_SPECIAL: Final = "\\,"
"""All that needs escaping in a value that is not a branch."""


def format_options(options: MountOptions) -> str:
    """The branches and every option that is not at its default, comma separated, as -o takes them back."""
    words = ["ro" if options.ro else "rw", *sorted(options.kernel_flags)]
    if options.source is None:
        words.append(f"br={format_branches(options.branches)}")
    for name, one in FIELDS.items():
        value = getattr(options, name)
        if value == one.default or name in ("branches", "ro", "kernel_flags", "notices"):
            continue
        if name in _SWITCHED:
            words.append(f"{_SWITCHED[name]}={'on' if value else 'off'}")
        elif isinstance(value, bool):
            words.append(name if value else "no" + name)
        else:
            words.append(f"{name}={escape(str(value), _ITEM_SPECIAL)}")
    return ",".join(words)
