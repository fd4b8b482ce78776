"""A change written back to the configuration: one line differs, and reading the file gives what was meant."""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from udbad.branch.spec import parse_branch
from udbad.errors import ExitCode, UserError
from udbad.settings.edit import Change, DropBranch, PutBranch, SetKey, check_writable, edited, write
from udbad.settings.file import load
from udbad.types import Perm

FILE = """\
# All of it.
[daemon]
log_level = "info" # enough

[mounts.lines]  # several lines
mount_point = "/m/lines"
branches = [
    # the fast disk
    "/top=rw",   # SSD
    # the shared tree
    "/base=ro",  # NFS
    # no more
]
udba = "reval"   # they are slow

[mounts.line]
branches = ["/l/top", '/l/base']
mount_point = "/m/line"

# a mount of tables
[mounts.tables]
mount_point = "/m/tables"
branches = [
  { perm = "rw", path = "/t/top" },
  {path = "/t/base", perm = "ro", attributes = ["wh"]}
]

[mounts.text]
mount_point = "/m/text"
branches = '/s/top=rw:/s/base'  # as after -o
[mounts.aot]
mount_point = "/m/aot"
dirwh = 4
[[mounts.aot.branches]]
path = "/a/top" # the top
perm = "rw"
[[mounts.aot.branches]]
path = "/a/base"
"""

INLINE = """\
mounts = { one = { mount_point = "/m/1", branches = ["/one/top=rw", "/one/base"] } }
"""
DOTTED = """\
[mounts]
two.mount_point = "/m/2"
two.branches = ["/two/top=rw", "/two/base"]
"""


def put(text: str, *above: str) -> PutBranch:
    return PutBranch(parse_branch(text), tuple(map(os.fsencode, above)))


def change(tmp_path: Path, text: str, name: str, changes: Sequence[Change]) -> list[str]:
    """The lines that differ, as diff has them; the new text is in the file afterwards."""
    path = tmp_path / "udbad.toml"
    path.write_bytes(text.encode())
    result = edited(path, name, changes, {b"/l/base": Perm.RR})
    assert (result.file, result.before) == (str(path.resolve()), text)
    assert path.read_bytes().decode() == text
    write(result.file, result.after)
    assert load(path).mounts[name] == result.settings
    lines = difflib.ndiff(text.split("\n"), path.read_bytes().decode().split("\n"))
    return [line for line in lines if line[0] in "+-"]


@pytest.mark.parametrize(
    ("name", "changes", "expected"),
    [
        ("lines", [SetKey("udba", "notify")],
         ['- udba = "reval"   # they are slow', '+ udba = "notify"   # they are slow']),
        ("lines", [SetKey("udba", "reval")], []),
        ("line", [SetKey("udba", "notify")], ['+ udba = "notify"']),
        ("aot", [SetKey("udba", "notify")], ['+ udba = "notify"']),
        ("lines", [put("/new=ro+wh", "/base", "/top")], ['+     "/new=ro+wh",']),
        ("lines", [put("/new=ro", "/top")], ['+     "/new=ro",']),
        ("lines", [put("/new=rw")], ['+     "/new=rw",']),
        ("lines", [put("/new=ro", "/by-hand", "/top")], ['+     "/new=ro",']),
        ("lines", [put("/base=rr", "/top")], ['-     "/base=ro",  # NFS', '+     "/base=rr",  # NFS']),
        ("lines", [put("/base/=ro")], ['-     "/base=ro",  # NFS', '+     "/base/=ro",  # NFS']),
        ("lines", [put("/base=ro")], []),
        ("lines", [DropBranch(b"/base/")], ['-     "/base=ro",  # NFS']),
        ("lines", [DropBranch(b"/top")], ['-     "/top=rw",   # SSD']),
        ("lines", [DropBranch(b"/by-hand")], []),
        ("line", [put('/q"\\,=ro', "/l/base")],
         ["- branches = [\"/l/top\", '/l/base']", "+ branches = [\"/l/top\", '/l/base', '/q\"\\,=ro']"]),
        # What has its permission by its place keeps it when the place changes.
        ("line", [put("/new=rw")],
         ["- branches = [\"/l/top\", '/l/base']", "+ branches = [\"/new=rw\", \"/l/top=rw\", '/l/base']"]),
        ("line", [DropBranch(b"/l/top")],
         ["- branches = [\"/l/top\", '/l/base']", "+ branches = ['/l/base=rr']"]),
        ("tables", [put("/n:1=ro", "/t/top")], ['+   { perm = "ro", path = "/n:1" },']),
        ("tables", [put("/new=ro+coo_reg+udba=none+watch=auto", "/t/base")],
         ['-   {path = "/t/base", perm = "ro", attributes = ["wh"]}',
          '+   {path = "/t/base", perm = "ro", attributes = ["wh"]},',
          '+   {path = "/new", perm = "ro", attributes = ["coo_reg"], udba = "none", watch = "auto"}']),
        ("tables", [put("/t/top=ro+wh")],
         ['-   { perm = "rw", path = "/t/top" },', '+   { perm = "ro", path = "/t/top", attributes = ["wh"] },']),
        ("text", [put("/n=ro", "/s/top")],
         ["- branches = '/s/top=rw:/s/base'  # as after -o", "+ branches = '/s/top=rw:/n=ro:/s/base'  # as after -o"]),
        ("text", [DropBranch(b"/s/top")],
         ["- branches = '/s/top=rw:/s/base'  # as after -o", "+ branches = '/s/base=ro'  # as after -o"]),
        ("aot", [put("/a/top=ro+wh")], ['- perm = "rw"', '+ perm = "ro"', '+ attributes = ["wh"]']),
        ("aot", [put("/n=ro", "/a/top")], ["+ [[mounts.aot.branches]]", '+ path = "/n"', '+ perm = "ro"']),
        ("aot", [DropBranch(b"/a/base")], ["- [[mounts.aot.branches]]", '- path = "/a/base"']),
        ("lines", [DropBranch(b"/base"), put("/new=ro", "/top"), SetKey("udba", "none")],
         ['-     "/base=ro",  # NFS', '+     "/new=ro",',
          '- udba = "reval"   # they are slow', '+ udba = "none"   # they are slow']),
    ],
)  # fmt: skip
def test_only_what_was_changed_differs(
    tmp_path: Path, name: str, changes: Sequence[Change], expected: list[str]
) -> None:
    found = change(tmp_path, FILE, name, changes)
    assert sorted(found) == sorted(expected), (tmp_path / "udbad.toml").read_text()


