"""The other published forms of both terms, against numbers worked out by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from backtalk.errors import ConfigError
from backtalk.objective.batch import TokenCounts, collate, token_temperatures, trained_mask
from backtalk.objective.coefficient import Schedule
from backtalk.objective.config import ObjectiveConfig, PolicyOptions, WorldOptions
from backtalk.objective.forms import (
    cispo_surrogate,
    clipped_mae,
    clipped_surrogate,
    importance_weights,
    kl_to_reference,
    policy_surrogate,
    sequence_ratio,
)
from backtalk.objective.loss import objective, policy_weights, world_weights
from backtalk.objective.samples import Sample, build_samples
from backtalk.trajectory import Segment, TokenRole, Trajectory, TrajectoryGroup

CONTEXT, TEMPLATE, ACTION, ENV_OUTPUT, WARNING = TokenRole
LN2 = math.log(2)


def rows(*values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


ALL = torch.ones(1, 2, dtype=torch.bool)


def test_clip_higher_is_its_own_bound() -> None:
    ratio = rows([1.25, 1.4])
    assert clipped_surrogate(ratio, rows([1.0]), (0.2, 0.28)).tolist() == [[-1.25, -1.28]]
    assert clipped_surrogate(ratio, rows([-1.0]), (0.2, 0.28)).tolist() == [[1.25, 1.4]]


def test_gspo_has_one_ratio_a_sequence() -> None:
    # ratios 4 and 1 of the two actions: geometric mean 2; the third token is no action
    log_ratio, trained = rows([2 * LN2, 0.0, 0.0]), torch.tensor([[True, True, False]])
    assert sequence_ratio(log_ratio, trained)[0, :2].tolist() == pytest.approx([2.0, 2.0])
    new = rows([2 * LN2 - 3, -1.0, -9.0]).requires_grad_()
    old = rows([-3.0, -1.0, -9.0])
    loss = policy_surrogate(new, old, torch.tensor([-1.0]), trained, (0.2, 0.2), "gspo")
    assert loss[0, :2].tolist() == pytest.approx([2.0, 2.0])  # a bad sequence that became likelier is not clipped
    (loss * trained / 2).sum().backward()
    assert new.grad is not None
    assert new.grad[0].tolist() == pytest.approx([1.0, 1.0, 0.0])  # s * 1/n * -adv, for each of n actions


def test_cispo_teaches_through_the_log_probability() -> None:
    new = rows([-1.0, -2.0]).requires_grad_()
    loss = cispo_surrogate(new, rows([3.0, 0.5]), rows([2.0]), (1.0, 0.28))
    assert loss.tolist() == [[1.28 * 2 * 1, 0.5 * 2 * 2]]
    loss.sum().backward()
    assert new.grad is not None
    assert new.grad.tolist() == [[-2.56, -1.0]]  # the clipped token still has a gradient


def test_importance_is_truncated_and_carries_no_gradient() -> None:
    new, sampled = rows([-1.0, -1.0]).requires_grad_(), rows([-1 - math.log(5), -1 + LN2])
    weights = importance_weights(new, sampled, ALL, 2.0)
    assert weights[0].tolist() == pytest.approx([2.0, 0.5])
    assert not weights.requires_grad


def test_kl_of_a_token_half_as_likely_as_in_the_reference() -> None:
    policy, reference = rows([-2.0, -2.0]).requires_grad_(), rows([-2.0 + LN2, -2.0])
    kl = kl_to_reference(policy, reference, ALL)
    assert kl[0].tolist() == pytest.approx([2 - LN2 - 1, 0.0])
    kl.sum().backward()
    assert policy.grad is not None
    assert policy.grad[0].tolist() == pytest.approx([-1.0, 0.0])  # 1 - q/p: towards the reference


def test_clipped_mae_is_off_where_a_token_is_known_and_slow_where_it_cannot_be() -> None:
    logprobs = rows([math.log(0.9), math.log(0.5), math.log(0.01)]).requires_grad_()
    loss = clipped_mae(logprobs)
    assert loss[0].tolist() == pytest.approx([0.0, 0.3, 0.79])
    loss.sum().backward()
    assert logprobs.grad is not None
    assert logprobs.grad[0].tolist() == pytest.approx([0.0, -0.5, -0.01])  # -p, where cross-entropy has -1


def sample(advantage: float = 1.0, *, sampled: float = -1.0, temperature: float = 1.0) -> Sample:
    roles = [CONTEXT, ACTION, ACTION, TEMPLATE, ENV_OUTPUT, ENV_OUTPUT, WARNING]
    return Sample(
        token_ids=torch.arange(7),
        roles=torch.tensor(roles, dtype=torch.int8),
        turns=torch.tensor([-1, 0, 0, 0, 0, 0, 0], dtype=torch.int32),
        sampled=torch.tensor([role == ACTION for role in roles]),
        sampling_logprobs=torch.tensor([sampled if role == ACTION else 0.0 for role in roles]),
        advantage=advantage,
        has_reward=True,
        temperature=temperature,
    )


def loss_and_gradient(samples: list[Sample], logprobs: Tensor, config: ObjectiveConfig) -> tuple[float, Tensor]:
    logprobs = logprobs.clone().requires_grad_()
    batch = collate(samples, 0)
    counts = TokenCounts.of(samples, config.world_loss_target)
    reference = torch.full_like(logprobs, -1.0 + LN2)
    total, _ = objective(logprobs, replace(batch, reference_logprobs_BT=reference), counts, config)
    total.backward()
    assert logprobs.grad is not None
    return total.item(), logprobs.grad


def test_kl_pulls_on_actions_alone_even_where_rewards_are_equal() -> None:
    config = ObjectiveConfig(world_model_coeff=0.0, policy=PolicyOptions(kl_coeff=0.1))
    total, grad = loss_and_gradient([sample(0.0)], torch.full((1, 7), -1.0, dtype=torch.float64), config)
    assert total == pytest.approx(0.1 * (1 - LN2))
    assert grad[0].tolist() == pytest.approx([0, -0.05, -0.05, 0, 0, 0, 0])
    plain = collate([sample()], 0)
    with pytest.raises(ConfigError, match="reference_logprobs_BT"):
        objective(torch.zeros(1, 7), plain, TokenCounts.of([sample()]), config)


def test_truncated_importance_weighs_the_gradient_of_an_on_policy_step() -> None:
    # The trainer finds the actions e times as likely as the sampler said: ratio 1, weight min(e, 2) = 2.
    config = ObjectiveConfig(world_model_coeff=0.0, policy=PolicyOptions(max_importance_ratio=2.0))
    total, grad = loss_and_gradient([sample(3.0, sampled=-2.0)], torch.full((1, 7), -1.0, dtype=torch.float64), config)
    assert total == pytest.approx(-6.0)
    assert grad[0].tolist() == pytest.approx([0, -3.0, -3.0, 0, 0, 0, 0])
    agreeing, _ = loss_and_gradient([sample(3.0)], torch.full((1, 7), -1.0, dtype=torch.float64), config)
    assert agreeing == pytest.approx(-3.0)


@pytest.mark.parametrize("loss", ["clip", "gspo", "cispo"])
def test_on_policy_all_forms_have_one_gradient(loss: Any) -> None:
    config = ObjectiveConfig(world_model_coeff=0.0, policy=PolicyOptions(loss=loss))
    _, grad = loss_and_gradient([sample(3.0)], torch.full((1, 7), -1.0, dtype=torch.float64), config)
    assert grad[0].tolist() == pytest.approx([0, -1.5, -1.5, 0, 0, 0, 0])


def test_clipped_mae_in_the_objective() -> None:
    config = ObjectiveConfig(policy_coeff=0.0, world_model_coeff=2.0, world=WorldOptions(loss="clipped_mae"))
    total, grad = loss_and_gradient([sample()], torch.full((1, 7), math.log(0.5), dtype=torch.float64), config)
    assert total == pytest.approx(2 * 2 * 0.3 / 3)  # two of three observation tokens are targets
    assert grad[0].tolist() == pytest.approx([0, 0, 0, 0, -2 * 0.5 / 3, -2 * 0.5 / 3, 0])


def test_temperatures_of_targets() -> None:
    batch = collate([sample(temperature=0.5)], 0)
    assert token_temperatures(batch, ObjectiveConfig())[0].tolist() == [1, 0.5, 0.5, 1, 1, 1, 1]
    tempered = ObjectiveConfig(world=WorldOptions(temperature="sampling"))
    assert token_temperatures(batch, tempered)[0].tolist() == [0.5] * 7


@pytest.mark.parametrize(
    ("policy_coeff", "coeff", "trained"),
    [(1.0, 0.0, [1, 2]), (0.0, 1.0, [4, 5]), (1.0, 0.1, [1, 2, 4, 5])],
)
def test_which_tokens_get_a_gradient(policy_coeff: float, coeff: float, trained: list[int]) -> None:
    config = ObjectiveConfig(policy_coeff=policy_coeff, world_model_coeff=coeff)
    assert trained_mask(collate([sample()], 0), config)[0].nonzero().flatten().tolist() == trained


def branched(reward: float = 1.0) -> Trajectory:
    """Make a row of two actions and two observations, the second pair in a second branch."""
    return Trajectory(
        task_id="t",
        sample_index=0,
        reward=reward,
        segments=(
            Segment(CONTEXT, (1, 2)),
            Segment(ACTION, (3, 4), (-1.0, -1.0), turn=0),
            Segment(CONTEXT, (1, 2, 5), branch=1),
            Segment(TEMPLATE, (9,), turn=0, branch=1),
            Segment(ENV_OUTPUT, (6, 7), turn=0, branch=1),
            Segment(ACTION, (3,), (-1.0,), turn=1, branch=1),
            Segment(ENV_OUTPUT, (8, 8), turn=1, branch=1),
        ),
    )


def straight() -> Trajectory:
    segments = [replace(s, branch=0) for s in branched().segments if not (s.branch == 1 and s.role is CONTEXT)]
    return Trajectory(task_id="t", sample_index=1, reward=0.0, segments=tuple(segments))


@pytest.mark.parametrize("policy", ["sequence_mean", "token_mean", "fixed_length"])
@pytest.mark.parametrize("world", ["sequence_mean", "sequence_mean_selected", "token_mean", "fixed_length"])
@pytest.mark.parametrize("target", ["env_only", "full_observation"])
def test_a_rewritten_history_weighs_what_a_straight_one_does(policy: Any, world: Any, target: Any) -> None:
    config = ObjectiveConfig(policy_normalizer=policy, world_normalizer=world, world_loss_target=target, max_seq_len=32)
    samples = build_samples(TrajectoryGroup("t", (branched(), straight())), config)
    assert [s.branch for s in samples] == [0, 1, 0]
    batch, counts = collate(samples, 0), TokenCounts.of(samples, target)
    assert counts.sequences == counts.rewarded_sequences == 2
    for weights in (policy_weights, world_weights):
        first, second, whole = weights(batch, counts, config, torch.float64)
        assert first.sum() + second.sum() == pytest.approx(whole.sum().item())
        assert sorted({*first.tolist(), *second.tolist()}) == sorted(
            set(whole.tolist())
        )  # each token, not the sum only


def test_a_schedule_goes_from_point_to_point() -> None:
    linear = Schedule({0: 0.1, 10: 0.05, 20: 0.0})
    assert [linear.at(step) for step in (0, 5, 10, 15, 20, 99)] == pytest.approx([0.1, 0.075, 0.05, 0.025, 0.0, 0.0])
    steps = Schedule({0: 0.1, 10: 0.05}, shape="steps")
    assert [steps.at(step) for step in (0, 9, 10, 99)] == [0.1, 0.1, 0.05, 0.05]
    config = ObjectiveConfig(world_model_coeff=linear)
    assert config.at(5).world_coeff == pytest.approx(0.075)
    assert config.at(20).world_coeff == 0.0
    with pytest.raises(ConfigError, match=r"config.at\(step\)"):
        _ = config.world_coeff
    assert ObjectiveConfig().at(7) == ObjectiveConfig()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Schedule({5: 0.1}), "start at 0"),
        (lambda: Schedule({0: 0.1, 5: -1.0}), ">= 0"),
        (lambda: Schedule({0: 0.1}, shape="sine"), "linear"),  # type: ignore[arg-type]
        (lambda: PolicyOptions(loss="ppo"), "gspo"),  # type: ignore[arg-type]
        (lambda: PolicyOptions(advantage="gae"), "rloo"),  # type: ignore[arg-type]
        (lambda: PolicyOptions(kl_coeff=-0.1), "kl_coeff"),
        (lambda: PolicyOptions(max_importance_ratio=0.5), ">= 1"),
        (lambda: PolicyOptions(loss="gspo", max_importance_ratio=2.0), "token by token"),
        (lambda: WorldOptions(weights={"env": 1.0}), "tool:NAME"),
        (lambda: WorldOptions(weights={"env_output": -1.0}), ">= 0"),
        (lambda: WorldOptions(max_tokens_per_observation=0), "null for all"),
        (lambda: WorldOptions(min_correct=1.0), "where tasks are hard"),
        (lambda: WorldOptions(min_valid_calls=2.0), "0 to 1"),
        (lambda: WorldOptions(entropy_share=0.0), "keeps no observation"),
        (lambda: WorldOptions(loss="mae"), "clipped_mae"),  # type: ignore[arg-type]
        (lambda: ObjectiveConfig(world=WorldOptions(weights={"warning": 0.5})), "never selects"),
        (lambda: ObjectiveConfig(world=WorldOptions(weights={"env_output": 0.0})), "world_model_coeff=0"),
        (lambda: ObjectiveConfig(policy_coeff=0.0, world_model_coeff=Schedule({0: 0.1})), "learning rate"),
    ],
)
def test_what_makes_no_sense_is_refused(build: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build()
