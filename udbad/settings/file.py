"""The configuration file of the daemon: TOML in, a checked and frozen Config out, or everything that is wrong with it.

    [daemon]          settings of the supervisor
    [metrics]         where metrics are served
    [hosts]           where hosts tell each other of changes
    [mounts.NAME]     mount_point, what to do when a branch is missing, and every mount option as a typed key

`conf.d/*.toml` beside the file is read after it, in the order of the names; a table may be in one file only.
Reads files and nothing else: no branch and no mount point is looked at, they may hang. What can only be
known with the branches open (links, bind mounts) is checked by branch/accept.py when the mount starts.

Invariants: load() reports every problem at once, each with file, key, what was found and what is allowed.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from udbad.branch import capabilities
from udbad.branch.branches import BranchSpec
from udbad.branch.policy import parse_copyup, parse_create
from udbad.branch.spec import escape, parse_branch, shown, split_escaped, suggestion
from udbad.errors import ExitCode, UserError
from udbad.settings.options import FIELDS, MountOptions, Wrong, WrongOptions
from udbad.types import Perm

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_NAME_FORM: Final = "1 to 64 letters, digits, '_', '.' and '-', beginning with a letter or digit"
_NOT_HERE: Final = {"control": "the daemon gives each mount its own socket", "metrics": "the daemon serves [metrics]"}
INTERNAL: Final = frozenset({"notices", "allow_other", *_NOT_HERE})
"""Fields of MountOptions that are no keys of a table."""


M = TypeVar("M", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong: file, dotted key ("" for the whole file), and what."""

    file: str
    key: str
    text: str

    def __str__(self) -> str:
        return ": ".join(part for part in (self.file, self.key, self.text) if part)


class ConfigError(UserError):
    """The configuration cannot be used; `problems` is everything that is wrong with it."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = list(problems)
        super().__init__("\n".join(map(str, self.problems)), ExitCode.CONFIG)


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")


def _seconds(default: float, least: float = 0.0) -> Any:
    return Field(default=default, ge=least, le=86400, description=f"a number of seconds from {least:g} to 86400")


class DaemonSettings(_Table):
    """[daemon]. Times are in seconds."""

    run_dir: str = Field(default_factory=capabilities.run_dir, pattern="^/", description="an absolute path")
    """Where the sockets are, and what is known about each mount: `/run/udbad`, of a user's own daemon
    `$XDG_RUNTIME_DIR/udbad`."""
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="debug, info, warning or error"
    )
    """What is logged, of the daemon and of the mounts."""
    log_format: Literal["plain", "json"] = Field(default="plain", description="plain or json")
    """Lines for people, or JSON."""
    heartbeat: float = _seconds(5.0, 0.1)
    """How often a mount process is asked for a sign of life."""
    wedged_after: float = _seconds(60.0, 0.5)
    """How long it may be silent before it is aborted and started anew."""
    start_timeout: float = _seconds(300.0, 1.0)
    """How long a mount may take until it serves; then its process is ended, and another one tried."""
    stop_timeout: float = _seconds(30.0, 0.5)
    """How long a mount process may take to end; then it is aborted."""
    restart_delay: float = _seconds(0.5)
    """Waited before the second restart in a row; doubled each time."""
    restart_delay_max: float = _seconds(60.0)
    """What the delay is doubled up to."""
    healthy_after: float = _seconds(10.0)
    """A mount that has served for so long starts afresh with the delay."""
    retry_missing: float = _seconds(2.0, 0.1)
    """How often a missing branch is looked for."""
    watch: bool = Field(default=True, description="true or false")
    """A file of the configuration that changes is read again by itself."""

    @field_validator("log_level", "log_format", mode="before")
    @classmethod
    def _lower(cls, value: object) -> object:
        return value.lower() if isinstance(value, str) else value


class MetricsSettings(_Table):
    """[metrics]: the endpoint for all mounts."""

    listen: str = Field(default="127.0.0.1:9723", description='HOST:PORT, PORT from 0 to 65535, or "off"')
    """Where metrics of all mounts are served."""
    tls_certificate: str | None = Field(default=None, pattern="^/", description="the absolute path of a PEM file")
    """Of the endpoint, which then speaks HTTPS. Together with tls_key."""
    tls_key: str | None = Field(default=None, pattern="^/", description="the absolute path of a PEM file")
    """The key of the certificate."""

    @field_validator("listen")
    @classmethod
    def _check_listen(cls, value: str) -> str:
        match = re.fullmatch(r"(?:\[[0-9A-Fa-f:.]+\]|[^\[\]:\s]+):([0-9]{1,5})", value)
        if value != "off" and (match is None or int(match[1]) > 65535):
            raise ValueError
        return value


BRANCH_ID: Final = "[A-Za-z0-9_-]{1,64}"
"""How hosts may call a branch."""
_URL: Final = re.compile("(?:nats|tls|redis|rediss)://[^@/]+(?:/[0-9]*)?")


class HostsSettings(_Table):
    """[hosts]: the message bus by which hosts tell each other what changes. Times are in seconds."""

    urls: list[str] = Field(
        default=[],
        description='a list of addresses, "nats://HOST:PORT", tls://, redis:// or rediss://, without a password',
    )
    """NATS JetStream or Redis; one after another is tried. None: nothing is told to others."""
    prefix: str = Field(default="udbad", pattern="^[A-Za-z0-9_-]{1,64}$", description="letters, digits, '_' and '-'")
    """What subjects, or keys, begin with, and the name of the stream of JetStream."""
    ca_certificate: str | None = Field(default=None, pattern="^/", description="the absolute path of a PEM file")
    """Whose certificates the bus may have; left out: those that the system trusts."""
    certificate: str | None = Field(default=None, pattern="^/", description="the absolute path of a PEM file")
    """Of this host, for a bus that asks for one. Together with key."""
    key: str | None = Field(default=None, pattern="^/", description="the absolute path of a PEM file")
    """The key of the certificate."""
    credentials: str | None = Field(default=None, pattern="^/", description="the absolute path of a file")
    """`USER:PASSWORD`, or what NATS makes for a user (`.creds`); nobody else may read it."""
    name: str = Field(default_factory=lambda: os.uname().nodename, pattern="^[^\\s]+$", description="a name")
    """Of this host among others; left out: its host name."""
    publishers: list[str] = Field(default=[], description="a list of names")
    """Who must be heard for a branch to be believed; none: whoever watches it (`udbad watch`)."""
    bound: float = _seconds(10.0, 0.5)
    """How long a branch is believed after the last time that all publishers were heard."""
    settle: float = _seconds(60.0)
    """How old what the branch's file system says may be, because of its own caches."""

    @field_validator("urls")
    @classmethod
    def _check_urls(cls, value: list[str]) -> list[str]:
        if any(_URL.fullmatch(url) is None for url in value):
            raise ValueError
        return value


