"""Leaving the most surprising target tokens of a step out of the world-model term."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from backtalk.errors import ConfigError
from backtalk.objective.batch import TokenCounts, collate
from backtalk.objective.config import ObjectiveConfig, WorldNormalizer, WorldOptions
from backtalk.objective.controls import shuffle_observations
from backtalk.objective.loss import objective
from backtalk.objective.samples import Sample, build_samples
from backtalk.objective.surprise import drop_surprising
from backtalk.trajectory import Segment, TokenRole, Trajectory, TrajectoryGroup

CONTEXT, TEMPLATE, ACTION, ENV_OUTPUT, WARNING = TokenRole
BRANCH = (Segment(CONTEXT, (10,), branch=1), Segment(ENV_OUTPUT, (50, 51), None, 1, branch=1))


def rollout(index: int, output: int, reward: float = 0.0, more: tuple[Segment, ...] = ()) -> Trajectory:
    """Return a prompt token, an action of two, and environment output of so many tokens."""
    segments = (Segment(CONTEXT, (1,)), Segment(ACTION, (2, 3), (-0.5, -0.5), 0))
    segments += (Segment(ENV_OUTPUT, (9,) * output, None, 0),)
    return Trajectory(task_id="t", sample_index=index, segments=(*segments, *more), reward=reward)


def samples_of(*rollouts: Trajectory) -> list[Sample]:
    return build_samples(TrajectoryGroup("t", rollouts))


def targets(samples: list[Sample]) -> list[list[int]]:
    return [sample.target_mask("env_only").int().tolist() for sample in samples]


# of both rollouts: prompt, action, action, and output of three and of two tokens
LOGPROBS = [0.0, -9.0, -9.0, -1.0, -4.0, -2.0, 0.0, -9.0, -9.0, -3.0, -2.0]


def test_the_least_likely_targets_of_the_whole_step_go() -> None:
    """Of -1, -2, -2, -3, -4 the lowest 40 % are -4 and -3; what is no target does not count, however unlikely."""
    samples = drop_surprising(samples_of(rollout(0, 3), rollout(1, 2)), LOGPROBS, "env_only", 0.4)
    assert targets(samples) == [[0, 0, 0, 1, 0, 1], [0, 0, 0, 0, 1]]
    assert TokenCounts.of(samples).target_tokens == 3


@pytest.mark.parametrize(
    ("normalizer", "expected"),
    [
        ("sequence_mean", (1 + 2) / (2 * 3) + 2 / (2 * 2)),  # divisors stay those of all observation tokens
        ("sequence_mean_selected", (1 + 2) / (2 * 2) + 2 / (2 * 1)),
        ("token_mean", (1 + 2 + 2) / 3),
    ],
)
def test_the_loss_of_what_is_left(normalizer: WorldNormalizer, expected: float) -> None:
    config = ObjectiveConfig(policy_coeff=0.0, world_model_coeff=1.0, world_normalizer=normalizer)
    rows = samples_of(rollout(0, 3), rollout(1, 2))
    samples = drop_surprising(rows, LOGPROBS, "env_only", 0.4)
    logprobs_BT = torch.nn.utils.rnn.pad_sequence(list(torch.tensor(LOGPROBS).split([6, 5])), batch_first=True)
    loss, _ = objective(logprobs_BT, collate(samples, 0), TokenCounts.of(samples), config)
    assert loss.item() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("share", "left"),
    [
        (0.01, [-1, -2, -2, -3, -4]),  # ceil(0.99 * 5) = 5
        (0.2, [-1, -2, -2, -3]),
        (0.5, [-1, -2, -2]),  # ceil(2.5)
        (0.6, [-1, -2, -2]),  # the two of -2 have one fate
        (0.99, [-1]),  # never none at all
    ],
)
def test_how_many_are_left(share: float, left: list[float]) -> None:
    samples = drop_surprising(samples_of(rollout(0, 3), rollout(1, 2)), LOGPROBS, "env_only", share)
    flat = [value for row in targets(samples) for value in row]
    assert sorted(x for x, chosen in zip(LOGPROBS, flat, strict=True) if chosen) == sorted(left)


def test_the_order_of_the_rows_changes_nothing() -> None:
    first, second = samples_of(rollout(0, 3), rollout(1, 2))
    turned = drop_surprising([second, first], [*LOGPROBS[6:], *LOGPROBS[:6]], "env_only", 0.4)
    assert targets(turned)[::-1] == targets(drop_surprising([first, second], LOGPROBS, "env_only", 0.4))


def test_a_row_counts_what_is_left_in_its_other_branches() -> None:
    samples = samples_of(rollout(0, 3, more=BRANCH))
    kept = drop_surprising(samples, [*LOGPROBS[:6], 0.0, -1.5, -8.0], "env_only", 0.4)
    assert targets(kept) == [[0, 0, 0, 1, 0, 1], [0, 1, 0]]
    assert [sample.other_branches.targets for sample in kept] == [1, 2]
    assert [sample.other_branches.observations for sample in kept] == [2, 3]


def test_weights_stay_and_what_had_none_is_not_counted() -> None:
    config = ObjectiveConfig(world=WorldOptions(max_tokens_per_observation=2, weights={"env_output": 0.5}))
    samples = build_samples(TrajectoryGroup("t", (rollout(0, 3), rollout(1, 2))), config)
    first, second = drop_surprising(samples, LOGPROBS, "env_only", 0.25)  # of -1, -4, -3, -2 the lowest
    assert first.world_scale is not None and second.world_scale is not None
    assert first.world_scale.tolist()[3:] == [0.5, 0.0, 0.0] and second.world_scale.tolist()[3:] == [0.5, 0.5]


def test_a_step_without_targets_is_left_alone_and_controls_exchange_what_is_left() -> None:
    silent = samples_of(rollout(0, 0))
    assert drop_surprising(silent, LOGPROBS[:3], "env_only", 0.5) == silent
    samples = drop_surprising(samples_of(rollout(0, 3), rollout(1, 2)), LOGPROBS, "env_only", 0.4)
    moved = shuffle_observations(samples, "env_only", key="0/0")
    assert TokenCounts.of(moved).target_tokens == 3


@pytest.mark.parametrize("options", [{"drop_surprising": 1.0}, {"drop_surprising": -0.1}])
def test_a_share_that_leaves_nothing_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="leaves nothing to learn; use 0 <= share < 1"):
        WorldOptions(**options)
