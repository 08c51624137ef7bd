"""Run the command line as ``python -m backtalk.cli``."""

from backtalk.cli.app import main

main()
