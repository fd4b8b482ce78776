"""The command line of fuse-overlayfs (settings/overlayfs.py, commands/overlay.py), and what is a mapping of ids."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from udbad.commands import overlay
from udbad.errors import ExitCode, UserError
from udbad.settings import ids
from udbad.settings.ids import Ids
from udbad.settings.options import MountOptions, format_options, parse_mount_options
from udbad.settings.overlayfs import mount_options
from udbad.types import Perm


@pytest.fixture
def layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("u", "w", "l"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def paths(options: MountOptions) -> list[str]:
    return [os.fsdecode(spec.path) for spec in options.branches]


def test_layers(layers: Path) -> None:
    """As containers/storage writes them, empty words and all, relative paths too."""
    found = mount_options([f"lowerdir=l/A:{layers}/b,upperdir=u,workdir=w,,volatile", "nodev"])
    assert paths(found) == [f"{layers}/u", f"{layers}/l/A", f"{layers}/b"]
    assert [spec.perm for spec in found.branches] == [Perm.RW, Perm.RO, Perm.RO]
    assert all("wh" in spec.attrs for spec in found.branches[1:])
    assert (found.udba, found.ro, found.volatile) == ("none", False, True)
    assert found.kernel_flags == {"suid", "exec", "nodev"}
    assert parse_mount_options(format_options(found)) == found


def test_without_an_upper_directory_it_is_read_only(layers: Path) -> None:
    assert mount_options(["lowerdir=l"]).ro


def test_escapes(layers: Path) -> None:
    assert paths(mount_options([r"lowerdir=/a\:b:/c\,d:/e\\f:/g=h"])) == ["/a:b", "/c,d", r"/e\f", "/g=h"]


def test_the_last_word_counts(layers: Path) -> None:
    found = mount_options(["lowerdir=/a", "lowerdir=/b,noacl,squash_to_root,udba=notify", "squash_to_uid=7"])
    assert paths(found) == ["/b"]
    assert (found.acl, found.squash_to_uid, found.squash_to_gid, found.udba) == (False, 7, 0, "notify")
    assert [mount_options([f"lowerdir=/a,{word}"]).xattrs for word in ("noxattrs", "noxattrs=1", "noxattrs=0")] == [
        False, False, True,
    ]  # fmt: skip


@pytest.mark.parametrize(
    "word",
    [
        "rw", "allow_other", "default_permissions", "acl=1", "noxattrs=0", "fsync=1", "xattr_permissions=0",
        "static_nlink=0", "redirect_dir=off", "redirect_dir=follow", "metacopy=off", "index=off", "nfs_export=off",
        "timeout=1000", "threaded=1", "fast_ino=0", "writeback=1", "max_threads=5", "max_idle_threads=5",
    ],
)  # fmt: skip
def test_what_is_so_anyway_changes_nothing(word: str) -> None:
    assert mount_options([f"lowerdir=/a,{word}"]) == mount_options(["lowerdir=/a"])


def test_directories_are_renamed_when_asked_for() -> None:
    assert mount_options(["lowerdir=/a"]).dirren == "off"
    assert mount_options(["lowerdir=/a,redirect_dir=on"]).dirren == "on"
    assert mount_options(["lowerdir=/a,allow_idmap"]).allow_idmap


@pytest.mark.parametrize(
    "words",
    [
        "lowerdir=/a::/data", "lowerdir=/a:", "lowerdir=", "lowerdir", "upperdir=u,workdir=w", "lowerdir=l,upperdir=u",
        "lowerdir=l,workdir=w", "lowerdir=l,upperdir=u,workdir=none", "lowerdir=l,xattr_permissions=2",
        "lowerdir=l,redirect_dir=sideways", "lowerdir=l,metacopy=on", "lowerdir=l,static_nlink",
        "lowerdir=l,context=system_u:object_r:a_t:s0", "lowerdir=l,allow_root", "lowerdir=l,squash_to_ruut",
        "lowerdir=l,uidmapping=0:1", "lowerdir=l,uidmapping=0:5:10:5:100:10", "lowerdir=l,nodev=1",
    ],
)  # fmt: skip
def test_what_is_not_supported_is_refused_by_name(layers: Path, words: str) -> None:
    with pytest.raises(UserError) as refused:
        mount_options([words])
    assert refused.value.code in (ExitCode.OPTION, ExitCode.BRANCH)
    named = words.rpartition(",")[2].partition("=")[0]
    assert any(word in refused.value.message for word in (named, "workdir", "lowerdir", "none"))
    assert "\n" not in refused.value.message


@pytest.mark.parametrize("words", ["lowerdir=/:l", "lowerdir=/,upperdir=l,workdir=w"])
@pytest.mark.parametrize("key", ["user.containers.override_stat", "user.fuseoverlayfs.override_stat"])
def test_layers_that_keep_owners_elsewhere_are_refused(layers: Path, words: str, key: str) -> None:
    """As the option force_mask= of containers/storage writes them: they would be shown with other owners and modes."""
    os.setxattr("l", key, b"0:0:0755")
    with pytest.raises(UserError, match=f"^{layers}/l: has {key} .*: not supported$") as refused:
        mount_options([words])
    assert refused.value.code == ExitCode.BRANCH


def test_arguments() -> None:
    parsed = overlay.parse(["-o", "a", "-ob", "-f", "m"])
    assert parsed == overlay.Words(["a", "b"], True, False, "m")
    assert overlay.parse(["--debug", "--", "-m"]) == overlay.Words([], True, True, "-m")
    assert str(overlay.parse(["--version"])).startswith("udbad-overlay: version ")
    assert "--help" in str(overlay.parse(["-h"]))


@pytest.mark.parametrize("words", [[], ["a", "b"], ["-o"], ["-x", "m"], ["--nothing", "m"]])
def test_wrong_arguments(words: list[str]) -> None:
    with pytest.raises(UserError):
        overlay.parse(words)


def test_every_word_that_is_refused_is_documented() -> None:
    text = (Path(__file__).parents[2] / "docs" / "containers.md").read_text()
    for word in ("xattr_permissions=", "static_nlink", "metacopy=on", "context=", "::"):
        assert f"`{word}`" in text


# -- ids --------------------------------------------------------------------------------------------


def test_mapping() -> None:
    found = ids.of("0:1000:1:1:100000:65535", -1)
    assert [found.shown(number) for number in (0, 1, 65535, 65536)] == [1000, 100000, 165534, ids.OVERFLOW]
    assert [found.kept(number) for number in (1000, 100000, 165534, 0, 165535)] == [0, 1, 65535, -1, -1]


def test_squashing_is_one_way() -> None:
    found = Ids(squash=7)
    assert (found.shown(0), found.shown(5), found.kept(5)) == (7, 7, 5)
    assert Ids(((0, 100, 10),), 7).kept(103) == 3


@pytest.mark.parametrize(
    "text", ["", "0", "0:1:0", "0:0:4294967296", "1:0:4294967295", "0:1:2:", "0:100:10:9:200:1", "0:100:10:20:109:1"]
)
def test_no_mapping(text: str) -> None:
    with pytest.raises(ValueError, match=r"^$"):
        ids.parse(text)
