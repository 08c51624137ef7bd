"""A server that ends at its start."""

raise RuntimeError("no licence found")
