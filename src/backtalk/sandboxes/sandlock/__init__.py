"""Isolate commands with Landlock and seccomp, where namespaces are not allowed."""
