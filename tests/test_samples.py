"""From trajectories to padded micro-batches: who made a token stays known, and nothing selects padding."""

from __future__ import annotations

import pytest
import torch

from backtalk.errors import ConfigError
from backtalk.objective_config import ObjectiveConfig, PolicyOptions
from backtalk.samples import (
    Sample,
    TokenCounts,
    build_samples,
    collate,
    is_action,
    is_observation,
    is_target,
    micro_batches,
    roles_from_masks,
    to_samples,
)
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
        is_action(batch.roles_BT),
        is_observation(batch.roles_BT),
        is_target(batch.roles_BT, batch.turns_BT, "full_observation"),
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
    assert is_target(sample.roles, sample.turns, target).nonzero().flatten().tolist() == positions  # type: ignore


def test_unknown_target_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="env_only"):
        is_target(torch.zeros(1), torch.zeros(1), "all")  # type: ignore[arg-type]


def test_micro_batches_hold_every_row_once_within_the_budget() -> None:
    samples = [of_length(n) for n in (3, 9, 1, 4, 4, 20, 0)]
    parts = micro_batches(samples, 12)
    assert [[len(s) for s in part] for part in parts] == [[20], [9], [4, 4, 3], [1]]
    assert micro_batches([], 12) == []


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
            sampling_logprobs=sample.sampling_logprobs, advantage=0.0, has_reward=True,
        )  # fmt: skip
