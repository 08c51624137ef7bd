"""What Backtalk asks of anything that holds a policy and can train it, and of the settings of such a thing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:  # settings name an engine's, and are read without PyTorch
    from backtalk.objective.config import ObjectiveConfig
    from backtalk.objective.samples import Sample
    from backtalk.rollout.sampler import Sampler, SamplingParams
    from backtalk.trajectory import Trajectory


class Engine(Protocol):
    """A policy that can be sampled from, trained on samples, asked for log-probabilities, saved and continued."""

    @property
    def tokenizer(self) -> Any:
        """The policy's own: a fast tokenizer of transformers, or what behaves like one (``ChatTokenizer``)."""
        ...

    @property
    def policy_version(self) -> int:
        """Train steps taken so far."""
        ...

    def sampler(self, params: SamplingParams) -> Sampler:
        """Return a sampler at the current version. It is stale after the next ``train_step``: ask for a new one."""
        ...

    async def train_step(self, samples: Sequence[Sample], config: ObjectiveConfig) -> dict[str, float]:
        """Take one optimizer step over all samples and return its metrics. The version goes up by 1."""
        ...

    async def score(self, trajectories: Sequence[Trajectory]) -> list[list[float]]:
        """Return the log-probability of every token at temperature 1, in nats; 0.0 for a trajectory's first token."""
        ...

    def save(self, folder: Path) -> None:
        """Write everything that ``load`` needs into ``folder``, which may have to be made."""
        ...

    def load(self, folder: Path) -> None:
        """Continue where ``save`` left off, ``policy_version`` included; DataError where that cannot be."""
        ...


class CustomEngineConfig(Protocol):
    """Settings of an engine of the user's own: a dataclass, or a pydantic model."""

    @property
    def kind(self) -> str:
        """The import path of this class, as ``engine.kind`` names it: "my_module:MyEngineConfig"."""
        ...

    def open(self, *, seed: int) -> Engine:
        """Return the engine; ``seed`` is the run's."""
        ...
