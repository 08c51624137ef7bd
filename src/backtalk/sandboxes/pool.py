"""Limit how many sandboxes of a backend are alive, and how many are starting, so that the machine carries them."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager

from backtalk.errors import ConfigError
from backtalk.sandboxes.base import Arrival, BackendReport, Sandbox, SandboxBackend, SandboxLimits, arrival
from backtalk.sandboxes.machine.capacity import STARTS_PER_CORE, capacity, cores, memory_is_short

_MEMORY_PAUSE_S = 0.05


class PooledBackend:
    """A `SandboxBackend` over another one, with bounds on how many of its sandboxes there are at once.

    At most `live` are alive, those being started or closed included, and at most `starts` are being started. A rollout
    that asks for more waits, first come, first served. While memory is short none is started unless no other is alive.
    A rollout that waits for a place or for memory says so (`sandboxes.base`). Each event loop has bounds of its own.
    """

    def __init__(self, backend: SandboxBackend, *, live: int | None = None, starts: int | None = None) -> None:
        """Set the bounds: `live` None is what the machine holds (`capacity`), `starts` None is 4 for each core.

        Raises:
            ConfigError: a bound below 1.
        """
        for name, value in (("live", live), ("starts", starts)):
            if value is not None and value < 1:
                raise ConfigError(f"a pool with {name}={value} gives no sandbox; use 1 or more, or None")
        self._backend, self._max_live, self._max_starts = backend, live, starts
        self._places: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Places] = weakref.WeakKeyDictionary()

    @property
    def report(self) -> BackendReport:
        """Return the report of the backend beneath."""
        return self._backend.report

    @asynccontextmanager
    async def open(self, limits: SandboxLimits) -> AsyncGenerator[Sandbox]:
        loop = asyncio.get_running_loop()
        if loop not in self._places:
            live = self._max_live or capacity(limits).sandboxes
            starts = self._max_starts or max(1, int(STARTS_PER_CORE * cores()))
            self._places[loop] = _Places(self._backend, live, starts)
        stack = AsyncExitStack()
        try:
            yield await self._places[loop].start(limits, stack)
        finally:
            await asyncio.shield(stack.aclose())  # a rollout that is cancelled must not cut the end short


class _Places:
    """The bounds in one event loop, and how much of them is taken."""

    def __init__(self, backend: SandboxBackend, live: int, starts: int) -> None:
        self._backend = backend
        self._places, self._starts = asyncio.Semaphore(live), asyncio.Semaphore(starts)
        self._opening: set[Arrival] = set()  # rollouts that have no sandbox yet
        self._live = 0  # sandboxes whose start has begun and whose end has not

    async def start(self, limits: SandboxLimits, stack: AsyncExitStack) -> Sandbox:
        """Start a sandbox within the bounds; `stack` closes it and gives its place back."""
        rollout = arrival.get()
        self._opening.add(rollout)
        if self._places.locked():
            rollout.wait()
        try:
            await stack.enter_async_context(self._places)
            async with self._starts:
                while self._live and memory_is_short(limits):
                    for other in self._opening:  # those behind this one cannot start either
                        other.wait()
                    await asyncio.sleep(_MEMORY_PAUSE_S)
                self._live += 1
                stack.callback(self._ended)
                return await stack.enter_async_context(self._backend.open(limits))
        finally:
            self._opening.discard(rollout)
            rollout.go_on()

    def _ended(self) -> None:
        self._live -= 1
