"""Rules that hold for every test, and the fixtures `union` and `expect_log`.

A test fails when it logs a warning it did not declare, keeps a file descriptor open, or leaves a
mount below the temporary directory. A test marked `fuse` or `system` is skipped, with the reason,
where nothing can be mounted; with CI=true any skip is a failure unless its reason starts with "ok:".
"""

from __future__ import annotations

import gc
import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import hypothesis
import pytest

from tests.helpers import forked
from tests.helpers import mount as mount_helper
from tests.helpers.leaks import FS_TYPE, RUN_MARKER, MountInfo, own_namespace, read_mountinfo, remove_mount
from tests.helpers.mount import WATCHDOG, Mount, UnionFactory, mounted, why_no_fuse

WORKER: Final = "PYTEST_XDIST_WORKER" in os.environ
"""Whether this is one of several workers of pytest-xdist, which have a mount namespace each."""

# On two shared cores the time of one example says nothing about the code, nor does the time of drawing it.
hypothesis.settings.register_profile(
    "udbad", deadline=None, print_blob=True, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("udbad")


def pytest_configure() -> None:
    # make test sets the marker; a bare pytest gets one too, so that what it leaves can be told apart.
    os.environ.setdefault(RUN_MARKER, f"pytest-{os.getpid()}")
    os.umask(0o022)  # what tests expect of modes; whoever runs them may have another one
    if WORKER and why_no_fuse() is None:
        own_namespace()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """In the order of the files, whole systems and long runs last; among workers first, so that all end together."""
    long = ("system", "stress")
    items.sort(key=lambda item: any(item.get_closest_marker(name) for name in long) != WORKER)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("fuse") or item.get_closest_marker("system"):
        reason = why_no_fuse()
        if reason is not None:
            pytest.skip(f"cannot mount: {reason}")
        forked.prepare()  # its socket is no descriptor of the test's


def _forbidden_skip(report: pytest.TestReport | pytest.CollectReport) -> str | None:
    """The message with which a skip fails in CI; None for anything that may pass."""
    if os.environ.get("CI") != "true" or not report.skipped or hasattr(report, "wasxfail"):
        return None
    # For a skip pytest stores (file, line, "Skipped: reason").
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    reason = reason.removeprefix("Skipped: ")
    return None if reason.startswith("ok:") else f"skipped in CI: {reason}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if (message := _forbidden_skip(report)) is not None:
        report.outcome = "failed"
        report.longrepr = message
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    if (message := _forbidden_skip(report)) is not None:
        report.outcome = "failed"
        report.longrepr = message
    return report


def _open_descriptors() -> dict[int, str]:
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:  # the descriptor that listed the directory
            continue
    return found


@pytest.fixture(scope="session")
def _open_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory above every tmp_path, made passable (pytest makes it 0700): tests act as other users too."""
    base = tmp_path_factory.getbasetemp().resolve()
    base.chmod(0o755)
    for parent in base.parents:
        if parent.stat().st_mode & 0o7777 == 0o700 and "pytest" in parent.name:
            parent.chmod(0o711)
    return base


def _new_mounts(before: list[MountInfo], base: Path) -> list[MountInfo]:
    """What a test may not leave: mounts below the base, and in a namespace of its own a union anywhere."""
    now = read_mountinfo()
    if now == before:  # most often, and this is done for every test
        return []
    new = (mount for mount in now if mount not in before)
    return [mount for mount in new if mount.path.is_relative_to(base) or (WORKER and mount.fs_type == FS_TYPE)]


@pytest.fixture(scope="module", autouse=True)
def _quick_collections() -> None:
    """A search for garbage does not go through what is there already: ten thousand tests, to begin with. Many ask for
    one, after each step at which something is killed."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _nothing_left(request: pytest.FixtureRequest, _open_base: Path) -> Iterator[None]:
    if "tmp_path" in request.fixturenames:
        # Asked for here so that it is removed after this check: removing must never enter a mount.
        request.getfixturevalue("tmp_path").chmod(0o755)
    base = _open_base
    os.umask(0o022)  # what tests expect of modes; the real Credentials, used in this process, leave 0
    mounts_before = read_mountinfo()
    descriptors_before = _open_descriptors()
    yield
    descriptors = _open_descriptors()
    if len(descriptors) > len(descriptors_before):
        gc.collect()  # only now: it takes long, and cycles that hold a descriptor are few
        descriptors = _open_descriptors()
    mounts = _new_mounts(mounts_before, base)
    for mount in reversed(mounts):
        remove_mount(mount)
    if mounts:
        pytest.fail("mounts left by this test: " + ", ".join(map(str, mounts)), pytrace=False)
    if len(descriptors) > len(descriptors_before):
        new = [f"{fd} → {target}" for fd, target in descriptors.items() if descriptors_before.get(fd) != target]
        pytest.fail(f"descriptors left by this test: {', '.join(new)}", pytrace=False)


class _Records(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


@pytest.fixture(autouse=True)
def expect_log() -> Iterator[Callable[[str], None]]:
    """Declare a warning or error that this test causes: expect_log(pattern), a regular expression.

    Each pattern must match at least one record of the logger `udbad` or its children, and each record
    must match a pattern. This is about code run in this process; for a daemon see `allow_log`.
    """
    patterns: list[str] = []
    handler = _Records()
    logger = logging.getLogger("udbad")
    logger.addHandler(handler)
    try:
        yield patterns.append
    finally:
        logger.removeHandler(handler)
    messages = [f"{record.levelname} {record.name}: {record.getMessage()}" for record in handler.records]
    undeclared = [text for text in messages if not any(re.search(pattern, text) for pattern in patterns)]
    if undeclared:
        pytest.fail(f"log records that the test did not declare with expect_log: {undeclared}", pytrace=False)
    absent = [pattern for pattern in patterns if not any(re.search(pattern, text) for text in messages)]
    if absent:
        pytest.fail(f"expected in the log, but not there: {absent}", pytrace=False)


@pytest.fixture
def in_memory(tmp_path: Path) -> Iterator[None]:
    """Have tmp_path on a tmpfs, where one may be mounted and has user.* attributes (Linux 6.6): many small changes, or
    many names, need not wait for a disk."""
    if why_no_fuse() is not None:
        yield
        return
    subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=755", "none", str(tmp_path)], check=True, timeout=20)
    try:
        try:
            os.setxattr(tmp_path, "user.probe", b"")
            os.removexattr(tmp_path, "user.probe")
        except OSError:
            subprocess.run(["umount", str(tmp_path)], check=True, timeout=20)
        yield
    finally:
        while any(mount.path == tmp_path for mount in read_mountinfo()):
            subprocess.run(["umount", "-i", "-l", str(tmp_path)], check=True, timeout=20)


@pytest.fixture
def patch_daemon(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Python for the mount processes that this test makes from now on, which run it when all of udbad is imported."""
    return lambda source: monkeypatch.setattr(mount_helper, "PATCH", source)


@pytest.fixture
def union(tmp_path: Path) -> Iterator[UnionFactory]:
    """Mount unions of directories below tmp_path, see UnionFactory; at the end all are unmounted and checked."""
    with ExitStack() as stack:

        def factory(
            layers: Mapping[str, str] | None = None,
            udba: str = "reval",
            options: str = "",
            *,
            mount_point: str = "mnt",
            allow_log: str | None = None,
            watchdog: float = WATCHDOG,
        ) -> Mount:
            branches = []
            for name, permission in (layers or {"top": "rw", "base": "ro"}).items():
                (tmp_path / name).mkdir(parents=True, exist_ok=True)
                branches.append(f"{tmp_path / name}={permission}")
            context = mounted(branches, tmp_path / mount_point, udba, options, allow_log=allow_log, watchdog=watchdog)
            mount = stack.enter_context(context)
            # pytest shows it with a test that failed; whatever goes wrong after this point carries the log itself.
            stack.callback(lambda: sys.stderr.write(f"-- log of the daemon of {mount.path}:\n{mount.log()}\n"))
            return mount

        yield factory
