"""Selection of the observations that the world-model term learns from: gates, weights, caps and PaW's choices.

The functions take a whole group, because gates and choices compare its rollouts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from backtalk.errors import ConfigError
from backtalk.objective.config import ObjectiveConfig, WorldOptions
from backtalk.objective.roles import is_target
from backtalk.trajectory import Segment, Trajectory, TrajectoryGroup

SOLVED_REWARD = 1.0  # a rollout with at least this reward counts as correct


def world_scales(group: TrajectoryGroup, config: ObjectiveConfig) -> list[list[float] | None]:
    """Return the factor on each token's weight in the world-model term, one list a trajectory, over all its branches.

    None stands for 1 everywhere.
    """
    options = config.world
    shares = rollout_scales(group, options)
    turns = turn_weights(group, options)
    plain = turns is None and options.weights is None and options.max_tokens_per_observation is None
    return [
        None if plain and share == 1 else _scales(trajectory, share, None if turns is None else turns[i], config)
        for i, (trajectory, share) in enumerate(zip(group, shares, strict=True))
    ]


def _scales(
    trajectory: Trajectory, share: float, turns: Mapping[int | None, float] | None, config: ObjectiveConfig
) -> list[float]:
    """Return the factor on each token of a trajectory, from its rollout's scale and the weights of its turns."""
    options, cap = config.world, config.world.max_tokens_per_observation
    taken: dict[int, int] = {}  # target tokens so far, by turn
    scales: list[float] = []
    for segment in trajectory.segments:
        scale = share if turns is None else share * turns.get(segment.turn, 0.0)
        if segment.turn is None or not is_target(segment.role, segment.turn, config.world_loss_target):
            scales += [scale] * len(segment)
            continue
        scale *= options.weight(segment.role.name.lower(), segment.tool)
        room = len(segment) if cap is None else min(len(segment), cap - taken.get(segment.turn, 0))
        if scale > 0:
            taken[segment.turn] = taken.get(segment.turn, 0) + room
        scales += [scale] * room + [0.0] * (len(segment) - room)
    return scales


def rollout_scales(group: TrajectoryGroup, options: WorldOptions) -> list[float]:
    """Return the factor on each rollout's observations: 0 where a gate excludes it, else 1 or PaW's scale."""
    allowed = [_passes_gates(trajectory, options) for trajectory in group]
    if options.min_correct > 0:
        correct = [trajectory.reward is not None and trajectory.reward >= SOLVED_REWARD for trajectory in group]
        solved = sum(a and c for a, c in zip(allowed, correct, strict=True))
        others = math.floor(solved * (1 - options.min_correct) / options.min_correct + 1e-9)
        for i, is_correct in enumerate(correct):
            if allowed[i] and not is_correct:
                allowed[i], others = others > 0, others - 1
    scale = return_adaptive_scale(group.rewards) if options.return_adaptive else 1.0
    return [scale if is_allowed else 0.0 for is_allowed in allowed]


def _passes_gates(trajectory: Trajectory, options: WorldOptions) -> bool:
    """Return whether a rollout passes echo-rl's gates on valid calls and clean turns; without a turn it passes none."""
    turns, stats = trajectory.num_turns, trajectory.stats
    if options.min_valid_calls == options.min_clean_turns == 0:
        return True
    if turns == 0:
        return False
    valid = 1 - stats.get("invalid_calls", 0.0) / turns
    clean = 1 - stats.get("unclean_turns", 0.0) / turns
    return valid >= options.min_valid_calls and clean >= options.min_clean_turns


def return_adaptive_scale(rewards: Sequence[float | None]) -> float:
    """Return 1 - mean reward: the better a group does, the less its world-model term counts (PaW, arXiv 2606.02388).

    Raises:
        ConfigError: a reward outside [0, 1], which would give a weight outside [0, 1].
    """
    known = [reward for reward in rewards if reward is not None]
    if any(not 0 <= reward <= 1 for reward in known):
        raise ConfigError(
            f"world.return_adaptive weighs by 1 - mean reward, and this group has rewards {known}; "
            "scale rewards to [0, 1], or use return_adaptive=false"
        )
    return 1 - math.fsum(known) / len(known) if known else 1.0


def turn_weights(group: TrajectoryGroup, options: WorldOptions) -> list[dict[int | None, float]] | None:
    """Return the weights of each rollout's turns by the entropy of their actions; None means 1 for all.

    A turn without sampled tokens has no entropy and no weight. With ``entropy_share`` below 1 those of highest entropy
    are kept, over the group (PaW). ``negative`` weights are exp(-entropy), divided by their mean over the turns that
    are kept.
    """
    if options.entropy_share >= 1 and options.entropy_weights == "equal":
        return None
    entropies = sorted(turn_entropies(group), key=lambda entry: (-entry[0], entry[1:]))
    kept = entropies[: math.ceil(options.entropy_share * len(entropies) - 1e-9)]
    weights = [1.0 if options.entropy_weights == "equal" else math.exp(-entropy) for entropy, _, _ in kept]
    mean = math.fsum(weights) / len(weights) if weights else 1.0
    found: list[dict[int | None, float]] = [{} for _ in range(len(group))]
    for (_, rollout, turn), weight in zip(kept, weights, strict=True):
        found[rollout][turn] = weight / mean
    return found


def turn_entropies(group: TrajectoryGroup) -> list[tuple[float, int, int]]:
    """Return the action entropy of each turn that has sampled tokens, with its rollout's number and its own.

    It is estimated by the mean of -logprob over the turn's sampled tokens, in nats.
    """
    return [
        (-math.fsum(x for s in sampled for x in s.logprobs or ()) / max(sum(map(len, sampled)), 1), i, turn)
        for i, trajectory in enumerate(group)
        for turn, sampled in _sampled_turns(trajectory)
    ]


def _sampled_turns(trajectory: Trajectory) -> Iterator[tuple[int, list[Segment]]]:
    """Yield each turn that has sampled tokens, with its sampled segments."""
    for action in trajectory.actions:
        sampled = [segment for segment in action if segment.is_sampled]
        if sampled:
            yield sampled[0].turn or 0, sampled
