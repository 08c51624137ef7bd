"""Serve run folders, studies and other libraries' trajectories as a local, read-only web page (docs/viewer.md)."""
