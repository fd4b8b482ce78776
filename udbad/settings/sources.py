"""The branches that a mount source stands for, which take reading what it names: for who may wait for that."""

from __future__ import annotations

from udbad.layers import source, store
from udbad.settings.options import MountOptions


def resolved(options: MountOptions) -> MountOptions:
    """The options with all branches in place of the source; as they are where there is none. Raises UserError
    (BRANCH)."""
    named = source.parse(options.source) if options.source is not None else None
    if named is None:
        return options
    # A layer goes elsewhere as a tar archive, which has no words for a redirect.
    dirren = "off" if options.dirren == "auto" else options.dirren
    return options.but(source=None, branches=store.branches(named, options.ro), dirren=dirren)
