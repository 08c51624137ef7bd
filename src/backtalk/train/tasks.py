"""Which tasks a run trains on and is measured on, and the recorded trajectories that it is measured on too."""

from __future__ import annotations

import random
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from backtalk.config import TrainConfig
from backtalk.envs import load_tasks
from backtalk.envs.base import Split, Task
from backtalk.errors import ConfigError
from backtalk.runlog import read_trajectories
from backtalk.train.events import Notice, OnEvent
from backtalk.trajectory import Trajectory

TRAIN_TASKS = 2000  # distinct ones, of a source that makes or has as many; each comes up once an epoch
HELD_OUT_SEED = 0  # all runs are measured on the same held-out tasks, whatever their own seed


def tasks_of_step(tasks: Sequence[Task], per_step: int, seed: int, step: int) -> list[Task]:
    """The tasks of one step. Every epoch is a new shuffle of them all; what fills no whole step waits for the next."""
    epoch, place = divmod(step, len(tasks) // per_step)
    order = list(tasks)
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return order[place * per_step : (place + 1) * per_step]


def train_tasks(config: TrainConfig) -> list[Task]:
    wanted = config.tasks
    tasks = load_tasks(wanted.source, split=Split.TRAIN, count=TRAIN_TASKS, levels=wanted.levels, seed=config.seed)
    if len(tasks) < config.tasks_per_step:
        raise ConfigError(
            f"{wanted.source!r} has {len(tasks)} training tasks, fewer than tasks_per_step={config.tasks_per_step}; "
            "lower tasks_per_step or add tasks"
        )
    return tasks


def held_out_tasks(config: TrainConfig) -> list[Task]:
    if config.evaluation.tasks == 0:
        return []
    wanted = config.tasks
    return load_tasks(
        wanted.source,
        split=Split.HELD_OUT,
        count=config.evaluation.tasks,
        levels=wanted.levels,
        seed=HELD_OUT_SEED,
    )


def recorded_trajectories(config: TrainConfig, vocab_size: int, tell: OnEvent) -> list[Trajectory]:
    """Trajectories of another policy, in this model's tokens, whose cross-entropy is compared over time."""
    if config.evaluation.tasks == 0:
        return []
    if config.evaluation.recorded_path is not None:
        path = Path(config.evaluation.recorded_path)
    elif config.engine.model == "base" and config.tasks.source == "triage":
        path = Path(str(resources.files("backtalk").joinpath("assets/recorded/held_out.parquet")))
        if not path.exists():
            tell(Notice(f"{path} is missing, so the cross-entropy on recorded trajectories is not measured"))
            return []
    else:
        tell(
            Notice(
                "no recorded trajectories for this model, so held-out cross-entropy is measured on its own rollouts "
                "only; set evaluation.recorded_path to the groups/*.parquet of a run with the same tokenizer"
            )
        )
        return []
    trajectories = read_trajectories(path)
    highest = max((token for t in trajectories for token in t.token_ids), default=0)
    if highest >= vocab_size:
        raise ConfigError(
            f"{path} holds token {highest}, and this model has only {vocab_size}; "
            "record it with the same tokenizer, or leave evaluation.recorded_path out"
        )
    return trajectories
