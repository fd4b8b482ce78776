"""The manual pages, from the commands of click and the models of the options: udbad(8), mount.udba(8), udbad.toml(5),
udbad-overlay(1).

    python -m udbad.manpages share/man     writes them, in the checkout of the repository

What a command, an option or a key means stands beside it, see settings/reference.py. Only what introduces them, and
the examples, is written here. The language is man(7), in ASCII.
"""

from __future__ import annotations

import re
import sys
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from email.utils import parsedate_to_datetime
from pathlib import Path

import click

from udbad import __version__
from udbad.branch.capabilities import SYSTEM_CONFIG, SYSTEM_RUN_DIR
from udbad.branch.policy import COPYUP_POLICIES, CREATE_POLICIES
from udbad.branch.spec import ATTRIBUTES
from udbad.cli import main as program
from udbad.commands import overlay
from udbad.settings import reference
from udbad.settings.file import BranchTable, DaemonSettings, HostsSettings, MetricsSettings, MountKeys
from udbad.settings.options import IGNORED
from udbad.types import Perm

_WIDTH = 100

# -- man(7) -----------------------------------------------------------------------------------------

_NOT_ASCII = {"…": "...", "→": "->", "≥": ">="}

_ELSEWHERE = {
    ": see Modes": ": see MODES in mount.udba(8)",
    ": see Create policies": ": see POLICIES in mount.udba(8)",
    ": see Copy-up policies": ": see POLICIES in mount.udba(8)",
    ": see Durability": "",
    ": see Containers": ": see LAYERS in mount.udba(8)",
}
"""What the pages in docs/ have, and what stands for it here."""


def _escaped(text: str) -> str:
    """Text as groff shows it as it is: a hyphen that begins a word is an option's, which people copy."""
    for sign, words in _NOT_ASCII.items():
        text = text.replace(sign, words)
    return re.sub(r"(?<!\w)-|-(?!\w)", r"\\-", text.replace("\\", "\\(rs"))


def _literal(text: str) -> str:
    """In bold, every hyphen as it is typed."""
    return "\\fB" + re.sub(r"(?<!\\)-", r"\\-", _escaped(text)) + "\\fP"


def _prose(text: str) -> str:
    """Sentences in which `backticks` enclose what is literal."""
    for words, instead in _ELSEWHERE.items():
        text = text.replace(words, instead)
    return "".join(_literal(part) if odd % 2 else _escaped(part) for odd, part in enumerate(text.split("`")))


def _lines(roff: str) -> list[str]:
    """Filled; no line is taken for a request, which begins with a dot or an apostrophe."""
    lines = textwrap.wrap(roff, _WIDTH, break_long_words=False, break_on_hyphens=False)
    return ["\\&" + line if line.startswith((".", "'")) else line for line in lines]


def _paragraph(text: str) -> list[str]:
    return [".PP", *_lines(_prose(text))]


def _item(head: str, *paragraphs: str) -> list[str]:
    """A tagged paragraph; head, one line, is man(7) already, the paragraphs are not."""
    result = [".TP", head]
    for index, text in enumerate(paragraphs):
        result += [".IP"] * (index > 0) + _lines(_prose(text))
    return result


def _example(text: str) -> list[str]:
    lines = [_escaped(line) for line in text.rstrip("\n").split("\n")]
    return [".PP", ".nf", ".RS 4", *("\\&" + line if line.startswith((".", "'")) else line for line in lines),
            ".RE", ".fi"]  # fmt: skip


def _section(title: str, *parts: Iterable[str]) -> list[str]:
    """The first paragraph needs no request."""
    lines = [line for part in parts for line in part]
    return [f'.SH "{title}"', *(lines[1:] if lines[:1] == [".PP"] else lines)]


def _subsection(title: str, *parts: Iterable[str]) -> list[str]:
    return [f'.SS "{_escaped(title)}"', *_section("", *parts)[1:]]


def _page(name: str, section: int, date: str, summary: str, *sections: Iterable[str]) -> str:
    head = [
        '.\\" Generated: python -m udbad.manpages share/man',
        f'.TH {name.upper()} {section} {date} "udbad {__version__}" "udbad"',
        ".SH NAME",
        f"{name} \\- {summary}",
    ]
    return "\n".join([*head, *(line for part in sections for line in part)]) + "\n"


