"""Measure what steps of the world-model term alone teach, and how far they move the policy, scaled and full.

The first step of a run is replayed as if no reward had differed: ``python replay.py RUN_FOLDER``. Three quarters of
its tasks are trained on, in another order for each seed; on the rest two numbers are taken, in nats a token: the
cross-entropy of environment output, and how much less probable the policy's own actions have become, an estimate of
KL(before || now).
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from dataclasses import replace
from random import Random
from typing import get_args

from backtalk.engines.torch.config import TorchConfig
from backtalk.engines.torch.engine import TorchEngine
from backtalk.objective.config import ObjectiveConfig, WorldOptions, ZeroAdvantageSteps
from backtalk.objective.samples import build_samples
from backtalk.run.log import RunLog
from backtalk.trajectory import TokenRole, Trajectory, TrajectoryGroup

STEPS, GROUPS_PER_STEP, COEFF, SEEDS = 20, 2, 0.02, 3


async def measure(engine: TorchEngine, held_out: Sequence[Trajectory]) -> tuple[float, float]:
    """Return the cross-entropy of environment output and the mean log-probability of actions, nats a token."""
    logprobs: dict[TokenRole, list[float]] = {TokenRole.ENV_OUTPUT: [], TokenRole.ACTION: []}
    for trajectory, row in zip(held_out, await engine.score(held_out), strict=True):
        for role, logprob in zip(trajectory.roles, row, strict=True):
            if role in logprobs:
                logprobs[role].append(logprob)
    output, actions = (sum(values) / len(values) for values in logprobs.values())
    return -output, actions


async def replay(groups: Sequence[TrajectoryGroup], steps: ZeroAdvantageSteps, seed: int) -> tuple[float, float, float]:
    """Train for STEPS world-only steps; return the cross-entropy before and after, and the KL estimate."""
    engine = TorchEngine(TorchConfig(learning_rate=3e-4, warmup_steps=3, measure_gradients_every=0))
    config = ObjectiveConfig(world_model_coeff=COEFF, world=WorldOptions(zero_advantage_steps=steps))
    train, held_out = groups[len(groups) // 4 :], [t for group in groups[: len(groups) // 4] for t in group]
    random, queue = Random(seed), []
    before, actions_before = await measure(engine, held_out)
    for _ in range(STEPS):
        if len(queue) < GROUPS_PER_STEP:
            queue = random.sample(train, len(train))
        step = [queue.pop() for _ in range(GROUPS_PER_STEP)]
        await engine.train_step([sample for group in step for sample in build_samples(group, config)], config)
    after, actions_after = await measure(engine, held_out)
    return before, after, actions_before - actions_after


async def main(folder: str) -> None:
    """Replay the first step of a run in each arm and print a line for each seed."""
    groups = [
        TrajectoryGroup(group.task_id, tuple(replace(t, reward=0.0) for t in group))
        for group in RunLog(folder).read_groups(0)
    ]
    for seed in range(SEEDS):
        for steps in get_args(ZeroAdvantageSteps):
            before, after, kl = await replay(groups, steps, seed)
            print(f"seed {seed}  {steps:6}  env CE {before:.3f} to {after:.3f}  policy moved {kl:.4f}", flush=True)


asyncio.run(main(sys.argv[1]))
