"""Controls against rows changed by hand, and the policy term that they must not touch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import Tensor

from backtalk.engines.torch.engine import TorchConfig, TorchEngine
from backtalk.objective import objective
from backtalk.objective.batch import TokenCounts, collate
from backtalk.objective.config import ObjectiveConfig, WorldNormalizer, WorldOptions
from backtalk.objective.controls import mask_actions, shuffle_observations
from backtalk.objective.roles import WorldLossTarget
from backtalk.objective.samples import Sample, build_samples
from backtalk.objective.weights import step_weights
from backtalk.trajectory import Segment, TokenRole, Trajectory, TrajectoryGroup
from tiny import tiny_model_dir

CONTEXT, TEMPLATE, ACTION, ENV_OUTPUT, WARNING = TokenRole


def rollout(task: str, index: int, reward: float | None, observations: Sequence[Sequence[Segment]]) -> Trajectory:
    """Make a rollout with an action before each observation, and a last one without."""
    segments = [Segment(TEMPLATE, (1,)), Segment(CONTEXT, (10 + index, 11 + ord(task)))]
    for turn, observation in enumerate([*observations, ()]):
        segments.append(Segment(ACTION, (20 + turn, 30 + index), (-0.5, -0.25), turn))
        if observation:
            segments.append(Segment(TEMPLATE, (2, 3), None, turn, "bash"))
            segments += [replace(segment, turn=turn) for segment in observation]
            segments.append(Segment(TEMPLATE, (4,), None, turn))
    return Trajectory(task_id=task, sample_index=index, segments=tuple(segments), reward=reward)


def output(first: int, count: int) -> list[Segment]:
    return [Segment(ENV_OUTPUT, tuple(range(first, first + count)), tool="bash")]


TWO_MESSAGES = [*output(140, 2), Segment(TEMPLATE, (5,)), Segment(WARNING, (150,)), *output(151, 1)]
GROUPS = (
    TrajectoryGroup(
        "a", (rollout("a", 0, 1.0, [output(100, 4), output(110, 1)]), rollout("a", 1, 0.0, [TWO_MESSAGES]))
    ),
    TrajectoryGroup("b", (rollout("b", 0, 0.0, [output(120, 3)]), rollout("b", 1, None, [output(130, 6)]))),
    TrajectoryGroup("c", (rollout("c", 0, 1.0, [output(160, 2)]), rollout("c", 1, 0.0, []))),
)


def samples_of(config: ObjectiveConfig, groups: Sequence[TrajectoryGroup] = GROUPS) -> list[Sample]:
    return [sample for group in groups for sample in build_samples(group, config)]


def bodies(sample: Sample | Trajectory) -> list[tuple[int, ...]]:
    """Return the tokens between the template's heading (2, 3) and its end (4) of each observation."""
    ids = list(sample.token_ids.tolist() if isinstance(sample, Sample) else sample.token_ids)
    found, start = [], 0
    while 3 in ids[start:]:
        begin = ids.index(3, start) + 1
        start = ids.index(4, begin)
        found.append(tuple(ids[begin:start]))
    return found


def shuffled_by_hand(trajectory: Trajectory, copy: Sample) -> Trajectory:
    """Return a trajectory with the observations that stand in its copy, each cut into its segments from its own."""
    own = {
        tuple(token for s in group for token in s.token_ids): group
        for group in ([output(100, 4), output(110, 1), TWO_MESSAGES, output(120, 3), output(130, 6), output(160, 2)])
    }
    made = rollout(trajectory.task_id, trajectory.sample_index, None, [own[body] for body in bodies(copy)])
    return replace(made, segments=tuple(replace(s, logprobs=None) for s in made.segments))


@pytest.mark.parametrize("key", ["0/0", "0/1", "7/3"])
def test_every_observation_follows_an_action_of_another_task(key: str) -> None:
    samples = samples_of(ObjectiveConfig())
    copies = [sample for sample in shuffle_observations(samples, "env_only", key=key) if sample.is_control]
    assert [(c.task_id, c.sample_index) for c in copies] == [("a", 0), ("a", 1), ("b", 0), ("b", 1), ("c", 0)]
    own = {task: {b for s in samples if s.task_id == task for b in bodies(s)} for task in "abc"}
    for copy in copies:
        assert not own[copy.task_id] & set(bodies(copy))
        # what is no observation stays, and no token counts as sampled
        original = next(s for s in samples if (s.task_id, s.sample_index) == (copy.task_id, copy.sample_index))
        rest = [[x for x in s.token_ids.tolist() if (x < 100 and x != 5) or x > 170] for s in (original, copy)]
        assert rest[0] == rest[1]
        assert not copy.sampled.any() and not copy.has_reward and copy.advantage == 0
    assert sorted(b for c in copies for b in bodies(c)) == sorted(b for s in samples for b in bodies(s))
    again = [sample for sample in shuffle_observations(samples, "env_only", key=key) if sample.is_control]
    assert [c.token_ids.tolist() for c in again] == [c.token_ids.tolist() for c in copies]


