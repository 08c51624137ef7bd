"""The version of SkyRL that the host is built on, in a module that imports nothing of SkyRL."""

from __future__ import annotations

from importlib.metadata import version

VERSION = "0.4.0"  # tested


def moved(what: str) -> str:
    """Return the message for something of SkyRL that is not where it is in the tested version."""
    return (
        f"SkyRL {version('skyrl')} is not as the world-model term needs it: {what}; install the version that is "
        f"tested: pip install 'skyrl=={VERSION}'"
    )
