"""The command line. Nothing heavy is imported before a command needs it."""

from alignfed.cli.app import app, main

__all__ = ["app", "main"]
