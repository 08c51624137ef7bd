"""Sandboxes started ahead, handed out in order, and no more at once than the machine carries."""

from __future__ import annotations

import asyncio
import weakref
from collections import Counter, defaultdict, deque
from collections.abc import AsyncGenerator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from types import TracebackType

from backtalk.errors import ConfigError, SandboxError
from backtalk.sandboxes.base import BackendReport, Sandbox, SandboxBackend, SandboxLimits
from backtalk.sandboxes.machine.capacity import STARTS_PER_CORE, capacity, cores, memory_is_short
from backtalk.sandboxes.places import Arrival, arrival

_CHECK_TIMEOUT_S = 10.0
_MEMORY_PAUSE_S = 0.05


class PooledBackend:
    """A `SandboxBackend` over another: the same sandboxes, each still used once.

    - At most `live` of them are there at once, ready ones and those being started or closed included, and at most
      `starts` are being started. Whoever asks for more waits, in order. While memory is short none is started unless
      no other is in use. A rollout that waits for either says so (`sandboxes.places`).
    - Up to `ready` are started ahead, with the limits asked for last. One that died while it waited is replaced.

    A sandbox is closed before its block is left, as without a pool. What is ready is closed by `close`, or when the
    event loop that it belongs to ends and cancels what still runs.
    """

    def __init__(
        self, backend: SandboxBackend, *, ready: int = 0, live: int | None = None, starts: int | None = None
    ) -> None:
        """`live` None is what the machine holds (`capacity.capacity`), `starts` None is 4 for each of its cores."""
        for name, value in (("ready", ready + 1), ("live", live), ("starts", starts)):
            if value is not None and value < 1:
                raise ConfigError(f"a pool with {name}={value} gives no sandbox; use 1 or more, or None")
        self._backend, self._ready, self._live, self._starts = backend, ready, live, starts
        self._pools: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Pool] = weakref.WeakKeyDictionary()

    @property
    def report(self) -> BackendReport:
        """That of the backend beneath."""
        return self._backend.report

    def open(self, limits: SandboxLimits) -> AbstractAsyncContextManager[Sandbox]:
        """A fresh sandbox, closed with everything in it on exit. Waits for a place where there is none.

        Raises:
            SandboxError: on entry, when it could not start, or the pool was closed meanwhile.
        """
        return self._open(limits)

    @asynccontextmanager
    async def _open(self, limits: SandboxLimits) -> AsyncGenerator[Sandbox]:
        loop = asyncio.get_running_loop()
        if loop not in self._pools:
            live = self._live or capacity(limits).sandboxes
            starts = self._starts or max(1, int(STARTS_PER_CORE * cores()))
            self._pools[loop] = _Pool(self._backend, min(self._ready, live - 1), live, starts)
        pool = self._pools[loop]
        kept = await pool.take(limits)
        try:
            yield kept.sandbox
        finally:
            await pool.give_back(kept)

    async def close(self) -> None:
        """Close what is ready or starting; those in use are left to their users. A later `open` begins anew."""
        if pool := self._pools.pop(asyncio.get_running_loop(), None):
            await pool.close()

    async def __aenter__(self) -> PooledBackend:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


@dataclass(eq=False, slots=True)
class _Kept:
    """A running sandbox, and the task that opened it and will close it: a block is left where it was entered."""

    limits: SandboxLimits
    sandbox: Sandbox
    keeper: asyncio.Task[None]
    leave: asyncio.Event = field(default_factory=asyncio.Event)

    async def works(self) -> bool:
        """Whether it still runs commands."""
        try:
            result = await self.sandbox.exec(":", timeout_s=_CHECK_TIMEOUT_S)
        except SandboxError:
            return False
        return result.exit_code == 0


@dataclass(frozen=True, slots=True)
class _Wanted:
    """A sandbox that a rollout waits for."""

    future: asyncio.Future[_Kept]
    arrival: Arrival


