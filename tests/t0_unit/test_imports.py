"""What a start does not import: whole libraries cost more than all that the command does. Modules are counted, no time.

Also that a process that goes on for long has imported all that it can ever want of udbad, see mount/later.py.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.mount import REPOSITORY
from udbad import cli

EVENT_LOOPS = {"trio", "asyncio", "trio_asyncio", "asyncinotify", "pyfuse3"}
HEAVY = {
    *EVENT_LOOPS,
    *("pydantic", "prometheus_client", "rich", "tomlkit", "tomllib"),
    *("concurrent.futures", "email", "hashlib", "http", "importlib.metadata", "logging.handlers"),
    *("multiprocessing", "random", "ssl", "subprocess", "tempfile", "wsgiref"),
}
"""Libraries, and modules of the standard library that bring many others or are big themselves."""

SAYS_ITS_MODULES = """
import sys
before = set(sys.modules)  # .pth files of an environment bring some
from udbad.cli import main
try:
    main(prog_name="udbad")
except SystemExit:
    pass
print(*sorted(set(sys.modules) - before), file=sys.stderr)
"""


def run(script: str, *words: str, **environment: str) -> list[str]:
    """The last line that a Python with this script says on stderr, as words."""
    done = subprocess.run(
        [sys.executable, "-P", "-c", script, *words], check=True, capture_output=True, text=True, timeout=60, cwd="/",
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), **environment},
    )  # fmt: skip
    return done.stderr.splitlines()[-1].split()


def heavy(modules: list[str]) -> set[str]:
    assert "udbad.compiled" in modules, "udbad was loaded"
    return HEAVY.intersection(modules)


def test_help() -> None:
    assert heavy(run(SAYS_ITS_MODULES, "--help")) == set()
    assert heavy(run(SAYS_ITS_MODULES, "mount", "--help")) == set()


def test_help_says_of_commands_what_they_say() -> None:
    """It imports none of them (cli.COMMANDS)."""
    loaded = run(SAYS_ITS_MODULES, "--help")
    assert not [name for name in loaded if name.startswith("udbad.commands.")]
    for name, (module, text) in cli.COMMANDS.items():
        command = cli.main.commands[name]
        assert command.callback is not None
        assert command.callback.__module__ == f"udbad.commands.{module}"
        assert (text or None) == (None if command.hidden else command.get_short_help_str(1000))


@pytest.mark.parametrize("line", ["udbad ", "udbad umount ", "udbad branch del m "])
def test_tab(line: str, tmp_path: Path) -> None:
    variables = {"_UDBAD_COMPLETE": "bash_complete", "COMP_WORDS": line, "COMP_CWORD": str(line.count(" "))}
    assert heavy(run(SAYS_ITS_MODULES, UDBAD_RUN_DIR=str(tmp_path), **variables)) == set()


@pytest.mark.parametrize(
    "words",
    [
        ("mount", "-o", "br=/nowhere,plink=3", "none", "/nowhere"),
        ("umount", "/nowhere"),
        ("status", "--json"),
        ("flush", "/nowhere"),
        ("feed", "/nowhere"),
        ("branch", "add", "/nowhere", "/a=ro"),
    ],
)
def test_a_command_that_ends_with_one_line(words: tuple[str, ...], tmp_path: Path) -> None:
    assert heavy(run(SAYS_ITS_MODULES, *words, UDBAD_RUN_DIR=str(tmp_path))) == set()


SAYS_THE_MODULES_OF_A_MOUNT = """
import os, signal, sys
before = set(sys.modules)
from udbad.commands import mounting
from udbad.cli import main
def ready(process, ready_fd):
    names = sorted(set(sys.modules) - before)
    os.kill(os.getpid(), signal.SIGTERM)
    mounting.end = lambda: print(*names, file=sys.stderr)
mounting._say_ready = ready
try:
    main(prog_name="udbad")
except SystemExit:
    pass
mounting.end()
"""


@pytest.mark.fuse
@pytest.mark.parametrize("udba", ["none", "reval", "notify"])
def test_a_mount_that_begins_to_serve(udba: str, tmp_path: Path) -> None:
    for name in ("top", "base", "mnt"):
        (tmp_path / name).mkdir()
    options = f"br={tmp_path}/top=rw:{tmp_path}/base=ro,udba={udba},survive=off,control={tmp_path}/ctl"
    words = ["mount", "-f", "-o", options, "none", f"{tmp_path}/mnt"]
    loaded = run(SAYS_THE_MODULES_OF_A_MOUNT, *words)
    assert heavy(loaded) == set()
    assert "pathlib" not in loaded  # 3 ms with what it brings


SAYS_THE_MODULES_OF_THE_PROGRAM = """
import sys
before = set(sys.modules)
from udbad.commands import overlay
try:
    overlay.main()
