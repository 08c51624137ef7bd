"""Stop work on Ctrl-C (once: after its clean-up, twice: at once), and recognise a full disk or too large a file."""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Coroutine
from types import FrameType
from typing import Any, TypeVar

T = TypeVar("T")

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(BaseException):
    """The work was stopped by a signal and has cleaned up after itself. ``exit_code`` is 128 + the signal."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.exit_code = 128 + signum


def run(work: Coroutine[Any, Any, T]) -> T:
    """Run ``work`` as ``asyncio.run`` does; a first SIGINT or SIGTERM cancels it and waits for it, a second exits.

    Exiting at once loses nothing that was written (files appear whole or not at all) and leaves no sandbox
    behind, because sandboxes die with their parent.

    Raises:
        Interrupted: ``work`` was cancelled by a signal.
    """
    import asyncio  # slow to load, and help should be instant

    received: list[int] = []

    async def guarded() -> T:
        loop = asyncio.get_running_loop()
        task = asyncio.current_task()
        assert task is not None

        def on_signal(signum: int, frame: FrameType | None) -> None:
            received.append(signum)
            if len(received) > 1:
                os._exit(128 + signum)
            print("\nStopping cleanly; press Ctrl-C again to stop at once.", file=sys.stderr, flush=True)
            loop.call_soon_threadsafe(task.cancel)

        before = {number: signal.signal(number, on_signal) for number in SIGNALS}
        try:
            return await work
        finally:
            if not received:  # otherwise a second one must still work while the loop closes
                for number, handler in before.items():
                    signal.signal(number, handler)

    try:
        return asyncio.run(guarded())
    except asyncio.CancelledError:
        if received:
            raise Interrupted(received[0]) from None
        raise


def disk_is_full(error: BaseException) -> bool:
    """Return whether an error, or one that caused it, says that the disk is full; libraries wrap it variously."""
    return _says(error, (errno.ENOSPC, errno.EDQUOT), ("No space left on device", "os error 28", "Disk quota exceeded"))


def file_is_too_large(error: BaseException) -> bool:
    """Return whether an error, or one that caused it, says that a file may not become that large (``ulimit -f``)."""
    return _says(error, (errno.EFBIG,), ("File too large", "os error 27"))


def _says(error: BaseException, numbers: tuple[int, ...], texts: tuple[str, ...]) -> bool:
    seen: BaseException | None = error
    for _ in range(10):
        if seen is None:
            return False
        if (isinstance(seen, OSError) and seen.errno in numbers) or any(text in str(seen) for text in texts):
            return True
        seen = seen.__cause__ or seen.__context__
    return False
