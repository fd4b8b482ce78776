"""What versions of udbad tell each other of an object: its fields by their names, as JSON has them.

One rule, for both directions: who writes leaves out a field that has its default value, so that a version that does
not know it seldom meets it; who reads passes over what he does not know. What nobody may pass over is said beside it
(`needs` in mount/handover.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


def said(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of an object, but those that have their default value."""
    return {name: value for name, value in values.items() if name not in defaults or value != defaults[name]}


def known(fields: Iterable[str], words: Mapping[str, Any]) -> dict[str, Any]:
    """Those of these words that are fields."""
    return {name: words[name] for name in fields if name in words}
