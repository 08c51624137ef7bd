"""The conformance suite: the embedded engine passes it, the oracle's numbers are right, and each fault is found."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from backtalk.cli.check import open_trainer
from backtalk.engines.conformance import CHECKS, CheckResult, Outcome, Step, StepResult, conformance
from backtalk.engines.conformance.batch import groups
from backtalk.engines.conformance.oracle import Expected
from backtalk.engines.conformance.suite import Suite
from backtalk.engines.conformance.table import logprob
from backtalk.engines.conformance.torch_engine import TorchUnderTest
from backtalk.errors import ConfigError
from backtalk.objective import objective
from backtalk.objective.batch import Batch, TokenCounts, collate, policy_mask, target_mask
from backtalk.objective.config import ObjectiveConfig
from backtalk.objective.loss import policy_weights, world_weights
from backtalk.objective.samples import Sample
from backtalk.trajectory import TokenRole


class LossUnderTest:
    """A trainer that is a loss function over log-probabilities, on one process or on several in turn."""

    def __init__(self, model_folder: Path | None = None) -> None:
        pass

    def train_step(self, step: Step) -> StepResult:
        """Split the step over processes and micro-batches, and add up the derivatives."""
        counts = TokenCounts.of(step.samples, step.objective.world_loss_target)
        rows: list[Tensor] = []
        size = math.ceil(len(step.samples) / (step.processes * step.microbatches))
        for start in range(0, len(step.samples), size):
            part = step.samples[start : start + size]
            batch = collate(part, 0)
            logprobs_BT = table_logprobs(part, batch)
            self.loss(logprobs_BT, batch, self.counts(counts, part, step.objective), step.objective).backward()
            assert logprobs_BT.grad is not None
            rows += [row[: len(one)] for row, one in zip(logprobs_BT.grad, part, strict=True)]
        metrics = self.metrics(step, counts)
        return StepResult(
            gradients=[row.tolist() for row in rows], metrics=[metrics] * step.processes, raw=[torch.cat(rows)]
        )

    def own_grpo(self, step: Step) -> StepResult:
        """Take the step with the policy term alone."""
        return LossUnderTest().train_step(replace(step, objective=replace(step.objective, world_model_coeff=0.0)))

    def counts(self, step: TokenCounts, part: Sequence[Sample], config: ObjectiveConfig) -> TokenCounts:
        return step

    def loss(self, logprobs_BT: Tensor, batch: Batch, counts: TokenCounts, config: ObjectiveConfig) -> Tensor:
        return objective(logprobs_BT, batch, counts, config)[0]

    def metrics(self, step: Step, counts: TokenCounts) -> dict[str, float]:
        batch = collate(step.samples, 0)
        p_BT = policy_weights(batch, counts, step.objective, torch.float64)[policy_mask(batch)]
        w_BT = world_weights(batch, counts, step.objective, torch.float64)[target_mask(batch, step.objective)]
        return {"effective_obs_weight": float(step.objective.world_coeff * w_BT.mean() / p_BT.mean())}


def table_logprobs(samples: Sequence[Sample], batch: Batch) -> Tensor:
    """The table's log-probabilities as a float64 leaf; 0 for first tokens and padding."""
    logprobs_BT = torch.zeros(batch.token_ids_BT.shape, dtype=torch.float64)
    for b, sample in enumerate(samples):
        ids = sample.token_ids.tolist()
        for t in range(1, len(ids)):
            logprobs_BT[b, t] = logprob(ids[t - 1], ids[t])
    return logprobs_BT.requires_grad_()


def outcomes(results: Sequence[CheckResult], outcome: Outcome) -> set[str]:
    return {result.check.name for result in results if result.outcome is outcome}


def test_the_embedded_engine_passes_and_refuses_only_a_second_process() -> None:
    results = list(conformance(TorchUnderTest))
    assert [r.check for r in results] == list(CHECKS)
    assert outcomes(results, Outcome.FAILED) == set(), [r for r in results if r.outcome is Outcome.FAILED]
    assert outcomes(results, Outcome.CANNOT) == {"processes_change_nothing"}


def test_a_plain_loss_function_passes_everything() -> None:
    results = list(conformance(LossUnderTest))
    assert outcomes(results, Outcome.PASSED) == {check.name for check in CHECKS}, results


