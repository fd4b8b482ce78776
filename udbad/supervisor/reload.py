"""What a changed configuration means for what runs: a verdict for each mount and key. Compares only."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from enum import Enum

from udbad.settings.file import DaemonSettings, HostsSettings, MetricsSettings, MountSettings
from udbad.settings.options import FIELDS, MountOptions

OWN_KEYS = ("mount_point", "missing_branch", "enabled", "published", "publish")
"""Keys of a mount that are not mount options."""


class Outcome(Enum):
    """What became of a changed key."""

    APPLIED = "applied"
    NEEDS_REMOUNT = "needs remount"
    NEEDS_RESTART = "needs restart of the daemon"
    REJECTED = "rejected"


@dataclass(frozen=True, slots=True)
class Verdict:
    """table: daemon, hosts, metrics or mounts.NAME; key: "" for all of it."""

    table: str
    key: str
    outcome: Outcome
    text: str = ""

    def __str__(self) -> str:
        name = f"{self.table}.{self.key}" if self.key else self.table
        return f"{name}: {self.outcome.value}" + (f": {self.text}" if self.text else "")

    def to_json(self) -> dict[str, str]:
        return {**asdict(self), "outcome": self.outcome.value}


def changed_options(old: MountOptions, new: MountOptions) -> list[str]:
    """Mount options that differ."""
    names = FIELDS.keys() - {"notices"}
    return sorted(name for name in names if getattr(old, name) != getattr(new, name))


def changed_keys(old: MountSettings, new: MountSettings) -> list[str]:
    """Every key of a mount that differs."""
    own = [key for key in OWN_KEYS if getattr(old, key) != getattr(new, key)]
    return own + changed_options(old.options, new.options)


def judge_daemon(old: DaemonSettings, new: DaemonSettings) -> list[Verdict]:
    """All but the place where everybody looks for us is read when it is needed, so it applies at once."""
    return [
        Verdict("daemon", key, Outcome.NEEDS_RESTART if key == "run_dir" else Outcome.APPLIED)
        for key in _changed(DaemonSettings.model_fields, old, new)
    ]


def judge_metrics(old: MetricsSettings, new: MetricsSettings) -> list[Verdict]:
    return [Verdict("metrics", key, Outcome.NEEDS_RESTART) for key in _changed(MetricsSettings.model_fields, old, new)]


def judge_hosts(old: HostsSettings, new: HostsSettings) -> list[Verdict]:
    """Only processes that are started with them have any use for these (subscriptions.py)."""
    return [Verdict("hosts", key, Outcome.APPLIED) for key in _changed(HostsSettings.model_fields, old, new)]


def _changed(fields: Iterable[str], old: object, new: object) -> list[str]:
    return [key for key in fields if getattr(old, key) != getattr(new, key)]