@pytest.mark.parametrize(("name", "text"), [("one", INLINE), ("two", DOTTED)])
def test_unusual_forms_of_the_table(tmp_path: Path, name: str, text: str) -> None:
    changes: list[Change] = [put("/new=ro", f"/{name}/top"), SetKey("udba", "notify")]
    change(tmp_path, text, name, changes)
    mount = load(tmp_path / "udbad.toml").mounts[name]
    assert (mount.options.udba, len(mount.options.branches)) == ("notify", 3)


def test_line_ends_stay(tmp_path: Path) -> None:
    changed = change(tmp_path, FILE.replace("\n", "\r\n"), "lines", [SetKey("udba", "notify")])
    assert changed == ['- udba = "reval"   # they are slow\r', '+ udba = "notify"   # they are slow\r']


def test_many_changes_one_after_the_other(tmp_path: Path) -> None:
    """The text follows the settings whatever comes together; `edited` refuses when it does not."""
    path = tmp_path / "udbad.toml"
    path.write_text(FILE)
    for name in load(path).mounts:
        for turn in range(30):
            specs = load(path).mounts[name].options.branches
            if turn % 3 == 2:
                step: Change = DropBranch(specs[turn % len(specs)].path)
            else:
                above = [spec.path for spec in specs[: turn % (len(specs) + 1)]][::-1]
                step = PutBranch(parse_branch(f"/new/{name}{turn}=ro"), tuple(above))
            result = edited(path, name, [step], {})
            write(result.file, result.after)
            assert result.settings.options.branches != specs
    kept = [line for line in path.read_text().splitlines() if "# " in line]
    assert [line for line in FILE.splitlines() if line.startswith("#")] == [one for one in kept if one[0] == "#"]


def test_the_file_keeps_mode_owner_and_its_link(tmp_path: Path) -> None:
    real = tmp_path / "versions" / "1.toml"
    real.parent.mkdir()
    real.write_text(FILE)
    real.chmod(0o640)
    os.chown(real, 12, 34)
    path = tmp_path / "udbad.toml"
    path.symlink_to("versions/1.toml")
    result = edited(path, "text", [SetKey("udba", "none")], {})
    check_writable(result.file)
    before = real.stat().st_ino
    write(result.file, result.after)
    st = real.stat()
    assert (st.st_mode & 0o7777, st.st_uid, st.st_gid) == (0o640, 12, 34)
    assert st.st_ino != before, "replaced, not written over: a reader sees the old or the new one"
    assert (path.is_symlink(), os.listdir(real.parent)) == (True, ["1.toml"])
    assert load(path).mounts["text"].options.udba == "none"


def test_conf_d_has_the_mount(tmp_path: Path) -> None:
    path = tmp_path / "udbad.toml"
    path.write_text("[daemon]\n")
    (tmp_path / "conf.d").mkdir()
    (tmp_path / "conf.d" / "10.toml").write_text(FILE.replace("[daemon]", "").replace("log_level", "# "))
    assert edited(path, "aot", [SetKey("udba", "none")], {}).file == str((tmp_path / "conf.d" / "10.toml").resolve())


@pytest.mark.parametrize(
    ("text", "name", "changes", "message"),
    [
        (FILE, "gone", [], "no file of the configuration has [mounts.gone]"),
        ("[mounts.a", "a", [], "not TOML: "),
        (FILE + "x = 1\n[mounts.n]\n", "aot", [], "(and 2 more problems: udbad check-config)"),
        (FILE, "line", [put("/t/top/sub=rw")], "two mounts may not write to one tree"),
        (FILE, "line", [put("relative=ro")], "the path must be absolute"),
        (
            FILE,
            "line",
            [DropBranch(b"/l/top"), DropBranch(b"/l/base")],
            "mounts.line.branches: found [], must be ",
        ),
        (FILE, "line", [put("/x\udcff=ro")], "is not UTF-8 and cannot be in a TOML file"),
    ],
)
def test_refused_with_one_line(tmp_path: Path, text: str, name: str, changes: Sequence[Change], message: str) -> None:
    path = tmp_path / "udbad.toml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        edited(path, name, changes, {})
    assert message in caught.value.message
    assert (caught.value.message.count("\n"), caught.value.code) == (0, ExitCode.CONFIG)
    assert path.read_text() == text


def test_a_failed_write_leaves_the_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "udbad.toml"
    path.write_text(FILE)

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write(str(path), "[daemon]\n")
    assert (os.listdir(tmp_path), path.read_text()) == (["udbad.toml"], FILE)
