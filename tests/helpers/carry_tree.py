"""A tree of three branches for mvdown and sync: whiteouts, opaque directories, changes of type, links, odd names."""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path

LAYERS = {"src": "rw", "dst": "rw", "low": "ro+wh"}


def build(src: Path, dst: Path, low: Path) -> None:
    """Three branches, top first, with everything that a merge of the first two has to deal with."""
    labels = {src: "src", dst: "dst", low: "low"}
    for branch in labels:
        for directory in ("both", "both/deep", "mixed"):
            (branch / directory).mkdir(parents=True)
        (branch / "everywhere").write_text(labels[branch])
        (branch / "both" / "everywhere").write_text(labels[branch])
        (branch / "both" / labels[branch]).write_text("only here")
    for branch in (dst, low):
        for name in ("gone", "both/gone", "both/deep/gone"):
            (branch / name).write_text(f"hidden by a whiteout, {labels[branch]}")
        for directory in ("gone_dir/sub", "opaque/sub", "opaque/deep/er", "pair"):
            (branch / directory).mkdir(parents=True)
            (branch / directory / f"of_{labels[branch]}").write_text("hidden")
        (branch / "becomes_dir").write_text("was a file")
        (branch / "becomes_file").mkdir()
        (branch / "becomes_file" / "in").write_text("was in a directory")
        (branch / "pair_file").write_text("below a pair")
    (dst / "gone_here").write_text("hidden, and nothing below")
    for name in ("gone", "both/.wh.gone", "both/deep/.wh.gone", "gone_dir", "gone_here", "nothing"):
        head, _, tail = name.rpartition("/")
        (src / head / f".wh.{tail.removeprefix('.wh.')}").touch()
    (src / "opaque" / "sub" / "new").mkdir(parents=True)
    (src / "opaque" / ".wh..wh..opq").touch()
    (src / "opaque" / "mine").write_text("mine")
    (src / "opaque" / "sub" / "mine").write_text("mine, too")
    (src / "opaque" / "sub" / "new" / ".wh.nothing").touch()
    (src / "pair").mkdir()
    (src / ".wh.pair").touch()
    (src / "pair" / "mine").write_text("beside a whiteout")
    (src / "pair_file").write_text("beside a whiteout")
    (src / ".wh.pair_file").touch()
    (src / "becomes_dir").mkdir()
    (src / "becomes_dir" / "in").write_text("in")
    (src / "becomes_file").write_text("now a file")
    (src / "new" / "er").mkdir(parents=True)
    (src / "new" / "er" / "file").write_text("deep")
    (src / "new" / "empty").mkdir()
    _special(src)
    (dst / "same").write_text("the same")
    os.utime(dst / "same", ns=(1, 10**18))
    shutil.copy2(dst / "same", src / "same")
    shutil.copy2(dst / "same", src / "chmodded")
    shutil.copy2(dst / "same", dst / "chmodded")
    os.chmod(src / "chmodded", 0o4711)


def _special(src: Path) -> None:
    odd = os.fsencode(src) + b"/mixed/\xff\n\x01 odd"
    with open(odd, "wb") as stream:
        stream.write(b"odd")
    os.chown(odd, 1234, 4321)
    os.symlink(b"\xfe/target", os.fsencode(src) + b"/mixed/link")
    os.mkfifo(src / "mixed" / "fifo", 0o640)
    with open(src / "mixed" / "sparse", "wb") as stream:
        stream.seek(1 << 20)
        stream.write(b"end")
    (src / "mixed" / "one").write_text("several names")
    os.link(src / "mixed" / "one", src / "both" / "two")
    os.link(src / "mixed" / "one", src / "new" / "three")
    os.setxattr(src / "mixed" / "one", "user.word", b"value")
    os.setxattr(src / "new", "user.word", b"of a directory")
    os.chmod(src / "new", 0o2750)


def as_overlay(branch: Path) -> None:
    """Make the marks of a branch as overlayfs does; a whiteout beside its name, which it cannot have, stays."""
    for path in branch.rglob(".wh.*"):
        hidden = path.with_name(path.name.removeprefix(".wh."))
        if path.name == ".wh..wh..opq":
            os.setxattr(path.parent, "trusted.overlay.opaque", b"y")
            path.unlink()
        elif not os.path.lexists(hidden):
            os.mknod(hidden, stat.S_IFCHR)
            path.unlink()


def listing(branch: Path) -> list[str]:
    """What a branch has but for its administrative names."""
    return sorted(
        str(path.relative_to(branch))
        for path in branch.rglob("*")
        if not str(path.relative_to(branch)).startswith(".wh..wh.") or path.name == ".wh..wh..opq"
    )