class MountKeys(_Table):
    """The keys of [mounts.NAME] that are no mount options."""

    mount_point: str = Field(pattern="^/", description="an absolute path")
    """Where the union is mounted: a directory that exists."""
    enabled: bool = Field(default=True, description="true or false")
    """Whether it is mounted at all."""
    missing_branch: Literal["wait", "fail"] = Field(default="wait", description="wait or fail")
    """When a branch is not there: wait for it, or fail."""
    published: dict[str, str] = Field(
        default={}, description="a table of NAME = \"BRANCH\", NAME of letters, digits, '_' and '-'"
    )
    """Branches whose changes other hosts tell, by the names that they have on the bus of [hosts]: see Many hosts."""
    publish: bool = Field(default=False, description="true or false")
    """Whether what is changed through the mount on these branches is told to other hosts, where nobody watches them."""

    @field_validator("published")
    @classmethod
    def _check_published(cls, value: dict[str, str]) -> dict[str, str]:
        if any(re.fullmatch(BRANCH_ID, name) is None for name in value):
            raise ValueError
        return {name: os.path.normpath(path) for name, path in value.items()}


class BranchTable(_Table):
    """A branch that is written as a table, for paths with a `:` or `=` in them."""

    path: str = Field(min_length=1, description="an absolute path")
    """Of the directory, as it is: nothing in it is escaped."""
    perm: Literal["rw", "ro", "rr"] | None = Field(default=None, description="rw, ro or rr")
    """Its permission. Left out: as in a string."""
    attributes: list[str] = Field(default=[], description="a list of attributes")
    """Its attributes, for example "wh" or "coo_reg". With perm only."""
    udba: str | None = Field(default=None, description="none, reval or notify")
    """A mode for this branch alone. With perm only."""
    watch: str | None = Field(default=None, description="auto, inotify or fanotify")
    """How changes of this branch alone are heard of. With perm only."""


@dataclass(frozen=True, slots=True)
class MountSettings:
    """One [mounts.NAME]: mount_point is normalised; missing_branch: wait for it, or fail."""

    name: str
    mount_point: str
    options: MountOptions
    enabled: bool = True
    missing_branch: str = "wait"
    published: Mapping[str, str] = field(default_factory=dict)
    """Paths of branches, by the names that hosts call them."""
    publish: bool = False
    """What is changed through the mount on these."""


