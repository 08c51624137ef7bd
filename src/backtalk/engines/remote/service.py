"""What the engine asks of a service, as protocols: an SDK is behind one implementation, PyTorch behind another.

A row is the token ids of one sequence. Numbers of a row are one for each token after the first, since the first has no
log-probability.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from backtalk.errors import InfrastructureError
from backtalk.rollout.sampler import Completion

LossName = Literal["cross_entropy", "importance_sampling"]


class ServiceError(InfrastructureError):
    """The service, or the way to it, failed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Datum:
    """One row of a request, with the inputs of the loss by their names in the APIs of Tinker and Foundry.

    ``weights`` belong to cross_entropy, ``logprobs`` and ``advantages`` to importance_sampling.
    """

    token_ids: Sequence[int]  # at least 2
    inputs: Mapping[str, Sequence[float]]  # each of len(token_ids) - 1


@dataclass(frozen=True, kw_only=True, slots=True)
class AdamStep:
    """Settings of one step of AdamW; ``grad_clip_norm`` 0 is no clipping."""

    learning_rate: float
    betas: tuple[float, float]
    eps: float = 1e-8
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0


class SamplingWeights(Protocol):
    """The weights of one version, to be sampled from."""

    async def sample(
        self, token_ids: Sequence[int], *, max_tokens: int, temperature: float, seed: int, stop: Sequence[int]
    ) -> Completion:
        """Sample what follows a prompt, the stop token included."""
        ...


class RemoteModel(Protocol):
    """A base model with adapters that the service trains. All methods wait for the answer, and raise ServiceError."""

    def run(self, data: Sequence[Datum], loss: LossName, *, backward: bool) -> list[list[float]]:
        """Run the rows and return their log-probabilities in nats; with ``backward``, add the loss to the gradient."""
        ...

    def step(self, adam: AdamStep) -> dict[str, float]:
        """Take an optimizer step with the gradient, forget that, and return the service's metrics."""
        ...

    def save(self, name: str) -> str:
        """Save adapters and optimizer on the service, and return their path."""
        ...

    def sampling_weights(self) -> SamplingWeights:
        """Return the current weights for sampling."""
        ...


class Service(Protocol):
    """A connection to a service."""

    def open_model(self, state: str | None = None) -> RemoteModel:
        """Return a model with fresh adapters, or with what ``save`` left at a path, optimizer included."""
        ...

    def close(self) -> None:
        """End the session, and with it its models."""
        ...
