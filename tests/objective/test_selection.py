"""Selection of observations: gates, weights, caps and PaW's choices on groups made by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from backtalk.errors import ConfigError
from backtalk.objective.batch import TokenCounts
from backtalk.objective.config import ObjectiveConfig, WorldOptions
from backtalk.objective.samples import build_samples
from backtalk.objective.selection import return_adaptive_scale, rollout_scales, turn_weights, world_scales
from backtalk.trajectory import Failure, Segment, StopReason, TokenRole, Trajectory, TrajectoryGroup

CONTEXT, TEMPLATE, ACTION, ENV_OUTPUT, WARNING = TokenRole


def rollout(
    index: int = 0, reward: float | None = 1.0, surprises: tuple[float, ...] = (1.0, 2.0), **stats: float
) -> Trajectory:
    """Make a turn for each surprise in nats: two action tokens, one of template, three of output, one warning."""
    segments = [Segment(CONTEXT, (1,))]
    for turn, surprise in enumerate(surprises):
        tool = "bash" if turn % 2 == 0 else "search"
        segments += [
            Segment(ACTION, (2, 3), (-surprise, -surprise), turn=turn),
            Segment(TEMPLATE, (4,), turn=turn, tool=tool),
            Segment(ENV_OUTPUT, (5, 6, 7), turn=turn, tool=tool),
            Segment(WARNING, (8,), turn=turn, tool=tool),
        ]
    failed = reward is None
    return Trajectory(
        task_id="t",
        sample_index=index,
        segments=tuple(segments),
        reward=reward,
        stop_reason=StopReason.FAILED if failed else StopReason.SUBMITTED,
        failure=Failure("step", "SandboxError", "gone") if failed else None,
        stats=stats,
    )


def group(*rollouts: Trajectory) -> TrajectoryGroup:
    return TrajectoryGroup("t", rollouts)


def test_nothing_chosen_is_one_everywhere_and_costs_nothing() -> None:
    assert world_scales(group(rollout(), rollout(1, None)), ObjectiveConfig()) == [None, None]
    assert build_samples(group(rollout()))[0].world_scale is None


def test_weights_by_role_and_tool_multiply() -> None:
    options = WorldOptions(weights={"warning": 0.5, "tool:search": 0.1})
    config = ObjectiveConfig(world_loss_target="warning_plus_env", world=options)
    (scale,) = world_scales(group(rollout()), config)
    assert scale is not None
    assert scale[4:8] == [1.0, 1.0, 1.0, 0.5]  # of bash
    assert scale[11:15] == pytest.approx([0.1, 0.1, 0.1, 0.05])  # of search
    (sample,) = build_samples(group(rollout()), config)
    assert sample.counts("warning_plus_env").targets == 8


def test_a_weight_of_zero_is_no_target() -> None:
    config = ObjectiveConfig(world=WorldOptions(weights={"tool:search": 0.0}))
    samples = build_samples(group(rollout()), config)
    assert TokenCounts.of(samples).target_tokens == 3
    assert TokenCounts.of(samples).env_output_tokens == 6


@pytest.mark.parametrize(
    ("target", "cap", "expected"),
    [
        ("env_only", 2, [0, 1, 1, 0, 0]),
        ("warning_plus_env", 3, [0, 1, 1, 1, 0]),
        ("warning_plus_env", 4, [0, 1, 1, 1, 1]),
        ("full_observation", 2, [1, 1, 0, 0, 0]),
    ],
)
def test_a_cap_keeps_the_first_targets_of_each_observation(target: str, cap: int, expected: list[int]) -> None:
    config = ObjectiveConfig(world_loss_target=target, world=WorldOptions(max_tokens_per_observation=cap))  # type: ignore
    for sample in build_samples(group(rollout()), config):
        chosen = sample.target_mask(config.world_loss_target).int().tolist()
        assert chosen == [0, 0, 0, *expected, 0, 0, *expected]


def test_gates_on_how_a_rollout_was_written() -> None:
    good, half, none = rollout(0), rollout(1, invalid_calls=1.0), rollout(2, invalid_calls=2.0, unclean_turns=2.0)
    silent = rollout(3, surprises=())
    rollouts = group(good, half, none, silent)
    assert rollout_scales(rollouts, WorldOptions()) == [1, 1, 1, 1]
    assert rollout_scales(rollouts, WorldOptions(min_valid_calls=0.5)) == [1, 1, 0, 0]
    assert rollout_scales(rollouts, WorldOptions(min_valid_calls=0.6)) == [1, 0, 0, 0]
    assert rollout_scales(rollouts, WorldOptions(min_clean_turns=1.0)) == [1, 1, 0, 0]


@pytest.mark.parametrize(
    ("rewards", "share", "kept"),
    [
        ((1.0, 0.0, 0.0, 0.0), 0.5, [1, 1, 0, 0]),  # one solved allows one that is not
        ((1.0, 1.0, 0.0, 0.0), 2 / 3, [1, 1, 1, 0]),  # two solved allow one
        ((0.0, 0.0, 1.0, 0.0), 1 / 3, [1, 1, 1, 0]),  # the first ones
        ((0.0, 0.0, 0.0, 0.0), 0.1, [0, 0, 0, 0]),
        ((1.0, None, 0.0, 0.0), 0.5, [1, 1, 0, 0]),  # a failed one is not solved
    ],
)
def test_gate_on_the_share_of_solved_rollouts(rewards: tuple[float, ...], share: float, kept: list[int]) -> None:
    rollouts = group(*(rollout(i, reward) for i, reward in enumerate(rewards)))
    assert rollout_scales(rollouts, WorldOptions(min_correct=share)) == kept


def test_a_gated_row_keeps_its_place_in_the_mean() -> None:
    rollouts = group(rollout(0), rollout(1, invalid_calls=2.0))
    config = ObjectiveConfig(world=WorldOptions(min_valid_calls=1.0))
    counts = TokenCounts.of(build_samples(rollouts, config))
    assert (counts.sequences, counts.target_tokens, counts.action_tokens) == (2, 6, 8)


def kept_turns(rollouts: TrajectoryGroup, share: float) -> list[set[int | None]] | None:
    weights = turn_weights(rollouts, WorldOptions(entropy_share=share))
    assert weights is None or all(weight == 1.0 for turns in weights for weight in turns.values())
    return None if weights is None else [set(turns) for turns in weights]


def without_first_logprobs(trajectory: Trajectory) -> Trajectory:
    segments = [replace(s, logprobs=None) if s.logprobs and s.turn == 0 else s for s in trajectory.segments]
    return replace(trajectory, segments=tuple(segments))


def test_paw_keeps_the_turns_of_highest_entropy() -> None:
    rollouts = group(rollout(0, surprises=(1.0, 4.0)), rollout(1, surprises=(3.0, 2.0)))
    assert kept_turns(rollouts, 1.0) is None
    assert kept_turns(rollouts, 0.75) == [{1}, {0, 1}]  # the turn of 1 nat goes
    assert kept_turns(rollouts, 0.5) == [{1}, {0}]
    assert kept_turns(rollouts, 0.01) == [{1}, set()]  # never none at all
    scripted = group(without_first_logprobs(rollouts.trajectories[0]), rollouts.trajectories[1])
    assert kept_turns(scripted, 0.67) == [{1}, {0, 1}]  # ceil(0.67 * 3)
    assert kept_turns(scripted, 0.66) == [{1}, {0}]
    config = ObjectiveConfig(world=WorldOptions(entropy_share=0.75))
    first, second = build_samples(rollouts, config)
    assert first.target_mask("env_only").int().tolist() == [0] * 11 + [1, 1, 1, 0]
    assert second.target_mask("env_only").sum() == 6


def test_negative_entropy_weighs_what_follows_sure_actions_more() -> None:
    """Entropies of log 2, log 4, log 1 and log 4 have exp(-entropy) 1/2, 1/4, 1 and 1/4, of mean 1/2."""
    log2 = math.log(2)
    rollouts = group(rollout(0, surprises=(log2, 2 * log2)), rollout(1, surprises=(0.0, 2 * log2)))
    weights = turn_weights(rollouts, WorldOptions(entropy_weights="negative"))
    assert weights == [{0: pytest.approx(1), 1: pytest.approx(0.5)}, {0: pytest.approx(2), 1: pytest.approx(0.5)}]
    first, second = build_samples(rollouts, ObjectiveConfig(world=WorldOptions(entropy_weights="negative")))
    scales = [
        sorted(set(s.world_scale[s.roles == TokenRole.ENV_OUTPUT].tolist()))
        for s in (first, second)
        if s.world_scale is not None
    ]
    assert scales == [[pytest.approx(0.5), pytest.approx(1)], [pytest.approx(0.5), pytest.approx(2)]]
    scripted = group(without_first_logprobs(rollouts.trajectories[0]))
    assert turn_weights(scripted, WorldOptions(entropy_weights="negative")) == [{1: 1.0}]


def test_paw_balances_by_the_mean_reward() -> None:
    assert return_adaptive_scale([1.0, 0.0, None, 0.5]) == 0.5
    assert return_adaptive_scale([None]) == 1.0
    with pytest.raises(ConfigError, match=r"scale rewards to \[0, 1\]"):
        return_adaptive_scale([3.0])
    config = ObjectiveConfig(world=WorldOptions(return_adaptive=True))
    (scale, _) = world_scales(group(rollout(0, 1.0), rollout(1, 0.5)), config)
    assert scale is not None
    assert scale[4:7] == [0.25] * 3
    solved = build_samples(group(rollout(0, 1.0), rollout(1, 1.0)), config)
    assert TokenCounts.of(solved).target_tokens == 0
