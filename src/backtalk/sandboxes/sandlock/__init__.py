"""Sandbox backend by Landlock and seccomp, for machines where namespaces are not allowed."""
