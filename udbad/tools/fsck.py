"""Offline check and repair of one branch.

Finds what aufs' auchk(8) does (semantics 1, 10.3, 12) and stale temporary names. Works on a branch
that is not mounted, or not yet: on a live one the temporary names belong to running operations.

May not: follow a symbolic link, leave the branch through "..", or touch anything but the defect it was
told to repair. The times of the directory that held the defect are put back, so that the merged tree
looks the same afterwards.
"""

from __future__ import annotations

import errno
import os
import stat as st_mod
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from enum import Enum
from typing import Final

from udbad.branch import notation, origin, redirect, sweep, syscalls, whiteout, writelock
from udbad.branch.branches import Branch
from udbad.branch.dirtymark import DIRTY_MARK, was_dirty
from udbad.branch.spec import printable
from udbad.branch.walk import Entries, descend, join, objects_in, open_branch, stat_or_none, walk
from udbad.errors import NO_DIRECTORY, ExitCode
from udbad.tools.homecheck import shown_by
from udbad.types import Perm

_ADMINISTRATIVE: Final = {
    whiteout.BASE: st_mod.S_IFREG,
    whiteout.PLINK_DIR: st_mod.S_IFDIR,
    whiteout.ORPHAN_DIR: st_mod.S_IFDIR,
    whiteout.OVERLAY_DIR: st_mod.S_IFDIR,
    DIRTY_MARK: st_mod.S_IFREG,
    redirect.MARK: st_mod.S_IFREG,
}


class DefectKind(Enum):
    """What can be wrong with a branch; the value is the short name people see."""

    WHITEOUT_PAIR = "whiteout beside its name"
    BAD_WHITEOUT = "whiteout of a wrong type"
    PENDING = "whiteout that was under way"
    OVERLAY_WHITEOUT = "whiteout of overlayfs in a branch of aufs, where it is a device"
    OVERLAY_OPAQUE = "opaque mark of overlayfs in a branch of aufs, where it means nothing"
    BAD_BASE = "administrative name of a wrong type"
    PLINK_LEFTOVER = "leftover pseudo-link, the file's only name"
    PLINK_ALONE = "pseudo-link, the file's only name here"
    PLINK_SHARED = "pseudo-link"
    ORPHAN = "leftover of a deleted file"
    TEMPORARY = "stale temporary name"
    BAD_REDIRECT = "redirect that cannot be a path"
    UNTOLD_REDIRECT = "redirect that does not count"
    UNREADABLE = "cannot be checked"


@dataclass(frozen=True, slots=True)
class Defect:
    """One finding. path: relative to the branch root. remedy: what `repair` would do, "" if nothing can be done."""

    kind: DefectKind
    path: bytes
    detail: str
    remedy: str

    def __str__(self) -> str:
        return f"{printable(self.path)}: {self.kind.value}" + (f" ({self.detail})" if self.detail else "")


# -- finding ----------------------------------------------------------------------------------


