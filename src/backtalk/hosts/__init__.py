"""Hosts: other programs that drive Backtalk."""