@dataclass(frozen=True, slots=True)
class Config:
    """A whole configuration; files: what it was read from. origin: file of each table ("daemon", "mounts.NAME")."""

    daemon: DaemonSettings = field(default_factory=DaemonSettings)
    metrics: MetricsSettings = field(default_factory=MetricsSettings)
    hosts: HostsSettings = field(default_factory=HostsSettings)
    mounts: Mapping[str, MountSettings] = field(default_factory=dict)
    files: tuple[str, ...] = ()
    origin: Mapping[str, str] = field(default_factory=dict)


def allowed(table: type[BaseModel | MountOptions]) -> dict[str, str]:
    """What may be the value of each key, in words."""
    if issubclass(table, BaseModel):
        return {name: one.description or "" for name, one in table.model_fields.items()}
    return {name: one.allowed for name, one in FIELDS.items()}


def _wrong(error: ValidationError) -> list[Wrong]:
    """The first thing about each key: pydantic has one for each element of a list."""
    kinds: dict[str, Literal["unknown", "missing"]] = {"extra_forbidden": "unknown", "missing": "missing"}
    found: dict[str, Wrong] = {}
    for one in error.errors():
        key = str(one["loc"][0]) if one["loc"] else ""
        found.setdefault(key, Wrong(key, kinds.get(one["type"], "value"), one["input"]))
    return list(found.values())


def config_files(path: Path) -> list[Path]:
    """The file and its conf.d/*.toml, in the order in which they are read; the latter need not exist."""
    return [path, *sorted((path.parent / "conf.d").glob("*.toml"))]


def read_file(file: str) -> bytes:
    """Raises OSError; EINVAL for a FIFO and the like, which would be waited for."""
    fd = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        kind = stat.S_IFMT(os.fstat(fd).st_mode)
        if kind == stat.S_IFDIR:
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if kind != stat.S_IFREG:
            raise OSError(errno.EINVAL, "not a regular file")
        with open(fd, "rb", closefd=False) as stream:
            return stream.read()
    finally:
        os.close(fd)


def load(path: Path, texts: Mapping[str, str] = MappingProxyType({})) -> Config:
    """Read and check a configuration. Raises ConfigError with everything that is wrong.

    texts: contents of files, by path, that are used in place of what the files hold.
    """
    return _Loader(texts).load(path)


_TABLES: Final = ("daemon", "hosts", "metrics", "mounts")


