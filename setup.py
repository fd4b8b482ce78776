"""Builds the hot modules with Cython (udbad/compiled.py); everything else about the package is in pyproject.toml.

Without a compiler, or without Cython, the package is built all the same, and runs the Python sources.
"""

from __future__ import annotations

import glob
import os
import runpy
import sys

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = os.path.dirname(os.path.abspath(__file__))
COMPILED = runpy.run_path(os.path.join(ROOT, "udbad", "compiled.py"), run_name="compiled")
FLAGS = ["-O1", "-g0", "-w", *os.environ.get("UDBAD_CFLAGS", "").split()]
"""-O2 takes twice as long and gains nothing that can be measured; Cython's C has warnings that are nobody's to mend.
UDBAD_CFLAGS: more of them, for a sanitizer for instance."""
DIRECTIVES = {
    "language_level": 3,
    "nonecheck": True,  # an attribute of None is an AttributeError, as in Python, and not a crash
}

C_FILES = os.path.join("build", "cython")
NOT_SEARCHED = "udbad.inodes.node"
"""Python's search for cyclic garbage looks at no object of its classes, and none has room for what that needs."""


def _declared_anew(sources: list[str]) -> bool:
    """Whether a .pxd is newer than the C that was made of any of the sources: then each has to be compiled again.

    Cython does not see that `from udbad.union cimport lookup` depends on lookup.pxd (parse_dependencies() of 3.3), and
    a module that takes another one's attributes to be where they were reads something else.
    """
    declared = [os.path.getmtime(path) for path in glob.glob("udbad/*/*.pxd")]
    made = [os.path.join(C_FILES, os.path.splitext(source)[0] + ".c") for source in sources]
    return max(declared) > min((os.path.getmtime(path) for path in made if os.path.exists(path)), default=0.0)


class BuildHotModules(build_ext):
    """All of them or none, and at the end the fingerprint of what they were made from."""

    failed = False

    def finalize_options(self) -> None:
        self.parallel = int(self.parallel or os.cpu_count() or 1)
        try:
            try:
                self._to_c(self.parallel)
            except (ImportError, OSError):  # a system without semaphores, as a chroot without /dev/shm
                self._to_c(0)
        except Exception as error:  # there is no Cython, or it does not take a source
            self._give_up(error)
        super().finalize_options()

    def _to_c(self, processes: int) -> None:
        """processes: 0 for none but this one."""
        from Cython.Build import cythonize
        from Cython.Compiler.Options import get_directive_defaults

        get_directive_defaults()["no_gc"] = False  # a decorator; what is no Cython has no such thing to say
        anew = _declared_anew([module.sources[0] for module in self.distribution.ext_modules])
        made = []
        for no_gc in (True, False):
            some = [module for module in self.distribution.ext_modules if (module.name == NOT_SEARCHED) is no_gc]
            made += cythonize(
                some,
                nthreads=processes,
                build_dir=C_FILES,
                compiler_directives={**DIRECTIVES, "no_gc": no_gc},
                force=anew,
                quiet=True,
            )
        self.distribution.ext_modules = made

    def run(self) -> None:
        stamp = os.path.join(ROOT if self.inplace else self.build_lib, "udbad", COMPILED["STAMP"])
        if os.path.exists(stamp):
            os.unlink(stamp)
        if self.failed:
            return
        made_from = COMPILED["fingerprint"](os.path.join(ROOT, "udbad"))
        try:
            super().run()
        except Exception as error:  # there is no compiler, or no Python.h
            self._give_up(error)
            return
        with open(stamp, "w") as file:
            file.write(made_from)

    def _give_up(self, error: Exception) -> None:
        if os.environ.get("UDBAD_REQUIRE_COMPILED"):
            raise error
        print(f"udbad: not compiled, the Python sources will run instead: {error}", file=sys.stderr)
        self.failed = True
        self.distribution.ext_modules = []

    def get_outputs(self) -> list[str]:
        return [*super().get_outputs(), os.path.join(self.build_lib, "udbad", COMPILED["STAMP"])]


if __name__ == "__main__":  # the processes that Cython starts may import this file
    setup(
        ext_modules=[
            Extension(name, [name.replace(".", "/") + suffix], extra_compile_args=FLAGS)
            for names, suffix in ((COMPILED["MODULES"], ".py"), (COMPILED["IN_C"], ".pyx"))
            for name in names
        ],
        cmdclass={"build_ext": BuildHotModules},
    )