def _see_also(*pages: str) -> list[str]:
    words = [re.sub(r"(.*)\((.)\)", r"\\fB\1\\fP(\2)", page.replace("-", "\\-")) for page in pages]
    return [".SH SEE ALSO", *_lines(", ".join(words))]


# -- udbad(8) ---------------------------------------------------------------------------------------


def _commands(group: click.Group, path: str) -> Iterator[tuple[str, click.Command]]:
    """Every command that does something, with its words."""
    for name, command in sorted(group.commands.items()):
        if isinstance(command, click.Group):
            yield from _commands(command, f"{path} {name}")
        elif not command.hidden:
            yield f"{path} {name}".strip(), command


def _value(option: click.Option) -> str:
    """The placeholder of an option's value, "" for a flag."""
    if option.is_flag:
        return ""
    if isinstance(option.type, click.Choice):
        return option.metavar or "|".join(map(str, option.type.choices))
    number = isinstance(option.type, click.types.IntParamType | click.types.FloatParamType)
    return option.metavar or ("NUMBER" if number else option.name or "").upper().replace("_", "-")


def _argument(argument: click.Argument) -> str:
    word = argument.metavar or (argument.name or "").upper().replace("_", "-")
    if argument.metavar is None:
        word = word if argument.required else f"[{word}]"
        word += "..." * (argument.nargs == -1)
    return f"\\fI{_escaped(word)}\\fP"


def _options(command: click.Command) -> list[click.Option]:
    return [one for one in command.params if isinstance(one, click.Option) and not one.hidden]


def _command(words: str, command: click.Command) -> list[str]:
    arguments = [_argument(one) for one in command.params if isinstance(one, click.Argument)]
    usage = " ".join([_literal(f"udbad {words}"), *(["[\\fIOPTION\\fP]..."] if _options(command) else []), *arguments])
    paragraphs = [" ".join(text.split()) for text in (command.help or "").split("\n\n")]
    lines = [*_lines(usage), *(line for text in paragraphs for line in _paragraph(text))]
    for option in _options(command):
        names = ", ".join(_literal(name) for name in [*option.opts, *option.secondary_opts])
        value = _value(option)
        # A default that depends on who asks is shown as the text that stands for it.
        shown = option.show_default if isinstance(option.show_default, str) else option.default
        default = f" Default: `{shown}`." if option.show_default else ""
        head = f"{names} \\fI{_escaped(value)}\\fP" if value else names
        lines += _item(head, (option.help or "") + default)
    return [f'.SS "{_escaped(words)}"', *lines]


def _udbad(date: str) -> str:
    commands = [line for words, command in _commands(program, "") for line in _command(words, command)]
    return _page(
        "udbad",
        8,
        date,
        "unite directories into one mounted tree that follows direct changes",
        _section("SYNOPSIS", _lines("\\fBudbad\\fP \\fICOMMAND\\fP [\\fIOPTION\\fP]... [\\fIARGUMENT\\fP]...")),
        _section(
            "DESCRIPTION",
            _paragraph(program.help or ""),
            _paragraph(
                "Each mount is served by a process of its own. `udbad run` is the daemon: it mounts what its "
                "configuration file says, see udbad.toml(5), and keeps it mounted. `udbad mount` and mount.udba(8) "
                "mount by hand. The other commands ask the daemon or a mount process."
            ),
            _paragraph(
                "MOUNT is the name of a mount in the configuration, its mount point, or a path in it. No command but "
                "`umount` touches a mount point, which may hang."
            ),
        ),
        _section("COMMANDS", commands),
        _section("EXIT STATUS", *(_item(_literal(str(code)), text) for code, text in reference.exit_codes().items())),
        _section("ENVIRONMENT", _item(_literal("UDBAD_RUN_DIR"), f"Instead of `{SYSTEM_RUN_DIR}`.")),
        _section(
            "FILES",
            _item(_literal(SYSTEM_CONFIG), "The configuration of the daemon, with `conf.d/*.toml` beside it."),
            _item(_literal(SYSTEM_RUN_DIR), "Sockets, and what is known about each mount."),
            _item(
                ", ".join(map(_literal, ("~/.config/udbad/udbad.toml", "$XDG_RUNTIME_DIR/udbad"))),
                "The same of an ordinary user.",
            ),
        ),
        _see_also("mount.udba(8)", "udbad.toml(5)", "mount(8)", "inotify(7)"),
    )


