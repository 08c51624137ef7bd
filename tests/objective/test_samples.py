"""From trajectories to padded micro-batches: who made a token stays known, and nothing selects padding."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from backtalk.errors import ConfigError
from backtalk.exchange.rfc010 import to_rfc010
from backtalk.objective import objective
from backtalk.objective.batch import TokenCounts, collate, measured_mask, policy_mask, token_temperatures
from backtalk.objective.config import LengthPenalty, ObjectiveConfig, PolicyOptions, WorldOptions
from backtalk.objective.roles import TARGET_ROLES, has_target_role, is_observation, roles_from_masks
from backtalk.objective.samples import Sample, build_samples, to_samples
from backtalk.run.rollouts import row_metrics
from backtalk.trajectory import Failure, Segment, StopReason, TokenRole, Trajectory, TrajectoryGroup

CONTEXT, TEMPLATE, ACTION, ENV_OUTPUT, WARNING = TokenRole


def trajectory(index: int = 0, reward: float | None = 1.0, *, failed: bool = False) -> Trajectory:
    return Trajectory(
        task_id="t",
        sample_index=index,
        segments=(
            Segment(CONTEXT, (10, 11)),
            Segment(TEMPLATE, (12,)),
            Segment(ACTION, (13, 14), (-0.5, -0.25), turn=0),
            Segment(TEMPLATE, (15,), turn=0),
            Segment(ENV_OUTPUT, (16, 17, 18), turn=0, tool="bash"),
            Segment(WARNING, (19,), turn=0, tool="bash"),
        ),
        reward=reward,
        policy_version=3,
        stop_reason=StopReason.FAILED if failed else StopReason.SUBMITTED,
        failure=Failure("step", "SandboxError", "gone") if failed else None,
    )


def of_length(length: int) -> Sample:
    ids = tuple(range(length))
    return to_samples(Trajectory(task_id="t", sample_index=length, segments=(Segment(ENV_OUTPUT, ids, turn=0),)))[0]


def test_a_sample_is_its_trajectory_token_by_token() -> None:
    (sample,) = to_samples(trajectory(), advantage=0.5, temperature=0.8)
    assert sample.token_ids.tolist() == list(range(10, 20))
    assert sample.roles.tolist() == [0, 0, 1, 2, 2, 1, 3, 3, 3, 4]
    assert sample.turns.tolist() == [-1, -1, -1, 0, 0, 0, 0, 0, 0, 0]
    assert sample.sampling_logprobs.tolist() == [0, 0, 0, -0.5, -0.25, 0, 0, 0, 0, 0]
    assert (sample.advantage, sample.temperature, sample.policy_version, sample.has_reward) == (0.5, 0.8, 3, True)


def test_a_failed_row_stays_and_is_outside_the_baseline() -> None:
    group = TrajectoryGroup("t", (trajectory(0, 1.0), trajectory(1, None, failed=True), trajectory(2, 0.0)))
    samples = build_samples(group, ObjectiveConfig(policy=PolicyOptions(advantage="dr_grpo")))
    assert [s.advantage for s in samples] == [0.5, 0.0, -0.5]
    assert [s.has_reward for s in samples] == [True, False, True]
    assert TokenCounts.of(samples) == TokenCounts(
        sequences=3, rewarded_sequences=2, action_tokens=6, policy_tokens=4,
        env_output_tokens=9, warning_tokens=3, target_tokens=9,
    )  # fmt: skip
    assert TokenCounts.of(samples, "warning_plus_env").target_tokens == 12


def token_gradients(samples: Sequence[Sample], config: ObjectiveConfig) -> list[list[float]]:
    """Return d(total)/d(logprob) at ratio 1 of each row's two action tokens and first observation token."""
    batch = collate(samples, pad_token_id=0)
    logprobs_BT = batch.sampling_logprobs_BT.clone().requires_grad_()
    total, _ = objective(logprobs_BT, batch, TokenCounts.of(samples), config)
    (gradient_BT,) = torch.autograd.grad(total, logprobs_BT)
    return [[round(x, 6) for x in row] for row in gradient_BT[:, [3, 4, 6]].tolist()]


