"""The command line: one module for each command, put together in ``app``."""

from backtalk.cli.app import app, explain, main

__all__ = ["app", "explain", "main"]