# -- mount.udba(8) ----------------------------------------------------------------------------------


def _meanings(words: Mapping[str, str]) -> list[str]:
    return [line for word, text in words.items() for line in _item(_literal(word), text)]


def _mount_options() -> Iterator[str]:
    for one in reference.mount_options():
        default = " Default: `{}`.".format(one.default.strip('"')) if one.default else ""
        value = "" if all(word[-1] != "=" for word in one.words) else f" Value: {one.values}."
        yield from _item(", ".join(map(_literal, one.words)), one.meaning + value + default)


def _mount_udba(date: str) -> str:
    perms = reference.explained(Perm)
    lists = [
        line
        for words, form, meaning in reference.list_options()
        for line in _item(", ".join(map(_literal, words)) + f"\\fI{_escaped(form)}\\fP", meaning)
    ]
    return _page(
        "mount.udba",
        8,
        date,
        "mount a union of directories",
        _section(
            "SYNOPSIS",
            _lines("\\fBmount \\-t udba \\-o\\fP \\fIOPTIONS\\fP \\fISOURCE\\fP \\fIDIRECTORY\\fP"),
            [".PP"],
            _lines(
                "\\fBmount.udba\\fP \\fISOURCE\\fP \\fIDIRECTORY\\fP [\\fB\\-fnsv\\fP] [\\fB\\-o\\fP \\fIOPTIONS\\fP]"
            ),
        ),
        _section(
            "DESCRIPTION",
            _paragraph(
                "mount(8) calls this program for `mount -t udba`, for lines of fstab(5) and for systemd's mount units. "
                "The union is looked after by the daemon, see udbad(8), when one runs, and else has a process of its "
                "own. SOURCE is its name in `/proc/mounts`, and means nothing else unless it is a layer, see LAYERS."
            ),
            _paragraph("`-f` checks the options only, `-v` logs what helps to find a fault, `-n` and `-s` do nothing."),
            _paragraph("With `-o remount` options and branches of a mounted union change, while it is used."),
        ),
        _section(
            "BRANCHES",
            _paragraph(
                "`br=PATH[=PERM[+ATTR...]][:PATH...]`, top first. `\\:` `\\,` `\\=` `\\\\` escape characters in paths."
            ),
            _subsection("Permissions", _meanings({perm.value: perms[perm.name] for perm in Perm})),
            _subsection("Attributes", _meanings({word: one.meaning for word, one in ATTRIBUTES.items()})),
        ),
        _section(
            "LAYERS",
            _paragraph(
                "SOURCE `docker-aufs:ROOT#ID`, or `source=docker-aufs:ROOT#ID`, stands for all branches, as Docker's "
                "aufs driver has them: `ROOT/diff/ID` is written to, and `ROOT/layers/ID` names the layers below it, "
                "nearest first, one a line: `ROOT/diff/PARENT=ro+wh`. With `ro` the layer itself is only read, too. "
                "There may be any number of layers; their paths are no part of what mount(2) is told."
            ),
        ),
        _section(
            "OPTIONS",
            _paragraph("Separated by commas; the last word on a subject wins."),
            _subsection("The list of branches", lists),
            _subsection("The mount", _mount_options()),
            _subsection(
                "Accepted without an effect",
                _paragraph(" ".join(f"`{word}`" for word in sorted(IGNORED))),
            ),
        ),
        _section(
            "MODES",
            _meanings(
                {
                    "none": "Changes made through the mount are seen, direct ones need not be. Everything is cached.",
                    "reval": "Any access that begins after a direct change has returned sees it. Every walk of a path "
                    "asks the process of the mount.",
                    "notify": "The same, about a millisecond later, at the speed of `none`: inotify(7) tells what has "
                    "changed. What cannot be watched is served as under `reval`.",
                }
            ),
        ),
        _section(
            "POLICIES",
            _subsection("Which branch gets a new object: create=", _meanings(reference.policies(CREATE_POLICIES))),
            _subsection("Which branch receives a copy-up: cpup=", _meanings(reference.policies(COPYUP_POLICIES))),
        ),
        _section(
            "EXIT STATUS",
            _meanings({"0": "It is mounted.", "1": "An option is wrong.", "32": "It could not be mounted."}),
        ),
        _section(
            "EXAMPLES",
            _example("mount -t udba -o br=/srv/top=rw:/srv/base=ro,udba=notify none /mnt"),
            _paragraph("In fstab(5):"),
            _example("pool  /srv/pool  udba  br=/disks/1=rw:/disks/2=rw,create=mfs,udba=notify  0  0"),
            _paragraph("One more branch at the bottom, and the top one away:"),
            _example("mount -o remount,append=/srv/more=ro,del=/srv/top /mnt"),
        ),
        _see_also("udbad(8)", "udbad.toml(5)", "mount(8)", "fstab(5)"),
    )


