"""Calls that the design keeps out of udbad, or keeps in one place; found with ast, nothing is imported.

No shell and no change of the working directory anywhere; changes of branches only through branch/, which
does them relative to a directory descriptor; print only in cli.py; kernel notifications only where the
invalidator's threads call them (elsewhere they can deadlock with the request being served); no bare except.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "udbad").rglob("*.py"))]

SHELL = {"os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"}
DIRECTORY = {"os.chdir", "os.fchdir", "contextlib.chdir", "os.chroot"}
NOTIFY = {"pyfuse3.invalidate_inode", "pyfuse3.invalidate_entry", "pyfuse3.invalidate_entry_async"}
NOTIFY |= {"pyfuse3.notify_store"}
# By name or by descriptor: who changes metadata or names of a branch object goes through branch/.
MUTATING = {
    *("os.chmod", "os.fchmod", "os.lchmod", "os.chown", "os.fchown", "os.lchown", "os.utime", "os.truncate"),
    *("os.mkdir", "os.makedirs", "os.mknod", "os.mkfifo", "os.symlink", "os.link", "os.setxattr", "os.removexattr"),
    *("os.rename", "os.renames", "os.replace", "os.unlink", "os.remove", "os.rmdir", "os.removedirs"),
}
# Flags with which os.open makes or empties a file.
OPEN_TO_CHANGE = {"O_CREAT", "O_TRUNC", "O_TMPFILE"}


def names_of_imports(tree: ast.AST) -> dict[str, str]:
    """Local name → dotted name of what was imported under it."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.asname:
                    names[alias.asname] = alias.name
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    return names


def dotted(node: ast.expr, names: dict[str, str]) -> str:
    """`os.path.join` for such an expression, with imported names resolved; "" for any other expression."""
    if isinstance(node, ast.Name):
        return names.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        before = dotted(node.value, names)
        return f"{before}.{node.attr}" if before else ""
    return ""


def findings(source: str, path: str) -> Iterator[str]:
    """`path:line: what` for everything forbidden in this source; path is relative to the repository."""
    tree = ast.parse(source)
    names = names_of_imports(tree)
    core = path.startswith(("udbad/union/", "udbad/inodes/"))
    for node in ast.walk(tree):
        what = None
        if isinstance(node, (ast.Name, ast.Attribute)):
            # A reference counts as a call: a function handed to a thread or an undo stack is called there.
            what = _forbidden_name(dotted(node, names), path, core)
        elif isinstance(node, ast.Call):
            what = _forbidden_arguments(node, names, core)
        elif isinstance(node, ast.ExceptHandler) and node.type is None:
            what = "bare except"
        if what and isinstance(node, (ast.expr, ast.excepthandler)):
            yield f"{path}:{node.lineno}: {what}"


def _forbidden_name(name: str, path: str, core: bool) -> str | None:
    if name in SHELL:
        return f"{name} starts a shell"
    if name in DIRECTORY:
        return f"{name} changes the process for everybody"
    if name in NOTIFY and path != "udbad/edge/portable_session.py":
        return f"{name} outside what the invalidator's threads call"
    if name == "print" and path != "udbad/cli.py":
        return "print outside cli.py"
    if core and (name in MUTATING or name.startswith("shutil.")):
        return f"{name} outside branch/"
    return None


def _forbidden_arguments(call: ast.Call, names: dict[str, str], core: bool) -> str | None:
    name = dotted(call.func, names)
    if any(word.arg == "shell" and not _is_false(word.value) for word in call.keywords):
        return f"{name or 'a call'} with shell="
    if name == "os.open" and core:
        words = {dotted(child, names).rpartition(".")[2] for child in ast.walk(call) if isinstance(child, ast.expr)}
        if words & OPEN_TO_CHANGE:
            return "os.open that creates or truncates outside branch/"
    return None


def _is_false(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is False


@pytest.mark.parametrize("path", SOURCES)
def test_no_forbidden_call(path: str) -> None:
    found = list(findings((ROOT / path).read_text(), path))
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("udbad/supervisor/supervisor.py", "import os\nos.system('true')"),
        ("udbad/supervisor/supervisor.py", "import subprocess\nsubprocess.run('true', shell=True)"),
        ("udbad/supervisor/supervisor.py", "from subprocess import getoutput\ngetoutput('true')"),
        ("udbad/cli.py", "import os\nos.chdir('/')"),
        ("udbad/cli.py", "from os import fchdir as go\ngo(3)"),
        ("udbad/union/rename.py", "import os\nos.rename(b'a', b'b')"),
        ("udbad/union/rename.py", "import os as o\no.unlink(b'a')"),
        ("udbad/union/rename.py", "from os import mkdir\nmkdir(b'a')"),
        ("udbad/union/rename.py", "import os\nundo.callback(os.rmdir, b'a')"),
        ("udbad/union/copyup.py", "import os\nos.fchown(3, 0, 0)"),
        ("udbad/union/copyup.py", "import shutil\nshutil.copy2(b'a', b'b')"),
        ("udbad/union/copyup.py", "import os\nos.open(b'a', os.O_WRONLY | os.O_CREAT)"),
        ("udbad/inodes/inomap.py", "import os\nos.setxattr(b'a', b'user.b', b'')"),
        ("udbad/edge/portable.py", "import pyfuse3\npyfuse3.invalidate_inode(1)"),
        ("udbad/kernel/session.py", "from pyfuse3 import invalidate_entry_async as drop\ndrop(1, b'a')"),
        ("udbad/edge/portable.py", "print('here')"),
        ("udbad/edge/portable.py", "try:\n    pass\nexcept:\n    pass"),
    ],
)
def test_the_checker_finds(path: str, source: str) -> None:
    assert len(list(findings(source, path))) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("udbad/cli.py", "print('usage')"),
        ("udbad/branch/syscalls.py", "import os\nos.rename(b'a', b'b')"),
        ("udbad/edge/portable_session.py", "import pyfuse3\npyfuse3.invalidate_entry(1, b'a')"),
        ("udbad/union/copyup.py", "import os\nfd = os.open(b'a', os.O_RDONLY)\nos.fstat(fd)\nos.close(fd)"),
        ("udbad/union/rename.py", "from udbad.branch import syscalls\nsyscalls.rename(1, b'a', 2, b'b')"),
        ("udbad/supervisor/supervisor.py", "import subprocess\nsubprocess.run(['true'], shell=False)"),
    ],
)
def test_the_checker_allows(path: str, source: str) -> None:
    assert list(findings(source, path)) == []
