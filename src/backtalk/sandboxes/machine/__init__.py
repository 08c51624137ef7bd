"""Measure what this machine offers to sandboxes: programs, namespaces, control groups, memory."""