def test_weights_of_a_partial_group() -> None:
    # Four rows, two of them scored: advantages 0.5 and -0.5 about their own mean. Every row is one of the four that
    # both means divide by, whatever it lacks: an action weighs 1 / (4 * 2), an observation token 1 / (4 * 4).
    rows = (trajectory(0, 1.0), trajectory(1, None, failed=True), trajectory(2, 0.0), trajectory(3, None))
    config = ObjectiveConfig(world_model_coeff=1.0, policy=PolicyOptions(advantage="dr_grpo"))
    world = -1 / 16
    assert token_gradients(build_samples(TrajectoryGroup("t", rows), config), config) == [
        [-0.0625, -0.0625, world],
        [0, 0, world],
        [0.0625, 0.0625, world],
        [0, 0, world],
    ]
    # One scored row has nothing to be compared with.
    lone = TrajectoryGroup("t", (trajectory(0, 1.0), trajectory(1, None)))
    assert token_gradients(build_samples(lone, config), config) == [[0, 0, -1 / 8]] * 2
    # token_mean counts the actions of rows without a reward too, so a failure makes no other row heavier: 1 / 8.
    by_token = replace(config, policy_normalizer="token_mean")
    samples = build_samples(TrajectoryGroup("t", rows), by_token)
    assert [row[0] for row in token_gradients(samples, by_token)] == [-0.0625, 0, 0.0625, 0]


def test_length_costs_reward_before_advantages_and_the_recorded_reward_stays() -> None:
    long = replace(trajectory(0, 1.0), segments=(*trajectory().segments, Segment(ENV_OUTPUT, (20,) * 3000, turn=0)))
    group = TrajectoryGroup("t", (long, trajectory(1, 1.0), trajectory(2, None)))
    # 7 tokens after the prompt, and 3007; 7 are free: echo-rl's penalty at 0.1 for 1000 tokens is 0.3.
    penalty = LengthPenalty(per_1000_tokens=0.1, free_tokens=7, max_penalty=math.inf)
    config = ObjectiveConfig(policy=PolicyOptions(advantage="dr_grpo", length_penalty=penalty))
    samples = build_samples(group, config)
    assert [s.advantage for s in samples] == pytest.approx([-0.15, 0.15, 0.0])
    assert [s.length_penalty for s in samples] == pytest.approx([0.3, 0.0, 0.0])
    assert row_metrics(samples, config)["length_penalty"] == pytest.approx(0.15)  # of the two that have a reward
    assert group.rewards == (1.0, 1.0, None)
    assert [s.length_penalty for s in build_samples(group)] == [0, 0, 0]


def test_the_soft_overlong_punishment_of_dapo() -> None:
    # L_max = 20480, L_cache = 4096: nothing up to 16384, then ((L_max - L_cache) - L) / L_cache, and -1 from 20480 on.
    penalty = LengthPenalty(per_1000_tokens=1000 / 4096, free_tokens=20480 - 4096, max_penalty=1.0)
    assert [penalty.for_length(tokens) for tokens in (0, 16384, 17408, 18432, 20480, 99999)] == [0, 0, 0.25, 0.5, 1, 1]


@pytest.mark.parametrize(("now", "bound", "trained"), [(None, 0, True), (3, 0, True), (5, 1, False), (5, 2, True)])
def test_rows_that_are_too_old_keep_the_world_model_term_alone(now: int | None, bound: int, trained: bool) -> None:
    group = TrajectoryGroup("t", (trajectory(0, 1.0), trajectory(1, 0.0)))  # sampled by version 3
    config = ObjectiveConfig(world_model_coeff=1.0, policy=PolicyOptions(advantage="dr_grpo", max_staleness=bound))
    samples = build_samples(group, config, policy_version=now)
    action = 1 / 8 if trained else 0  # 0.5 / (2 rows * 2 actions)
    assert token_gradients(samples, config) == [[-action, -action, -1 / 8], [action, action, -1 / 8]]
    assert row_metrics(samples, config)["staleness"] == (0 if now is None else now - 3)
    assert row_metrics(samples, config)["stale_rows"] == (0 if trained else 2)


def test_rows_of_a_later_policy_are_refused() -> None:
    with pytest.raises(ValueError, match="sampled by policy version 3, and version 2 is to learn from it"):
        build_samples(TrajectoryGroup("t", (trajectory(),)), policy_version=2)


def test_greedy_samples_are_refused() -> None:
    with pytest.raises(ConfigError, match="temperature=0"):
        build_samples(TrajectoryGroup("t", (trajectory(),)), temperature=0)


def test_padding_is_context_and_nothing_selects_it() -> None:
    batch = collate([*to_samples(trajectory()), of_length(2)], pad_token_id=99)
    assert batch.token_ids_BT.shape == (2, 10)
    assert batch.token_ids_BT[1].tolist() == [0, 1] + [99] * 8
    assert batch.lengths_B.tolist() == [10, 2]
    padding_BT = torch.arange(10) >= batch.lengths_B[:, None]
    for selected_BT in (
        batch.sampled_BT,
        is_observation(batch.roles_BT),
        has_target_role(batch.roles_BT, batch.turns_BT, "full_observation"),
    ):
        assert not (selected_BT & padding_BT).any()


