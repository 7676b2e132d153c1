"""``loraweave``: the command line. One file a verb."""

from loraweave.cli.app import main

__all__ = ["main"]
