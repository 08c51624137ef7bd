"""Recorded weights against autograd of the loss, an engine's own gradients, and numbers by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import Tensor

from backtalk.engines.torch.engine import TorchConfig, TorchEngine
from backtalk.errors import DataError
from backtalk.objective import objective
from backtalk.objective.batch import TokenCounts, collate
from backtalk.objective.coefficient import Schedule
from backtalk.objective.config import (
    LengthPenalty,
    ObjectiveConfig,
    PolicyNormalizer,
    PolicyOptions,
    WorldNormalizer,
    WorldOptions,
)
from backtalk.objective.roles import WorldLossTarget
from backtalk.objective.samples import Sample, build_samples
from backtalk.objective.weights import step_weights
from backtalk.run.log import RunLog
from backtalk.trajectory import Segment, StopReason, TokenRole, TokenWeights, Trajectory, TrajectoryGroup
from tiny import tiny_model_dir

CONTEXT, TEMPLATE, ACTION, ENV_OUTPUT, WARNING = TokenRole


def rollout(
    task: str, index: int, reward: float | None, num_output: int, *, num_actions: int = 3, version: int = 3
) -> Trajectory:
    """Make a rollout with ``num_actions`` + 2 + ``num_output`` + 2 tokens after the prompt."""
    segments = [
        Segment(TEMPLATE, (1, 2)),
        Segment(CONTEXT, (10, 11, 12)),
        Segment(ACTION, tuple(range(20, 20 + num_actions)), (-0.5,) * num_actions, 0),
        Segment(TEMPLATE, (3,), None, 0, "bash"),
        Segment(ENV_OUTPUT, tuple(range(40, 40 + num_output)), None, 0, "bash"),
        Segment(WARNING, (60, 61), None, 0, "bash"),
        Segment(TEMPLATE, (4,), None, 0, "bash"),
    ]
    return Trajectory(
        task_id=task,
        sample_index=index,
        segments=tuple(segment for segment in segments if len(segment)),
        reward=reward,
        stop_reason=StopReason.SUBMITTED,
        policy_version=version,
    )


SECOND_BRANCH = (  # after the history was rewritten
    Segment(CONTEXT, (10, 13), branch=1),
    Segment(ACTION, (24, 25), (-0.5, -0.25), 1, branch=1),
    Segment(ENV_OUTPUT, (50, 51, 52), None, 1, "bash", 1),
    Segment(ACTION, (26, 27, 28), None, 2, branch=1),  # which nobody sampled
)
FORKED = rollout("a", 0, 1.0, 4)
FORKED = replace(FORKED, segments=(*FORKED.segments, *SECOND_BRANCH))
GROUPS = [
    TrajectoryGroup("a", (FORKED, rollout("a", 1, 0.0, 9, num_actions=5))),
    TrajectoryGroup("b", (rollout("b", 0, 0.5, 0), rollout("b", 1, None, 6), rollout("b", 2, 0.25, 2))),
    TrajectoryGroup("c", tuple(rollout("c", i, float(i), 3, version=1) for i in range(2))),  # two versions old
]
PENALTY = LengthPenalty(per_1000_tokens=100.0, free_tokens=6, max_penalty=2.0)  # 0.1 a token
CONFIGS = {
    f"{policy}, {world}, {target}": ObjectiveConfig(
        policy_coeff=2.0,
        world_model_coeff=0.3,
        policy_normalizer=policy,
        world_normalizer=world,
        world_loss_target=target,
        max_seq_len=100,
    )
    for policy in get_args(PolicyNormalizer)
    for world in get_args(WorldNormalizer)
    for target in get_args(WorldLossTarget)
} | {
    "schedule": ObjectiveConfig(world_model_coeff=Schedule({0: 0.5, 10: 0.1})),
    "weights": ObjectiveConfig(
        world_loss_target="warning_plus_env", world=WorldOptions(weights={"warning": 0.25, "tool:bash": 0.5})
    ),
    "cap": ObjectiveConfig(
        world_normalizer="sequence_mean_selected",
        world_loss_target="full_observation",
        world=WorldOptions(max_tokens_per_observation=4),
    ),
    "gate": ObjectiveConfig(world_normalizer="token_mean", world=WorldOptions(min_correct=0.5)),
    "paw": ObjectiveConfig(world=WorldOptions(entropy_share=0.5, return_adaptive=True)),
    "rloo": ObjectiveConfig(policy=PolicyOptions(advantage="rloo")),
    "length and age": ObjectiveConfig(policy=PolicyOptions(length_penalty=PENALTY, max_staleness=1)),
    "stale": ObjectiveConfig(policy=PolicyOptions(max_staleness=2)),
    "observations alone": ObjectiveConfig(policy_coeff=0.0, world_model_coeff=1.0),
    "rewards alone": ObjectiveConfig(world_model_coeff=0.0),
}


def samples_of(config: ObjectiveConfig) -> list[Sample]:
    return [sample for group in GROUPS for sample in build_samples(group, config, policy_version=3)]


def gradients(samples: Sequence[Sample], config: ObjectiveConfig) -> list[float]:
    """Return -d(loss) / d(logprob) of each token by autograd, at the sampling policy, over two micro-batches."""
    counts, found = TokenCounts.of(samples, config.world_loss_target), []
    for part in (samples[:3], samples[3:]):
        batch = collate(part, 0)
        logprobs_BT = batch.sampling_logprobs_BT.double().requires_grad_()
        objective(logprobs_BT, batch, counts, config)[0].backward()
        assert logprobs_BT.grad is not None
        found += [-x for row, sample in zip(logprobs_BT.grad, part, strict=True) for x in row[: len(sample)].tolist()]
    return found


def flat(rows: Sequence[TokenWeights]) -> list[float]:
    return [p + w for row in rows for p, w in zip(row.policy, row.world, strict=True)]


@pytest.mark.parametrize("name", CONFIGS)
def test_weights_are_the_gradient_of_the_loss(name: str) -> None:
    config = CONFIGS[name].at(5)
    samples = samples_of(config)
    rows = step_weights(samples, config)
    assert len(rows) == 7 and any(flat(rows))
    assert flat(rows) == pytest.approx(gradients(samples, config), rel=1e-6, abs=1e-12)  # advantages are float32 there


def test_length_and_age_move_the_advantage_by_hand() -> None:
    policy = PolicyOptions(advantage="dr_grpo", length_penalty=PENALTY, max_staleness=1)
    rows = step_weights(samples_of(config := ObjectiveConfig(policy=policy)), config)
    # Group a: 11 + 8 tokens after the prompt in two branches, and 18: 1 - 0.1 (19 - 6) = -0.3, 0 - 0.1 (18 - 6) = -1.2.
    assert [row.advantage for row in rows[:2]] == pytest.approx([0.45, -0.45])
    # Group b: 0.5 - 0.1 (7 - 6), no reward, 0.25 - 0.1 (9 - 6), so 0.4 and -0.05.
    assert rows[2].advantage == pytest.approx(0.225) and rows[4].advantage == pytest.approx(-0.225)
    assert rows[3].advantage is None and not any(rows[3].policy) and any(rows[3].world)
    # Group c is two updates old: observations alone.
    assert [row.advantage for row in rows[5:]] == [None, None]
    assert not any(rows[6].policy) and sum(rows[6].world) == pytest.approx(0.05 / 7 * 3 / 5)


@pytest.mark.parametrize("packing", ["on", "off"])
async def test_weights_are_the_gradient_that_the_engine_used(packing: str, tmp_path: Path) -> None:
    settings = {"device": "cpu", "dtype": "float64", "max_tokens_per_microbatch": 40}
    engine = TorchEngine(TorchConfig(model=str(tiny_model_dir(tmp_path)), packing=packing, **settings))
    config = CONFIGS["length and age"]
    samples = samples_of(config)
    counts = TokenCounts.of(samples)
    # The sampler's log-probabilities become the engine's own, so that every ratio is 1.
    _, record, _ = engine._accumulate(samples, counts, config)
    own = {id(sample): logprobs for sample, logprobs in zip(record.samples, record.logprobs, strict=True)}
    samples = [replace(sample, sampling_logprobs=own[id(sample)]) for sample in samples]
    _, record, _ = engine._accumulate(samples, counts, config)
    used: dict[int, Tensor] = dict(zip(map(id, record.samples), record.gradients, strict=True))
    expected = torch.cat([-used[id(sample)] for sample in samples])
    assert len(record.samples) == len(samples) and bool(expected.any())
    assert flat(step_weights(samples, config)) == pytest.approx(expected.tolist(), rel=1e-5, abs=1e-12)


def test_a_row_without_a_token_has_no_weights() -> None:
    nothing = TrajectoryGroup("n", (Trajectory(task_id="n", sample_index=0, segments=()),))
    assert step_weights(build_samples(nothing), ObjectiveConfig()) == [TokenWeights(None, (), ())]


def test_weights_come_back_as_written_and_cost_little(tmp_path: Path) -> None:
    config, log = CONFIGS["cap"], RunLog(tmp_path)
    weights = step_weights(samples_of(config), config)
    log.write_groups(7, GROUPS)
    assert log.read_weights(7, GROUPS) is None
    log.write_weights(7, GROUPS, weights)
    assert log.group_steps() == [7]
    found = log.read_weights(7, GROUPS)
    assert found is not None and [len(rows) for rows in found] == [2, 3, 2]
    back = [row for rows in found for row in rows]
    assert [row.advantage for row in back] == [row.advantage for row in weights]
    assert flat(back) == pytest.approx(flat(weights), rel=1e-6)
    long = [TrajectoryGroup("l", tuple(rollout("l", i, float(i), 20_000, num_actions=2_000) for i in range(2)))]
    log.write_weights(8, long, step_weights(build_samples(long[0]), ObjectiveConfig()))
    assert log.weights_path(8).stat().st_size < 10_000  # of 44,000 tokens


def test_weights_of_other_trajectories_are_told_apart(tmp_path: Path) -> None:
    log, rows = RunLog(tmp_path), step_weights(samples_of(ObjectiveConfig()), ObjectiveConfig())
    with pytest.raises(ValueError, match="the weights given are for 6 trajectories"):
        log.write_weights(0, GROUPS, rows[1:])
    log.write_weights(0, GROUPS, rows)
    with pytest.raises(DataError, match=r"does not hold the weights of this step .*remove it to go without"):
        log.read_weights(0, GROUPS[:2])
    log.weights_path(0).write_bytes(b"PAR1")
    with pytest.raises(DataError, match="does not hold the weights of this step"):
        log.read_weights(0, GROUPS)
