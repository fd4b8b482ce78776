"""Watching directories and files as other programs do: inotify(7) and fanotify(7), with events in words."""

from __future__ import annotations

import ctypes
import os
import select
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

_libc = ctypes.CDLL(None, use_errno=True)

WORDS: Final = {
    0x2: "MODIFY", 0x4: "ATTRIB", 0x8: "CLOSE_WRITE", 0x20: "OPEN", 0x40: "MOVED_FROM", 0x80: "MOVED_TO",
    0x100: "CREATE", 0x200: "DELETE", 0x400: "DELETE_SELF", 0x800: "MOVE_SELF",
}  # fmt: skip
"""The same numbers in both."""
_IGNORED: Final = 0x8000
_OVERFLOW: Final = 0x4000
_DIRECTORY: Final = 0x40000000
_ALL: Final = sum(WORDS)
_INOTIFY = struct.Struct("iIII")
_FANOTIFY = struct.Struct("=IBBHQii")
_INFO = struct.Struct("=BBH")

Event = tuple[str, str, str]
"""What is watched, by a label; the name in it; the word, with `DIR` where it is about a directory."""


def _checked(result: int) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def _words(mask: int) -> Iterator[str]:
    for bit, word in WORDS.items():
        if mask & bit:
            yield f"{word} DIR" if mask & _DIRECTORY else word


class Inotify:
    """Watches what is named by labels."""

    def __init__(self, places: Mapping[str, Path]) -> None:
        self._fd = _checked(_libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC))
        self._labels = {
            _checked(_libc.inotify_add_watch(self._fd, os.fsencode(path), _ALL)): label
            for label, path in places.items()
        }
        self.renames: list[tuple[str, str]] = []
        """Names that a cookie has brought together, since `take` was called last."""

    def take(self) -> list[Event]:
        """Everything up to now."""
        found: list[Event] = []
        self.renames = []
        cookies: dict[int, str] = {}
        for data in _chunks(self._fd):
            at = 0
            while at < len(data):
                wd, mask, cookie, length = _INOTIFY.unpack_from(data, at)
                name = data[at + _INOTIFY.size : at + _INOTIFY.size + length].rstrip(b"\0").decode()
                at += _INOTIFY.size + length
                # 16 events are all it has while a test of another run keeps fs.inotify.max_queued_events low.
                assert not mask & _OVERFLOW, f"events were lost after {len(found)}"
                if mask & _IGNORED:
                    continue
                found += [(self._labels[wd], name, word) for word in _words(mask)]
                if cookie in cookies:
                    self.renames.append((cookies[cookie], name))
                elif cookie:
                    cookies[cookie] = name
        return found

    def close(self) -> None:
        os.close(self._fd)


