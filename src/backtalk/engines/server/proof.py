"""Decide from log-probabilities whether a server samples from the trainer's weights.

Both score the same tokens, the probe. Legend: s the server's log-probabilities, n the trainer's, in nats.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from backtalk.errors import SamplerFault

MAX_ERROR = 0.05  # standard error of the uptake above which it decides nothing
MAX_DEVIATION = 0.25  # of the uptake from 1, at least five standard errors


@dataclass(frozen=True, slots=True)
class Uptake:
    """Share of the trainer's change that the server's log-probabilities went along with: 1 in sync, 0 if stale.

    ``error`` is its standard error.
    """

    share: float
    error: float

    @property
    def decides(self) -> bool:
        """Return whether the change was large enough, against the noise between the two, to tell."""
        return self.error <= MAX_ERROR


def uptake(server_change: Sequence[float], trainer_change: Sequence[float]) -> Uptake:
    """Fit the change of the server's log-probabilities as a share of the trainer's, by least squares.

    What the two differ by before and after (other kernels, another rounding) cancels.
    """
    square = math.fsum(n * n for n in trainer_change)
    if square == 0 or len(trainer_change) < 2:
        return Uptake(math.nan, math.inf)
    share = math.fsum(s * n for s, n in zip(server_change, trainer_change, strict=True)) / square
    left = math.fsum((s - share * n) ** 2 for s, n in zip(server_change, trainer_change, strict=True))
    return Uptake(share, math.sqrt(left / (len(trainer_change) - 1) / square))


def mean_gap(server: Sequence[float], trainer: Sequence[float]) -> float:
    """Return the mean |server - trainer| in nats a token."""
    return math.fsum(abs(s - n) for s, n in zip(server, trainer, strict=True)) / len(server)


class SyncProof:
    """Proof that a server has the trainer's weights, repeated after each update on the same tokens.

    Two things have to hold: the mean gap is within ``max_gap``, and of the change since the last proof that could tell,
    the server went along with all. An update too small to tell leaves that proof where it is, so that the change
    adds up until it can.
    """

    def __init__(self, max_gap: float) -> None:
        self.max_gap = max_gap
        self._reference: tuple[list[float], list[float]] | None = None  # server's and trainer's at that proof

    def check(self, server: list[float], trainer: list[float], name: str) -> tuple[float, float]:
        """Return the mean gap, and the share that was taken up, NaN where that cannot be told.

        ``name`` is the server's, for messages.

        Raises:
            SamplerFault: the server has other weights.
        """
        gap, found = mean_gap(server, trainer), None
        if self._reference is not None:
            old_server, old_trainer = self._reference
            found = uptake(_differences(server, old_server), _differences(trainer, old_trainer))
        if found is not None and found.decides and abs(found.share - 1) > MAX_DEVIATION:
            raise SamplerFault(
                f"{name} is out of sync: of the last updates' change in log-probabilities it went along with "
                f"{found.share:.0%} (mean difference from the trainer {gap:.2g} nats a token), so it samples from old "
                "weights or from others. Look at the server's log for why it did not load them, restart it, and "
                "continue with --resume"
            )
        if not gap <= self.max_gap:
            raise SamplerFault(
                f"{name} is out of sync: its log-probabilities differ from the trainer's by {gap:.2g} nats a token on "
                f"average, and {self.max_gap:g} is allowed. Is it the same model, with a full and unquantised copy of "
                "its weights? If it only computes in less precision, raise engine.sampler.max_logprob_gap"
            )
        if found is None or found.decides:
            self._reference = server, trainer
        return gap, found.share if found is not None and found.decides else math.nan


def _differences(new: Sequence[float], old: Sequence[float]) -> list[float]:
    return [a - b for a, b in zip(new, old, strict=True)]
