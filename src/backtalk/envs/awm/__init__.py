"""The Agent World Model environment: tools over an SQLite database, in this process, in sandboxes or on a server."""