def test_steps_are_shuffled_differently() -> None:
    samples = samples_of(ObjectiveConfig())
    made = [shuffle_observations(samples, "env_only", key=f"0/{step}") for step in range(8)]
    assert len({tuple(b for s in step if s.is_control for b in bodies(s)) for step in made}) > 2


def test_within_one_task_observations_go_to_other_rollouts() -> None:
    group = TrajectoryGroup("a", tuple(rollout("a", i, 1.0, [output(100 + 5 * i, 4)]) for i in range(4)))
    made = shuffle_observations(samples_of(ObjectiveConfig(), [group]), "env_only", key="0/0")
    for number in range(4):
        (true,), (copy,) = ([s for s in made if s.sample_index == number and s.is_control is x] for x in (False, True))
        assert bodies(true) != bodies(copy)


def test_a_task_with_most_observations_keeps_as_few_as_can_be_and_none_at_its_own_action() -> None:
    large = rollout("a", 0, 1.0, [output(100 + 5 * turn, 4) for turn in range(5)])
    groups = [TrajectoryGroup("a", (large,)), TrajectoryGroup("b", (rollout("b", 0, 1.0, [output(130, 6)]),))]
    made = shuffle_observations(samples_of(ObjectiveConfig(), groups), "env_only", key="0/0")
    (copy,) = (s for s in made if s.is_control and s.task_id == "a")
    assert all(got != own for got, own in zip(bodies(copy), bodies(large), strict=True))
    assert sum(body in bodies(large) for body in bodies(copy)) == 4


def test_a_single_observation_is_not_learned() -> None:
    samples = samples_of(ObjectiveConfig(), [TrajectoryGroup("b", (rollout("b", 0, 1.0, [output(120, 3)]),))])
    made = shuffle_observations(samples, "env_only", key="0/0")
    assert len(made) == 1 and TokenCounts.of(made).target_tokens == 0


# ---------------------------------------------------------------- the loss


class Causal(torch.nn.Module):
    """A causal model in float64 throughout: a token is predicted from the sum of those before it."""

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.embedding = torch.nn.Parameter(torch.randn(200, 16, generator=draw, dtype=torch.float64))
        self.head = torch.nn.Parameter(torch.randn(16, 200, generator=draw, dtype=torch.float64))

    def forward(self, token_ids_BT: Tensor) -> Tensor:
        """Return log p(token t | tokens before); 0 for the first."""
        states = self.embedding[token_ids_BT[:, :-1]].cumsum(1).tanh()
        taken_BT = (states @ self.head).log_softmax(-1).gather(-1, token_ids_BT[:, 1:, None])[..., 0]
        return torch.nn.functional.pad(taken_BT, (1, 0))


def gradient(samples: Sequence[Sample], config: ObjectiveConfig) -> tuple[dict[str, Tensor], Tensor]:
    """Return the terms and the gradient of all weights, by autograd."""
    model, batch = Causal(), collate(samples, 0)
    counts = TokenCounts.of(samples, config.world_loss_target)
    total, terms = objective(model(batch.token_ids_BT), batch, counts, config)
    return terms, torch.cat([g.flatten() for g in torch.autograd.grad(total, list(model.parameters()))])


CONFIGS = {
    f"{normalizer}, {target}": ObjectiveConfig(
        world_model_coeff=0.3, world_normalizer=normalizer, world_loss_target=target, max_seq_len=50
    )
    for normalizer, target in zip(get_args(WorldNormalizer), get_args(WorldLossTarget), strict=True)
} | {"paper": ObjectiveConfig(world_model_coeff=0.3)}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_world_term_is_that_of_rows_shuffled_by_hand_and_the_policy_term_is_untouched(name: str) -> None:
    config = CONFIGS[name]
    samples = samples_of(config)
    made = shuffle_observations(samples, config.world_loss_target, key="0/0")
    before, after = (TokenCounts.of(step, config.world_loss_target) for step in (samples, made))
    assert before == after

    plain, policy_gradient = gradient(samples, replace(config, world_model_coeff=0.0))
    copies = {(s.task_id, s.sample_index): s for s in made if s.is_control}
    by_hand = [
        sample
        for group in GROUPS
        for t in group
        for sample in build_samples(
            TrajectoryGroup(
                group.task_id, (shuffled_by_hand(t, copies.get((t.task_id, t.sample_index), samples[-1])),)
            ),
            config,
        )
    ]
    world, world_gradient = gradient(by_hand, replace(config, policy_coeff=0.0, world_model_coeff=1.0))
    terms, whole = gradient(made, config)
    assert float(terms["policy_loss"]) == pytest.approx(float(plain["policy_loss"]), abs=1e-13)
    assert float(terms["world_model_loss"]) == pytest.approx(float(world["world_model_loss"]), abs=1e-12)
    assert (whole - policy_gradient - 0.3 * world_gradient).abs().max() < 1e-12
    assert policy_gradient.abs().max() > 1e-4 < world_gradient.abs().max()

    _, copied = gradient(made, replace(config, world_model_coeff=0.0))
    assert (copied - policy_gradient).abs().max() < 1e-13


