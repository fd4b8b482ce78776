"""udbad-overlay: a union with the command line of fuse-overlayfs, for who calls that as a mount_program.

It runs once for each container, and whoever calls it waits: so no click here, see serving.py.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Sequence
from typing import Final, NamedTuple

from udbad import __version__
from udbad.errors import ExitCode, UserError

_NAME: Final = "udbad-overlay"
HELP: Final = f"""\
Usage: {_NAME} [-f] [-d] [-o OPTION[,OPTION...]]... MERGED

Mount a union of directories on MERGED, as fuse-overlayfs does; it serves once this returns.

  -o lowerdir=A[:B...]         the lower layers, the uppermost first; never written to
  -o upperdir=U,workdir=W      where changes go; without these the mount is read-only
  -o uidmapping=0:100000:65536[:...], gidmapping=...
                               owners as others: the first id in the layers, the first id shown, how many
  -o squash_to_uid=N, squash_to_gid=N, squash_to_root
                               everything is shown as one user's, one group's
  -o volatile                  fsync does nothing: after a crash of the machine the upper layer is worth nothing
  -o noacl, noxattrs           without POSIX ACLs; without any extended attributes
  -o ro, nosuid, nodev, noexec, noatime, ...
                               as in mount(8)
  -o udba=notify               layers may be changed directly, and that is seen; by default they are private
  -f                           stay in the foreground
  -d, --debug                  the same, and log also what helps to find a fault
  -V, --version
  -h, --help

In paths \\, \\: and \\\\ stand for the second character. Whatever else fuse-overlayfs takes is refused by name.
"""


class Words(NamedTuple):
    """What was written. options: the arguments of -o."""

    options: Sequence[str]
    foreground: bool
    debug: bool
    mount_point: str


def parse(arguments: Sequence[str]) -> Words | str:
    """A text to print instead for --help and --version. Raises UserError (OPTION)."""
    options: list[str] = []
    places: list[str] = []
    foreground = debug = False
    rest = iter(arguments)
    for word in rest:
        if word == "--":
            places += rest
        elif word in ("-h", "--help"):
            return HELP
        elif word in ("-V", "--version"):
            return f"{_NAME}: version {__version__}\n"
        elif word.startswith("-o"):
            value = word[2:] or next(rest, None)
            if value is None:
                raise UserError("-o needs a value", ExitCode.OPTION)
            options.append(value)
        elif word == "-f":
            foreground = True
        elif word in ("-d", "--debug"):
            foreground = debug = True
        elif word == "-s":
            pass  # one thread serves requests as it is
        elif word.startswith("-") and word != "-":
            raise UserError(f"{word}: no such option", ExitCode.OPTION)
        else:
            places.append(word)
    if len(places) != 1:
        raise UserError("one mount point is needed" if not places else f"{places[1]}: only one mount point is possible",
                        ExitCode.OPTION)  # fmt: skip
    return Words(options, foreground, debug, places[0])


def main() -> None:
    """Entry point of udbad-overlay."""
    gc.disable()  # of what is imported nothing goes, and serve() ends this when all is there
    from udbad.commands.serving import user_errors

    with user_errors(_NAME):
        words = parse(sys.argv[1:])
        if isinstance(words, str):
            sys.stdout.write(words)
        else:
            sys.exit(_mount(words))


def _mount(words: Words) -> int:
    from udbad.branch import capabilities
    from udbad.commands.serving import Job, finish, serve, serve_in_background
    from udbad.settings.overlayfs import mount_options

    options = mount_options(words.options)
    run_dir = os.environ.get("UDBAD_RUN_DIR") or capabilities.run_dir()
    place = os.path.abspath(words.mount_point)
    job = Job(options, place, run_dir, words.debug, "plain", background=not words.foreground)
    job.set_up_log()
    if not words.foreground:
        finish(serve_in_background(job))
    return serve(job, lambda: None, ())


if __name__ == "__main__":
    main()
