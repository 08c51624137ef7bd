"""Order in which the rollouts of a step come to the policy, so that they sample together and never wait in a circle."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from backtalk.rollout.limits import Deadline
from backtalk.sandboxes.places import Arrival, arrival

PATIENCE_S = 60.0  # a world that takes longer to open than this is not waited for


class Admission:
    """Order in which the rollouts of one step come to the policy.

    A rollout takes what it needs in one order: its turn among those that run at once, its environment, its sampler
    session. A sampler's wave waits for every open session, hence only for rollouts that lack nothing. Before it
    samples, a rollout also waits for those that are still opening their environments (`settled`): which rollouts
    share a wave changes the rounding, and a run is to be repeatable. That cannot deadlock:

    - Whoever has a session holds an environment and waits for nothing that another rollout has to give back.
    - An environment that finds no place says so (`sandboxes.places`), and its rollout is not waited for until it has
      one. Places come back when rollouts end, and those never wait for it.
    - A stranger's environment that waits and does not say so is waited for up to `PATIENCE_S`. From then on no arrival
      of the step is: each joins when it comes.

    While a rollout waits for a place its deadline moves with every other rollout that ends, so that few places cost
    time and no rollouts. Where none ends in all of its own time, its deadline ends it.
    """

    def __init__(self) -> None:
        self._opening: set[_Arrival] = set()  # and not waiting for a place
        self._waiting: set[_Arrival] = set()  # for a place
        self._settled = asyncio.Event()
        self._settled.set()
        self._patient = True

    async def settled(self) -> None:
        """Return when every rollout that is opening its environment has come, failed, or waits for a place."""
        await self._settled.wait()

    @contextmanager
    def arriving(self, deadline: Deadline) -> Iterator[None]:
        """Hold the others' next samples until this block, which opens an environment and a session, is left."""
        one = _Arrival(self, deadline)
        timer = asyncio.get_running_loop().call_later(PATIENCE_S, self._lose_patience)
        token = arrival.set(one)
        self._opening.add(one)
        self._update()
        try:
            yield
        finally:
            timer.cancel()
            arrival.reset(token)
            one.go_on()
            self._opening.discard(one)
            self._update()

    def ended(self) -> None:
        """Note that a rollout has given everything back."""
        for one in self._waiting:
            one.excuse()

    def move(self, one: _Arrival, *, waiting: bool) -> None:
        """Count an arrival as waiting for a place, or as opening its environment."""
        before, after = (self._opening, self._waiting) if waiting else (self._waiting, self._opening)
        if one in before:
            if waiting:
                one.since = asyncio.get_running_loop().time()
            else:
                one.excuse()
            before.remove(one)
            after.add(one)
            self._update()

    def _lose_patience(self) -> None:
        if self._opening:
            self._patient = False
            self._update()

    def _update(self) -> None:
        if self._opening and self._patient:
            self._settled.clear()
        else:
            self._settled.set()


class _Arrival(Arrival):
    """See `Admission.arriving`."""

    def __init__(self, admission: Admission, deadline: Deadline) -> None:
        self._admission, self._deadline = admission, deadline
        self.since = 0.0  # it waits, or was last excused

    def wait(self) -> None:
        self._admission.move(self, waiting=True)

    def go_on(self) -> None:
        self._admission.move(self, waiting=False)

    def excuse(self) -> None:
        """Give back the time that was spent waiting."""
        now = asyncio.get_running_loop().time()
        self._deadline.postpone(now - self.since)
        self.since = now
