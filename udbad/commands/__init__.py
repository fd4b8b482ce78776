"""The subcommands of `udbad`, by what they are about: parsing and printing only."""