def test_the_expected_numbers_are_those_worked_out_by_hand() -> None:
    """Row 0 is c2 t2 a4 t2 e5 t1 a3 t1 e2 of 8 rows, with reward 1 among 1, 0 and 0.25 (mean 5/12, std 0.520)."""
    config = Suite.any_config(world_model_coeff=0.1)
    row = Expected(groups(), config).gradients()[0]
    advantage = (1 - 5 / 12) / math.sqrt((49 / 144 + 25 / 144 + 4 / 144) / 2)
    ratio_one = -advantage / (8 * 7)  # 7 actions
    context, scaffold = [0.0] * 4, [0.0] * 2
    first = [0.0, 1.1 * ratio_one, ratio_one, ratio_one]  # a ratio of 1.5 is clipped at 1.25
    observation = -0.1 / (8 * 7)  # 7 observation tokens
    wanted = [*context, *first, *scaffold, *[observation] * 5, 0.0, *[ratio_one] * 3, 0.0, *[observation] * 2]
    assert row == pytest.approx(wanted, rel=3e-6)  # the published advantage divides by the deviation + 1e-6

    branches = Expected(groups(), config).gradients()[3:5]  # c2 a2 t1 e3 | c4 t1 a3 t1 w1 e2: 6 observation tokens
    assert branches[0][5:] == [*branches[1][10:], pytest.approx(-0.1 / 48)]
    assert branches[1][9] == 0.0  # a warning is counted, and not learned
    lone = Expected(groups(), replace(config, world_normalizer="token_mean")).gradients()[5]  # c2 a3 t1 e6
    assert lone[2] == 0.0 and lone[-1] == pytest.approx(-0.1 / 25)  # 7 + 4 + 5 + 6 + 3 targets


class PartCounts(LossUnderTest):
    """Divides by the tokens of the micro-batch."""

    def counts(self, step: TokenCounts, part: Sequence[Sample], config: ObjectiveConfig) -> TokenCounts:
        return TokenCounts.of(part, config.world_loss_target)


class NotAction(LossUnderTest):
    """Takes everything after the first action that is no action for an observation."""

    def loss(self, logprobs_BT: Tensor, batch: Batch, counts: TokenCounts, config: ObjectiveConfig) -> Tensor:
        scaffold_BT = (batch.roles_BT == TokenRole.TEMPLATE) & (batch.turns_BT >= 0)
        roles_BT = batch.roles_BT.masked_fill(scaffold_BT, TokenRole.ENV_OUTPUT)
        return super().loss(logprobs_BT, replace(batch, roles_BT=roles_BT), counts, config)


class FailedIsZero(LossUnderTest):
    """Takes a missing reward for a reward."""

    def loss(self, logprobs_BT: Tensor, batch: Batch, counts: TokenCounts, config: ObjectiveConfig) -> Tensor:
        failed_B = ~batch.has_reward_B
        batch = replace(
            batch,
            has_reward_B=torch.ones_like(failed_B),
            advantages_B=batch.advantages_B.masked_fill(failed_B, -1.0),
        )
        return super().loss(logprobs_BT, batch, counts, config)


class NoClip(LossUnderTest):
    """Forgets to clip."""

    def loss(self, logprobs_BT: Tensor, batch: Batch, counts: TokenCounts, config: ObjectiveConfig) -> Tensor:
        return super().loss(logprobs_BT, batch, counts, replace(config, clip=(1.0, 9.0)))


class BranchesAreRows(LossUnderTest):
    """Takes the branches of a rollout for rollouts."""

    def loss(self, logprobs_BT: Tensor, batch: Batch, counts: TokenCounts, config: ObjectiveConfig) -> Tensor:
        none_B = torch.zeros_like(batch.other_actions_B)
        batch = replace(batch, other_actions_B=none_B, other_observations_B=none_B, other_targets_B=none_B)
        return super().loss(logprobs_BT, batch, counts, config)


class WeightsAsLikelihoodRatio(LossUnderTest):
    """Carries observations as importance sampling against a filler log-probability of 0: the gradient is p lambda."""

    def loss(self, logprobs_BT: Tensor, batch: Batch, counts: TokenCounts, config: ObjectiveConfig) -> Tensor:
        policy = objective(logprobs_BT, batch, counts, replace(config, world_model_coeff=0.0))[0]
        w_BT = world_weights(batch, counts, config, logprobs_BT.dtype)
        return policy - config.world_coeff * (logprobs_BT.exp() * w_BT).sum()


