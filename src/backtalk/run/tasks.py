"""Choose the tasks that a run trains on and is evaluated on."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import NamedTuple

from backtalk.errors import ConfigError, TaskError
from backtalk.run.config import TrainConfig
from backtalk.run.worlds import Worlds
from backtalk.tasks.task import Split, Task

TRAIN_TASKS = 2000  # at most, of one source; each comes up once an epoch
HELD_OUT_SEED = 0  # runs of every seed are evaluated on the same held-out tasks


class Pool(NamedTuple):
    """The training tasks of one source. Its share of a step is its weight over the sum of all weights."""

    tasks: Sequence[Task]
    weight: float = 1.0


class Share(NamedTuple):
    """Number of a pool's tasks in a step: ``now`` in this one, ``most`` in any."""

    now: int
    most: int


def tasks_of_step(tasks: Sequence[Task], per_step: int, seed: int, step: int) -> list[Task]:
    """Return the tasks of one step. Every epoch shuffles all of them anew, and leaves out a rest that fills no step."""
    epoch, place = divmod(step, len(tasks) // per_step)
    order = list(tasks)
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return order[place * per_step : (place + 1) * per_step]


def mixed_tasks_of_step(pools: Sequence[Pool], per_step: int, seed: int, step: int) -> list[Task]:
    """Return the tasks of one step from several sources, by weight; they depend on seed and step alone.

    Each pool has epochs of its own. If its share is no whole number, it is rounded up or down by a draw, and an epoch
    leaves out the tasks that are lost in rounding down.
    """
    shares = shares_of_step([pool.weight for pool in pools], per_step, seed, step)
    drawn = []
    for pool, share in zip(pools, shares, strict=True):
        drawn += tasks_of_step(pool.tasks, share.most, seed, step)[: share.now]
    return drawn


def shares_of_step(weights: Sequence[float], per_step: int, seed: int, step: int) -> list[Share]:
    """Return the number of tasks that each weight gets: its exact share, rounded down or up by one draw for them all.

    The draw is systematic (Madow, 1949): the counts add up to ``per_step``, and their means over the steps are the
    exact shares.
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
