"""The command line."""

from trietune.cli.app import main

__all__ = ["main"]