def find_defects(root_fd: int, lower_fds: Sequence[int] = (), pending: bool = False) -> Generator[Defect, None, None]:
    """All defects of the branch whose root directory is `root_fd` (O_PATH will do).

    lower_fds: the root directories of all branches below it in the union, where they are known. pending: a mount that
    wrote it in the notation of overlayfs did not end well. A defect may be
    repaired while the generator is suspended. What cannot be read is a defect too, not an OSError. Source:
    semantics 12, row auchk, and 6.4 for the temporary names.
    """
    unreadable: list[Defect] = []

    def on_error(path: bytes, error: OSError) -> None:
        unreadable.append(Defect(DefectKind.UNREADABLE, path, os.strerror(error.errno or errno.EIO), ""))

    shared: dict[tuple[int, int], list[bytes]] = {}  # (st_dev, st_ino) -> names of the file outside .wh..wh.plnk
    plinks: list[tuple[bytes, os.stat_result]] = []
    yield from _administrative(root_fd)
    alone: list[tuple[bytes, os.stat_result]] = []
    for name, st in objects_in(root_fd, whiteout.PLINK_DIR, on_error):
        path = join(whiteout.PLINK_DIR, name)
        if whiteout.is_temporary(name):
            yield Defect(DefectKind.TEMPORARY, path, "", _removal(st))
        elif _only_name(st):
            alone.append((name, st))
        else:
            plinks.append((path, st))
            shared[st.st_dev, st.st_ino] = []
    yield from _only_homes(root_fd, alone, lower_fds)
    for name, st in objects_in(root_fd, whiteout.ORPHAN_DIR, on_error):
        yield Defect(DefectKind.ORPHAN, join(whiteout.ORPHAN_DIR, name), "", _removal(st))

    inodes = {ino for _, ino in shared}
    overlay = whiteout.unmarked(root_fd)
    with closing(walk(root_fd, on_error)) as directories:
        # In a layer of overlayfs they always count.
        told = redirect.may_have(root_fd) or not syscalls.exists_at(root_fd, whiteout.BASE)
        for directory, fd, entries in directories:
            if directory:
                try:
                    defect = _redirect(directory, fd, told)
                except OSError as error:
                    on_error(directory, error)
                else:
                    if defect is not None:
                        yield defect
            if not overlay and whiteout.overlay_opaque(fd) and whiteout.OPAQUE not in entries:
                remedy = f"make {printable(whiteout.OPAQUE)}"
                yield Defect(DefectKind.OVERLAY_OPAQUE, join(directory, whiteout.OPAQUE), "not there", remedy)
            for name, entry in entries.items():
                try:
                    if inodes and entry.inode() in inodes:
                        _note_name(shared, fd, directory, name)
                    defect = _classify(directory, fd, name, entries)
                    if defect is None and not overlay and _is_device(fd, name, entry):
                        hidden = printable(whiteout.PREFIX + name)
                        path = join(directory, name)
                        defect = Defect(DefectKind.OVERLAY_WHITEOUT, path, "", f"make it {hidden}")
                    elif defect is None and pending and whiteout.meaning(name)[0] is whiteout.Meaning.WHITEOUT:
                        defect = Defect(DefectKind.PENDING, join(directory, name), "", "put a device in its place")
                except OSError as error:
                    on_error(join(directory, name), error)
                    continue
                if defect is not None:
                    yield defect
    yield from unreadable
    for path, st in plinks:
        names = ", ".join(map(printable, shared[st.st_dev, st.st_ino])) or "not found in the branch"
        detail = f"{st.st_nlink} links, other names: {names}"
        # Removing it is not for a checker to offer: the next mount takes it up, and names of the file
        # that exist on lower branches only would show their old content again (semantics 10.3).
        yield Defect(DefectKind.PLINK_SHARED, path, detail, "")


def _redirect(directory: bytes, fd: int, told: bool) -> Defect | None:
    """What is wrong with what a directory says of where it is below. told: the root says that there are redirects."""
    try:
        said = redirect.read(fd, redirect.key())
    except redirect.Unusable as error:
        return Defect(DefectKind.BAD_REDIRECT, directory, printable(error.args[0][:200]), "remove it")
    if said is None or told:
        return None
    return Defect(
        DefectKind.UNTOLD_REDIRECT, directory, f"{printable(said)}; {printable(redirect.MARK)} is missing", ""
    )


def _administrative(root_fd: int) -> Generator[Defect, None, None]:
    """The names that aufs and we keep in a branch root, when they are not what they should be (semantics 3)."""
    for name, right_type in _ADMINISTRATIVE.items():
        st = stat_or_none(root_fd, name)
        if st is not None and st_mod.S_IFMT(st.st_mode) != right_type:
            what = "a directory" if right_type == st_mod.S_IFDIR else "a regular file"
            yield Defect(DefectKind.BAD_BASE, name, f"should be {what}", _removal(st))


def _only_homes(
    root_fd: int, homes: Sequence[tuple[bytes, os.stat_result]], lower_fds: Sequence[int]
) -> Iterator[Defect]:  # fmt: skip
    """What has no other name than the one in .wh..wh.plnk: a leftover, unless names on lower branches show it."""
    origins = {name: origin.parse(name) for name, _ in homes}
    shown = shown_by(root_fd, homes, lower_fds) if lower_fds else {}
    for name, st in homes:
        path = join(whiteout.PLINK_DIR, name)
        size = f"{st.st_size} bytes"
        if origins[name] is None or st_mod.S_ISDIR(st.st_mode):
            yield Defect(DefectKind.PLINK_LEFTOVER, path, f"{size}, lost with it", _removal(st))
        elif not lower_fds:
            detail = f"{size}, shown by names on lower branches, if there are any; name those branches to know"
            yield Defect(DefectKind.PLINK_ALONE, path, detail, "")
        elif name in shown:
            yield Defect(DefectKind.PLINK_ALONE, path, f"{size}, {shown[name]}", "")
        else:
            yield Defect(DefectKind.PLINK_LEFTOVER, path, f"{size}, lost with it", _removal(st))