class PathUnit:
    """A stand-in for a path unit of systemd: the same watches, and when it would start its service.

    As path_spec_watch(), path_spec_fd_event() and path_spec_check_good() in systemd's src/core/path.c: what the unit is
    about is watched, or else the last directory on the way that is there. No systemd is started for it: a manager that
    is root takes the processes of its control group for its own.
    """

    _ON_THE_WAY = 0x800 | 0x400 | 0x4 | 0x100 | 0x80
    """IN_MOVE_SELF, IN_DELETE_SELF, IN_ATTRIB, IN_CREATE, IN_MOVED_TO."""
    _EXISTS = 0x400 | 0x800 | 0x4
    _CHANGED = _EXISTS | 0x8 | 0x100 | 0x200 | 0x40 | 0x80
    _ABOUT: Final = {
        "PathExists": _EXISTS,
        "PathExistsGlob": _EXISTS,
        "PathChanged": _CHANGED,
        "PathModified": _CHANGED | 0x2,
        "DirectoryNotEmpty": _EXISTS | 0x100 | 0x80,
    }

    def __init__(self, setting: str, path: Path) -> None:
        """setting: one of those of systemd.path(5). path: absolute."""
        self._setting = setting
        self._path = path
        self._fd = self._main = -1
        self._was_there = self._is_there()
        self._watch()

    def _is_there(self) -> bool:
        if self._setting == "PathExistsGlob":
            return any(self._path.parent.glob(self._path.name))
        if self._setting == "DirectoryNotEmpty":
            return self._path.is_dir() and any(self._path.iterdir())
        return self._path.exists()

    def _watch(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
        self._fd, self._main = _checked(_libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)), -1
        before: Path | None = None
        for path in (*reversed(self._path.parents), self._path):
            mask = self._ABOUT[self._setting] if path == self._path else self._ON_THE_WAY
            watch = _libc.inotify_add_watch(self._fd, os.fsencode(path), mask)
            if watch < 0:
                return
            if before is not None:  # need not be watched for what comes
                _libc.inotify_add_watch(self._fd, os.fsencode(before), 0x800)
            before = path
        self._main = watch

    def starts(self) -> bool:
        """Whether what was sent since the last time starts the service; only an event can."""
        woken, main = False, False
        for data in _chunks(self._fd):
            at = 0
            while at < len(data):
                watch, _, _, length = _INOTIFY.unpack_from(data, at)
                at += _INOTIFY.size + length
                woken, main = True, main or watch == self._main
        if not woken:
            return False
        was_there, self._was_there = self._was_there, self._is_there()
        self._watch()
        if self._setting in ("PathChanged", "PathModified"):
            return main or self._was_there != was_there
        return self._was_there and (self._setting != "PathExists" or not was_there)

    def close(self) -> None:
        os.close(self._fd)


class Fanotify:
    """The same with FAN_REPORT_DFID_NAME, by marks on directories and files themselves."""

    def __init__(self, places: Mapping[str, Path]) -> None:
        self.renames: list[tuple[str, str]] = []
        flags = 0x1 | 0x2 | 0x200 | 0x400 | 0x800  # CLOEXEC, NONBLOCK, REPORT_FID, REPORT_DIR_FID, REPORT_NAME
        self._fd = _checked(_libc.fanotify_init(flags, os.O_RDONLY))
        self._labels: dict[bytes, str] = {}
        for label, path in places.items():
            on_children = 0x08000000 if path.is_dir() else 0
            mask = ctypes.c_uint64(_ALL | _DIRECTORY | on_children)
            _checked(_libc.fanotify_mark(self._fd, 0x1, mask, -100, os.fsencode(path)))
            self._labels[_handle(path)] = label

    def take(self) -> list[Event]:
        found: list[Event] = []
        for data in _chunks(self._fd):
            at = 0
            while at < len(data):
                length, _, _, start, mask, _, _ = _FANOTIFY.unpack_from(data, at)
                label, name = self._about(data[at + start : at + length])
                found += [(label, name, word) for word in _words(mask)]
                at += length
        return found

    def _about(self, data: bytes) -> tuple[str, str]:
        label, name, at = "?", "", 0
        while at < len(data):
            kind, _, length = _INFO.unpack_from(data, at)
            record = data[at + _INFO.size + 8 : at + length]
            size = struct.unpack_from("=I", record)[0]
            known = self._labels.get(record[: 8 + size])
            if kind == 2:  # FAN_EVENT_INFO_TYPE_DFID_NAME
                label, name = known or label, record[8 + size :].split(b"\0")[0].decode()
            elif label == "?":
                label = known or label
            at += length
        return label, "" if name == "." else name

    def close(self) -> None:
        os.close(self._fd)


def _handle(path: Path) -> bytes:
    buffer = ctypes.create_string_buffer(struct.pack("=Ii", 128, 0), 8 + 128)
    mount_id = ctypes.c_int()
    flags = 0x200  # AT_HANDLE_FID
    _checked(_libc.name_to_handle_at(-100, os.fsencode(path), buffer, ctypes.byref(mount_id), flags))
    size = struct.unpack_from("=I", buffer.raw)[0]
    return buffer.raw[: 8 + size]


def _chunks(fd: int) -> Iterator[bytes]:
    while select.select([fd], [], [], 0)[0]:
        try:
            yield os.read(fd, 1 << 16)
        except BlockingIOError:
            return
