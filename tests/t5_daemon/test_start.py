"""A start that fails at whatever step leaves nothing: no mount, mark, socket or descriptor; one line says why."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import trio

from tests.helpers.leaks import mounts_under
from tests.helpers.mount import DEADLINE, REPOSITORY, UnionFactory
from udbad.branch.writelock import WriteLocks
from udbad.coherence.notify import NotifyCoherence
from udbad.errors import UserError
from udbad.kernel import mounts, newmount, session
from udbad.kernel.invalidator import Invalidator
from udbad.mount import life, mountproc, presence
from udbad.mount.writing import Writing
from udbad.settings.options import parse_mount_options
from udbad.union import homes

pytestmark = pytest.mark.fuse

STEPS: dict[str, tuple[object, str]] = {
    "branches": (mountproc, "open_branches"),
    "lock": (WriteLocks, "take"),
    "mark": (Writing, "begin"),
    "pseudo-links": (homes, "load"),
    "connection": (newmount, "_configure"),
    "INIT": (session, "InitRequest"),
    "invalidator": (Invalidator, "__init__"),
    "coherence": (NotifyCoherence, "start"),
    "edge": (mountproc, "Native"),
    "event loop": (os, "eventfd"),
    "control socket": (presence, "bind"),
    "mount": (newmount, "attach"),
    "connection number": (mounts, "unions"),
    "entry": (mountproc.MountProcess, "write_entry"),
}


def _fail_to_start(step: str, failure: Exception, tree: Path, run_dir: str | None) -> None:
    """In a child: a mount process gives up a capability and has a umask of its own. Exit code 0: as it should be."""
    owner, name = STEPS[step]
    works = getattr(owner, name)

    def fail(*arguments: object, **keys: object) -> None:
        setattr(owner, name, works)  # once: what is undone may need it
        raise failure

    descriptors = len(os.listdir("/proc/self/fd"))
    setattr(owner, name, fail)
    options = f"br={tree}/top=rw:{tree}/base=ro,udba=notify"
    options += "" if run_dir else f",control={tree}/control"
    identity = presence.Identity(run_dir=run_dir)
    with pytest.raises(UserError) as caught:
        life.run(parse_mount_options(options), os.fsencode(tree / "mnt"), lambda _: None, identity)
    assert "injected" in caught.value.message
    assert "\n" not in caught.value.message
    assert len(os.listdir("/proc/self/fd")) == descriptors


def _in_a_child(call: Callable[[], None]) -> int:
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            call()
            code = 0
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.parametrize("step", STEPS)
def test_a_step_that_fails(tmp_path: Path, step: str) -> None:
    for name in ("top", "base", "mnt"):
        (tmp_path / name).mkdir()
    (tmp_path / "top" / ".wh..wh.plnk").mkdir()
    failures: list[Exception] = [OSError(5, "injected"), UserError("injected")]
    for failure in failures:
        # The last step is no reason not to serve when it fails as a full run directory makes it fail.
        if step == "entry" and isinstance(failure, OSError):
            continue
        for run_dir in (None, str(tmp_path / "run")):
            if step == "control socket" and run_dir is not None:
                continue  # likewise
            assert _in_a_child(partial(_fail_to_start, step, failure, tmp_path, run_dir)) == 0
            assert mounts_under(tmp_path) == []
            assert not (tmp_path / "top" / ".wh..wh.udbad").exists()
            assert not (tmp_path / "control").exists()
            assert list((tmp_path / "run").glob("*")) == []


def test_a_branch_that_was_not_reached_keeps_its_mark(tmp_path: Path) -> None:
    """What an earlier mount has left there has not been swept."""
    for name in ("a", "b", "mnt"):
        (tmp_path / name).mkdir()
    (tmp_path / "b" / ".wh..wh.udbad").touch()
    (tmp_path / "a" / ".wh..wh.aufs").mkdir()  # cannot be made writable
    command = [sys.executable, "-m", "udbad", "mount", "-f", "-o", f"br={tmp_path}/a=rw:{tmp_path}/b=rw", "none", "mnt"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "UDBAD_RUN_DIR": str(tmp_path / "run")}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, check=False, capture_output=True, text=True, timeout=DEADLINE
    )
    said = [line for line in done.stderr.splitlines() if "INFO" not in line]
    assert (done.returncode, len(said)) == (4, 1), done.stderr
    assert not (tmp_path / "a" / ".wh..wh.udbad").exists()
    assert (tmp_path / "b" / ".wh..wh.udbad").exists()


def test_a_control_socket_of_somebody_else_stays(tmp_path: Path) -> None:
    for name in ("top", "base", "mnt"):
        (tmp_path / name).mkdir()
    with socket.socket(socket.AF_UNIX) as foreign:
        os.symlink(tmp_path, place := f"/tmp/udbad-{os.getpid()}")
        try:
            foreign.bind(f"{place}/control")
            foreign.listen()
            options = parse_mount_options(f"br={tmp_path}/top:{tmp_path}/base,control={place}/control")

            def start() -> None:
                with pytest.raises(UserError, match="another process answers on"):
                    life.run(options, os.fsencode(tmp_path / "mnt"), lambda _: None)

            assert _in_a_child(start) == 0
        finally:
            os.unlink(place)
        assert (tmp_path / "control").exists()
    assert mounts_under(tmp_path) == []


def test_a_taken_metrics_port_is_a_warning(union: UnionFactory) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        mount = union(options=f"metrics=127.0.0.1:{port}", allow_log="no metrics are served")
        assert os.listdir(mount.path) == []
        assert f"no metrics are served: metrics on 127.0.0.1:{port}: Address already in use" in mount.log()


def test_as_root_of_a_user_namespace(tmp_path: Path) -> None:
    """Large reads and writes come whole."""
    for name in ("top", "base", "mnt"):
        (tmp_path / name).mkdir()
    data = os.urandom(3 << 20)
    (tmp_path / "base" / "large").write_bytes(data)
    script = """
        "$1" -m udbad mount -o br=top=rw:base=ro,udba=notify none mnt || exit 1
        cmp mnt/large base/large || exit 2
        cp base/large mnt/copy && cmp mnt/copy base/large || exit 3
        echo more >>mnt/large || exit 4
        ls -A mnt | tr '\\n' ' '
        "$1" -m udbad umount mnt || exit 5
    """
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "UDBAD_RUN_DIR": str(tmp_path / "run")}
    done = subprocess.run(
        ["unshare", "-Urm", "sh", "-c", script, "sh", sys.executable],
        cwd=tmp_path, env=environment, check=False, capture_output=True, text=True, timeout=3 * DEADLINE,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "copy large "), done.stderr
    assert "Traceback" not in done.stderr
    assert (tmp_path / "top" / "copy").read_bytes() == data
    assert (tmp_path / "top" / "large").read_bytes() == data + b"more\n"


def test_a_signal_after_the_unmount_does_not_cut_the_end_short(tmp_path: Path) -> None:
    """The supervisor stops a mount that somebody has unmounted a moment ago: the branches are marked clean all the
    same, and the process is not one that was killed."""
    for name in ("top", "base", "mnt"):
        (tmp_path / name).mkdir()
    options = parse_mount_options(f"br={tmp_path}/top=rw:{tmp_path}/base=ro")
    close = mountproc.MountProcess.close

    def interrupted(process: mountproc.MountProcess) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        close(process)

    def serve() -> None:
        mountproc.MountProcess.close = interrupted  # type: ignore[assignment, method-assign]  # in a child of our own
        life.run(options, os.fsencode(tmp_path / "mnt"), lambda _: os.kill(os.getpid(), signal.SIGTERM))
        os.kill(os.getpid(), signal.SIGTERM)

    assert _in_a_child(serve) == 0
    assert not (tmp_path / "top" / ".wh..wh.udbad").exists()
    assert mounts_under(tmp_path) == []


def test_trio_that_cannot_begin(tmp_path: Path) -> None:
    """The mount serves by then; so it ends as after any other crash, which a guardian would see."""
    for name in ("top", "base", "mnt"):
        (tmp_path / name).mkdir()
    options = parse_mount_options(f"br={tmp_path}/top=rw:{tmp_path}/base=ro")

    def fail(*arguments: object, **keys: object) -> None:
        raise RuntimeError("injected")

    def serve() -> None:
        trio.lowlevel.start_guest_run = fail  # in a child of our own
        with pytest.raises(RuntimeError, match="injected"):
            life.run(options, os.fsencode(tmp_path / "mnt"), lambda _: None)

    try:
        assert _in_a_child(serve) == 0
    finally:
        subprocess.run(["umount", "-l", tmp_path / "mnt"], check=True, timeout=DEADLINE)


def test_a_control_socket_that_is_gone_at_the_end(tmp_path: Path) -> None:
    """As the next process finds it when one is killed in its orderly end: that is nothing to warn of."""
    path = tmp_path / "ctl"

    here = presence.Presence(os.fsencode(tmp_path), presence.NOBODY, str(path))
    listener = here.listen(None)
    assert listener is not None
    path.unlink()
    listener.close()
    here.close()
