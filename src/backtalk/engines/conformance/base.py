"""What a trainer under test must offer, the step it is given, what it returns, and the outcomes of a check."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:  # results are read without PyTorch
    from torch import Tensor

    from backtalk.objective.config import ObjectiveConfig
    from backtalk.objective.samples import Sample


class Failure(Exception):
    """A check found what should not be."""


class NotApplicable(Exception):
    """A check says nothing about this trainer; the message says why."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One optimizer step to take on the table model, from fresh weights."""

    samples: Sequence[Sample]  # a whole step; each token but padding occurs once in it
    objective: ObjectiveConfig
    microbatches: int = 1  # split each process's share into at least so many
    processes: int = 1  # data-parallel; the samples are shared out in order, the first ones to the first process


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """The gradient of a step, before clipping and before the optimizer."""

    gradients: Sequence[Sequence[float]]  # d(loss)/d(logprob) of each token of each sample, see token_gradients
    metrics: Sequence[Mapping[str, float]] = ()  # what each process logged
    raw: Sequence[Tensor] = ()  # the same as the trainer has it, to be compared to the bit


class TrainerUnderTest(Protocol):
    """A trainer that takes a step on the table model in a folder and shows its gradient.

    Both methods raise ConfigError for what the trainer cannot do, with the reason: that is a refusal, not a failure.
    """

    def train_step(self, step: Step) -> StepResult:
        """Take a step with Backtalk's objective."""
        ...

    def own_grpo(self, step: Step) -> StepResult:
        """Take the same step by the trainer's own GRPO, without any part of the world-model term."""
        ...


class Outcome(StrEnum):
    """The outcome of a check.

    PASSED: the claim holds. FAILED: it does not. CANNOT: the trainer refuses, with a reason. NOT_APPLICABLE: the check
    says nothing about this trainer.
    """

    PASSED = "passed"
    FAILED = "failed"
    CANNOT = "cannot"
    NOT_APPLICABLE = "not applicable"
