"""The configuration file: what it means, and that everything wrong with it is said at once."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from udbad.settings.file import ConfigError, load
from udbad.settings.options import parse_mount_options
from udbad.supervisor import check
from udbad.types import Perm

REPOSITORY = Path(__file__).resolve().parents[2]
GOOD = """
[daemon]
log_level = "WARNING"
heartbeat = 2
[mounts.pool]
mount_point = "/mnt/pool/"
branches = ["/disks/a=rw", {path = "/disks/b:c", perm = "ro", attributes = ["wh"], udba = "none", watch = "inotify"}]
udba = "notify"
create = "mfs:60"
[mounts.live]
mount_point = "/mnt/live"
branches = "/run/top=rw:/run/base=rr"
missing_branch = "fail"
enabled = false
"""


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return path


def problems(tmp_path: Path, text: str) -> list[str]:
    """Everything load() finds, without the file name."""
    path = write(tmp_path / "c.toml", text)
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert str(caught.value) == "\n".join(map(str, caught.value.problems))
    return [str(problem).removeprefix(f"{path}: ") for problem in caught.value.problems]


def test_a_good_file(tmp_path: Path) -> None:
    config = load(write(tmp_path / "c.toml", GOOD))
    assert (config.daemon.log_level, config.daemon.heartbeat) == ("warning", 2.0)
    assert list(config.mounts) == ["pool", "live"]
    pool, live = config.mounts.values()
    assert (pool.mount_point, pool.options.udba, pool.options.create) == ("/mnt/pool", "notify", "mfs:60")
    assert [spec.path for spec in pool.options.branches] == [b"/disks/a", b"/disks/b:c"]
    lower = pool.options.branches[1]
    assert (lower.attrs, lower.udba, lower.watch) == (frozenset({"wh"}), "none", "inotify")
    assert [spec.perm for spec in live.options.branches] == [Perm.RW, Perm.RR]
    assert (pool.enabled, pool.missing_branch, live.enabled, live.missing_branch) == (True, "wait", False, "fail")


def test_conf_d_is_read_in_order_and_a_table_is_in_one_file_only(tmp_path: Path) -> None:
    path = write(tmp_path / "c.toml", GOOD)
    extra = '[mounts.{}]\nmount_point = "/mnt/{}"\nbranches = "/d/{}"\n'
    write(tmp_path / "conf.d" / "20-b.toml", extra.format("b", "b", "b"))
    write(tmp_path / "conf.d" / "10-a.toml", extra.format("a", "a", "a"))
    write(tmp_path / "conf.d" / "ignored.txt", "not TOML")
    assert list(load(path).mounts) == ["pool", "live", "a", "b"]
    twice = write(tmp_path / "conf.d" / "30-c.toml", extra.format("a", "z", "z"))
    with pytest.raises(ConfigError) as caught:
        load(path)
    first = tmp_path / "conf.d" / "10-a.toml"
    assert str(caught.value) == f"{twice}: mounts.a: is in {first} already; a table may be in one file only"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[mounts.a", ["not TOML: Expected ']' at the end of a table declaration (at end of document)"]),
        ("mounts = 3", ["mounts: found 3, must be a table, [mounts.NAME]"]),
        ("[mount.a]", ["mount: unknown table or key, the closest known one is 'mounts'"]),
        ("[daemon]\nhartbeat = 1", ["daemon.hartbeat: unknown key, the closest known one is 'heartbeat'"]),
        (
            '[daemon]\nheartbeat = "often"\nwatch = 1\nlog_level = "loud"\nrun_dir = "run"',
            [
                'daemon.run_dir: found "run", must be an absolute path',
                'daemon.log_level: found "loud", must be debug, info, warning or error',
                'daemon.heartbeat: found "often", must be a number of seconds from 0.1 to 86400',
                "daemon.watch: found 1, must be true or false",
            ],
        ),
        (
            '[metrics]\nlisten = "9723"\ntls_key = "/k"',
            ['metrics.listen: found "9723", must be HOST:PORT, PORT from 0 to 65535, or "off"'],
        ),
        ('[metrics]\ntls_key = "/k"', ["metrics: tls_certificate and tls_key are given together or not at all"]),
        (
            "[mounts.a]",
            [
                "mounts.a.mount_point: missing, must be an absolute path",
                "mounts.a.branches: missing, must be a list of PATH[=PERM[+ATTR...]]",
            ],
        ),
        (
            '[mounts.a]\nmount_point = "/m"\nbranches = ["/x=rw", "/y=rq", "rel", {path = "/z", prem = "ro"}, 5]\n'
            'udba = "often"\ncreate = "mfx"\nrdcache = 9999\nudbo = "none"\ncontrol = "/s"',
            [
                "mounts.a.control: not possible here, the daemon gives each mount its own socket",
                "mounts.a.create: found \"mfx\": create=mfx: unknown policy 'mfx', the closest known one is 'mfs'",
                "mounts.a.branches[1]: found \"/y=rq\": branch /y: unknown permission 'rq', allowed are rw, ro, rr "
                "(a '=' in a path is written \\=)",
                'mounts.a.branches[2]: found "rel", the path must be absolute',
                "mounts.a.branches[3].prem: unknown key, the closest known one is 'perm'",
                "mounts.a.branches[4]: found 5, must be PATH[=PERM[+ATTR...]] or a table with path, perm, "
                "attributes, udba and watch",
                'mounts.a.udba: found "often", must be none, reval or notify',
                "mounts.a.rdcache: found 9999, must be a whole number of seconds from 0 to 3600",
                "mounts.a.udbo: unknown key, the closest known one is 'udba'",
            ],
        ),
        (
            '[mounts.a]\nmount_point = "/m"\nbranches = [{path = "/x", attributes = ["wh"]}]',
            ["mounts.a.branches[0]: attributes, udba and watch need perm: rw, ro or rr"],
        ),
        (
            '[mounts."a b"]\nmount_point = "/m"\nbranches = "/x"',
            [
                "mounts.a b: the name of a mount must be 1 to 64 letters, digits, '_', '.' and '-', "
                "beginning with a letter or digit"
            ],
        ),
        (
            '[mounts.a]\nmount_point = "/m"\nbranches = "/x=rw"\n[mounts.b]\nmount_point = "/m/"\nbranches = "/y=rw"',
            ["mounts.b.mount_point: found '/m', which is the mount point of a already"],
        ),
        (
            '[mounts.a]\nmount_point = "/m"\nbranches = "/x"\n[mounts.b]\nmount_point = "/n"\nbranches = "/x/y:/z"',
            ["mounts.b.branches: /x/y is writable here and /x in a; two mounts may not write to one tree"],
        ),
        (
            '[mounts.a]\nmount_point = "/m"\nbranches = "/x:/n/sub"\n'
            '[mounts.b]\nmount_point = "/n"\nbranches = "/y:/m/sub"',
            [
                "mounts.a.branches: /n/sub is inside the mount point of b; a union cannot be a branch",
                "mounts.b.branches: /m/sub is inside the mount point of a; a union cannot be a branch",
            ],
        ),
        (
            '[hosts]\nurls = ["nats://bus"]\n[mounts.a]\nmount_point = "/m"\nbranches = "/x:/y"\n'
            'published = { one = "/x/", two = "/x", other = "/z", base = "/y" }',
            [
                "mounts.a.published.two: /x is one already",
                'mounts.a.published.other: found "/z", which is no branch of this mount',
            ],
        ),
        (
            '[mounts.a]\nmount_point = "/m"\nbranches = "/x"\npublished = { "a.b" = "/x" }',
            [
                "mounts.a.published: found {'a.b': '/x'}, must be a table of NAME = \"BRANCH\", NAME of letters, "
                "digits, '_' and '-'"
            ],
        ),
        (
            '[mounts.a]\nmount_point = "/m"\nbranches = "/x"\npublished = { x = "/x" }',
            ["mounts.a.published: there is no bus: [hosts] has no urls"],
        ),
        (
            '[mounts.a]\nmount_point = "/m"\nbranches = "/x"\npublish = true',
            ["mounts.a.publish: published says of no branch what other hosts call it"],
        ),
        (
            '[mounts.a]\nmount_point = "/x/m"\nbranches = "/x"',
            ["mounts.a.branches: /x holds the mount point /x/m"],
        ),
    ],
)
def test_everything_wrong_is_said_at_once(tmp_path: Path, text: str, expected: list[str]) -> None:
    assert problems(tmp_path, text) == expected


def test_a_read_only_mount_or_a_disabled_one_shares_nothing(tmp_path: Path) -> None:
    text = (
        '[mounts.a]\nmount_point = "/m"\nbranches = "/x"\n'
        '[mounts.b]\nmount_point = "/n"\nbranches = "/x:/z"\nro = true\n'
        '[mounts.c]\nmount_point = "/m"\nbranches = "/x"\nenabled = false\n'
    )
    assert list(load(write(tmp_path / "c.toml", text)).mounts) == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda path: path.mkdir(), "Is a directory"),
        (lambda path: path.symlink_to("nowhere"), "No such file or directory"),
        (lambda path: path.symlink_to(path), "Too many levels of symbolic links"),
        (lambda path: os.mkfifo(path), "not a regular file"),
        (lambda path: path.symlink_to("/dev/zero"), "not a regular file"),
    ],
)
def test_a_file_of_conf_d_that_is_none(tmp_path: Path, make: Callable[[Path], None], error: str) -> None:
    path = write(tmp_path / "c.toml", GOOD)
    odd = tmp_path / "conf.d" / "odd.toml"
    odd.parent.mkdir()
    make(odd)
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert [str(problem) for problem in caught.value.problems] == [f"{odd}: {error}"]


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.toml: No such file or directory$"):
        load(tmp_path / "none.toml")
    (tmp_path / "c.toml").write_bytes(b"# \xff\n")
    with pytest.raises(ConfigError, match=r"c\.toml: not TOML: "):
        load(tmp_path / "c.toml")


@pytest.mark.parametrize("example", sorted((REPOSITORY / "config").glob("*.toml")), ids=lambda path: path.name)
def test_examples_are_good(example: Path) -> None:
    config = load(example)
    assert config.mounts, "an example without a mount shows nothing"


def test_examples_are_there_for_each_use() -> None:
    names = {path.stem for path in (REPOSITORY / "config").glob("*.toml")}
    assert names == {"udbad", "pool", "live", "developer", "homes", "mergerfs"}


def test_the_line_of_fstab_for_who_comes_from_mergerfs_says_the_same() -> None:
    text = (REPOSITORY / "config/mergerfs.toml").read_text()
    (line,) = (line for line in text.splitlines() if "  udba  " in line)
    source, mount_point, fs_type, options, *_ = line.removeprefix("#").split()
    (mount,) = load(REPOSITORY / "config/mergerfs.toml").mounts.values()
    parsed = parse_mount_options(options)
    assert (source, mount_point, fs_type) == (mount.name, mount.mount_point, "udba")
    for key in ("branches", "create", "sum", "udba"):
        assert getattr(parsed, key) == getattr(mount.options, key), key


def test_check_config(tmp_path: Path) -> None:
    def check(path: Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "udbad", "check-config", "-c", str(path)]
        return subprocess.run(command, check=False, capture_output=True, text=True, cwd=REPOSITORY, timeout=60)

    path = write(tmp_path / "c.toml", GOOD.replace("/mnt", str(tmp_path)))
    absent = check(path)
    assert (absent.returncode, absent.stderr.splitlines()) == (
        10, [f"udbad: {path}: mounts.pool.mount_point: mount point {tmp_path}/pool: No such file or directory"],
    )  # fmt: skip
    (tmp_path / "pool").mkdir()
    good = check(path)
    assert good.returncode == 0
    assert good.stdout.splitlines() == [
        f"pool: {tmp_path}/pool, 2 branches",
        "pool: branch /disks/a does not exist; it will be waited for",
        "pool: branch /disks/b:c does not exist; it will be waited for",
        f"live: {tmp_path}/live, 2 branches (not enabled)",
        f"{path}: good, 2 mounts",
    ]
    bad = check(write(path, "[daemon]\nx = 1\ny = 2\n"))
    assert (bad.returncode, bad.stdout) == (10, "")
    assert [line.split(":")[0] for line in bad.stderr.splitlines()] == ["udbad", "udbad"]


@pytest.fixture
def places(tmp_path: Path) -> Path:
    for name in ("a", "b", "a/inside", "m"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to("a")
    (tmp_path / "file").touch()
    return tmp_path


@pytest.mark.parametrize(
    ("branches", "more", "problem"),
    [
        ('"{0}/a", "{0}/b/../a=ro"', "", 'branches[1]: branch {0}/b/../a is given twice'),
        ('"{0}/a", "{0}/link=ro"', "", "branches: branch {0}/link is given twice, it is the same directory as {0}/a"),
        ('"{0}/a", "{0}/a/inside"', "", "branches: branches overlap: {0}/a/inside is inside {0}/a"),
        ('"{0}/file"', "", "branches: branch {0}/file is not a directory"),
        ('"/proc"', "", "branches: branch /proc: file system type proc cannot be a branch"),
        ('"{0}/b", "{0}/gone"', 'missing_branch = "fail"', "branches: branch {0}/gone does not exist"),
        ('"{0}/b"', 'mount_point = "{0}/nowhere"', "mount_point: mount point {0}/nowhere: No such file or directory"),
        ('"{0}/b"', 'mount_point = "{0}/link/inside"', ""),
        ('"{0}/link"', 'mount_point="{0}/a/inside"', "branches: the mount point {0}/a/inside is inside branch "
            "{0}/link"),
        ('"{0}/odd"', "", "branches: branch {0}/odd: .wh..wh.plnk exists and is not a directory"),
        ('"{0}/odd"', "ro = true", ""),
        ('"{0}/odd=ro"', "", ""),
        ('"{0}/gone", "{0}/odd"', "", ""),
        ('"{0}/odd", "{0}/odd"', "enabled = false", "branches[1]: branch {0}/odd is given twice"),
        ('"{0}/odd"', "enabled = false", ""),
    ],
)  # fmt: skip
def test_what_a_mount_would_be_refused_for(places: Path, branches: str, more: str, problem: str) -> None:
    """By the rules of branch/accept.py; that those are applied when it starts is in test_accept.py."""
    (places / "odd").mkdir()
    (places / "odd/.wh..wh.plnk").touch()
    point = "" if "mount_point" in more else f'mount_point = "{places}/m"'
    text = f"[mounts.x]\nbranches = [{branches}]\n{more}\n{point}\n".replace("{0}", str(places))
    path = places / "udbad.toml"
    path.write_text(text)
    try:
        found = [str(one) for one in check.problems(load(path))]
    except ConfigError as error:
        found = [str(one) for one in error.problems]
    assert found == ([f"{path}: mounts.x.{problem.format(places)}"] if problem else [])
    assert sorted(os.listdir(places / "odd")) == [".wh..wh.plnk"], "nothing was made ready"
