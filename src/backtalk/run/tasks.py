"""Which tasks a run trains on and is measured on, and the recorded trajectories that it is measured on too."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import NamedTuple

from backtalk.errors import ConfigError, TaskError
from backtalk.run.config import TrainConfig
from backtalk.run.events import Notice, OnEvent
from backtalk.run.log import read_trajectories
from backtalk.run.worlds import Worlds
from backtalk.tasks.task import Split, Task
from backtalk.trajectory import Trajectory

TRAIN_TASKS = 2000  # distinct ones, of a source that makes or has as many; each comes up once an epoch
HELD_OUT_SEED = 0  # all runs are measured on the same held-out tasks, whatever their own seed


class Pool(NamedTuple):
    """The training tasks of one source. Its share of a step is its weight over the sum of all weights."""

    tasks: Sequence[Task]
    weight: float = 1.0


class Share(NamedTuple):
    """How many tasks of a pool a step takes: ``now`` at this step, ``most`` at any."""

    now: int
    most: int


def tasks_of_step(tasks: Sequence[Task], per_step: int, seed: int, step: int) -> list[Task]:
    """The tasks of one step. Every epoch is a new shuffle of them all; what fills no whole step waits for the next."""
    epoch, place = divmod(step, len(tasks) // per_step)
    order = list(tasks)
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return order[place * per_step : (place + 1) * per_step]


def mixed_tasks_of_step(pools: Sequence[Pool], per_step: int, seed: int, step: int) -> list[Task]:
    """The tasks of one step from several sources, by weight. Nothing is remembered: a resumed run draws the same.

    Each pool has epochs of its own. Where its share is no whole number, a step keeps a place for the larger one and
    leaves the last task out when the draw gives the smaller, so that an epoch then passes over some tasks.
    """
    shares = shares_of_step([pool.weight for pool in pools], per_step, seed, step)
    drawn = []
    for pool, share in zip(pools, shares, strict=True):
        drawn += tasks_of_step(pool.tasks, share.most, seed, step)[: share.now]
    return drawn


def shares_of_step(weights: Sequence[float], per_step: int, seed: int, step: int) -> list[Share]:
    """How many of ``per_step`` tasks each weight gets: its exact share, rounded down or up by one draw for them all.

    The draw is systematic (Madow, 1949): the counts always add up to ``per_step``, and their means over the steps are
    the exact shares.
    """
    exact = [per_step * weight / math.fsum(weights) for weight in weights]
    whole = [math.floor(share + 1e-9) for share in exact]
    rest = [share - least if share - least > 1e-9 else 0.0 for share, least in zip(exact, whole, strict=True)]
    ends = [math.fsum(rest[: i + 1]) for i in range(len(rest))]
    ends[-1] = per_step - sum(whole)  # exactly
    offset = random.Random(f"{seed}/{step}/sources").random()
    drawn = [math.floor(end + offset) for end in ends]
    extra = [now - before for now, before in zip(drawn, [0, *drawn], strict=False)]
    return [Share(least + more, least + (part > 0)) for least, more, part in zip(whole, extra, rest, strict=True)]


def train_tasks(config: TrainConfig, worlds: Worlds) -> tuple[Pool, ...]:
    """Return the training tasks of every source.

    Raises:
        ConfigError: too few tasks for a step.
        TaskError: a task cannot run, or two have one id.
    """
    sources = config.tasks.sources
    loaded = worlds.tasks(Split.TRAIN, TRAIN_TASKS, config.seed)
    shares = shares_of_step([source.weight for source in sources], config.tasks_per_step, config.seed, 0)
    for source, tasks, share in zip(sources, loaded, shares, strict=True):
        if len(tasks) < share.most:
            part = "" if len(sources) == 1 else f", of which its weight gives it up to {share.most}"
            raise ConfigError(
                f"{source.name!r} has {len(tasks)} training tasks, fewer than "
                f"tasks_per_step={config.tasks_per_step}{part}; lower tasks_per_step{part and ' or its weight'} or add "
                "tasks (one in five is held out, by a hash of its id)"
            )
    return tuple(Pool(tasks, source.weight) for source, tasks in zip(sources, loaded, strict=True))


def held_out_tasks(config: TrainConfig, worlds: Worlds) -> list[Task]:
    """Return ``evaluation.tasks`` held-out tasks, of several sources by weight as far as each has some.

    Raises:
        TaskError: no source has a held-out task, or one cannot run.
    """
    count, sources = config.evaluation.tasks, config.tasks.sources
    if count == 0:
        return []
    loaded = worlds.tasks(Split.HELD_OUT, count, HELD_OUT_SEED)
    if not any(loaded):
        names = ", ".join(repr(source.name) for source in sources)
        raise TaskError(
            f"none of {names} has a held-out task (one in five is, by a hash of its id); add tasks, or set "
            "evaluation.tasks=0"
        )
    taken = [0] * len(sources)
    for _ in range(min(count, sum(map(len, loaded)))):
        left = [i for i, tasks in enumerate(loaded) if taken[i] < len(tasks)]
        taken[min(left, key=lambda i: (taken[i] + 1) / sources[i].weight)] += 1
    draw = random.Random(HELD_OUT_SEED)
    places = [sorted(draw.sample(range(len(tasks)), number)) for tasks, number in zip(loaded, taken, strict=True)]
    return [tasks[place] for tasks, chosen in zip(loaded, places, strict=True) for place in chosen]


def recorded_trajectories(config: TrainConfig, vocab_size: int, tell: OnEvent) -> list[Trajectory]:
    """Trajectories of another policy, in this model's tokens, whose cross-entropy is compared over time."""
    if config.evaluation.tasks == 0:
        return []
    if config.evaluation.recorded_path is not None:
        path = Path(config.evaluation.recorded_path)
    elif getattr(config.engine, "model", None) == "base" and "triage" in {one.name for one in config.tasks.sources}:
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
