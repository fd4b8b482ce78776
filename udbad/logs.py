"""How log lines look: plain for people and the journal, JSON for machines. One line per state change."""

from __future__ import annotations

import json
import logging
import sys
import syslog

LEVELS = ("debug", "info", "warning", "error")


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time (RFC 3339, UTC), level, logger, mount (where there is one), message."""

    def __init__(self, mount: str = "") -> None:
        super().__init__()
        self.mount = mount

    def format(self, record: logging.LogRecord) -> str:
        from datetime import UTC, datetime

        words: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
        }
        mount = getattr(record, "mount", self.mount)
        if mount:
            words["mount"] = mount
        words["message"] = record.getMessage()
        if record.exc_info:
            words["traceback"] = self.formatException(record.exc_info)
        return json.dumps(words)


class _Syslog(logging.Handler):
    """syslog(3), which also finds who listens later. That of logging.handlers takes 3 ms to import."""

    def emit(self, record: logging.LogRecord) -> None:
        found = (key for least, key in _PRIORITIES if record.levelno >= least)
        syslog.syslog(next(found, syslog.LOG_DEBUG), self.format(record))


_PRIORITIES = (
    (logging.CRITICAL, syslog.LOG_CRIT),
    (logging.ERROR, syslog.LOG_ERR),
    (logging.WARNING, syslog.LOG_WARNING),
    (logging.INFO, syslog.LOG_INFO),
)


def set_up(level: str, style: str, mount: str = "") -> None:
    """Log to stderr. level: debug, info, warning or error. style: plain or json. mount: named in each line."""
    handler = logging.StreamHandler(sys.stderr)
    label = f"{mount}: ".replace("%", "%%") if mount else ""
    plain = logging.Formatter(f"udbad: {label}%(levelname)s: %(message)s")
    handler.setFormatter(JsonFormatter(mount) if style == "json" else plain)
    root = logging.getLogger()
    for old in list(root.handlers):
        root.removeHandler(old)
    root.addHandler(handler)
    set_level(level)


def set_level(level: str) -> None:
    """Raises ValueError for a level that does not exist."""
    logging.getLogger().setLevel(level.upper())


def to_syslog() -> None:
    """From now on log where a process without a terminal does, to syslog(3); nowhere when none listens."""
    syslog.openlog("udbad", 0, syslog.LOG_DAEMON)
    root = logging.getLogger()
    for old in list(root.handlers):
        root.removeHandler(old)
    root.addHandler(_Syslog())
