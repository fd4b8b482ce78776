"""Layers as tar archives: what goes in comes out, and an archive that means harm reaches nothing but its layer."""

from __future__ import annotations

import errno
import gzip
import io
import os
import stat
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.mount import why_no_fuse
from udbad.errors import ExitCode, UserError
from udbad.layers import store
from udbad.layers.pack import pack
from udbad.layers.unpack import Unpacked, unpack
from udbad.tools.convert import convert

ROOT = os.geteuid() == 0
CAPABILITY = bytes.fromhex("0100000200200000000000000000000000000000")
"""cap_net_raw=ep, with the NULs that it has."""
VICTIM = "what nobody may touch"


@pytest.fixture
def layer(tmp_path: Path) -> Iterator[Path]:
    """An empty layer `layer`, beside a file that no archive may reach."""
    (tmp_path / "victim").write_text(VICTIM)
    path = tmp_path / "layer"
    path.mkdir()
    yield path
    assert sorted(os.listdir(tmp_path)) in (["layer", "victim"], ["layer", "source", "victim"])
    assert (tmp_path / "victim").read_text() == VICTIM
    assert os.stat(tmp_path / "victim").st_nlink == 1


def packed(branch: Path) -> bytes:
    stream = io.BytesIO()
    fd = os.open(branch, os.O_RDONLY | os.O_DIRECTORY)
    try:
        pack(fd, stream)
    finally:
        os.close(fd)
    return stream.getvalue()


def unpacked(layer: Path, data: bytes, devices: bool = False, overlay: bool = False) -> Unpacked:
    fd = os.open(layer, os.O_RDONLY | os.O_DIRECTORY)
    try:
        return unpack(fd, io.BytesIO(data), devices, overlay)
    finally:
        os.close(fd)


Entry = tuple[str, bytes] | tuple[str, bytes, str]


def archive(*entries: Entry | tarfile.TarInfo) -> bytes:
    """An archive of (name, type[, data of a file, or where a link leads])."""
    stream = io.BytesIO()
    with tarfile.open(mode="w", fileobj=stream, format=tarfile.PAX_FORMAT) as tar:
        for entry in entries:
            info = entry if isinstance(entry, tarfile.TarInfo) else tarfile.TarInfo(entry[0])
            data = b""
            if not isinstance(entry, tarfile.TarInfo):
                info.type = entry[1]
                text = entry[2] if len(entry) == 3 else ""
                info.linkname = text if info.type in (LINK, SYMLINK) else ""
                data = text.encode() if info.type == FILE else b""
                info.size = len(data)
                info.mode = 0o755 if info.type == DIR else 0o644
            tar.addfile(info, io.BytesIO(data))
    return stream.getvalue()


FILE, DIR, LINK, SYMLINK = tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.LNKTYPE, tarfile.SYMTYPE
CHAR, FIFO = tarfile.CHRTYPE, tarfile.FIFOTYPE


LOCAL = ("trusted.here", "security.selinux")
"""Attributes that mean something on one machine only."""


def fill(branch: Path) -> None:
    """Everything that a layer may have, and what is left out of its archive."""
    inner = branch / "d" / "e"
    inner.mkdir(parents=True)
    (branch / "d" / "file").write_text("content")
    (branch / "d" / "file").chmod(0o4755)
    os.utime(branch / "d" / "file", ns=(0, 1_234_567_890_123_456_789))
    os.link(branch / "d" / "file", inner / "link")
    (inner / os.fsdecode(b"not \xff UTF-8")).write_text("x")
    (inner / ("n" * 255)).touch()
    (branch / "away").symlink_to("/etc/passwd")
    os.link(branch / "away", branch / "away too", follow_symlinks=False)
    os.mkfifo(branch / "fifo", 0o600)
    os.setxattr(branch / "d", "user.\xe4", b"\xff\x00=\n")
    (branch / ".wh.gone").touch()
    (branch / "d" / ".wh..wh..opq").touch()
    for name in (".wh..wh.orph", ".wh..wh.plnk"):
        (branch / name).mkdir()
    (branch / ".wh..wh.aufs").touch()
    (inner / ".wh..wh.file.0123456789ab").touch()
    os.link(branch / "d" / "file", branch / ".wh..wh.plnk" / "11.12")
    with (branch / "sparse").open("wb") as file:
        file.truncate(8 << 20)
        os.pwrite(file.fileno(), b"end", (8 << 20) - 3)
    if ROOT:
        os.chown(branch / "away", 12, 34, follow_symlinks=False)
        os.chown(inner, 1 << 22, 5)
        os.setxattr(branch / "d" / "file", "security.capability", CAPABILITY)
        for key in LOCAL:
            os.setxattr(branch / "d", key, b"only")
    os.utime(inner, ns=(0, -1_500_000_000))


