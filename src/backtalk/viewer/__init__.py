"""Show run folders: in a terminal, and as web pages."""