def _only_name(st: os.stat_result) -> bool:
    # A pseudo-link is never a directory: one that is here cannot have another name.
    return st.st_nlink == 1 or st_mod.S_ISDIR(st.st_mode)


def _note_name(shared: dict[tuple[int, int], list[bytes]], dirfd: int, directory: bytes, name: bytes) -> None:
    """Remember a name of a pseudo-linked file. The number in a directory entry knows no device: ask."""
    st = stat_or_none(dirfd, name)
    if st is not None and (st.st_dev, st.st_ino) in shared:
        shared[st.st_dev, st.st_ino].append(join(directory, name))


def _classify(directory: bytes, dirfd: int, name: bytes, names: Entries) -> Defect | None:
    """The defect that this entry is, if any."""
    if not name.startswith(whiteout.PREFIX):
        return None
    path = join(directory, name)
    temporary = whiteout.is_temporary(name)
    if not temporary and not _is_whiteout(name):
        return None
    st = stat_or_none(dirfd, name)
    if st is None:
        return None
    if temporary:
        return Defect(DefectKind.TEMPORARY, path, "", _removal(st))
    if not st_mod.S_ISREG(st.st_mode):
        return Defect(DefectKind.BAD_WHITEOUT, path, "should be a regular file", _removal(st))
    hidden = name[len(whiteout.PREFIX) :]
    if name != whiteout.OPAQUE and hidden in names:
        detail = f"{printable(join(directory, hidden))} exists"
        return Defect(DefectKind.WHITEOUT_PAIR, path, detail, "remove the whiteout")
    return None


def _is_device(dirfd: int, name: bytes, entry: os.DirEntry[str]) -> bool:
    """Whether a name is a device 0/0; most names cost no system call."""
    if entry.is_file(follow_symlinks=False) or entry.is_dir(follow_symlinks=False):
        return False
    return whiteout.is_device_at(dirfd, name)


def _removal(st: os.stat_result) -> str:
    return "remove it with all it contains" if st_mod.S_ISDIR(st.st_mode) else "remove it"


def _is_whiteout(name: bytes) -> bool:
    """`.wh.NAME` or the opaque mark, but no other `.wh..wh.*` and not the bare prefix."""
    if name.startswith(whiteout.RESERVED):
        return name == whiteout.OPAQUE
    return len(name) > len(whiteout.PREFIX)


# -- repairing --------------------------------------------------------------------------------


def repair(root_fd: int, defect: Defect) -> None:
    """Remove what `defect` names, if it still is that defect; its directory keeps its times.

    Raises OSError as unlink(2), ValueError for a defect without a remedy.
    """
    if not defect.remedy:
        raise ValueError(f"no remedy for {defect}")
    if defect.kind is DefectKind.BAD_REDIRECT:
        fd = descend(root_fd, defect.path.split(b"/"))
        try:
            redirect.remove(fd, redirect.key())
        finally:
            os.close(fd)
        return
    *directories, name = defect.path.split(b"/")
    try:
        dirfd = descend(root_fd, directories)
    except NO_DIRECTORY:
        return
    try:
        st = stat_or_none(dirfd, name)
        if defect.kind in _REWRITTEN:
            _rewrite(root_fd, dirfd, name, defect.kind)
        elif st is not None and _still(dirfd, name, st, defect.kind):
            if defect.kind is DefectKind.WHITEOUT_PAIR and whiteout.unmarked(root_fd):
                _rewrite(root_fd, dirfd, name, DefectKind.PENDING)  # a directory may lack its mark
            else:
                sweep.remove(dirfd, name)
    finally:
        os.close(dirfd)


_REWRITTEN: Final = frozenset({DefectKind.PENDING, DefectKind.OVERLAY_WHITEOUT, DefectKind.OVERLAY_OPAQUE})