class _Loader:
    def __init__(self, texts: Mapping[str, str]) -> None:
        self.texts = texts
        self.problems: list[Problem] = []
        self.origin: dict[str, str] = {}

    def note(self, file: str, key: str, text: str) -> None:
        self.problems.append(Problem(file, key, text))

    def load(self, path: Path) -> Config:
        files = config_files(path)
        tables: dict[str, dict[str, object]] = {}
        for file in files:
            self._merge(tables, str(file))
        daemon = self._table(DaemonSettings, tables.pop("daemon", {}), "daemon")
        metrics = self._table(MetricsSettings, tables.pop("metrics", {}), "metrics")
        if metrics is not None and (metrics.tls_certificate is None) != (metrics.tls_key is None):
            self.note(self.origin["metrics"], "metrics", "tls_certificate and tls_key are given together or not at all")
        hosts = self._table(HostsSettings, tables.pop("hosts", {}), "hosts")
        if hosts is not None and (hosts.certificate is None) != (hosts.key is None):
            self.note(self.origin["hosts"], "hosts", "certificate and key are given together or not at all")
        mounts = {}
        for key, data in tables.items():
            name = key.partition(".")[2]
            settings = self._mount(self.origin[key], name, data)
            if settings is not None:
                mounts[name] = settings
        self._check_together(mounts)
        if hosts is not None and not hosts.urls:
            for mount in mounts.values():
                if mount.published:
                    key = f"mounts.{mount.name}"
                    self.note(self.origin[key], f"{key}.published", "there is no bus: [hosts] has no urls")
        if self.problems or daemon is None or metrics is None or hosts is None:
            raise ConfigError(self.problems)
        return Config(daemon, metrics, hosts, mounts, tuple(map(str, files)), self.origin)

    def _merge(self, tables: dict[str, dict[str, object]], file: str) -> None:
        """Add the tables of one file under their names, and "mounts.NAME"."""
        try:
            data = tomllib.loads(self.texts[file] if file in self.texts else read_file(file).decode())
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            self.note(file, "", f"not TOML: {error}")
            return
        except OSError as error:
            self.note(file, "", str(error.strerror))
            return
        for key, value in data.items():
            if key not in _TABLES:
                self.note(file, key, f"unknown table or key{suggestion(key, _TABLES)}")
            elif not isinstance(value, dict):
                self.note(file, key, f"found {_show(value)}, must be a table, [{key}{'.NAME' * (key == 'mounts')}]")
            elif key == "mounts":
                for name, mount in value.items():
                    self._add(tables, file, f"mounts.{name}", mount)
            else:
                self._add(tables, file, key, value)

    def _add(self, tables: dict[str, dict[str, object]], file: str, key: str, value: object) -> None:
        if not isinstance(value, dict):
            self.note(file, key, f"found {_show(value)}, must be a table, [{key}]")
        elif key in tables:
            self.note(file, key, f"is in {self.origin[key]} already; a table may be in one file only")
        else:
            self.origin[key] = file
            tables[key] = value

    def _table(self, model: type[M], data: Mapping[str, object], key: str) -> M | None:
        file = self.origin.get(key, "")
        try:
            return model.model_validate(data)
        except ValidationError as error:
            self._note_wrong(file, key, _wrong(error), allowed(model))
        return None

    def _note_wrong(
        self, file: str, key: str, wrong: Iterable[Wrong], allowed: Mapping[str, str], known: Iterable[str] = ()
    ) -> None:
        """allowed: what may be the value of each key. known: the keys to suggest, if these are not all of them."""
        for one in wrong:
            where = f"{key}.{one.key}"
            if one.kind == "unknown":
                self.note(file, where, f"unknown key{suggestion(one.key, known or allowed)}")
            elif one.kind == "missing":
                self.note(file, where, f"missing, must be {allowed[one.key]}")
            else:
                self.note(file, where, f"found {_show(one.value)}, must be {allowed[one.key]}")

    def _mount(self, file: str, name: str, data: Mapping[str, object]) -> MountSettings | None:
        key = f"mounts.{name}"
        before = len(self.problems)
        if _NAME.fullmatch(name) is None:
            self.note(file, key, f"the name of a mount must be {_NAME_FORM}")
        own = {word: value for word, value in data.items() if word in MountKeys.model_fields}
        rest = {word: value for word, value in data.items() if word not in MountKeys.model_fields}
        keys = self._table(MountKeys, own, key)
        known = (MountKeys.model_fields.keys() | FIELDS.keys()) - INTERNAL
        for word in INTERNAL & rest.keys():
            del rest[word]
            reason = f", {_NOT_HERE[word]}" if word in _NOT_HERE else suggestion(word, known)
            self.note(file, f"{key}.{word}", f"not possible here{reason}")
        for word, parse in (("create", parse_create), ("cpup", parse_copyup)):
            value = rest.get(word)
            if isinstance(value, str) and not self._parses(file, f"{key}.{word}", parse, value):
                del rest[word]
        if "branches" in rest and "source" in rest:
            self.note(file, f"{key}.source", "stands for all branches: source and branches exclude each other")
        if "branches" in rest:
            rest["branches"] = self._branches(file, f"{key}.branches", rest["branches"])
        options = None
        try:
            options = MountOptions.checked(rest)
        except WrongOptions as error:
            self._note_wrong(file, key, error.wrong, allowed(MountOptions), known)
        if keys is None or options is None or len(self.problems) > before:
            return None
        place = os.path.normpath(keys.mount_point)
        self._check_published(file, f"{key}.published", keys.published, options)
        if keys.publish and not keys.published:
            self.note(file, f"{key}.publish", "published says of no branch what other hosts call it")
        return MountSettings(name, place, options, keys.enabled, keys.missing_branch, keys.published, keys.publish)

    def _check_published(self, file: str, key: str, published: Mapping[str, str], options: MountOptions) -> None:
        paths = {os.path.normpath(os.fsdecode(spec.path)) for spec in options.branches}
        taken: dict[str, str] = {}
        for name, path in published.items():
            if path not in paths:
                self.note(file, f"{key}.{name}", f"found {_show(path)}, which is no branch of this mount")
            if taken.setdefault(path, name) != name:
                self.note(file, f"{key}.{name}", f"{path} is {taken[path]} already")

    def _parses(self, file: str, key: str, parse: Callable[[str], object], value: str) -> bool:
        try:
            parse(value)
        except UserError as error:
            self.note(file, key, f"found {_show(value)}: {error.message}")
            return False
        return True

    def _branches(self, file: str, key: str, value: object) -> object:
        """Specs of all branches that are right; what is no list or string at all is left to the model to refuse."""
        items = _split(value) if isinstance(value, (str, list)) else None
        if items is None or not items:
            return value
        specs: list[BranchSpec] = []
        for index, item in enumerate(items):
            place = f"{key}[{index}]"
            text = self._branch_text(file, place, item)
            if text is None or not self._parses(file, place, parse_branch, text):
                continue
            spec = parse_branch(text)
            if not spec.path.startswith(b"/"):
                self.note(file, place, f"found {_show(item)}, the path must be absolute")
            if os.path.normpath(spec.path) in {os.path.normpath(above.path) for above in specs}:
                self.note(file, place, f"branch {shown(spec.path)} is given twice")
            specs.append(spec)
        # A branch for each that was wrong, so that "too few" is not said as well.
        return tuple(specs) or (BranchSpec(b"/"),)

    def _branch_text(self, file: str, place: str, item: object) -> str | None:
        """A branch in aufs syntax; None when a problem was noted."""
        if isinstance(item, str):
            return item
        if not isinstance(item, dict):
            self.note(file, place, f"found {_show(item)}, must be PATH[=PERM[+ATTR...]] or a table with path, perm, "
                      "attributes, udba and watch")  # fmt: skip
            return None
        try:
            table = BranchTable.model_validate(item)
        except ValidationError as error:
            self._note_wrong(file, place, _wrong(error), allowed(BranchTable))
            return None
        words: list[str] = [table.perm] if table.perm else []
        if (table.attributes or table.udba or table.watch) and not words:
            self.note(file, place, "attributes, udba and watch need perm: rw, ro or rr")
            return None
        words += table.attributes
        if table.udba is not None:
            words.append(f"udba={table.udba}")
        if table.watch is not None:
            words.append(f"watch={table.watch}")
        return escape(table.path) + ("=" + "+".join(words) if words else "")

    # -- what only shows when all mounts are seen together ----------------------------------------

    def _check_together(self, mounts: Mapping[str, MountSettings]) -> None:
        active = [mount for mount in mounts.values() if mount.enabled]
        for place, mount in enumerate(active):
            file, key = self.origin[f"mounts.{mount.name}"], f"mounts.{mount.name}"
            for other in active[:place]:
                if other.mount_point == mount.mount_point:
                    taken_by = f"found {mount.mount_point!r}, which is the mount point of {other.name} already"
                    self.note(file, f"{key}.mount_point", taken_by)
                for text in shared_trees(mount, other):
                    self.note(file, f"{key}.branches", text)
            for spec in mount.options.branches:
                path = os.path.normpath(os.fsdecode(spec.path))
                if _inside(mount.mount_point, path):
                    self.note(file, f"{key}.branches", f"{path} holds the mount point {mount.mount_point}")
                for other in active:
                    if _inside(path, other.mount_point):
                        self.note(file, f"{key}.branches",
                                  f"{path} is inside the mount point of {other.name}; "
                                  "a union cannot be a branch")  # fmt: skip


