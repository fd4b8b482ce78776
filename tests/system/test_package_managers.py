"""npm and cargo on a project whose directories are all on a lower branch: they rename and replace those.

What is there afterwards is what the same commands make of a plain directory. apt is in test_debian.py, git mv in
tests/t4_coherence/test_redirects.py.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.helpers.mount import UnionFactory
from tests.system.support import each_mode

pytestmark = [pytest.mark.system, pytest.mark.fuse]

NPM = ("--offline", "--no-audit", "--no-fund", "--no-update-notifier")


def said(*words: str, at: Path, home: Path) -> str:
    """Without a network, and what belongs to us in `home`."""
    env = {
        **os.environ,
        "npm_config_cache": str(home / "npm"),
        "CARGO_NET_OFFLINE": "true",
        "CARGO_TERM_COLOR": "never",
    }
    done = subprocess.run(words, cwd=at, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def installed(*programs: str) -> None:
    missing = [program for program in programs if shutil.which(program) is None]
    if missing:
        pytest.skip(f"ok: {missing[0]} is not installed, and brings hundreds of packages along")


def files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def package(home: Path, version: str) -> str:
    """The archive of one, with directories in it."""
    source = home / f"dep-{version}"
    for name in ("lib/deep", f"lib/of-{version}"):
        (source / name).mkdir(parents=True)
        (source / name / "index.js").write_text(f"// {version}\n")
    (source / "package.json").write_text(json.dumps({"name": "dep", "version": version}))
    return str(home / said("npm", "pack", "--silent", str(source), at=home, home=home).split()[-1])


@each_mode
def test_npm_replaces_packages(union: UnionFactory, tmp_path: Path, udba: str) -> None:
    installed("npm")
    first, second = (package(tmp_path, version) for version in ("1.0.0", "2.0.0"))
    base = tmp_path / "base"
    base.mkdir()
    (base / "package.json").write_text(json.dumps({"name": "project", "version": "1.0.0"}))
    said("npm", "install", *NPM, first, at=base, home=tmp_path)
    shutil.copytree(base, tmp_path / "plain")
    mount = union({"top": "rw", "base": "ro"}, udba)
    before = files(base)
    for root in (mount.path, tmp_path / "plain"):
        said("npm", "install", *NPM, second, at=root, home=tmp_path)
        assert json.loads((root / "node_modules/dep/package.json").read_text())["version"] == "2.0.0"
        (root / "node_modules").rename(root / "node_modules.old")
        said("npm", "install", *NPM, at=root, home=tmp_path)
    assert files(mount.path) == files(tmp_path / "plain")
    assert "node_modules.old/dep/lib/of-2.0.0/index.js" in files(mount.path)
    for root in (mount.path, tmp_path / "plain"):
        shutil.rmtree(root / "node_modules.old")
        said("npm", "uninstall", *NPM, "dep", at=root, home=tmp_path)
    assert files(mount.path) == files(tmp_path / "plain")
    assert files(base) == before


@each_mode
def test_cargo_builds_on(union: UnionFactory, tmp_path: Path, udba: str) -> None:
    """What was built is below; it renames and removes the directories of its incremental compilation."""
    installed("cargo")
    base = tmp_path / "base"
    (base / "src").mkdir(parents=True)
    (base / "Cargo.toml").write_text('[package]\nname = "project"\nversion = "0.1.0"\nedition = "2021"\n')
    (base / "src/main.rs").write_text('fn main() { println!("one"); }\n')
    said("cargo", "build", "-q", at=base, home=tmp_path)
    before = files(base)
    mount = union({"top": "rw", "base": "ro"}, udba)
    assert said("cargo", "run", "-q", at=mount.path, home=tmp_path) == "one\n"
    (mount.path / "src/main.rs").write_text('mod other;\nfn main() { println!("{}", other::two()); }\n')
    (mount.path / "src/other.rs").write_text('pub fn two() -> &\'static str { "two" }\n')
    assert said("cargo", "run", "-q", at=mount.path, home=tmp_path) == "two\n"
    (mount.path / "target/debug").rename(mount.path / "target/moved")
    assert said("cargo", "run", "-q", at=mount.path, home=tmp_path) == "two\n"
    assert subprocess.run([mount.path / "target/moved/project"], capture_output=True, check=True).stdout == b"two\n"
    said("cargo", "clean", at=mount.path, home=tmp_path)
    assert not (mount.path / "target").exists()
    assert files(base) == before