def test_round_trip(tmp_path: Path, layer: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    fill(source)
    data = packed(source)
    done = unpacked(layer, gzip.compress(data))
    assert done.names == 12
    same = packed(layer) == data  # no difference of two such archives is for people
    assert same
    assert os.stat(layer / "d" / "file").st_nlink == 2
    assert os.path.samestat(os.stat(layer / "d" / "file"), os.stat(layer / "d" / "e" / "link"))
    assert os.stat(layer / "d" / "file").st_mtime_ns == 1_234_567_890_123_456_789
    assert os.stat(layer / "d" / "e").st_mtime_ns == -1_500_000_000
    assert sorted(os.listdir(layer)) == [".wh.gone", "away", "away too", "d", "fifo", "sparse"]
    assert os.path.samestat(os.lstat(layer / "away"), os.lstat(layer / "away too"))
    assert os.getxattr(layer / "d", "user.\xe4") == b"\xff\x00=\n"
    assert (layer / "sparse").read_bytes() == (source / "sparse").read_bytes()
    assert os.stat(layer / "sparse").st_blocks * 512 < 1 << 20
    assert stat.S_ISFIFO(os.lstat(layer / "fifo").st_mode)
    if ROOT:
        assert os.getxattr(layer / "d" / "file", "security.capability") == CAPABILITY
        assert stat.S_IMODE(os.stat(layer / "d" / "file").st_mode) == 0o4755
        assert (os.lstat(layer / "away").st_uid, os.lstat(layer / "away").st_gid) == (12, 34)
        assert os.stat(layer / "d" / "e").st_uid == 1 << 22
        assert not {*LOCAL} & {*os.listxattr(layer / "d")}


needs_root = pytest.mark.skipif(not ROOT, reason="ok: attributes of overlayfs, and branches, are root's")


@needs_root
def test_a_layer_of_overlayfs_gives_the_same_archive(tmp_path: Path, layer: Path) -> None:
    """And an archive is unpacked as one, whether a whiteout comes before or after what has its name."""
    source = tmp_path / "source"
    source.mkdir()
    fill(source)
    data = packed(source)
    convert(os.fsencode(source), "aufs", "overlay", lambda done, count: None)
    assert (source / "gone").is_char_device()
    os.setxattr(source / "away too", "trusted.overlay.origin", b"x", follow_symlinks=False)
    os.setxattr(source / "d", "user.overlay.impure", b"y")
    assert packed(source) == data
    unpacked(layer, data, overlay=True)
    assert os.getxattr(layer / "d", "trusted.overlay.opaque") == b"y"
    assert not list(layer.rglob(".wh.*"))
    assert packed(layer) == data


@needs_root
def test_whiteouts_of_overlayfs_beside_their_names(layer: Path) -> None:
    member = tarfile.TarInfo("after")
    member.type, member.pax_headers = DIR, {"SCHILY.xattr.user.overlay.opaque": "y"}
    unpacked(
        layer,
        archive(
            (".wh.after", FILE), member, ("before", DIR), ("before/x", FILE), (".wh.before", FILE),
            ("file", FILE, "x"), (".wh.file", FILE), ("gone", DIR), ("gone/.wh.x", FILE), ("gone", FILE, "x"),
        ),
        overlay=True,
    )  # fmt: skip
    assert sorted(os.listdir(layer)) == ["after", "before", "file", "gone"]
    for name in ("after", "before"):
        assert os.getxattr(layer / name, "trusted.overlay.opaque") == b"y"
    assert os.listxattr(layer / "after") == ["trusted.overlay.opaque", "user.overlay.overlay.opaque"]


def test_gnu_tar_reads_and_writes_it(tmp_path: Path, layer: Path) -> None:
    """Also attributes, and sparse files in each form that GNU tar has for them."""
    source = tmp_path / "source"
    source.mkdir()
    with (source / "sparse").open("wb") as file:
        for place in (0, 3 << 20, (8 << 20) - 5):
            os.pwrite(file.fileno(), b"piece", place)
    os.setxattr(source / "sparse", "user.x", b"y")
    listed = subprocess.run(
        ["tar", "-tvv", "--xattrs"], input=packed(source), capture_output=True, check=True, timeout=60
    )
    assert b"x: 1 user.x" in listed.stdout
    for words in (["--format=gnu"], ["--sparse-version=0.0"], ["--sparse-version=0.1"], ["--sparse-version=1.0"]):
        posix = [] if words == ["--format=gnu"] else ["--format=posix", "--xattrs"]
        command = ["tar", "-C", str(source), "-cS", *posix, *words, "sparse"]
        made = subprocess.run(command, capture_output=True, check=True, timeout=60)
        assert len(made.stdout) < 1 << 20
        unpacked(layer, made.stdout)
        assert (layer / "sparse").read_bytes() == (source / "sparse").read_bytes()
        assert os.stat(layer / "sparse").st_blocks * 512 < 1 << 20
        assert not posix or os.getxattr(layer / "sparse", "user.x") == b"y"


def test_the_later_one_of_two_entries_counts(layer: Path) -> None:
    data = archive(
        ("a", DIR), ("a/in", FILE, "1"), ("a", SYMLINK, "nowhere"), ("b", SYMLINK, "/etc/passwd"), ("b", FILE, "mine"),
        ("c", FILE, "x"), ("c", DIR), ("c/in", FILE, "2"), ("l", LINK, "b"), ("l", LINK, "b"), ("./", DIR),
        ("x//./y", DIR),
    )  # fmt: skip
    unpacked(layer, data)
    assert os.readlink(layer / "a") == "nowhere"
    assert (layer / "b").read_text() == (layer / "l").read_text() == "mine"
    assert (layer / "c" / "in").read_text() == "2"
    assert (layer / "x" / "y").is_dir()


def sparse(pieces: str, size: int) -> tarfile.TarInfo:
    info = tarfile.TarInfo("bomb")
    info.pax_headers = {"GNU.sparse.map": pieces, "GNU.sparse.size": str(size), "GNU.sparse.numblocks": "1"}
    return info


def headers(**words: object) -> tarfile.TarInfo:
    info = tarfile.TarInfo("file")
    for name, value in words.items():
        setattr(info, name, value)
    return info


def test_holes_of_an_archive_cost_nothing(layer: Path) -> None:
    unpacked(layer, archive(sparse("0,0", 1 << 42)))
    assert os.stat(layer / "bomb").st_size == 1 << 42
    assert os.stat(layer / "bomb").st_blocks == 0


HOSTILE: dict[str, tuple[bytes, str]] = {
    "absolute": (archive(("/tmp/x", FILE)), "/tmp/x: an absolute path"),
    "up": (archive(("../victim", FILE, "bad")), r"\.\./victim: a path with '\.\.' in it"),
    "up inside": (archive(("d/../../victim", FILE)), "a path with"),
    "up and down": (archive(("d", DIR), ("d/..", DIR)), "a path with"),
    "through a link": (archive(("l", SYMLINK, ".."), ("l/victim", FILE, "bad")), "l/victim: leads through a symbolic"),
    "through an absolute link": (archive(("l", SYMLINK, "/"), ("l/tmp/x/y", FILE)), "leads through a symbolic link"),
    "through a link that stays": (archive(("d", DIR), ("l", SYMLINK, "d"), ("l/f", FILE)), "leads through a symbolic"),
    "through a file": (archive(("f", FILE), ("f/g", FILE)), "no directory"),
    "into a replaced directory": (
        archive(("d", DIR), ("d/a", FILE), ("d", SYMLINK, ".."), ("d/victim", FILE, "bad")), "leads through a symbolic"
    ),
    "hard link up": (archive(("h", LINK, "../victim")), r"\.\./victim: a path with"),
    "hard link to the root": (archive(("h", LINK, "/victim")), "an absolute path"),
    "hard link through a link": (archive(("l", SYMLINK, ".."), ("h", LINK, "l/victim")), "h: a hard link to l/victim"),
    "hard link to nothing": (archive(("h", LINK, "later"), ("later", FILE)), "which is not in the archive before it"),
    "hard link to a directory": (archive(("d", DIR), ("h", LINK, "d")), "which is a directory"),
    "hard link to the layer": (archive(("h", LINK, ".")), "which is no file"),
    "hard link to a mark": (archive((".wh.a", FILE), ("h", LINK, ".wh.a")), "which is no file"),
    "device": (archive(headers(name="dev/sda", type=CHAR, devmajor=8)), "dev/sda: a device node"),
    "whiteout of nothing": (archive((".wh.", FILE)), "a whiteout of nothing"),
    "whiteout of the layer": (archive((".wh..", FILE)), "a whiteout of nothing"),
    "whiteout of what is above": (archive(("d/.wh...", FILE)), "a whiteout of nothing"),
    "whiteout that is a link": (archive((".wh.a", SYMLINK, "b")), "a whiteout is an empty file"),
    "opaque mark that is a directory": (archive((".wh..wh..opq", DIR)), "a whiteout is an empty file"),
    "in a whiteout": (archive((".wh.a/b", FILE)), "is in what would be a whiteout"),
    "in the place of the layer": (archive((".", SYMLINK, "/")), "takes the place of the layer itself"),
    "owner": (archive(headers(pax_headers={"uid": str(1 << 40)})), "an owner that there cannot be"),
    "NUL": (archive(headers(pax_headers={"path": "a\0b"})), "NUL"),
    "overlapping pieces": (archive(sparse("0,512,0,512", 1 << 30)), "pieces that overlap"),
    "piece outside": (archive(sparse("1048576,512", 512)), "pieces that overlap or lie outside"),
    "unknown type": (archive(headers(type=b"V")), "of a type that is not known"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_what_a_layer_may_not_have_is_refused(layer: Path, name: str) -> None:
    data, message = HOSTILE[name]
    with pytest.raises(UserError, match=message) as caught:
        unpacked(layer, data)
    assert caught.value.code is ExitCode.REFUSED
    assert "\n" not in caught.value.message


GOOD = archive(("a", FILE, "x" * 600), ("b", FILE, "y"))
BROKEN: dict[str, bytes] = {
    "nothing": b"",
    "text": b"no archive at all" * 100,
    "cut in a file": GOOD[:700],
    "cut in a header": GOOD[:1636],
    "a header that is none": GOOD[:1536] + b"x" * 512 + GOOD[2048:],
    "cut gzip": gzip.compress(GOOD)[:-20],
    "negative size": (lambda info: info.tobuf(tarfile.GNU_FORMAT))(headers(size=-512)) + bytes(1024),
    "a long name of 16 GiB": headers(type=tarfile.GNUTYPE_LONGNAME, size=16 << 30).tobuf(tarfile.GNU_FORMAT),
    "attributes of 16 GiB": headers(type=tarfile.XHDTYPE, size=16 << 30).tobuf(tarfile.GNU_FORMAT),
    "a time that is none": archive(headers(pax_headers={"mtime": "soon"})),
    "a map that is none": archive(sparse("one,two", 512)),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_no_archive_is_said_to_be_none(layer: Path, name: str) -> None:
    with pytest.raises(UserError, match=r"not an archive of a layer: .+") as caught:
        unpacked(layer, BROKEN[name])
    assert caught.value.code is ExitCode.FAILURE


@pytest.mark.parametrize(
    ("data", "number"),
    [
        (archive(("n" * 256, FILE)), errno.ENAMETOOLONG),
        (archive((".wh." + "n" * 252, FILE)), errno.ENAMETOOLONG),
        (archive(("d/" + "n" * 256 + "/f", FILE)), errno.ENAMETOOLONG),
        (archive(("l", SYMLINK, "t" * 5000)), errno.ENAMETOOLONG),
        (archive(sparse("0,0", (1 << 63) - 1)), errno.EFBIG),
    ],
)
def test_what_the_file_system_does_not_take_is_named(layer: Path, data: bytes, number: int) -> None:
    with pytest.raises(OSError, match=os.strerror(number)) as caught:
        unpacked(layer, data)
    assert caught.value.filename


def test_names_that_just_fit(layer: Path) -> None:
    deep = "/".join(["d" * 200] * 30)  # longer than PATH_MAX
    unpacked(layer, archive(("n" * 255, FILE, "x"), (".wh." + "n" * 251, FILE), (deep + "/f", FILE)))
    assert sorted(len(name) for name in os.listdir(layer)) == [200, 255, 255]
    with tarfile.open(fileobj=io.BytesIO(packed(layer))) as tar:
        assert deep + "/f" in tar.getnames()


@pytest.mark.skipif(not ROOT, reason="ok: device nodes need root")
def test_devices_are_made_when_asked_for(layer: Path) -> None:
    unpacked(layer, archive(headers(name="null", type=CHAR, devmajor=1, devminor=3)), devices=True)
    assert os.stat(layer / "null").st_rdev == os.makedev(1, 3)
    with pytest.raises(UserError, match="that overlayfs takes for a whiteout"):
        unpacked(layer, archive(headers(name="none", type=CHAR)), devices=True)


# -- all or nothing -----------------------------------------------------------------------------


@pytest.mark.skipif(why_no_fuse() is not None, reason="a store is opened by mount(2)")
@pytest.mark.parametrize("fail", [True, False])
def test_a_layer_is_filled_or_stays_empty(tmp_path: Path, fail: bool) -> None:
    with store.opened(str(tmp_path), make=True) as found:
        found.create("base")
        (tmp_path / "diff" / "base").chmod(0o751)
        found.create("top", "base")
        data = archive(("a", FILE, "1"), *([("../b", FILE, "2")] if fail else []))

        def apply() -> None:
            with found.replacing("top") as fd:
                unpack(fd, io.BytesIO(data))

        if fail:
            with pytest.raises(UserError):
                apply()
        else:
            apply()
            with pytest.raises(UserError, match="layer top is not empty"):
                apply()
        assert sorted(os.listdir(tmp_path / "diff")) == ["base", "top"]
        assert os.listdir(tmp_path / "diff" / "top") == ["a"] * (not fail)
        assert stat.S_IMODE(os.stat(tmp_path / "diff" / "top").st_mode) == 0o751