def test_a_rewritten_history_stays_one_row() -> None:
    later = [
        Segment(CONTEXT, (10, 13), branch=1),
        Segment(ACTION, (24, 25), (-0.5, -0.25), 9, branch=1),
        Segment(TEMPLATE, (2, 3), None, 9, "bash", 1),
        Segment(ENV_OUTPUT, (170, 171), None, 9, "bash", 1),
        Segment(TEMPLATE, (4,), None, 9, "bash", 1),
    ]
    forked = rollout("a", 0, 1.0, [output(100, 4)])
    forked = replace(forked, segments=(*forked.segments, *later))
    config = ObjectiveConfig(world_normalizer="sequence_mean", world_model_coeff=1.0)
    groups = [TrajectoryGroup("a", (forked,)), TrajectoryGroup("b", tuple(GROUPS[1]))]
    made = shuffle_observations(samples_of(config, groups), "env_only", key="0/0")
    assert [(s.task_id, s.branch, s.is_control) for s in made][:4] == [
        ("a", 0, False),
        ("a", 1, False),
        ("a", 2, True),
        ("a", 3, True),
    ]
    assert TokenCounts.of(made).sequences == 3
    # 2 observations of b, of 3 and 6 tokens, so the row has 9: each branch counts those of the other
    copies = made[2:4]
    assert [c.other_branches.observations + int((c.roles == ENV_OUTPUT).sum()) for c in copies] == [9, 9]
    assert all(c.other_branches.actions == 0 for c in copies)


def without_actions(trajectory: Trajectory) -> Trajectory:
    """Return a trajectory whose actions are their last token alone, not sampled."""
    empty = [replace(s, token_ids=s.token_ids[-1:], logprobs=None) for s in trajectory.segments]
    pairs = zip(trajectory.segments, empty, strict=True)
    return replace(trajectory, reward=None, segments=tuple(e if s.role is ACTION else s for s, e in pairs))


@pytest.mark.parametrize("name", CONFIGS)
def test_the_world_term_is_that_of_rows_with_empty_actions_and_the_policy_term_is_untouched(name: str) -> None:
    config = CONFIGS[name]
    samples = samples_of(config)
    made = mask_actions(samples, config.world_loss_target, kept=[30, 31])  # the ends of turns in these rollouts
    assert TokenCounts.of(made, config.world_loss_target) == TokenCounts.of(samples, config.world_loss_target)
    copies = [s for s in made if s.is_control]
    learned = 1 if config.world_loss_target == "warning_only" else 5  # the sixth rollout observed nothing
    assert len(copies) == learned and all(not s.sampled.any() for s in copies)
    by_hand = [
        sample
        for group in GROUPS
        for t in group
        for sample in build_samples(TrajectoryGroup(group.task_id, (without_actions(t),)), config)
    ]
    world, world_gradient = gradient(by_hand, replace(config, policy_coeff=0.0, world_model_coeff=1.0))
    _, policy_gradient = gradient(samples, replace(config, world_model_coeff=0.0))
    terms, whole = gradient(made, config)
    assert float(terms["world_model_loss"]) == pytest.approx(float(world["world_model_loss"]), abs=1e-12)
    assert (whole - policy_gradient - 0.3 * world_gradient).abs().max() < 1e-12
    assert world_gradient.abs().max() > 1e-4


def test_weights_of_an_observation_go_with_it() -> None:
    """A cap of 2 leaves the first 2 tokens of each observation, wherever it is learned."""
    config = ObjectiveConfig(world=WorldOptions(max_tokens_per_observation=2))
    made = shuffle_observations(samples_of(config), "env_only", key="0/0")
    learned = sorted(x for s in made for x in s.token_ids[s.target_mask("env_only")].tolist())
    assert learned == [100, 101, 110, 120, 121, 130, 131, 140, 141, 160, 161]


def test_recorded_weights_have_one_row_a_rollout_and_no_world_weights() -> None:
    config = ObjectiveConfig(world_model_coeff=0.3)
    samples = samples_of(config)
    own = step_weights(samples, config)
    rows = step_weights(shuffle_observations(samples, "env_only", key="0/0"), config)
    assert [row.policy for row in rows] == [row.policy for row in own]
    assert [len(row.world) for row in rows] == [len(row.world) for row in own] and not any(
        map(any, (r.world for r in rows))
    )


async def test_an_engine_measures_what_it_learns_and_what_was_observed(tmp_path: Path) -> None:
    config = ObjectiveConfig(world_model_coeff=0.3)
    samples = samples_of(config)
    made = shuffle_observations(samples, "env_only", key="0/0")
    model = str(tiny_model_dir(tmp_path / "model"))
    own, got = [
        await TorchEngine(TorchConfig(model=model, device="cpu", dtype="float64")).train_step(step, config)
        for step in (samples, made)
    ]
    for name in ("env_output_ce", "warning_ce", "policy_loss", "entropy", "env_output_tokens", "target_tokens"):
        assert got[name] == pytest.approx(own[name], abs=1e-12), name
    assert own["target_ce"] == own["env_output_ce"] and abs(got["target_ce"] - own["target_ce"]) > 1e-4
