"""What Backtalk asks of anything that holds a policy and can train it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

from backtalk.objective_config import ObjectiveConfig
from backtalk.sampler import Sampler, SamplingParams
from backtalk.samples import Sample
from backtalk.trajectory import Trajectory


class Engine(Protocol):
    """A policy that can be sampled from, trained on samples, and asked for log-probabilities."""

    @property
    def policy_version(self) -> int:
        """Train steps taken so far."""
        ...

    def sampler(self, params: SamplingParams) -> Sampler:
        """A sampler at the current version. It is stale after the next ``train_step``: ask for a new one."""
        ...

    async def train_step(self, samples: Sequence[Sample], config: ObjectiveConfig) -> dict[str, float]:
        """One optimizer step over all samples; returns its metrics. The version goes up by 1."""
        ...

    async def score(self, trajectories: Sequence[Trajectory]) -> list[list[float]]:
        """Log-probability of every token at temperature 1, in nats; 0.0 for a trajectory's first token."""
        ...


@runtime_checkable
class Checkpointable(Protocol):
    """An engine whose training can be continued in another process."""

    def save(self, folder: Path) -> None:
        """Write everything that ``load`` needs, all or nothing."""
        ...

    def load(self, folder: Path) -> None:
        """Continue where ``save`` left off."""
        ...