@pytest.mark.parametrize(
    ("target", "positions"),
    [
        ("env_only", [6, 7, 8]),
        ("warning_only", [9]),
        ("warning_plus_env", [6, 7, 8, 9]),
        ("full_observation", [5, 6, 7, 8, 9]),  # the scaffold of the observation, never that of the prompt
    ],
)
def test_targets(target: str, positions: list[int]) -> None:
    (sample,) = to_samples(trajectory())
    assert has_target_role(sample.roles, sample.turns, target).nonzero().flatten().tolist() == positions  # type: ignore


def test_counts_selection_and_exports_follow_one_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    """Change the roles of a target in the one place that defines them: losses, selection and exports follow."""
    monkeypatch.setitem(TARGET_ROLES, "env_only", (ACTION,))  # type: ignore[arg-type]
    config = ObjectiveConfig(world=WorldOptions(max_tokens_per_observation=1))
    (sample,) = build_samples(TrajectoryGroup("t", (trajectory(),)), config)
    assert has_target_role(sample.roles, sample.turns, "env_only").nonzero().flatten().tolist() == [3, 4]
    assert sample.target_mask("env_only").nonzero().flatten().tolist() == [3]  # the cap is on targets
    assert [t for t, learned in enumerate(to_rfc010(trajectory())["obs_mask"]) if learned] == [3, 4]


def test_unknown_target_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="env_only"):
        has_target_role(torch.zeros(1), torch.zeros(1), "all")  # type: ignore[arg-type]


def test_masks_that_cannot_be_roles_are_refused() -> None:
    mask = torch.tensor([[True, False]])
    with pytest.raises(ValueError, match="both masks"):
        roles_from_masks(mask, mask, shape=mask.shape)
    with pytest.raises(ValueError, match="must be bool"):
        roles_from_masks(mask.float(), mask, shape=mask.shape)
    with pytest.raises(ValueError, match="share one shape"):
        roles_from_masks(mask, ~mask, shape=torch.Size((1, 3)))


def test_fields_of_a_sample_have_one_length() -> None:
    sample = of_length(3)
    with pytest.raises(ValueError, match="3 tokens has 2 roles"):
        Sample(
            token_ids=sample.token_ids, roles=sample.roles[:2], turns=sample.turns,
            sampled=sample.sampled, sampling_logprobs=sample.sampling_logprobs, advantage=0.0, has_reward=True,
        )  # fmt: skip
    with pytest.raises(ValueError, match="no ACTION is marked as sampled"):
        replace(sample, sampled=~sample.sampled)


def test_only_sampled_actions_reach_the_policy_term() -> None:
    scripted = Segment(ACTION, (20, 21, 22), turn=1)
    row = replace(trajectory(0, 1.0), segments=(*trajectory().segments, scripted))
    (sample,) = to_samples(row, advantage=1.0, temperature=0.8)
    assert sample.roles.tolist() == [0, 0, 1, 2, 2, 1, 3, 3, 3, 4, 2, 2, 2]
    assert sample.sampled.tolist() == [False] * 3 + [True] * 2 + [False] * 8
    assert sample.counts("env_only").actions == 2
    counts = TokenCounts.of([sample])
    assert (counts.action_tokens, counts.policy_tokens) == (2, 2)
    batch = collate([sample, of_length(20)], pad_token_id=0)
    assert batch.sampled_BT.sum() == policy_mask(batch).sum() == 2
    assert token_temperatures(batch, ObjectiveConfig())[0].tolist() == pytest.approx([1] * 3 + [0.8] * 2 + [1] * 15)
    assert not measured_mask(batch, ObjectiveConfig())[0, 10:].any()
    # At ratio 1 the surrogate is -advantage, over the two sampled tokens: 1 / (1 row * |A| = 2) each, and 0 elsewhere.
    config = ObjectiveConfig(world_model_coeff=0.0)
    for normalizer in ("sequence_mean", "token_mean"):
        batch = collate([sample], pad_token_id=0)
        logprobs_BT = batch.sampling_logprobs_BT.clone().requires_grad_()
        total, _ = objective(logprobs_BT, batch, counts, replace(config, policy_normalizer=normalizer))
        (gradient_BT,) = torch.autograd.grad(total, logprobs_BT)
        assert gradient_BT.tolist() == [[0, 0, 0, -0.5, -0.5, *[0] * 8]]
