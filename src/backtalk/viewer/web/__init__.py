"""Show runs and studies as self-contained web pages with curves."""