class _Pool:
    """Sandboxes of one event loop."""

    def __init__(self, backend: SandboxBackend, ready: int, live: int, starts: int) -> None:
        self._backend, self._ready, self._most_live = backend, ready, live
        self._places = asyncio.Semaphore(live)  # held by each from before its start to after its end
        self._starts = asyncio.Semaphore(starts)
        self._shelf: list[_Kept] = []  # ready ones, the oldest first
        self._waiting: defaultdict[SandboxLimits, deque[_Wanted]] = defaultdict(deque)
        self._coming: Counter[SandboxLimits] = Counter()  # on the way, for whoever is first then
        self._live = 0  # begun and not ended
        self._keepers: dict[asyncio.Task[None], bool] = {}  # whether it is anybody's already

    async def take(self, limits: SandboxLimits) -> _Kept:
        while kept := self._from_shelf(limits):
            fit = False
            try:
                fit = await kept.works()
            finally:
                if not fit:
                    kept.leave.set()
            if fit:
                self._keepers[kept.keeper] = True
                self._refill(limits)
                return kept
        future: asyncio.Future[_Kept] = asyncio.get_running_loop().create_future()
        wanted = _Wanted(future, arrival.get())
        self._waiting[limits].append(wanted)
        if self._coming[limits] < len(self._waiting[limits]):
            self._hire(limits)
        if len(self._keepers) > self._most_live:  # the last of them has no place yet
            wanted.arrival.wait()
        if self._places.locked():
            self._clear_one(but=limits)
        try:
            kept = await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled() and future.exception() is None:
                self._offer(future.result())  # it came in the very moment of the cancellation
            raise
        finally:
            wanted.arrival.go_on()
            with suppress(ValueError):
                self._waiting[limits].remove(wanted)
        self._refill(limits)
        return kept

    async def give_back(self, kept: _Kept) -> None:
        """Close it. What its end raises is raised here; a cancellation leaves it to its keeper."""
        kept.leave.set()
        await asyncio.wait([kept.keeper])
        if not kept.keeper.cancelled():
            kept.keeper.result()

    async def close(self) -> None:
        self._ready = 0
        for waiting in self._waiting.values():
            for wanted in waiting:
                if not wanted.future.done():
                    wanted.future.set_exception(SandboxError("the pool of sandboxes was closed"))
        idle = [keeper for keeper, used in self._keepers.items() if not used]
        for keeper in idle:
            keeper.cancel()
        await asyncio.gather(*idle, return_exceptions=True)

    def _from_shelf(self, limits: SandboxLimits) -> _Kept | None:
        for index, kept in enumerate(self._shelf):
            if kept.limits == limits:
                return self._shelf.pop(index)
        return None

    def _offer(self, kept: _Kept) -> None:
        """To the first who waits for such a one, else to the shelf; close it where that is full."""
        if future := self._first_waiting(kept.limits):
            self._keepers[kept.keeper] = True
            future.set_result(kept)
        elif len(self._shelf) < self._ready:
            self._keepers[kept.keeper] = False
            self._shelf.append(kept)
        else:
            kept.leave.set()

    def _first_waiting(self, limits: SandboxLimits) -> asyncio.Future[_Kept] | None:
        waiting = self._waiting[limits]
        while waiting:
            if not (future := waiting.popleft().future).done():
                return future
        return None

    def _refill(self, limits: SandboxLimits) -> None:
        """Start ahead what is missing, where there is a place that nobody waits for."""
        if len(self._shelf) == self._ready:
            self._clear_one(but=limits)  # else a run that goes on with other limits would never find one ready
        ahead = sum(max(0, number - len(self._waiting[which])) for which, number in self._coming.items())
        for _ in range(self._ready - len(self._shelf) - ahead):
            if not self._places.locked():
                self._hire(limits)

    def _clear_one(self, *, but: SandboxLimits) -> None:
        for kept in self._shelf:
            if kept.limits != but:
                self._shelf.remove(kept)
                kept.leave.set()
                return

    def _ended(self) -> None:
        self._live -= 1

    def _hire(self, limits: SandboxLimits) -> None:
        self._coming[limits] += 1
        keeper = asyncio.ensure_future(self._keep(limits))
        self._keepers[keeper] = False
        keeper.add_done_callback(self._keepers.pop)

    async def _keep(self, limits: SandboxLimits) -> None:
        """One sandbox, from its place to its end."""
        async with self._places, AsyncExitStack() as stack:
            try:
                async with self._starts:
                    if self._coming[limits] > len(self._waiting[limits]) + self._ready - len(self._shelf):
                        return  # who wanted it has gone
                    while self._live > len(self._shelf) and memory_is_short(limits):
                        for wanted in self._waiting[limits]:
                            wanted.arrival.wait()
                        await asyncio.sleep(_MEMORY_PAUSE_S)
                    self._live += 1
                    stack.callback(self._ended)
                    sandbox = await stack.enter_async_context(self._backend.open(limits))
            except SandboxError as error:
                if future := self._first_waiting(limits):
                    future.set_exception(error)
                return
            except Exception as error:  # a bug, which must not leave its rollout waiting
                if not (future := self._first_waiting(limits)):
                    raise
                future.set_exception(error)
                return
            finally:
                self._coming[limits] -= 1
            keeper = asyncio.current_task()
            assert keeper is not None
            kept = _Kept(limits, sandbox, keeper)
            self._offer(kept)
            await kept.leave.wait()
