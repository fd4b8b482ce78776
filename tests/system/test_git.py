"""git at work in a union: its index trusts inode numbers and times, its gc lives on rename and unlink."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.helpers.mount import UnionFactory
from tests.system.support import clean_env, each_mode, require, run, unchanged

pytestmark = [pytest.mark.system, pytest.mark.fuse]

FILES = 2000
DIRECTORIES = 30
SEED = 20240517


def fast_import_stream() -> bytes:
    """A history for git fast-import: `main` with all files, `feature` changing, adding and deleting.

    The same bytes every time, hence the same commit ids.
    """
    random_ = random.Random(SEED)
    paths = [b"src/d%02d/file%04d.txt" % (n % DIRECTORIES, n) for n in range(FILES)]

    def commit(ref: bytes, mark: int, parent: bytes, changes: list[bytes]) -> bytes:
        head = b"commit %s\nmark :%d\ncommitter T <t@example.org> %d +0000\n" % (ref, mark, 1700000000 + mark)
        return head + b"data 7\ncommit\n" + parent + b"".join(changes) + b"\n"

    def modify(path: bytes, text: bytes, mode: bytes = b"100644") -> bytes:
        return b"M %s inline %s\ndata %d\n%s\n" % (mode, path, len(text), text)

    def text(n: int) -> bytes:
        return b"".join(b"%d %032x\n" % (n, random_.getrandbits(128)) for _ in range(random_.randrange(1, 60)))

    first = [modify(path, text(n), b"100755" if n % 50 == 0 else b"100644") for n, path in enumerate(paths)]
    first.append(modify(b"link", b"src/d00", b"120000"))
    second = [modify(path, text(n)) for n, path in enumerate(paths) if n % 4 == 1]
    second += [b"D %s\n" % path for n, path in enumerate(paths) if n % 4 == 2]
    second += [modify(b"new/n%02d/file%d.txt" % (n % 20, n), text(n)) for n in range(300)]
    # A directory becomes a file and a file becomes a directory.
    second += [b"D src/d03\n", modify(b"src/d03", b"now a file\n")]
    second += [b"D link\n", modify(b"link/inside.txt", b"now a directory\n")]
    return commit(b"refs/heads/main", 1, b"", first) + commit(b"refs/heads/feature", 2, b"from :1\n", second)


def make_origin(origin: Path) -> None:
    env = clean_env(GIT_CONFIG_GLOBAL="/dev/null", GIT_CONFIG_NOSYSTEM="1")
    run("git", "init", "-q", "--bare", "-b", "main", origin, env=env)
    run("git", "fast-import", "--quiet", cwd=origin, env=env, stdin=fast_import_stream())


def git_at_work(root: Path) -> None:
    """Clone `root`/origin.git, switch branches, commit, push, collect, check."""
    env = clean_env(
        GIT_CONFIG_GLOBAL="/dev/null",
        GIT_CONFIG_NOSYSTEM="1",
        GIT_AUTHOR_NAME="T",
        GIT_AUTHOR_EMAIL="t@example.org",
        GIT_COMMITTER_NAME="T",
        GIT_COMMITTER_EMAIL="t@example.org",
    )
    origin, work = root / "origin.git", root / "work"

    def git(*argv: str, at: Path = work) -> str:
        # gc.auto=0: no collection of git's own in the background outlives the test.
        return run("git", "-c", "gc.auto=0", *argv, cwd=at, env=env)

    def clean() -> None:
        # diff-files believes the index's stat data and refreshes nothing: a file whose inode number,
        # times or size moved since checkout shows up here although its content is right.
        assert git("diff-files") == ""
        assert git("status", "--porcelain") == ""

    git("clone", "-q", "--no-hardlinks", str(origin), str(work), at=root)
    clean()
    git("checkout", "-q", "feature")
    clean()
    assert (work / "src/d03").read_text() == "now a file\n"
    assert (work / "link/inside.txt").read_text() == "now a directory\n"
    assert not (work / "src/d02/file0002.txt").exists()
    git("checkout", "-q", "main")
    assert (work / "link").is_symlink()

    git("checkout", "-q", "-b", "topic")
    for n in range(0, 400, 8):
        with (work / f"src/d{n % DIRECTORIES:02d}/file{n:04d}.txt").open("a") as file:
            file.write("appended\n")
    git("mv", "src/d05", "moved")
    git("rm", "-q", "-r", "src/d07")
    git("commit", "-q", "-a", "-m", "topic")
    clean()
    git("push", "-q", "origin", "topic")
    git("checkout", "-q", "main")
    git("merge", "-q", "--no-ff", "--no-edit", "origin/topic")
    git("gc", "-q", "--prune=now")
    git("gc", "-q", "--prune=now", at=origin)
    for place in (work, origin):
        assert "error" not in git("fsck", "--full", "--strict", at=place)
    clean()
    assert git("rev-parse", "topic") == git("rev-parse", "refs/heads/topic", at=origin)


@each_mode
def test_clone_checkout_gc_fsck(union: UnionFactory, udba: str, tmp_path: Path) -> None:
    require("git")
    make_origin(tmp_path / "base/origin.git")
    mount = union({"top": "rw", "base": "ro"}, udba, watchdog=900)
    with unchanged(mount["base"]):
        git_at_work(mount.path)
        mount.remount()
        # An index without stat data makes git read and hash every file.
        run("git", "read-tree", "HEAD", cwd=mount.path / "work")
        assert run("git", "status", "--porcelain", cwd=mount.path / "work") == ""
