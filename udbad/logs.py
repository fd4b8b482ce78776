"""How log lines look: plain for people and the journal, JSON for machines. One line per state change."""

from __future__ import annotations

import json
import logging
import sys

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
    import logging.handlers

    handler: logging.Handler
    try:
        syslog = logging.handlers.SysLogHandler("/dev/log", logging.handlers.SysLogHandler.LOG_DAEMON)
        syslog.ident = "udbad: "
        handler = syslog
    except OSError:
        handler = logging.NullHandler()
    root = logging.getLogger()
    for old in list(root.handlers):
        root.removeHandler(old)
    root.addHandler(handler)
