"""Mount options and the branch syntax: what is understood, what is refused, in which words (semantics 2, 3)."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from udbad.branch.branches import BranchSpec
from udbad.branch.spec import (
    escape,
    format_branch,
    format_branches,
    parse_branch,
    parse_branches,
    split_escaped,
    unescape,
)
from udbad.errors import ExitCode, UserError
from udbad.settings.options import FIELDS, MountOptions, WrongOptions, format_options, message_of, parse_mount_options
from udbad.types import Perm

ExpectLog = Callable[[str], None]

A = BranchSpec(b"/a")
B = BranchSpec(b"/b")


def options(text: str) -> MountOptions:
    return parse_mount_options("br=/a:/b," + text)


def refusal(text: str | list[str]) -> str:
    with pytest.raises(UserError) as caught:
        parse_mount_options(text)
    assert caught.value.code is ExitCode.OPTION
    assert "\n" not in caught.value.message
    return caught.value.message


# -- branch syntax --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/a", BranchSpec(b"/a")),
        ("./top", BranchSpec(b"./top")),
        ("/a=rw", BranchSpec(b"/a", Perm.RW)),
        ("/a=ro", BranchSpec(b"/a", Perm.RO)),
        ("/a=rr", BranchSpec(b"/a", Perm.RR)),
        ("/a=", BranchSpec(b"/a", Perm.RO)),
        ("/a=ro+wh", BranchSpec(b"/a", Perm.RO, frozenset({"wh"}))),
        ("/a=rr+wh", BranchSpec(b"/a", Perm.RR, frozenset({"wh"}))),
        ("/a=rw+nolwh+unpin+fhsm", BranchSpec(b"/a", Perm.RW, frozenset({"nolwh", "unpin", "fhsm"}))),
        ("/a=ro+fhsm", BranchSpec(b"/a", Perm.RO, frozenset({"fhsm"}))),
        ("/a=rw+icex", BranchSpec(b"/a", Perm.RW, frozenset({"icex"}))),
        (
            "/a=rw+icexsec+icexsys+icextr+icexusr+icexoth",
            BranchSpec(b"/a", Perm.RW, frozenset({"icexsec", "icexsys", "icextr", "icexusr", "icexoth"})),
        ),
        ("/a=rw+coo_reg+coo_all", BranchSpec(b"/a", Perm.RW, frozenset({"coo_all"}))),
        ("/a=rw+coo_all+coo_reg", BranchSpec(b"/a", Perm.RW, frozenset({"coo_reg"}))),
        ("/a=rw+moo+coo_reg+unpin", BranchSpec(b"/a", Perm.RW, frozenset({"coo_reg", "unpin"}))),
        ("/a=rw+coo_all+moo", BranchSpec(b"/a", Perm.RW, frozenset({"moo"}))),
        ("/a=ro+udba=reval", BranchSpec(b"/a", Perm.RO, udba="reval")),
        ("/a=ro+udba=none+wh", BranchSpec(b"/a", Perm.RO, frozenset({"wh"}), "none")),
        ("/a=rw+udba=fsnotify", BranchSpec(b"/a", Perm.RW, udba="notify")),
        ("/a=+udba=notify", BranchSpec(b"/a", Perm.RO, udba="notify")),
        ("/a=ro+watch=fanotify", BranchSpec(b"/a", Perm.RO, watch="fanotify")),
        ("/a=ro+watch=inotify+wh+udba=notify", BranchSpec(b"/a", Perm.RO, frozenset({"wh"}), "notify", "inotify")),
        (r"/a\=rw", BranchSpec(b"/a=rw")),
        (r"/a\=b\:c\,d\\=rw", BranchSpec(b"/a=b:c,d\\", Perm.RW)),
        (r"/a\b", BranchSpec(rb"/a\b")),
        ("/a+b", BranchSpec(b"/a+b")),
        ("/a b\n", BranchSpec(b"/a b\n")),
        ("/\udcff\N{SNOWMAN}", BranchSpec(b"/\xff\xe2\x98\x83")),
        ("/a\\", BranchSpec(b"/a\\")),
    ],
)
def test_branch(text: str, expected: BranchSpec) -> None:
    assert parse_branch(text) == expected


@pytest.mark.parametrize(
    ("text", "perm", "attrs", "warning"),
    [
        ("/a=rw+wh", Perm.RW, set(), r"branch /a: \+wh dropped, impossible on a rw branch"),
        ("/a=ro+nolwh", Perm.RO, set(), r"branch /a: \+nolwh dropped, impossible on a ro branch"),
        ("/a=ro+moo", Perm.RO, set(), r"branch /a: \+moo dropped, impossible on a ro branch"),
        ("/a=rr+fhsm+wh", Perm.RR, {"wh"}, r"branch /a: \+fhsm dropped, impossible on a rr branch"),
        ("/a=ro+nolwh+wh+moo", Perm.RO, {"wh"}, r"branch /a: \+nolwh\+moo dropped"),
        ("/a=ro+coo_reg+moo", Perm.RO, {"coo_reg"}, r"branch /a: \+moo dropped"),
    ],
)
def test_impossible_attributes_are_dropped_with_one_warning(
    text: str,
    perm: Perm,
    attrs: set[str],
    warning: str,
    expect_log: ExpectLog,
    caplog: pytest.LogCaptureFixture,
) -> None:
    expect_log(warning)
    assert parse_branch(text) == BranchSpec(b"/a", perm, frozenset(attrs))
    assert len(caplog.records) == 1
    assert "\n" not in caplog.records[0].getMessage()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("/a=rx", ["branch /a", "unknown permission 'rx'", "rw, ro, rr"]),
        ("/a=RW", ["unknown permission 'RW'"]),
        ("/a=b=rw", ["unknown permission 'b=rw'", "is written \\="]),
        ("/a=ro+whh", ["branch /a", "unknown attribute 'whh'", "'wh'"]),
        ("/a=rw+coo_rge", ["unknown attribute 'coo_rge'", "'coo_reg'"]),
        ("/a=rw+", ["unknown attribute ''"]),
        ("/a=ro+udba", ["unknown attribute 'udba'", "'udba="]),
        ("/a=ro+udba=often", ["branch /a", "udba=often", "none, reval or notify"]),
        ("/a=ro+watch", ["unknown attribute 'watch'", "'watch="]),
        ("/a=ro+watch=dnotify", ["branch /a", "watch=dnotify", "auto, inotify or fanotify"]),
        ("", ["empty branch path"]),
        ("=rw", ["empty branch path"]),
        ("/a\0b", ["NUL"]),
        ("/a\nb=rx", [r"'/a\nb'"]),
    ],
)
def test_branch_refused(text: str, words: list[str]) -> None:
    message = refusal(["br=/ok:" + text.replace(",", r"\,")])
    assert [word for word in words if word not in message] == []


def test_branch_list() -> None:
    assert parse_branches(r"/a=rw:/b=ro+wh:/c\:d:/e=") == [
        BranchSpec(b"/a", Perm.RW),
        BranchSpec(b"/b", Perm.RO, frozenset({"wh"})),
        BranchSpec(b"/c:d"),
        BranchSpec(b"/e", Perm.RO),
    ]
    for text in ("/a:", ":/a", "/a::/b"):
        with pytest.raises(UserError, match="empty branch path"):
            parse_branches(text)


def test_split_keeps_the_escapes() -> None:
    assert split_escaped(r"a\,b,c\\,d\x,", ",") == [r"a\,b", r"c\\", r"d\x", ""]


paths = st.binary(min_size=1, max_size=40).filter(lambda path: b"\0" not in path) | st.text(
    alphabet="\\:,=+ab/", min_size=1, max_size=20
).map(str.encode)


@st.composite
def specs(draw: st.DrawFn) -> BranchSpec:
    """Any BranchSpec that the syntax can say."""
    perm = draw(st.none() | st.sampled_from(Perm))
    if perm is None:
        return BranchSpec(draw(paths))
    possible = {
        Perm.RW: ["nolwh", "unpin", "fhsm", "icex", "icexsec"],
        Perm.RO: ["wh", "unpin", "fhsm", "icexoth"],
        Perm.RR: ["wh", "unpin", "icexusr"],
    }[perm]
    attrs = draw(st.sets(st.sampled_from(possible))) | draw(st.sampled_from([set(), {"coo_reg"}, {"coo_all"}]))
    udba = draw(st.sampled_from([None, "none", "reval", "notify"]))
    watch = draw(st.sampled_from([None, "auto", "inotify", "fanotify"]))
    return BranchSpec(draw(paths), perm, frozenset(attrs), udba, watch)


@given(st.text())
def test_escape_round_trip(text: str) -> None:
    assert unescape(escape(text)) == text
    assert split_escaped(escape(text), ",") == [escape(text)]


@given(specs())
def test_branch_round_trip(spec: BranchSpec) -> None:
    assert parse_branch(format_branch(spec)) == spec


@given(st.lists(specs(), min_size=1))
def test_branches_round_trip_through_options(branches: list[BranchSpec]) -> None:
    text = format_branches(branches)
    assert parse_branches(text) == branches
    assert parse_mount_options(f"udba=none,br={text},rw").branches == tuple(branches)


# -- options --------------------------------------------------------------------------------------


def test_defaults() -> None:
    """Semantics 1: xino, udba=reval, plink, warn_perm, dio; create=tdp, cpup=tdp; dirwh 3, rdcache 10."""
    found = parse_mount_options("br=/a:/b")
    assert vars(found) == {
        "branches": (A, B),
        "source": None,
        "udba": "reval",
        "io": "auto",
        "create": "tdp",
        "cpup": "tdp",
        "plink": True,
        "xino": True,
        "shwh": False,
        "dirwh": 3,
        "diropq": "whiteouted",
        "whiteouts": "auto",
        "rdcache": 10,
        "dirren": "auto",
        "watch": "auto",
        "replay": "off",
        "watch_reserve": 10,
        "dirperm1": False,
        "warn_perm": True,
        "sum": False,
        "acl": True,
        "xattrs": True,
        "labels": False,
        "dio": True,
        "edge": "auto",
        "verbose": False,
        "ro": False,
        "kernel_flags": frozenset(),
        "fsname": "none",
        "allow_other": True,
        "fsync_copyup": True,
        "volatile": False,
        "uidmapping": None,
        "gidmapping": None,
        "squash_to_uid": -1,
        "squash_to_gid": -1,
        "allow_idmap": False,
        "survive": True,
        "restart_timeout": 60,
        "branch_timeout": 20,
        "metrics": None,
        "control": None,
        "notices": (),
    }


@pytest.mark.parametrize(
    ("text", "field", "value"),
    [
        ("udba=none", "udba", "none"),
        ("io=passthrough", "io", "passthrough"),
        ("edge=pyfuse3", "edge", "pyfuse3"),
        ("edge=native", "edge", "native"),
        ("udba=fsnotify", "udba", "notify"),
        ("udba=notify", "udba", "notify"),
        ("create=mfsrr:10G:60", "create", "mfsrr:10G:60"),
        ("create_policy=rr", "create", "rr"),
        ("cpup=bup", "cpup", "bup"),
        ("copyup=bu", "cpup", "bu"),
        ("copyup_policy=bottom-up", "cpup", "bottom-up"),
        ("noplink", "plink", False),
        ("noplink,plink", "plink", True),
        ("noxino", "xino", False),
        ("noxino,xino=/x", "xino", True),
        ("shwh", "shwh", True),
        ("shwh,noshwh", "shwh", False),
        ("dirwh=0", "dirwh", 0),
        ("dirwh=7", "dirwh", 7),
        ("diropq=a", "diropq", "always"),
        ("diropq=always", "diropq", "always"),
        ("diropq=a,diropq=w", "diropq", "whiteouted"),
        ("diropq=always,diropq=whiteouted", "diropq", "whiteouted"),
        ("rdcache=3600", "rdcache", 3600),
        ("dirren", "dirren", "on"),
        ("dirren=auto", "dirren", "auto"),
        ("dirren,nodirren", "dirren", "off"),
        ("watch=fanotify", "watch", "fanotify"),
        ("replay=on", "replay", "on"),
        ("replay=/in/**:/etc/*", "replay", "/in/**:/etc/*"),
        ("watch_reserve=25%", "watch_reserve", 25),
        ("watch_reserve=0", "watch_reserve", 0),
        ("dirperm1", "dirperm1", True),
        ("nowarn_perm", "warn_perm", False),
        ("nowarn", "warn_perm", False),
        ("nowarn,warn_perm", "warn_perm", True),
        ("sum", "sum", True),
        ("noacl", "acl", False),
        ("labels", "labels", True),
        ("labels,nolabels", "labels", False),
        ("nodio", "dio", False),
        ("verbose", "verbose", True),
        ("v", "verbose", True),
        ("v,q", "verbose", False),
        ("v,silent", "verbose", False),
        ("v,quiet", "verbose", False),
        ("v,noverbose", "verbose", False),
        ("ro", "ro", True),
        ("ro,rw", "ro", False),
        ("fsname=disk", "fsname", "disk"),
        ("fsname=123", "fsname", "123"),
        (r"fsname=a\,b\\c:d", "fsname", r"a,b\c:d"),
        ("copyup_fsync", "fsync_copyup", True),
        ("survive=on", "survive", True),
        ("survive=on,survive=off", "survive", False),
        ("restart_timeout=5", "restart_timeout", 5),
        ("branch_timeout=0", "branch_timeout", 0),
        ("copyup_fsync,nocopyup_fsync", "fsync_copyup", False),
        ("copyup_fsync=off", "fsync_copyup", False),
        ("copyup_fsync=off,copyup_fsync", "fsync_copyup", True),
        ("copyup_fsync=off,copyup_fsync=on", "fsync_copyup", True),
        ("metrics=127.0.0.1:9100", "metrics", "127.0.0.1:9100"),
        ("metrics=[::1]:0", "metrics", "[::1]:0"),
        ("metrics=localhost:65535", "metrics", "localhost:65535"),
        (r"control=/run/a\,b", "control", "/run/a,b"),
        ("allow_other,default_permissions", "allow_other", True),
    ],
)
def test_option(text: str, field: str, value: object) -> None:
    assert getattr(options(text), field) == value


@pytest.mark.parametrize(
    ("text", "flags"),
    [
        ("nosuid,nodev,noexec,noatime", {"nosuid", "nodev", "noexec", "noatime"}),
        ("nosuid,suid,nodev,dev,noexec,exec,sync,async", {"suid", "dev", "exec"}),
        ("suid,dev,nosuid,exec,noexec", {"nosuid", "dev", "noexec"}),
        ("suid,dev,exec,users", {"nosuid", "nodev", "noexec"}),
        ("exec,owner", {"nosuid", "nodev", "exec"}),
        ("defaults", set()),
        ("suid,nosuid", {"nosuid"}),
        ("noatime,atime,nodiratime,diratime", set()),
        ("noatime,relatime", {"relatime"}),
        ("relatime,strictatime", {"strictatime"}),
        ("relatime,norelatime,strictatime,nostrictatime,lazytime,nolazytime", set()),
        ("lazytime,sync,dirsync,nodiratime", {"lazytime", "sync", "dirsync", "nodiratime"}),
        ("users", {"nosuid", "nodev", "noexec"}),
        ("user=joe,exec", {"nosuid", "nodev", "exec"}),
        ("owner", {"nosuid", "nodev"}),
    ],
)
def test_kernel_flags(text: str, flags: set[str]) -> None:
    found = options(text)
    assert found.kernel_flags == flags
    assert found.notices == () or text == "defaults"


@pytest.mark.parametrize(
    ("text", "restrictions", "flags"),
    [
        ("", {"nosuid", "nodev"}, {"nosuid", "nodev"}),
        ("noexec,ro", {"nosuid"}, {"nosuid", "noexec", "ro"}),
        ("suid", {"nosuid", "nodev"}, {"nodev"}),
        ("suid,dev,exec,noatime", {"nosuid", "nodev", "noexec"}, {"noatime"}),
        ("suid,dev,exec", set(), set()),
    ],
)
def test_a_union_is_as_strict_as_its_branches(text: str, restrictions: set[str], flags: set[str]) -> None:
    assert options(text).mount_flags(frozenset(restrictions)) == flags


IGNORED = (
    "xino=/tmp/x,trunc_xino,notrunc_xino,trunc_xino=/a,trunc_xino_path=/a,itrunc_xino=0,trunc_xib,notrunc_xib,"
    "rdblk=512,rdhash=def,fhsm_sec=30,si=0123abcd,wsum,list_plink,clean_plink,nodlgt,debug=1,delete=all,imap=x,"
    "droplvl=2,ephemeral,defaults,nouser,_netdev,nofail,noauto,auto,comment=hello,x-systemd.automount,x-a=b"
)


def test_what_has_no_meaning_is_listed_in_one_notice() -> None:
    found = options(IGNORED)
    assert len(found.notices) == 1
    listed = found.notices[0].partition(": ")[2].split(", ")
    assert set(listed) == {
        item if item.startswith("xino=") else item.partition("=")[0] for item in IGNORED.split(",")
    } - {"xino=/tmp/x"} | {"xino="}
    assert len(listed) == len(set(listed)), "each once"
    assert found.but(notices=()) == options("")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("br=/a,plnk", ["unknown option 'plnk'", "'plink'"]),
        ("br=/a,udab=none", ["unknown option 'udab'", "'udba'"]),
        ("br=/a,dirwh=x", ["dirwh=x", "whole number"]),
        ("br=/a,dirwh=-1", ["dirwh=-1", "whole number"]),
        ("br=/a,dirwh=\N{ARABIC-INDIC DIGIT THREE}", ["dirwh=", "whole number"]),
        ("br=/a,rdcache=3601", ["rdcache=3601", "from 0 to 3600"]),
        ("br=/a,watch=dnotify", ["watch=dnotify", "auto, inotify or fanotify"]),
        ("br=/a,replay=some", ["replay=some", "patterns of paths"]),
        ("br=/a,replay=/a:b", ["replay=/a:b", "patterns of paths"]),
        ("br=/a,watch_reserve=101%", ["watch_reserve=101", "from 0% to 100%"]),
        ("br=/a,watch_reserve=some", ["watch_reserve=some", "percentage"]),
        ("br=/a,udba=sometimes", ["udba=sometimes", "none, reval or notify"]),
        ("br=/a,diropq=maybe", ["diropq=maybe", "always", "whiteouted"]),
        ("br=/a,create=tdq", ["create=tdq", "'tdp'"]),
        ("br=/a,copyup=mfs", ["mfs"]),
        ("br=/a,metrics=9100", ["metrics=9100", "HOST:PORT"]),
        ("br=/a,metrics=localhost:65536", ["metrics=localhost:65536", "HOST:PORT"]),
        ("br=/a,plink=yes", ["plink=yes", "takes no value"]),
        ("br=/a,nosuid=1", ["nosuid=1", "takes no value"]),
        ("br=/a,copyup_fsync=maybe", ["copyup_fsync=maybe", "on or off"]),
        ("br=/a,copyup_fsync=", ["copyup_fsync needs a value", "on or off"]),
        ("br=/a,dirwh", ["dirwh needs a value", "whole number"]),
        ("br=/a,control=", ["control needs a value", "socket"]),
        ("br=", ["br needs a value", "PATH"]),
        ("", ["no branch", "br="]),
        ("udba=none", ["no branch"]),
        ("br=/a,del=/a", ["the last branch"]),
        ("br=/a,add=2:/x", ["add=2:/x", "from 0 to 1"]),
        ("br=/a,ins=x:/x", ["ins=x:/x", "INDEX:PATH"]),
        ("br=/a,add=/x", ["add=/x", "INDEX:PATH"]),
        ("br=/a,del=/x", ["del=/x", "/x is not a branch"]),
        ("br=/a,mod=/x=ro", ["mod=/x=ro", "/x is not a branch"]),
        ("br=/a,mod=/a", ["mod=/a", "PATH=PERM"]),
        ("br=/a,append=/x=rx", ["branch /x", "'rx'"]),
        ("br=/a,\nx=1", [r"'\nx'"]),
    ],
)
def test_refused(text: str, words: list[str]) -> None:
    message = refusal(text)
    assert [word for word in words if word not in message] == []


@pytest.mark.parametrize(
    ("text", "paths"),
    [
        ("br=/a:/b", "/a /b"),
        ("br:/a=rw:/b", "/a /b"),
        ("dirs=/a:/b", "/a /b"),
        ("dirs:/a", "/a"),
        ("br=/a,br=/b", "/a /b"),
        ("append=/c,br=/a:/b", "/a /b /c"),
        ("append=/c", "/c"),
        ("br=/a,append:/b=ro,append=/c", "/a /b /c"),
        ("br=/a:/b,prepend=/c=rw,prepend=/d", "/d /c /a /b"),
        ("br=/a:/b,add=0:/c", "/c /a /b"),
        ("br=/a:/b,add:1:/c=ro", "/a /c /b"),
        ("br=/a:/b,ins=2:/c", "/a /b /c"),
        (r"br=/a,add=1:/c\:\,d", "/a /c:,d"),
        ("br=/a:/b,del=/a/,append=/c", "/b /c"),
        ("br=/a:/b,append=/c,del:/b,add=1:/b", "/a /b /c"),
    ],
)
def test_branch_options(text: str, paths: str) -> None:
    assert [os.fsdecode(spec.path) for spec in parse_mount_options(text).branches] == paths.split()


def test_mod_replaces_permission_and_attributes() -> None:
    assert parse_mount_options("br=/a=rw+nolwh:/b,mod=/b=ro+wh,mod:/a=rr").branches == (
        BranchSpec(b"/a", Perm.RR),
        BranchSpec(b"/b", Perm.RO, frozenset({"wh"})),
    )


def test_a_source_stands_for_branches_of_which_one_is_known() -> None:
    found = parse_mount_options("source=docker-aufs:/a\\,b:c#d/e#id-1.x")
    assert found.branches == (BranchSpec(b"/a,b:c#d/e/diff/id-1.x", Perm.RW),)
    assert parse_mount_options(format_options(found)) == found
    view = parse_mount_options("ro,source=docker-aufs:/r#" + "f" * 235)
    assert view.branches == (BranchSpec(b"/r/diff/" + b"f" * 235, Perm.RO, frozenset({"wh"})),)
    for text in ("docker-aufs:r#a", "docker-aufs:/r#..", "docker-aufs:/r#a/b", "docker-aufs:/r", "docker-aufs:/r#",
                 "docker-aufs:/r#a-removing", "docker-aufs:/r#" + "f" * 236, "overlay:/r#a"):  # fmt: skip
        with pytest.raises(UserError, match="must be docker-aufs:ROOT#ID, ROOT an absolute path"):
            parse_mount_options(f"source={text}")
    for text in ("br=/a", "append=/a"):
        with pytest.raises(UserError, match="source= stands for all branches"):
            parse_mount_options(f"source=docker-aufs:/r#a,{text}")


def test_several_arguments_are_one_list_and_the_last_word_wins() -> None:
    found = parse_mount_options(["br=/a,udba=none", "", ",plink,,", "udba=notify,br=/b"])
    assert found.branches == (A, B)
    assert found.udba == "notify"


# -- the model, as a table of a configuration file ------------------------------------------------


def test_model_takes_typed_keys() -> None:
    found = MountOptions.checked(
        {
            "branches": ["/a=rw", r"/b\:c=ro+wh"],
            "udba": "fsnotify",
            "dirwh": 5,
            "kernel_flags": ["nosuid"],
            "plink": False,
        }
    )
    assert found.branches == (BranchSpec(b"/a", Perm.RW), BranchSpec(b"/b:c", Perm.RO, frozenset({"wh"})))
    assert (found.udba, found.dirwh, found.plink) == ("notify", 5, False)
    assert found.kernel_flags == {"nosuid"}
    assert MountOptions.checked({"branches": "/a:/b"}).branches == (A, B)


@pytest.mark.parametrize("word", ["bogus", "frobnicate", "x", "\udcff"])
def test_what_is_not_near_is_not_suggested(word: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_mount_options(f"br=/a,{word}")
    assert caught.value.message == f"unknown option {word!r}"


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({}, "branches is missing: must be a list of PATH[=PERM[+ATTR...]]"),
        ({"branches": []}, "branches=[]: must be a list of PATH[=PERM[+ATTR...]]"),
        ({"branches": 5}, "branches=5: must be a list of PATH[=PERM[+ATTR...]]"),
        ({"branches": "/a", "dirwh": "x"}, "dirwh=x: must be a whole number, 0 or more"),
        ({"branches": "/a", "dirwh": True}, "dirwh=True: must be a whole number, 0 or more"),
        ({"branches": "/a", "plink": 1}, "plink=1: must be true or false"),
        ({"branches": "/a", "kernel_flags": ["suit"]}, "kernel_flags=['suit']: must be a list of nosuid, nodev"),
        ({"branches": "/a", "kernel_flags": [["suid"]]}, "kernel_flags=[['suid']]: must be a list of nosuid, nodev"),
        ({"branches": "/a", "control": ""}, "control=: must be the path of a socket"),
        ({"branches": "/a", "udbaa": "none"}, "unknown option 'udbaa', the closest known one is 'udba'"),
        ({"branches": "/a", "allow_other": False}, "allow_other=False: must be true: others may always enter"),
    ],
)
def test_model_refuses(table: dict[str, object], message: str) -> None:
    with pytest.raises(WrongOptions) as caught:
        MountOptions.checked(table)
    assert message_of(caught.value.wrong[0], {}).startswith(message)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(["/a", "nosuid"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)
"""What TOML has."""


@given(st.dictionaries(st.sampled_from([*FIELDS, "bogus"]), values, max_size=3))
def test_whatever_a_table_holds_is_taken_or_refused_in_words(table: dict[str, object]) -> None:
    table = {"branches": "/a", **table}
    try:
        found = MountOptions.checked(table)
    except UserError:  # of a branch or a policy
        return
    except WrongOptions as error:
        wrong = error.wrong
    else:
        wrong = []
        again = {name: value for name, value in vars(found).items() if name in table}
        assert MountOptions.checked(again) == found, "what was taken is a value of its kind"
    assert {one.key for one in wrong} <= table.keys()
    assert all(message_of(one, {}) for one in wrong)


def test_model_is_frozen() -> None:
    with pytest.raises(AttributeError):
        options("").udba = "none"


# -- printing -------------------------------------------------------------------------------------


def test_format_shows_what_differs() -> None:
    assert format_options(options("")) == "rw,br=/a:/b"
    assert (
        format_options(
            options(r"ro,nosuid,noatime,udba=none,noplink,create=rr,dirwh=1,copyup_fsync=off,fsname=a\,b,xino=/x")
        )
        == r"ro,noatime,nosuid,br=/a:/b,udba=none,create=rr,noplink,dirwh=1,fsname=a\,b,copyup_fsync=off"
    )


texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)


@given(
    st.fixed_dictionaries(
        {"branches": st.lists(specs(), min_size=1, max_size=4).map(tuple)},
        optional={
            "udba": st.sampled_from(["none", "reval", "notify"]),
            "create": st.sampled_from(["tdp", "mfs:30", "pmfsrr:1G:5"]),
            "cpup": st.sampled_from(["tdp", "bu", "bottom-up-parent"]),
            **dict.fromkeys(
                (
                    "plink",
                    "xino",
                    "shwh",
                    "dirperm1",
                    "warn_perm",
                    "sum",
                    "acl",
                    "labels",
                    "dio",
                    "verbose",
                    "ro",
                    "fsync_copyup",
                    "survive",
                ),
                st.booleans(),
            ),
            "dirwh": st.integers(0, 999999999),
            "rdcache": st.integers(0, 3600),
            "restart_timeout": st.integers(0, 86400),
            "branch_timeout": st.integers(0, 86400),
            "diropq": st.sampled_from(["always", "whiteouted"]),
            "kernel_flags": st.frozensets(st.sampled_from(["nosuid", "dev", "noexec", "relatime", "lazytime", "sync"])),
            "fsname": texts,
            "metrics": st.sampled_from(["127.0.0.1:1", "[::1]:65535"]),
            "control": texts,
        },
    )
)
def test_format_parses_back(fields: dict[str, object]) -> None:
    wanted = MountOptions.checked(fields)
    assert parse_mount_options(format_options(wanted)) == wanted
