"""Compiled modules as they are where nothing is compiled, to compare the two, or to see what C does not show."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from udbad import compiled


def from_source(module: ModuleType) -> ModuleType:
    """The same module once more, from its source."""
    assert module.__file__ is not None
    file = Path(module.__file__)  # the source, or what was compiled from it
    source = file.with_name(file.name.partition(".")[0] + ".py")
    spec = importlib.util.spec_from_file_location(f"{module.__name__}_in_python", source)
    assert spec is not None
    assert spec.loader is not None
    again = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled, "why_not", lambda: "a test wants it so")
        spec.loader.exec_module(again)
    return again
