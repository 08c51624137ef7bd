"""Order in which the rollouts of a step reach the policy, so that they sample together and cannot deadlock."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from backtalk.rollout.limits import Deadline
from backtalk.sandboxes.base import Arrival, arrival

PATIENCE_S = 60.0  # an environment that takes longer to open than this is not waited for


class Admission:
    """Order in which the rollouts of one step reach the policy.

    Each takes what it needs in one order: one of ``RolloutLimits.concurrency``, its environment, its sampler session.
    A wave of the sampler waits for every open session, hence only for rollouts that lack nothing. Before it samples, a
    rollout also waits for those that are still opening their environments: which rollouts share a wave changes the
    rounding, and a run has to be repeatable. This cannot deadlock:

    - A rollout with a session has its environment too, and waits for nothing that another rollout has to give back.
    - An environment that finds no free place says so (`sandboxes.base`), and its rollout is not waited for until it
      has one. Places are given back when rollouts end, and those never wait for it.
    - A user's environment that waits and does not say so is waited for up to `PATIENCE_S`. After that the step waits
      for no opening environment any more.

    While a rollout waits for a place, every other rollout that ends extends its deadline by the time it waited, so that
    few places cost time and no rollouts. If none ends in all of its own time, its deadline ends it.

    Without ``waits``, for a sampler that batches continuously, no rollout waits for those that open their environments.
    """

    def __init__(self, *, waits: bool = True) -> None:
        self._waits = waits
        self._opening: set[_Arrival] = set()  # environments, without those that wait for a place
        self._waiting: set[_Arrival] = set()
        self._may_sample = asyncio.Event()
        self._may_sample.set()
        self._patient = True

    async def wait_for_openings(self) -> None:
        """Return when every rollout that opens its environment has it, has failed, or waits for a place."""
        await self._may_sample.wait()

    @contextmanager
    def opening(self, deadline: Deadline) -> Iterator[None]:
        """Hold the other rollouts' next samples while this block opens an environment and a session."""
        current = _Arrival(self, deadline)
        timer = asyncio.get_running_loop().call_later(PATIENCE_S, self._lose_patience)
        token = arrival.set(current)
        self._opening.add(current)
        self._update()
        try:
            yield
        finally:
            timer.cancel()
            arrival.reset(token)
            current.go_on()
            self._opening.discard(current)
            self._update()

    def rollout_ended(self) -> None:
        """Extend the deadlines of the rollouts that wait for a place: one has given its place back."""
        for waiting in self._waiting:
            waiting.extend_deadline()

    def move(self, moved: _Arrival, *, waiting: bool) -> None:
        """Count a rollout as waiting for a place, or as opening its environment."""
        before, after = (self._opening, self._waiting) if waiting else (self._waiting, self._opening)
        if moved in before:
            if waiting:
                moved.waits_since = asyncio.get_running_loop().time()
            else:
                moved.extend_deadline()
            before.remove(moved)
            after.add(moved)
            self._update()

    def _lose_patience(self) -> None:
        if self._opening:
            self._patient = False
            self._update()

    def _update(self) -> None:
        if self._waits and self._opening and self._patient:
            self._may_sample.clear()
        else:
            self._may_sample.set()


class _Arrival(Arrival):
    """A rollout of an admission whose environment is being opened."""

    def __init__(self, admission: Admission, deadline: Deadline) -> None:
        self._admission, self._deadline = admission, deadline
        self.waits_since = 0.0  # or when its deadline was last extended

    def wait(self) -> None:
        self._admission.move(self, waiting=True)

    def go_on(self) -> None:
        self._admission.move(self, waiting=False)

    def extend_deadline(self) -> None:
        now = asyncio.get_running_loop().time()
        self._deadline.postpone(now - self.waits_since)
        self.waits_since = now