# -- udbad.toml(5) ----------------------------------------------------------------------------------


def _keys(entries: Iterable[reference.Entry]) -> Iterator[str]:
    for one in entries:
        default = f" Default: `{one.default}`." if one.default else ""
        yield from _item(_literal(one.key), f"{one.meaning} Value: {one.values}.{default}")


def _udbad_toml(date: str, examples: Mapping[str, str]) -> str:
    return _page(
        "udbad.toml",
        5,
        date,
        "configuration of the udbad daemon",
        _section(
            "DESCRIPTION",
            _paragraph(
                f"`{SYSTEM_CONFIG}` is TOML. `conf.d/*.toml` beside it is read after it, in the order of the names; a "
                "table may be in one file only. The daemon notices changes by itself, and takes up what can change "
                "while mounted at once. `udbad check-config` says everything that is wrong."
            ),
        ),
        _section("[daemon]", _keys(reference.entries(DaemonSettings))),
        _section("[metrics]", _keys(reference.entries(MetricsSettings))),
        _section("[hosts]", _keys(reference.entries(HostsSettings))),
        _section(
            "[mounts.NAME]",
            _paragraph("`branches`, and:"),
            _keys(reference.entries(MountKeys)),
            _subsection(
                "Branches",
                _paragraph(
                    "`branches` is a list, top first, of strings `PATH[=PERM[+ATTR...]]` as in mount.udba(8), or of "
                    "tables with these keys:"
                ),
                _keys(reference.entries(BranchTable)),
            ),
            _subsection(
                "Mount options",
                _keys(one for one in reference.mount_options() if one.key),
            ),
        ),
        _section("EXAMPLES", *(_example(text) for text in examples.values())),
        _see_also("udbad(8)", "mount.udba(8)"),
    )


# -- udbad-overlay(1) -------------------------------------------------------------------------------


def _overlay(date: str) -> str:
    usage, _, options = overlay.HELP.partition("\n\n")[2].partition("\n\n")
    return _page(
        "udbad-overlay",
        1,
        date,
        "mount a union with the command line of fuse-overlayfs",
        _section(
            "SYNOPSIS",
            _lines(
                "\\fBudbad\\-overlay\\fP [\\fB\\-f\\fP] [\\fB\\-d\\fP] [\\fB\\-o\\fP \\fIOPTIONS\\fP]... \\fIMERGED\\fP"
            ),
        ),
        _section(
            "DESCRIPTION",
            _paragraph(" ".join(usage.split())),
            _paragraph(
                "It takes the place of fuse-overlayfs as `mount_program` of containers-storage.conf(5), for buildah "
                "and podman. The mount is one of udbad(8) like any other: `udbad status`, `udbad why` and the like "
                "work on it."
            ),
        ),
        _section("OPTIONS", _example(options)),
        _see_also("udbad(8)", "mount.udba(8)", "containers-storage.conf(5)", "fuse-overlayfs(1)"),
    )


def pages(root: Path) -> dict[str, str]:
    """The text of each page, by its path below a directory `man`. root: of the repository, for date and examples."""
    (stamp,) = re.findall(r"^ -- .*>  (.*)$", (root / "debian/changelog").read_text(), re.MULTILINE)[:1]
    date = f"{parsedate_to_datetime(stamp):%Y-%m-%d}"
    examples = {name: (root / "config" / f"{name}.toml").read_text() for name in ("pool", "developer", "live")}
    return {
        "man8/udbad.8": _udbad(date),
        "man8/mount.udba.8": _mount_udba(date),
        "man8/mount.fuse.udba.8": ".so man8/mount.udba.8\n",
        "man1/udbad-overlay.1": _overlay(date),
        "man5/udbad.toml.5": _udbad_toml(date, examples),
    }


def main(directory: Path) -> None:
    for name, text in pages(Path(__file__).parents[1]).items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "ascii")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