def _rewrite(root_fd: int, dirfd: int, name: bytes, kind: DefectKind) -> None:
    """Put a mark into the form that counts here."""
    branch = Branch(
        0, 0, b"", Perm.RW, frozenset(), None,
        root_fd=root_fd, anchor_fd=-1, dev=0, fs_type="", writes_overlay=kind is DefectKind.PENDING,
    )  # fmt: skip
    marks = notation.of(branch)
    before = os.fstat(dirfd)
    if kind is DefectKind.PENDING:
        marks.settle(branch, dirfd, name[len(whiteout.PREFIX) :])
    elif kind is DefectKind.OVERLAY_OPAQUE:
        marks.make_opaque(branch, dirfd)
    elif whiteout.is_device_at(dirfd, name):
        marks.hide(branch, dirfd, name, beside=True)
        syscalls.unlink_at(dirfd, name)
    syscalls.restore_times(dirfd, before)


def _still(dirfd: int, name: bytes, st: os.stat_result, kind: DefectKind) -> bool:
    """Whether the object is what was found. Kinds that follow from the path alone need not be asked again."""
    match kind:
        case DefectKind.WHITEOUT_PAIR:
            return st_mod.S_ISREG(st.st_mode) and syscalls.exists_at(dirfd, name[len(whiteout.PREFIX) :])
        case DefectKind.BAD_WHITEOUT:
            return not st_mod.S_ISREG(st.st_mode)
        case DefectKind.BAD_BASE:
            return st_mod.S_IFMT(st.st_mode) != _ADMINISTRATIVE[name]
        case DefectKind.PLINK_LEFTOVER:
            return _only_name(st)
        case _:
            return True


# -- the command ------------------------------------------------------------------------------


def run_fsck(
    path: bytes, ask: Callable[[Defect], bool], echo: Callable[[str], None], lowers: Sequence[bytes] = ()
) -> ExitCode:
    """Check the branch at `path`: `echo` each defect, and repair it where `ask` says yes.

    lowers: paths of all branches below it. Returns OK when nothing is wrong any more, FSCK_DEFECTS when something is;
    pseudo-links of files that have other names, or may have, are told, and are no defect. UserError(BRANCH) for a path
    that is no directory, UserError(NOT_ROOT) without CAP_SYS_ADMIN. UserError(BRANCH) while a mount writes to the
    branch, whose temporary names would be taken for stale ones; none can begin to before this returns.
    """
    root_fd = open_branch(path)
    lock_fd = -1
    lower_fds: list[int] = []
    found = repaired = 0
    try:
        before = os.fstat(root_fd)
        # Of an unmarked one, what a kill leaves must not make it one of aufs.
        directory = whiteout.OVERLAY_DIR if whiteout.unmarked(root_fd) else whiteout.ORPHAN_DIR
        bare = not syscalls.exists_at(root_fd, directory)  # what is locked is made for that, and not left
        end = time.monotonic() + writelock.PATIENCE
        lock_fd = writelock.lock(root_fd, path, "is written to by a mount{holder}; unmount it first", end, directory)
        if was_dirty(root_fd):
            echo(f"{printable(path)}: was not unmounted cleanly, or is mounted now; check only what is not in use")
        lower_fds.extend(map(open_branch, lowers))
        with closing(find_defects(root_fd, lower_fds, not bare and directory == whiteout.OVERLAY_DIR)) as defects:
            for defect in defects:
                echo(str(defect))
                if defect.kind in (DefectKind.PLINK_SHARED, DefectKind.PLINK_ALONE):
                    continue  # only worth knowing
                found += 1
                if defect.remedy and ask(defect) and _repaired(root_fd, defect, echo):
                    repaired += 1
    finally:
        if lock_fd >= 0:
            if bare:
                syscalls.rmdir_at(root_fd, directory)
                syscalls.restore_times(root_fd, before)
            os.close(lock_fd)
        for fd in (root_fd, *lower_fds):
            os.close(fd)
    echo(f"{printable(path)}: " + (f"{found} defects, {repaired} repaired" if found else "clean"))
    return ExitCode.OK if repaired == found else ExitCode.FSCK_DEFECTS


def _repaired(root_fd: int, defect: Defect, echo: Callable[[str], None]) -> bool:
    try:
        repair(root_fd, defect)
    except OSError as error:
        echo(f"{printable(defect.path)}: not repaired: {error.strerror}")
        return False
    return True
