"""A trainer with the fixed batch, the comparison of its gradients with the expected ones, and what a check is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any, get_args

from backtalk.engines.conformance.base import Failure, Outcome, Step, StepResult, TrainerUnderTest
from backtalk.engines.conformance.batch import CLIP, MAX_SEQ_LEN, groups, trajectory_groups
from backtalk.engines.conformance.oracle import Expected
from backtalk.errors import ConfigError
from backtalk.objective.config import ObjectiveConfig, PolicyNormalizer, WorldNormalizer
from backtalk.objective.samples import Sample, build_samples
from backtalk.trajectory import TokenRole

TOLERANCE = 1e-6  # relative to the expected gradient of the token, in float32
COEFFICIENT = 0.05


class Suite:
    """A trainer under test, with the fixed batch and the expected gradients."""

    def __init__(self, trainer: TrainerUnderTest) -> None:
        self.trainer = trainer
        self.rows = groups()
        self._accepted: dict[str, Any] | None = None

    def config(self, **changes: Any) -> ObjectiveConfig:
        """Return the objective that the checks use: the first pair of normalisers that the trainer keeps.

        Raises:
            Failure: it keeps none.
        """
        if self._accepted is None:
            self._accepted = self._first_accepted()
        return self.any_config(**self._accepted | changes)

    @staticmethod
    def any_config(**changes: Any) -> ObjectiveConfig:
        """Return the objective of the checks with other settings, whether or not the trainer keeps them."""
        return ObjectiveConfig(**{"world_model_coeff": COEFFICIENT, "clip": CLIP, "max_seq_len": MAX_SEQ_LEN} | changes)

    def _first_accepted(self) -> dict[str, Any]:
        reasons: list[str] = []
        for world, policy in product(get_args(WorldNormalizer), get_args(PolicyNormalizer)):
            names = {"world_normalizer": world, "policy_normalizer": policy}
            try:
                self.step(self.any_config(**names))
                return names
            except ConfigError as refusal:
                reasons.append(str(refusal))
        raise Failure(f"every normaliser is refused; the first: {reasons[0]}")

    def samples(self, config: ObjectiveConfig) -> list[Sample]:
        """Return the batch as samples, one for each branch of each row."""
        return [sample for group in trajectory_groups(self.rows) for sample in build_samples(group, config)]

    def step(self, config: ObjectiveConfig, *, microbatches: int = 1, processes: int = 1) -> StepResult:
        """Take a step over the whole batch; the first process gets rows without observations where there are two."""
        samples = self.samples(config)
        order = list(range(len(samples)))
        if processes > 1:
            order.sort(key=lambda i: bool(samples[i].target_mask("full_observation").any()))
        taken = [samples[i] for i in order]
        result = self.trainer.train_step(
            Step(samples=taken, objective=config, microbatches=microbatches, processes=processes)
        )
        back = sorted(range(len(order)), key=lambda k: order[k])
        return replace(result, gradients=[result.gradients[k] for k in back])

    def own_grpo(self, config: ObjectiveConfig) -> StepResult:
        """Take a step over the whole batch by the trainer's own GRPO."""
        return self.trainer.own_grpo(Step(samples=self.samples(config), objective=config))

    def without_observations(self, config: ObjectiveConfig) -> StepResult:
        """Take a step in which every observation is given text."""
        step = Step(samples=[without_observations(sample) for sample in self.samples(config)], objective=config)
        return self.trainer.train_step(step)

    def expect(self, config: ObjectiveConfig, result: StepResult) -> str:
        """Fail unless the gradient of every token is the expected one; return how far it is off."""
        return self.compare(result.gradients, Expected(self.rows, config).gradients())

    def compare(self, got: Sequence[Sequence[float]], wanted: Sequence[Sequence[float]]) -> str:
        """Fail unless both gradients agree at every token; return how far they are apart."""
        if [len(row) for row in got] != [len(row) for row in wanted]:
            raise Failure(f"gradients of {[len(r) for r in got]} tokens a sample, not {[len(r) for r in wanted]}")
        worst = 0.0
        for where, a, b in zip(self._places(), _flat(got), _flat(wanted), strict=True):
            error = abs(a - b) / abs(b) if b else abs(a) * 1e6  # what has no gradient has none, up to 1e-12
            if not error <= TOLERANCE:
                raise Failure(f"{where}: d(loss)/d(logprob) is {a:.7g}, not {b:.7g}")
            worst = max(worst, error)
        return f"largest relative error {worst:.1e}"

    def _places(self) -> Iterator[str]:
        """Yield a name for each token of the batch."""
        for row in (row for group in self.rows for row in group):
            for number, branch in enumerate(row.branches):
                position = 0
                for run in branch:
                    for _ in run.token_ids:
                        yield f"row {row.name!r}, branch {number}, token {position} ({run.role.name.lower()})"
                        position += 1


def without_observations(sample: Sample) -> Sample:
    """Return a sample whose tokens are all given text, except the actions."""
    roles = sample.roles.masked_fill(sample.roles != TokenRole.ACTION, TokenRole.CONTEXT)
    others = sample.other_branches._replace(observations=0, scaffold=0, targets=0)
    return replace(sample, roles=roles, other_branches=others, spans=())


def _flat(rows: Sequence[Sequence[float]]) -> list[float]:
    return [x for row in rows for x in row]


@dataclass(frozen=True, slots=True)
class Check:
    """One property that any trainer of both terms must have, and how to test it."""

    name: str
    claim: str  # one sentence
    run: Callable[[Suite], str] = field(repr=False)  # returns what was measured; raises Failure, ConfigError


@dataclass(frozen=True, slots=True)
class CheckResult:
    """The outcome of one check, with what was measured, what was found, or the reason."""

    check: Check
    outcome: Outcome
    reason: str = ""
