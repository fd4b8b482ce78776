"""Building a C project in a union: make trusts modification times, the compiler renames and maps."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.mount import UnionFactory
from tests.system.support import each_mode, require, run, unchanged

pytestmark = [pytest.mark.system, pytest.mark.fuse]

UNITS = 60

MAKEFILE = """\
CFLAGS = -O1 -Wall -Werror -Iinclude -MMD -MP
SOURCES = $(sort $(wildcard src/*.c))
OBJECTS = $(SOURCES:src/%.c=out/%.o)

program: libunits.a out/main.o
\t$(CC) -o $@ out/main.o libunits.a

libunits.a: $(filter-out out/main.o,$(OBJECTS))
\trm -f $@
\t$(AR) rcs $@ $^

out/%.o: src/%.c
\t@mkdir -p out
\t@echo COMPILE $<
\t$(CC) $(CFLAGS) -c -o $@ $<

clean:
\trm -rf out libunits.a program

.PHONY: clean
-include $(wildcard out/*.d)
"""


def generate_project(tree: Path) -> None:
    """UNITS C files in a chain, each with a header of its own, a common header, and a broken file.

    Unit n returns n plus the value of unit n - 1, times SCALE of the common header.
    """
    (tree / "src").mkdir(parents=True)
    (tree / "include").mkdir()
    (tree / "Makefile").write_text(MAKEFILE)
    (tree / "include/common.h").write_text("#pragma once\n#define SCALE 7\n")
    (tree / "src/broken.c").write_text("#error this file is deleted by the layer above\n")
    for n in range(UNITS):
        (tree / f"include/unit{n}.h").write_text(f"#pragma once\nlong unit{n}(void);\n")
        below = f'#include "unit{n - 1}.h"\n' if n else ""
        value = f"{n} + unit{n - 1}()" if n else "0"
        scale = '#include "common.h"\n' if n % 10 == 0 else ""
        times = " + SCALE" if n % 10 == 0 else ""
        (tree / f"src/unit{n}.c").write_text(
            f'{below}{scale}#include "unit{n}.h"\nlong unit{n}(void) {{ return {value}{times}; }}\n'
        )
    (tree / "src/main.c").write_text(
        f'#include <stdio.h>\n#include "unit{UNITS - 1}.h"\n'
        f'int main(void) {{ printf("%ld\\n", unit{UNITS - 1}()); return 0; }}\n'
    )


def expected(scale: int, unit3: int = 3) -> str:
    return f"{sum(range(UNITS)) - 3 + unit3 + scale * len(range(0, UNITS, 10))}\n"


def build_at_work(project: Path) -> None:
    """Build, run, rebuild what changed and nothing else, clean, build again."""

    def make(*targets: str) -> set[str]:
        output = run("make", "-j2", *targets, cwd=project)
        return {line.split("/")[-1] for line in output.splitlines() if line.startswith("COMPILE ")}

    everything = {f"unit{n}.c" for n in range(UNITS)} | {"main.c"}
    assert make() == everything
    assert run("./program", cwd=project) == expected(scale=5)
    run("make", "-q", cwd=project)  # exit code 1 if anything looked out of date
    assert make() == set()

    unit = project / "src/unit3.c"
    unit.write_text(unit.read_text().replace("return 3 +", "return 1003 +"))
    assert make() == {"unit3.c"}
    assert run("./program", cwd=project) == expected(scale=5, unit3=1003)

    header = project / "include/common.h"
    header.with_suffix(".new").write_text("#pragma once\n#define SCALE 11\n")
    header.with_suffix(".new").rename(header)
    assert make() == {f"unit{n}.c" for n in range(0, UNITS, 10)}
    assert run("./program", cwd=project) == expected(scale=11, unit3=1003)

    (project / "out/unit9.o").unlink()
    assert make() == {"unit9.c"}
    make("clean")
    assert not (project / "out").exists()
    assert make() == everything
    assert run("./program", cwd=project) == expected(scale=11, unit3=1003)
    run("make", "-q", cwd=project)


@each_mode
def test_make_j2(union: UnionFactory, udba: str, tmp_path: Path) -> None:
    require("make", "cc", "ar")
    project, above = tmp_path / "base/project", tmp_path / "mid/project"
    generate_project(project)
    for name in ("src", "include"):
        (above / name).mkdir(parents=True)
    (above / "src/.wh.broken.c").touch(0o444)
    (above / "include/common.h").write_text("#pragma once\n#define SCALE 5\n")
    mount = union({"top": "rw", "mid": "ro+wh", "base": "ro"}, udba)
    with unchanged(mount["mid"], mount["base"]):
        build_at_work(mount.path / "project")
