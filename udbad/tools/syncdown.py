"""Merging a branch down into the one below it, while the union of both is in use (aubrsync, semantics 12).

Every name of the upper branch covers what the lower one has under it, so the lower branch is changed only where
nobody sees it: files are replaced, whiteouts remove what they hide, opaque directories get an empty one to be
filled. With `move` the upper names are then taken away one by one, each of which shows something equal
(carry.py). At every instant, and after any crash, the union is what it was; running again does the rest.

A directory that is opaque cannot be taken away name by name, since its names are all that shows. So the lower
one is emptied first, which nobody sees, and then the mark is removed, which changes nothing either.

Runs on the event loop between two `yield`s, each of which hands work to a thread (None: lets others run).
After each the world may have changed: names, directories and marks are looked at again before they are used.
"""

from __future__ import annotations

import errno
import os
import stat as st_mod
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Final

from udbad.branch import copydata, datacalls, notation, sweep, syscalls, walk, whiteout
from udbad.branch.branches import Branch
from udbad.branch.spec import printable
from udbad.branch.state import object_stamp
from udbad.errors import ExitCode, UserError, estale, os_error
from udbad.inodes.node import Dir
from udbad.tools import carry
from udbad.tools.carry import Changed, Copy, Halt, Work
from udbad.tools.takeaway import (
    VANISHED,
    Directory,
    File,
    Parts,
    Progress,
    Steps,
    TakeAway,
    Whiteout,
    must_carry,
)
from udbad.union import copydirs, lookup, redirects, resolve
from udbad.union.superblock import Superblock

BATCH_FILES: Final = 64
BATCH_BYTES: Final = 32 << 20
"""What one thread call copies at most, one bigger file aside."""
_PASSES: Final = 3


@dataclass(slots=True)
class _Level:
    """A directory on both branches. hidden: the lower one cannot be seen, as the upper one is opaque (and stays so)."""

    parts: Parts
    src_fd: int
    dst_fd: int
    hidden: bool
    todo: list[bytes] = field(default_factory=list)


@dataclass(slots=True)
class _Links:
    """The names found so far of an upper file that has several. made: identity of the lower one."""

    st: os.stat_result
    made: tuple[int, int]
    names: list[tuple[Parts, bytes]]


def check(sb: Superblock, source: bytes, target: bytes, move: bool) -> tuple[Branch, Branch]:
    """The two branches. Raises UserError: OPTION for a path that is no branch, REFUSED for what cannot be."""
    by_path = {branch.path: branch for branch in sb.branches.branches}
    for given in (source, target):
        if given not in by_path:
            raise UserError(f"{printable(given)} is not a branch", ExitCode.OPTION)
    src, dst = by_path[source], by_path[target]
    if sb.options.read_only:
        raise UserError("the union is mounted read-only", ExitCode.REFUSED)
    if dst.index <= src.index:
        raise UserError(f"{printable(target)} is not below {printable(source)}", ExitCode.REFUSED)
    if dst.index != src.index + 1:
        between = printable(sb.branches[src.index + 1].path)
        raise UserError(
            f"{between} is between the two and would hide what is merged down; merge into that first",
            ExitCode.REFUSED,
        )
    for branch, needed in ((dst, True), (src, move)):
        if needed and not branch.writable:
            path = printable(branch.path)
            raise UserError(
                f"{path} is {branch.perm.value}; udbad branch mod MOUNT {path}=rw makes it writable", ExitCode.REFUSED
            )
    return src, dst