def writable_paths(mount: MountSettings) -> list[str]:
    """The branches of a mount that will be writable, as far as can be said without looking at them."""
    return [
        os.path.normpath(os.fsdecode(spec.path))
        for index, spec in enumerate(mount.options.branches)
        if spec.perm is Perm.RW or (spec.perm is None and index == 0 and not mount.options.ro)
    ]


def shared_trees(mount: MountSettings, other: MountSettings) -> Iterator[str]:
    """What is wrong with two mounts that write to one tree, a line for each; compares paths as they are written."""
    for path in writable_paths(mount):
        for taken in writable_paths(other):
            if _inside(path, taken) or _inside(taken, path):
                yield (
                    f"{path} is writable here and {taken} in {other.name or other.mount_point}; "
                    "two mounts may not write to one tree"
                )


def _inside(path: str, directory: str) -> bool:
    return path == directory or path.startswith(directory.rstrip("/") + "/")


def _split(value: str | list[object]) -> list[object]:
    if isinstance(value, list):
        return value
    return list(split_escaped(value, ":"))


def _show(value: object) -> str:
    """A value of the file in a message, as TOML would have it and not too long."""
    if isinstance(value, bool):
        return "true" if value else "false"
    text = shown(re.sub("://[^@/]*@", "://...@", str(value)))  # a password, perhaps, and this may be for a log
    text = f'"{text}"' if isinstance(value, str) else text
    return text if len(text) <= 120 else text[:117] + "..."
