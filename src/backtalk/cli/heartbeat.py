"""Say what a long piece of work is at, where nobody has said anything for a while."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Self

EVERY_S = 8.0  # so that with a late thread no silence is longer than 10 s


class Heartbeat:
    """A thread that says what is going on after every ``every_s`` seconds of silence. A context manager.

    ``say`` prints a line; without it nothing is said.
    """

    def __init__(self, say: Callable[[str], None] | None, doing: str, every_s: float = EVERY_S) -> None:
        self._say, self._every_s = say, every_s
        self._doing, self._since = doing, time.monotonic()
        self._heard = time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def __enter__(self) -> Self:
        if self._say is not None:
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        if self._say is not None:
            self._thread.join()

    def doing(self, doing: str, *, goes_on: bool = False) -> None:
        """Name the current work; with ``goes_on`` it is timed from the beginning of the work named before."""
        self._since = self._since if goes_on else time.monotonic()
        self._doing = doing

    def heard(self) -> None:
        """Note that something was said."""
        self._heard = time.monotonic()

    def _run(self) -> None:
        assert self._say is not None
        while not self._ended.wait(max(0.05, self._heard + self._every_s - time.monotonic())):
            now = time.monotonic()
            if now - self._heard >= self._every_s:
                self._heard = now
                self._say(f"... {self._doing}, for {now - self._since:.0f} s so far")