class Sync:
    """One run. The branches of the mount must stay as they are until it ends."""

    def __init__(self, sb: Superblock, src: Branch, dst: Branch, move: bool, halt: Halt) -> None:
        """src, dst: from `check`."""
        self.sb = sb
        self.src = src
        self.dst = dst
        self.move = move
        self.halt = halt
        self.progress = Progress()
        self._away = TakeAway(sb, src, dst, self.progress, halt)
        self._links: dict[tuple[int, int], _Links] = {}
        self._trash: list[tuple[int, bytes]] = []
        self._lowest = dst.index == len(sb.branches) - 1

    def steps(self) -> Steps:
        """All of it. Raises OSError, about `progress.current`: ECANCELED when halted, what the branches said else."""
        with self.sb.carrying(), datacalls.syncing(self.dst.root_fd) as self._away.sync_fd:
            yield from self._all()

    def _all(self) -> Steps:
        try:
            yield self._measure
            for _ in range(_PASSES if self.move else 1):
                self._links.clear()
                self._away.begin()
                yield from self._merge()
                self._finish_links()
                yield from self._away.finish()
                if not self._away.again:
                    break
            yield lambda: datacalls.sync_fs(self._away.sync_fd)
        finally:
            for dirfd, _ in self._trash:
                os.close(dirfd)

    def _measure(self) -> None:
        # All of this goes by names, which are not what a renamed directory has on lower branches. None is renamed
        # from here on (redirects.may_write).
        for branch in self.sb.branches.branches[: self.src.index + 1]:
            path = redirects.any_in(branch, self.sb.redirect_key) if branch.id in self.sb.redirecting else None
            if path is not None:
                raise UserError(
                    f"{printable(path)} on {printable(branch.path)} is a renamed directory, whose lower parts have "
                    "another name: nothing can be merged from there downwards",
                    ExitCode.REFUSED,
                )

        def ignore(path: bytes, error: OSError) -> None:
            pass  # met again, and told, when its turn comes

        for _, fd, entries in walk.walk(self.src.root_fd, ignore):
            self._check_halt()
            for name in entries:
                if name.startswith(whiteout.RESERVED):
                    continue
                self.progress.names += 1
                try:
                    st = syscalls.stat_at(fd, name)
                except OSError:
                    continue
                if st_mod.S_ISREG(st.st_mode):
                    self.progress.size += st.st_size

    def _check_halt(self) -> None:
        if self.halt.asked:
            raise os_error(errno.ECANCELED)

    def _at(self, parts: Parts, name: bytes) -> None:
        self.progress.current = b"/".join((*parts, name))

    def _leave(self, parts: Parts, name: bytes, reason: str, again: bool = True) -> None:
        self._away.leave(parts, name, reason, again)

    # -- walking ------------------------------------------------------------------------------------

    def _merge(self) -> Steps:
        levels = [
            _Level(
                (), syscalls.open_dir_at(self.src.root_fd, b"."), syscalls.open_dir_at(self.dst.root_fd, b"."), False
            )
        ]
        try:
            yield from self._visit(levels[0])
            while levels:
                self._check_halt()
                level = levels[-1]
                if level.todo:
                    child = yield from self._enter(level, level.todo.pop())
                    if child is not None:
                        levels.append(child)
                        yield from self._visit(child)
                    continue
                if level.parts:
                    yield lambda level=level: _copy_attributes(level.src_fd, level.dst_fd, self.dst.copying)  # type: ignore[misc]  # a lambda with a default
                self._close(levels.pop())
                if level.parts:
                    self._done(level)
                yield from self._away.run_when_many()
        finally:
            for level in levels:
                self._close(level)

    def _close(self, level: _Level) -> None:
        os.close(level.src_fd)
        os.close(level.dst_fd)

    def _done(self, level: _Level) -> None:
        *above, name = level.parts
        self.progress.synced += 1
        if self.move:
            self._away.add(Directory(tuple(above), name))
        carry.release(self.sb, level.parts)

    def _visit(self, level: _Level) -> Steps:
        """Everything in a directory but what is in its subdirectories."""
        names: list[bytes] = []
        yield lambda: names.extend(whiteout.names_in(level.src_fd, self.src.overlay))
        batch: list[Copy] = []
        size = 0
        for name in names:
            if name.startswith(whiteout.RESERVED):
                continue
            if name.startswith(whiteout.PREFIX):
                hidden = name[len(whiteout.PREFIX) :]
                if self.src.whable and hidden:
                    yield from self._apply_whiteout(level, hidden)
                continue
            try:
                st = syscalls.stat_at(level.src_fd, name)
            except FileNotFoundError:
                continue
            if st_mod.S_ISDIR(st.st_mode):
                level.todo.append(name)
                continue
            copy = Copy(self.src, self.dst, level.src_fd, level.dst_fd, name)
            if st.st_nlink > 1 and (st.st_dev, st.st_ino) in self._links:
                copy.st = st  # needs a link only
            batch.append(copy)
            size += st.st_size if st_mod.S_ISREG(st.st_mode) else 0
            if len(batch) >= BATCH_FILES or size >= BATCH_BYTES:
                yield from self._copy(level, batch)
                batch, size = [], 0
        if batch:
            yield from self._copy(level, batch)

    def _in_place(self, level: _Level) -> bool:
        """Whether the directories still are what the path leads to; somebody may have moved one."""
        for branch, fd in ((self.src, level.src_fd), (self.dst, level.dst_fd)):
            try:
                now = walk.descend(branch.root_fd, list(level.parts))
            except OSError as error:
                if error.errno not in VANISHED:
                    raise
                return False
            same = os.path.sameopenfile(now, fd)
            os.close(now)
            if not same:
                return False
        return True

    # -- files --------------------------------------------------------------------------------------

    def _copy(self, level: _Level, batch: list[Copy]) -> Steps:
        failures: dict[bytes, str] = {}
        done = self.progress.synced_size

        def transfer_all() -> None:
            before = done
            for copy in batch:
                self._check_halt()
                if copy.st is not None:
                    continue
                self._at(level.parts, copy.name)
                try:
                    st = carry.transfer(copy, self.halt, lambda offset, before=before: self._report(before + offset))  # type: ignore[misc]  # a lambda with a default
                except OSError as error:
                    if error.errno not in VANISHED:
                        raise
                    failures[copy.name] = "is being changed"
                    continue
                before += st.st_size if st_mod.S_ISREG(st.st_mode) else 0
                self._report(before)

        try:
            yield transfer_all
            in_place = self._in_place(level)
            for copy in batch:
                if copy.name in failures or not in_place:
                    if syscalls.exists_at(level.src_fd, copy.name):
                        self._leave(level.parts, copy.name, failures.get(copy.name, "its directory was moved"))
                    continue
                self._publish(level, copy)
        finally:
            for copy in batch:
                carry.discard(copy)
        yield from self._empty_trash()

    def _report(self, done: int) -> None:
        self.progress.synced_size = done

    def _publish(self, level: _Level, copy: Copy) -> None:
        st = copy.st
        assert st is not None
        self._at(level.parts, copy.name)
        links = self._links.get((st.st_dev, st.st_ino)) if st.st_nlink > 1 else None
        try:
            if links is not None:
                self._relink(links, copy)
            old = carry.publish(copy)
        except Changed as change:
            if syscalls.exists_at(level.src_fd, copy.name):
                self._leave(level.parts, copy.name, str(change))
            return
        if old is not None:
            self._trash.append((os.dup(old[0]), old[1]))
        self.progress.synced += 1
        made = copy.made
        assert made is not None
        if st.st_nlink > 1:
            if links is None:
                links = self._links[st.st_dev, st.st_ino] = _Links(st, (made[0], made[1]), [])
            links.names.append((level.parts, copy.name))
        elif self.move:
            self._away.add(File([(level.parts, copy.name)], st, made))

    def _relink(self, links: _Links, copy: Copy) -> None:
        """A further name of a file that was copied: make the copy a link to the first one."""
        assert copy.st is not None
        if object_stamp(links.st) != object_stamp(copy.st):
            raise Changed("changed while it was copied")
        parts, name = links.names[0]
        try:
            dirfd = walk.descend(self.dst.root_fd, list(parts))
        except OSError:
            raise Changed("its directory was moved") from None
        try:
            st = syscalls.stat_at(dirfd, name)
            if (st.st_dev, st.st_ino) != links.made:
                raise Changed("the copy was changed directly")
            if _identity_at(copy.dst_dirfd, copy.name) == links.made:
                return
            carry.discard(copy)
            tmp = whiteout.temporary_name(copy.name)
            syscalls.link_at(dirfd, name, copy.dst_dirfd, tmp)
            copy.tmp = tmp
        except FileNotFoundError:
            raise Changed("the copy was changed directly") from None
        finally:
            os.close(dirfd)

    def _finish_links(self) -> None:
        """Files with several names go at once, when all of the names were found. Homes of pseudo-links never do."""
        for name, st in walk.objects_in(self.src.root_fd, whiteout.PLINK_DIR, lambda path, error: None):
            if st.st_nlink == 1:  # else it is told by its names
                self._leave((whiteout.PLINK_DIR,), name, "holds what other names, on lower branches, show", again=False)
        for links in self._links.values():
            if len(links.names) < links.st.st_nlink:
                for parts, name in links.names:
                    if self.move:
                        self._leave(parts, name, "has names elsewhere, or is pseudo-linked", again=False)
            elif self.move:
                # Further links have changed its ctime: only who it is counts.
                self._away.add(File(links.names, links.st, (*links.made, b"")))

    # -- whiteouts and directories --------------------------------------------------------------------

    def _clear(self, level: _Level, name: bytes) -> None:
        """Take away what the lower branch has under this name, if anything; a directory is removed later."""
        old = carry.displace_directory(level.dst_fd, name)
        if old is not None:
            self._trash.append((os.dup(old[0]), old[1]))
        else:
            try:
                syscalls.unlink_at(level.dst_fd, name)
            except FileNotFoundError:
                pass

    def _apply_whiteout(self, level: _Level, name: bytes) -> Steps:
        """Remove on the lower branch what the whiteout hides there; carry it down when more is below."""
        if level.hidden or not self._in_place(level) or not whiteout.hides_alone(self.src, level.src_fd, name):
            return
        self._at(level.parts, name)
        marks = notation.of(self.dst)
        if must_carry(self.sb, self.src, self.dst, level.parts, level.src_fd, level.dst_fd, name):
            marks.hide(self.dst, level.dst_fd, name, beside=True)
        if not whiteout.hides_alone(self.dst, level.dst_fd, name):  # its own whiteout may have the place of the name
            self._clear(level, name)
        marks.settle(self.dst, level.dst_fd, name)
        self.progress.synced += 1
        if self.move:
            self._away.add(Whiteout(level.parts, name))
        yield from self._empty_trash()

    def _enter(self, level: _Level, name: bytes) -> Generator[Work | None, None, _Level | None]:
        """Make the directory exist on the lower branch, and go into it."""
        parts = (*level.parts, name)
        self._at(level.parts, name)
        try:
            if not self._in_place(level):
                return None
            src_fd = syscalls.open_dir_at(level.src_fd, name)
        except OSError as error:
            if error.errno not in VANISHED:
                raise
            return None
        try:
            opaque = self.src.whable and (
                whiteout.opaque(src_fd, self.src.overlay) or whiteout.present(level.src_fd, name)
            )
            if opaque and not level.hidden:
                if not (yield from self._start_opaque(level, name, src_fd)):
                    os.close(src_fd)
                    self._leave(level.parts, name, "changed meanwhile")
                    return None
            else:
                self._make_directory(level, parts, src_fd)
                yield from self._empty_trash()
            dst_fd = syscalls.open_dir_at(level.dst_fd, name)
        except BaseException:
            os.close(src_fd)
            raise
        return _Level(parts, src_fd, dst_fd, level.hidden or (opaque and not self.move))

    def _make_directory(self, level: _Level, parts: Parts, src_fd: int) -> None:
        name = parts[-1]
        try:
            if st_mod.S_ISDIR(syscalls.stat_at(level.dst_fd, name).st_mode):
                return
            if whiteout.hides_alone(self.dst, level.dst_fd, name):
                notation.of(self.dst).lift(self.dst, level.dst_fd, name)
            else:
                syscalls.unlink_at(level.dst_fd, name)  # of another type: the directory covers it
        except FileNotFoundError:
            pass
        node = carry.find(self.sb, parts)
        if not level.hidden and type(node) is Dir:
            layer = node.layer(self.src.index)
            if layer is not None and layer.identity == _identity(src_fd):
                copydirs.ensure_dir(self.sb, node, self.dst)
                return
        self._place_directory(level, name, src_fd, whiteout.hides(self.dst, level.dst_fd, name))

    def _place_directory(self, level: _Level, name: bytes, src_fd: int, opaque: bool) -> None:
        """Put a new directory with the attributes of the upper one where nobody sees it, in the place of anything."""
        tmp = whiteout.temporary_name(name)
        syscalls.mkdir_at(level.dst_fd, tmp, 0o700)
        fd = syscalls.open_dir_at(level.dst_fd, tmp)
        try:
            if not copydirs.is_empty(fd):
                raise estale()  # exchanged by who may write there, see copydirs.py
            if opaque:
                notation.of(self.dst).make_opaque(self.dst, fd)
            _copy_attributes(src_fd, fd, self.dst.copying)
        finally:
            os.close(fd)
        self._clear(level, name)
        syscalls.rename_at(level.dst_fd, tmp, level.dst_fd, name)
        whiteout.remove(level.dst_fd, name)

    def _start_opaque(self, level: _Level, name: bytes, src_fd: int) -> Generator[Work | None, None, bool]:
        """An opaque directory: begin with an empty one below it, opaque itself where more branches follow.

        With `move` the upper mark goes then. False when somebody has changed the directory meanwhile.
        """
        self._place_directory(level, name, src_fd, not self._lowest)
        made = _identity_at(level.dst_fd, name)
        yield from self._empty_trash()
        if not self.move:
            return True
        yield lambda: datacalls.sync_fs(self._away.sync_fd)
        # After this: both may have been moved, removed or filled.
        if not self._in_place(level) or _identity_at(level.src_fd, name) != _identity(src_fd):
            return False
        if _identity_at(level.dst_fd, name) != made or not self._is_bare(level.dst_fd, name):
            return False
        before = os.fstat(src_fd)
        marks = notation.of(self.src)
        if not whiteout.opaque(src_fd, self.src.overlay):
            # Only the whiteout beside it hides what is below: make that the mark's work, for an instant.
            marks.make_opaque(self.src, src_fd)
        whiteout.remove(level.src_fd, name)
        marks.clear_opaque(src_fd)
        syscalls.restore_times(src_fd, before)
        parent = carry.find(self.sb, level.parts)
        if type(parent) is Dir:
            lookup.update(self.sb, parent, name, resolve.resolve(self.sb, parent, name))
        return True

    def _is_bare(self, dirfd: int, name: bytes) -> bool:
        fd = syscalls.open_dir_at(dirfd, name)
        try:
            return set(whiteout.names_in(fd, self.dst.overlay)) <= ({whiteout.OPAQUE} if not self._lowest else set())
        finally:
            os.close(fd)

    def _empty_trash(self) -> Steps:
        """Remove the directories that were replaced."""
        if self._trash:
            trash, self._trash = self._trash, []

            def remove_all() -> None:
                try:
                    for dirfd, tmp in trash:
                        sweep.remove_tree(dirfd, tmp)
                finally:
                    for dirfd, _ in trash:
                        os.close(dirfd)

            yield remove_all


def _identity(fd: int) -> tuple[int, int]:
    st = os.fstat(fd)
    return st.st_dev, st.st_ino


def _identity_at(dirfd: int, name: bytes) -> tuple[int, int] | None:
    try:
        st = syscalls.stat_at(dirfd, name)
    except FileNotFoundError:
        return None
    return st.st_dev, st.st_ino


def _copy_attributes(src_fd: int, dst_fd: int, ignore: frozenset[str]) -> None:
    st = os.fstat(src_fd)
    copydata.copy_metadata(st, syscalls.proc_path(src_fd), syscalls.proc_path(dst_fd), ignore, follow_symlinks=True)
