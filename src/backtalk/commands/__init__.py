"""Commands with more to them than the command line's own module has room for."""