class CoefficientCancels(LossUnderTest):
    """Divides by the sum of weights, in which the coefficient is."""

    def loss(self, logprobs_BT: Tensor, batch: Batch, counts: TokenCounts, config: ObjectiveConfig) -> Tensor:
        coefficient = 1.0 if config.world_coeff else 0.0
        return super().loss(logprobs_BT, batch, counts, replace(config, world_model_coeff=coefficient))


class NotToTheBit(LossUnderTest):
    """Adds 0 times the world-model term, and rounds once more."""

    def loss(self, logprobs_BT: Tensor, batch: Batch, counts: TokenCounts, config: ObjectiveConfig) -> Tensor:
        return super().loss(logprobs_BT, batch, counts, config) * (1 + 1e-15)


class KeysDiffer(LossUnderTest):
    """Logs the term only where it has a token, and no effective weight."""

    def metrics(self, step: Step, counts: TokenCounts) -> dict[str, float]:
        return {"world_model_loss": 1.0} if counts.target_tokens else {}


@pytest.mark.parametrize(
    ("trainer", "found"),
    [
        (PartCounts, {"microbatches_change_nothing", "processes_change_nothing"}),
        (NotAction, {"world_sequence_mean", "world_token_mean", "target_env_only"}),
        (FailedIsZero, {"policy_sequence_mean", "observations_of_a_failed_row_are_learned"}),
        (NoClip, {"policy_sequence_mean", "policy_token_mean", "step_without_observations"}),
        (BranchesAreRows, {"world_sequence_mean", "world_sequence_mean_selected", "policy_sequence_mean"}),
        (WeightsAsLikelihoodRatio, {"world_sequence_mean", "world_token_mean", "target_env_only"}),
        (CoefficientCancels, {"world_sequence_mean", "doubled_coefficient_doubles_the_world_part"}),
        (NotToTheBit, {"zero_coefficient_is_grpo"}),
        (KeysDiffer, {"step_without_observations", "effective_weight_is_logged"}),
    ],
)
def test_a_fault_is_found(trainer: type[LossUnderTest], found: set[str]) -> None:
    alone = trainer in (NotToTheBit, KeysDiffer)  # these change nothing else
    results = list(conformance(trainer, only={*found, "policy_token_mean", "world_token_mean"} if alone else found))
    assert outcomes(results, Outcome.FAILED) == found


class SelectedMeanAlone(LossUnderTest):
    """Keeps one normaliser, and says so of the others."""

    def train_step(self, step: Step) -> StepResult:
        if step.objective.world_normalizer != "token_mean":
            raise ConfigError("this trainer has one count of tokens; use world_normalizer=token_mean")
        return super().train_step(step)


def test_a_refused_normaliser_is_no_failure_and_its_reason_is_shown() -> None:
    results = list(conformance(SelectedMeanAlone))
    refused = {"world_sequence_mean", "world_sequence_mean_selected", "world_fixed_length"}
    assert outcomes(results, Outcome.CANNOT) == refused and outcomes(results, Outcome.FAILED) == set()
    assert all("one count" in r.reason for r in results if r.outcome is Outcome.CANNOT)


class RefusesAll(LossUnderTest):
    def train_step(self, step: Step) -> StepResult:
        raise ConfigError("not today")


class Breaks(LossUnderTest):
    def train_step(self, step: Step) -> StepResult:
        raise ZeroDivisionError("division by zero")


@pytest.mark.parametrize(("trainer", "reason"), [(RefusesAll, "not today"), (Breaks, "ZeroDivisionError")])
def test_a_trainer_that_does_nothing_fails(trainer: type[LossUnderTest], reason: str) -> None:
    results = list(conformance(trainer, only=["world_token_mean", "effective_weight_is_logged"]))
    assert [r.outcome for r in results] == [Outcome.FAILED] * 2 and all(reason in r.reason for r in results)


def test_names_of_checks_and_of_engines_are_checked() -> None:
    with pytest.raises(ConfigError, match="no such checks: gradient"):
        list(conformance(LossUnderTest, only=["gradient"]))
    with pytest.raises(ConfigError, match="use torch, trl"):
        open_trainer("jax")
    with pytest.raises(ConfigError, match="train_step"):
        open_trainer("backtalk.errors:ConfigError")
    assert open_trainer("test_conformance:LossUnderTest")().__class__.__name__ == "LossUnderTest"
