"""Spans of time of a run, by stage, kept only while somebody records them.

Spans of rollouts overlap, so each is on a track: that of its asyncio task, or one that is named. With nobody recording,
``timed`` does nothing at all.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass

_NOTHING = nullcontext()
_recorded: list[Span] | None = None  # of this process; threads append to it too, which is atomic
_track: ContextVar[str] = ContextVar("track", default="run")


@dataclass(frozen=True, slots=True)
class Span:
    """A stage of a run from beginning to end, in seconds of ``time.perf_counter``."""

    stage: str
    track: str
    start_s: float
    end_s: float


@contextmanager
def recording() -> Iterator[list[Span]]:
    """Record all spans of this process inside the block, into the list that is yielded."""
    global _recorded
    before, _recorded = _recorded, []
    try:
        yield _recorded
    finally:
        _recorded = before


def on_track(name: str) -> None:
    """Put the spans of the current asyncio task, from now on, onto a track of their own."""
    _track.set(name)


def timed(
    stage: str, *, track: str | None = None, wait: Callable[[], None] | None = None
) -> AbstractContextManager[None]:
    """Record a stage from here to the end of the block, if anybody does.

    ``wait`` is called at the end of a recorded span: for a device that is still at work when its calls have returned.
    """
    return _NOTHING if _recorded is None else _record(_recorded, stage, track or _track.get(), wait)


@contextmanager
def _record(spans: list[Span], stage: str, track: str, wait: Callable[[], None] | None) -> Iterator[None]:
    start_s = time.perf_counter()
    try:
        yield
        if wait is not None:
            wait()
    finally:
        spans.append(Span(stage, track, start_s, time.perf_counter()))