except SystemExit:
    pass
import udbad.mount.guardian, udbad.mount.life, udbad.mount.presence
print(*sorted(set(sys.modules) - before), file=sys.stderr)
"""


def test_what_runs_for_each_container() -> None:
    """The program itself takes no library, and what serves no more than of other mounts, and no click."""
    loaded = run(SAYS_THE_MODULES_OF_THE_PROGRAM, "-o", "lowerdir=/nowhere,nothing", "/nowhere")
    assert heavy(loaded) == set()
    assert not {"click", "pathlib"}.intersection(loaded)


LOADED_FOR_EVER = """
import sys
import udbad.mount.worker
from udbad.mount import later
later.load()
print(*sorted(sys.modules), file=sys.stderr)
"""


def imported_by_functions(path: Path) -> Iterator[str]:
    """Modules of udbad that the functions of a module import, as far as their names show."""
    for function in ast.walk(ast.parse(path.read_text())):
        if not isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        for node in ast.walk(function):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("udbad"):
                for alias in node.names:
                    inner = REPOSITORY / f"{node.module}.{alias.name}".replace(".", "/")
                    is_module = inner.with_suffix(".py").exists() or inner.is_dir()
                    yield f"{node.module}.{alias.name}" if is_module else str(node.module)
            elif isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names if alias.name.startswith("udbad"))


def test_a_mount_process_has_all_of_udbad_that_it_can_want() -> None:
    """A version that is installed meanwhile must not bring parts of its own into it."""
    loaded = set(run(LOADED_FOR_EVER))
    ours = [name for name in loaded if name.startswith("udbad.") and name != "udbad.mount.later"]
    paths = [REPOSITORY / f"{name.replace('.', '/')}.py" for name in ours]
    wanted = {name for path in paths if path.exists() for name in imported_by_functions(path)}
    assert {"udbad.tools.explain", "udbad.tools.syncdown", "udbad.coherence.notify"} <= wanted
    assert wanted <= loaded


KEEPS = """
import sys
from udbad.mount import guardian, held, later
sys.path.insert(0, sys.argv[1])
later._MODULES = ("package.inner", "plain", *later._MODULES)
kept = held.Held()
for _ in kept.fill():
    pass
before = set(sys.modules)
for path in sys.argv[2:]:
    with open(path, "w") as file:
        file.write("raise SystemExit('another version')")
kept.install()
later.load()
import package.inner, plain
assert (package.NAME, package.inner.NAME, plain.NAME) == ("package", "package.inner", "plain")
assert [plain.__file__, package.inner.__file__, package.__file__] == sys.argv[2:]
loaded = set(sys.modules) - before
kept = {name for name in loaded if isinstance(sys.modules[name].__spec__.loader, held._Loader)}
print("kept", *sorted(kept), "others", *sorted(loaded - kept), file=sys.stderr)
"""


KILLED = """
import os, sys
from udbad.mount import held
held._be_child = lambda fd: os._exit(9)
kept = held.Held()
for _ in kept.fill():
    pass
kept.install()
assert kept not in sys.meta_path
"""


def test_a_guardian_whose_child_was_killed_keeps_nothing() -> None:
    """The next mount process imports from the disk then."""
    subprocess.run([sys.executable, "-c", KILLED], cwd=REPOSITORY, check=True, timeout=60)


def test_what_a_guardian_keeps_is_of_its_version(tmp_path: Path) -> None:
    """It has not imported it; a process that does gets what there was, whatever lies on the disk by then."""
    (tmp_path / "package").mkdir()
    paths = [tmp_path / name for name in ("plain.py", "package/inner.py", "package/__init__.py")]
    for path in paths:
        path.write_text("NAME = __name__")
    said = run(KEEPS, str(tmp_path), *map(str, paths))
    kept, others = said[1 : said.index("others")], said[said.index("others") + 1 :]
    assert {"package", "package.inner", "plain", "trio", "trio._core", "udbad.mount.beside"} <= set(kept)
    assert not [name for name in others if name.startswith(("udbad", "trio", "attr", "idna"))]


BEGINS_A_DAEMON = """
import sys
from udbad.cli import main
from udbad.supervisor import workers
def popen(*arguments, **words):
    print(*sorted(sys.modules), file=sys.stderr)
    raise SystemExit
workers.subprocess.Popen = popen
main(["run", "-c", "/nonexistent"])
"""


def test_the_daemon_starts_its_fork_server_first() -> None:
    """When both were killed, who uses a mount waits for what both import: at the same time."""
    modules = run(BEGINS_A_DAEMON)
    assert "udbad.supervisor.workers" in modules
    assert not {"pydantic", "udbad.settings.file"}.intersection(modules)
