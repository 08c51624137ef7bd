"""Protocols of an engine, which holds and trains a policy, and of the settings that open a user's own engine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:  # settings are read without PyTorch
    from backtalk.objective.config import ObjectiveConfig
    from backtalk.objective.samples import Sample
    from backtalk.rollout.sampler import Sampler, SamplingParams
    from backtalk.trajectory import Trajectory


class Engine(Protocol):
    """A policy that can be sampled from, trained on samples, asked for log-probabilities, saved and continued."""

    @property
    def tokenizer(self) -> Any:
        """Return the policy's tokenizer: a fast one of transformers, or an object like it (``ChatTokenizer``)."""
        ...

    @property
    def policy_version(self) -> int:
        """Return the number of train steps taken so far."""
        ...

    def sampler(self, params: SamplingParams) -> Sampler:
        """Return a sampler at the current version, to be used until the next ``train_step`` and not after."""
        ...

    async def train_step(self, samples: Sequence[Sample], config: ObjectiveConfig) -> dict[str, float]:
        """Take one optimizer step over all samples and return its metrics. The version goes up by 1.

        An engine with a true attribute ``measures_gradients`` takes a ``Share`` as the world-model coefficient, and
        returns the coefficient that it used as the metric ``world_model_coeff``. One with a true attribute
        ``applies_head`` keeps the term's gradient off the output embedding where ``world.head`` says so.
        """
        ...

    async def score(self, trajectories: Sequence[Trajectory]) -> list[list[float]]:
        """Return each token's log-probability at temperature 1, in nats; 0.0 for the first token of a trajectory.

        An engine with a method ``score_tokens(trajectories, alternatives)`` returns ``TokenScores``, which name the
        likeliest tokens too.
        """
        ...

    def save(self, folder: Path) -> None:
        """Write everything that ``load`` needs into ``folder``, and make the folder if need be."""
        ...

    def load(self, folder: Path) -> None:
        """Restore what ``save`` wrote, ``policy_version`` included.

        Raises:
            DataError: no checkpoint, or one of another model.
        """
        ...


class CustomEngineConfig(Protocol):
    """Settings of a user's own engine: a dataclass, or a pydantic model."""

    @property
    def kind(self) -> str:
        """Return the import path of this class, as in ``engine.kind``: "my_module:MyEngineConfig"."""
        ...

    def open(self, *, seed: int) -> Engine:
        """Return a new engine; ``seed`` is that of the run."""
        ...
