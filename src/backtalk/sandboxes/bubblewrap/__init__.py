"""Isolate commands with Linux namespaces, through bubblewrap."""
