"""Lines of proc_pid_mountinfo(5), the odd ones too."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.helpers.mount import DEADLINE
from udbad.branch import mountinfo
from udbad.branch.mountinfo import Mount, parse

PLAIN = b"36 35 98:0 /mnt1 /mnt2 rw,noatime - ext3 /dev/root rw,errors=continue\n"


def test_every_field() -> None:
    line = b"36 35 98:7 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw,errors=continue\n"
    assert parse(line) == [
        Mount(36, 35, (98, 7), b"/mnt1", b"/mnt2", b"rw,noatime", b"ext3", b"/dev/root", b"rw,errors=continue")
    ]


@pytest.mark.parametrize("optional", [b"", b"shared:2 ", b"shared:2 master:1 propagate_from:3 unbindable new:x "])
def test_any_number_of_optional_fields(optional: bytes) -> None:
    assert parse(PLAIN.replace(b"- ext3", optional + b"- ext3")) == parse(PLAIN)


@pytest.mark.parametrize(
    ("written", "name"),
    [
        (rb"/a\040b", b"/a b"),
        (rb"/a\011\012b", b"/a\t\nb"),
        (rb"/a\134040b", rb"/a\040b"),
        (rb"/\134x41\134", b"/\\x41\\"),
        (rb"/a\040-\040b", b"/a - b"),
        (rb"/a\x", rb"/a\x"),  # what the kernel does not write stays as it is
        (b"/a\r\x0b\x0c\x1c\x85b", b"/a\r\x0b\x0c\x1c\x85b"),  # nor does it escape these
        ("/ä€".encode(), "/ä€".encode()),
        (b"/\xff\xfe", b"/\xff\xfe"),
        (b"/a//deleted", b"/a//deleted"),
    ],
)
def test_names(written: bytes, name: bytes) -> None:
    first, second = parse(PLAIN.replace(b"/mnt1", written).replace(b"/mnt2", written + b"2") + PLAIN)
    assert (first.root, first.point) == (name, name + b"2")
    assert second == parse(PLAIN)[0]


@pytest.mark.parametrize(
    ("written", "source"),
    [(b"", b""), (b"none", b"none"), (rb"a\040\043b", b"a #b"), (b"-", b"-"), (b"server:/x", b"server:/x")],
)
def test_sources(written: bytes, source: bytes) -> None:
    (mount,) = parse(PLAIN.replace(b"/dev/root", written))
    assert (mount.fs_type, mount.source, mount.super_options) == (b"ext3", source, b"rw,errors=continue")


def test_options_with_spaces_and_hyphens() -> None:
    """Some file systems show options that have spaces."""
    (mount,) = parse(PLAIN.replace(b"errors=continue", b"context=a - b"))
    assert (mount.point, mount.super_options) == (b"/mnt2", b"rw,context=a - b")


def test_a_connection_is_the_minor_number() -> None:
    (mount,) = parse(PLAIN.replace(b"98:0", b"0:300"))
    assert mount.connection == 300


def test_no_line_and_the_last_one_without_an_end() -> None:
    assert parse(b"") == []
    assert len(parse(PLAIN + PLAIN.rstrip(b"\n"))) == 2


def test_the_mounts_of_this_process(tmp_path: Path) -> None:
    known = {mount.id: mount for mount in mountinfo.read()}
    fd = os.open(tmp_path, os.O_PATH)
    try:
        there = known[mountinfo.mount_id(fd)]
    finally:
        os.close(fd)
    st = os.stat(tmp_path)
    assert os.fsencode(tmp_path).startswith(there.point)
    if there.fs_type != b"btrfs":  # whose subvolumes have numbers of their own
        assert there.device == (os.major(st.st_dev), os.minor(st.st_dev))


@pytest.mark.fuse
def test_as_the_kernel_writes_them(tmp_path: Path) -> None:
    """A mount point and a source of all bytes that a name can have."""
    names = [bytes(byte for byte in range(start, start + 64) if byte not in b"\0/") for start in range(0, 256, 64)]
    for name in names:
        place = os.path.join(os.fsencode(tmp_path), name)
        os.mkdir(place)
        subprocess.run(["mount", "-t", "tmpfs", b"--", name, place], check=True, timeout=DEADLINE)
        try:
            (mount,) = (mount for mount in mountinfo.read() if mount.point == place)
        finally:
            subprocess.run(["umount", "--", place], check=True, timeout=DEADLINE)
        assert (mount.fs_type, mount.source) == (b"tmpfs", name)
