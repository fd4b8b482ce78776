"""udbad: unite directories into one mounted tree that stays right while people change the branches."""

from udbad import compiled

__version__ = "0.1.0"

compiled.install()
