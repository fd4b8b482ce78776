"""What versions of udbad tell each other of an object: its fields by their names, as JSON has them.

One rule, for both directions: who writes leaves out a field that has its default value, so that a version that does
not know it seldom meets it; who reads passes over what he does not know. What nobody may pass over is said beside it
(`needs` in mount/handover.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


def said(one: DataclassInstance) -> dict[str, Any]:
    """The fields that __init__ takes, but those that have their default value."""
    words = {field.name: (getattr(one, field.name), field.default) for field in fields(one) if field.init}
    return {name: value for name, (value, default) in words.items() if value != default}


def known(kind: type[DataclassInstance], words: Mapping[str, Any]) -> dict[str, Any]:
    """What __init__ of `kind` takes of these words."""
    return {field.name: words[field.name] for field in fields(kind) if field.init and field.name in words}
