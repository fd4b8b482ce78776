"""A store of layers as Docker's aufs graph driver has it (semantics 13): each is a branch, with those it lies on.

    ROOT/layers/ID    the layers below, nearest first, one id a line
    ROOT/diff/ID      the branch
    ROOT/mnt/ID       where the union of them all is mounted

A layer is there when layers/ID is: that is made last and removed after the branch has got another name. What a crash
leaves has a name that ends with `-removing`, and is swept by who changes the store next, Docker's driver included.

Works on descriptors of the three directories, each a private clone of its mount: what is mounted below is never
entered, and never removed.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat as st_mod
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from typing import Final, NamedTuple

from udbad.branch import copydata, sweep, syscalls, whiteout, writelock
from udbad.branch.branches import BranchSpec
from udbad.branch.spec import shown
from udbad.branch.walk import entries_of, give_up, open_branch, walk
from udbad.errors import ExitCode, UserError
from udbad.layers.source import REMOVING, Source, is_id

_APPLYING: Final = "-applying" + REMOVING
_LONGEST: Final = 16 << 20  # bytes of a file in layers/, which is in memory
_NAMES: Final = (b"layers", b"diff", b"mnt")
_WRITTEN: Final = "is written to by a mount{holder}"


class Layer(NamedTuple):
    """id: its name. parents: those below it, nearest first. present: whether its branch is there."""

    id: str
    parents: tuple[str, ...]
    present: bool


def branches(source: Source, ro: bool) -> tuple[BranchSpec, ...]:
    """The branches of the union of a layer and those below it, top first. ro: a view, nothing of which is written.

    Reads layers/ID only; whether the branches are there is for branch/accept.py to find. Raises UserError (BRANCH).
    """
    fd = _open_part(os.fsencode(source.root), b"layers")
    try:
        parents = _parents(fd, source.root, source.id)
    finally:
        os.close(fd)
    return (source.top(ro), *(Source(source.root, parent).top(ro=True) for parent in parents))


def _remove_if_there(dirfd: int, directory: bytes) -> None:
    """So that a layer does not look as if aufs had written to it."""
    with suppress(OSError):
        syscalls.rmdir_at(dirfd, directory)


def check_id(layer: str) -> str:
    """The id itself. Raises UserError (USAGE)."""
    if not is_id(layer):
        raise UserError(
            f"{shown(layer)}: the id of a layer is 1 to 235 letters, digits, '_', '.' and '-', begins with a letter or "
            f"a digit, and does not end with {REMOVING}"
        )
    return layer


def _open_part(root: bytes, name: bytes) -> int:
    try:
        return open_branch(os.path.join(root, name))
    except UserError as error:
        raise UserError(f"no store of layers: {error.message}", error.code) from None


def _parents(layers_fd: int, root: str, layer: str) -> tuple[str, ...]:
    try:
        fd, _ = syscalls.open_file_at(layers_fd, os.fsencode(check_id(layer)), os.O_RDONLY)
    except FileNotFoundError:
        raise UserError(f"there is no layer {layer} in {shown(root)}", ExitCode.BRANCH) from None
    with open(fd, "rb") as file:
        data = file.read(_LONGEST)
    parents = data.decode("ascii", "replace").split()
    for parent in parents:
        if not is_id(parent):
            raise UserError(f"layers/{layer} in {shown(root)}: {parent!r} is not the id of a layer", ExitCode.BRANCH)
    if len({layer, *parents}) <= len(parents):
        raise UserError(f"layers/{layer} in {shown(root)}: a layer is named twice", ExitCode.BRANCH)
    return tuple(parents)


@contextmanager
def opened(root: str, make: bool = False) -> Iterator[Store]:
    """The store in a directory. make: make what is missing of it there. Raises UserError (BRANCH), OSError."""
    place = os.fsencode(root)
    if make:
        fd = os.open(place, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            for name in _NAMES:
                with suppress(FileExistsError):
                    syscalls.mkdir_at(fd, name, 0o710)
        finally:
            os.close(fd)
    with ExitStack() as ending:
        fds = []
        for name in _NAMES:
            fds.append(_open_part(place, name))
            ending.callback(os.close, fds[-1])
        yield Store(root, *fds)


class Store:
    """A store that is open. Errors: UserError; OSError for what the file system says."""

    def __init__(self, root: str, layers_fd: int, diff_fd: int, mnt_fd: int) -> None:
        self.root = root
        self.layers_fd = layers_fd
        self.diff_fd = diff_fd
        self.mnt_fd = mnt_fd

    # -- looking ----------------------------------------------------------------------------------

    def parents(self, layer: str) -> tuple[str, ...]:
        """The layers below this one, nearest first."""
        return _parents(self.layers_fd, self.root, layer)

    def layers(self) -> list[Layer]:
        """All of them, in order of their ids. What has another name is somebody else's."""
        listing = syscalls.open_listing(self.layers_fd)
        try:
            names = sorted(name for name in os.listdir(listing) if is_id(name))
        finally:
            os.close(listing)
        return [Layer(name, self.parents(name), syscalls.exists_at(self.diff_fd, name.encode())) for name in names]

    def open_layer(self, layer: str) -> int:
        """A descriptor of the branch of a layer that is there."""
        self.parents(layer)
        try:
            return syscalls.open_listing_at(self.diff_fd, layer.encode())
        except FileNotFoundError:
            raise UserError(f"layer {layer} has no branch in {shown(self.root)}/diff", ExitCode.BRANCH) from None

    def size(self, layer: str) -> int:
        """Bytes of what is in a layer, each file once, as Docker's DiffSize."""
        fd = self.open_layer(layer)
        seen: set[tuple[int, int]] = set()
        size = 0
        try:
            with closing(walk(fd, give_up)) as directories:
                for _, _, entries in directories:
                    for entry in entries.values():
                        st = entry.stat(follow_symlinks=False)
                        if not st_mod.S_ISDIR(st.st_mode) and (st.st_dev, st.st_ino) not in seen:
                            if st.st_nlink > 1:
                                seen.add((st.st_dev, st.st_ino))
                            size += st.st_size
        finally:
            os.close(fd)
        return size

    # -- changing ---------------------------------------------------------------------------------

    def create(self, layer: str, parent: str | None = None) -> None:
        """Make an empty layer on another one, or on nothing. Its root has the attributes of the one below."""
        name = check_id(layer).encode()
        self.sweep()
        with self._locked():
            if syscalls.exists_at(self.layers_fd, name):
                raise UserError(f"there is a layer {layer} in {shown(self.root)} already", ExitCode.REFUSED)
            below: tuple[str, ...] = ()
            if parent is not None:
                below = (parent, *self.parents(parent))
                os.close(self.open_layer(parent))
            for directory in (self.mnt_fd, self.diff_fd):
                try:
                    with suppress(FileNotFoundError):
                        syscalls.rmdir_at(directory, name)  # a crash has left it
                    syscalls.mkdir_at(directory, name, 0o755)
                    syscalls.chmod_at(directory, name, 0o755)
                except OSError as error:
                    raise UserError(
                        f"{shown(self.root)} has something of a layer {layer} already: {error.strerror}",
                        ExitCode.REFUSED,
                    ) from None
            if parent is not None:
                self._copy_root(parent.encode(), name)
            self._write_parents(layer, below)

    def _copy_root(self, source: bytes, target: bytes) -> None:
        copydata.copy_metadata(
            syscalls.stat_at(self.diff_fd, source), syscalls.xattr_path(self.diff_fd, source),
            syscalls.xattr_path(self.diff_fd, target), frozenset(), follow_symlinks=False,
        )  # fmt: skip

    def _write_parents(self, layer: str, below: tuple[str, ...]) -> None:
        temporary = f".{layer}.new".encode()
        with suppress(FileNotFoundError):
            syscalls.unlink_at(self.layers_fd, temporary)
        fd = syscalls.create_file_at(self.layers_fd, temporary, os.O_WRONLY, 0o644)
        with open(fd, "wb") as file:
            file.write(b"".join(parent.encode() + b"\n" for parent in below))
            file.flush()
            os.fsync(fd)
        syscalls.rename_at(self.layers_fd, temporary, self.layers_fd, layer.encode())

    def remove(self, layer: str) -> None:
        """Remove a layer that no other one lies on, and that no mount writes to.

        Gone when its branch has another name; then that is deleted, by whoever comes next after a crash.
        """
        name = check_id(layer).encode()
        self.sweep()
        with ExitStack() as ending:
            with self._locked():
                above = [other.id for other in self.layers() if layer in other.parents]
                if above:
                    raise UserError(f"layer {layer}: {above[0]} lies on it", ExitCode.REFUSED)
                self.parents(layer)
                doomed = f"{layer}{REMOVING}".encode()
                with suppress(FileNotFoundError):
                    self._hold(ending, name)
                    syscalls.rename_at(self.diff_fd, name, self.diff_fd, doomed)
                syscalls.unlink_at(self.layers_fd, name)
                with suppress(OSError):  # in use, or somebody else's
                    syscalls.rmdir_at(self.mnt_fd, name)
            with suppress(FileNotFoundError):
                sweep.remove_tree(self.diff_fd, doomed)

    @contextmanager
    def replacing(self, layer: str) -> Iterator[int]:
        """Fill an empty layer, all or nothing: a descriptor of the directory that is it at the end of the block.

        What an error or a crash leaves is swept. Raises UserError (REFUSED) unless it is empty and not mounted.
        """
        name = check_id(layer).encode()
        self.sweep()
        stage = f"{layer}{_APPLYING}".encode()
        with ExitStack() as ending:
            self.parents(layer)
            self._hold(ending, name)
            self._check_empty(layer)
            with self._locked():
                try:
                    syscalls.mkdir_at(self.diff_fd, stage, 0o700)
                except FileExistsError:
                    raise UserError(f"something is being put into layer {layer} already", ExitCode.REFUSED) from None
                fd = self._claimed(ending, stage)
            try:
                self._copy_root(name, stage)
                yield fd
                self._check_empty(layer)
                syscalls.rename_at(self.diff_fd, stage, self.diff_fd, name, syscalls.RENAME_EXCHANGE)
            finally:
                sweep.remove_tree(self.diff_fd, stage)

    def _hold(self, ending: ExitStack, name: bytes) -> None:
        """Keep mounts from writing to a layer, and others from sweeping it under its next name."""
        fd = self._claimed(ending, name)
        end = time.monotonic() + writelock.PATIENCE
        directory = writelock.lock_directory(fd)
        existed = syscalls.exists_at(fd, directory)
        held = writelock.lock(fd, os.path.join(os.fsencode(self.root), b"diff", name), _WRITTEN, end, directory)
        if held >= 0:
            ending.callback(os.close, held)
            if not existed:
                ending.callback(_remove_if_there, fd, directory)

    def _claimed(self, ending: ExitStack, name: bytes) -> int:
        fd = syscalls.open_listing_at(self.diff_fd, name)
        ending.callback(os.close, fd)
        with suppress(OSError):  # a file system without locks on directories
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return fd

    def _check_empty(self, layer: str) -> None:
        fd = self.open_layer(layer)
        try:
            names = whiteout.told_apart(entries_of(fd))
        finally:
            os.close(fd)
        if names.objects or names.hidden or names.opaque:
            raise UserError(f"layer {layer} is not empty", ExitCode.REFUSED)

    def sweep(self) -> int:
        """Delete what removals have left that did not come to their end; how many directories."""
        removed = 0
        listing = syscalls.open_listing(self.diff_fd)
        try:
            names = [name for name in entries_of(listing) if name.endswith(REMOVING.encode())]
        finally:
            os.close(listing)
        for name in names:
            with ExitStack() as ending, suppress(FileNotFoundError, NotADirectoryError, BlockingIOError):
                with self._locked():  # who makes such a directory claims it before anybody else can
                    fd = syscalls.open_listing_at(self.diff_fd, name)
                    ending.callback(os.close, fd)
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                sweep.remove_tree(self.diff_fd, name)
                removed += 1
        return removed

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One change of the list of layers at a time."""
        fd = syscalls.open_listing(self.layers_fd)
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX)
            except OSError as error:
                if error.errno != errno.EBADF:  # NFS, as in writelock.py
                    raise
            yield
        finally:
            os.close(fd)
