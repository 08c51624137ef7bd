"""A policy on a dataset that others wrote: pass@k as leaderboards count it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from backtalk.engines.choose import open_engine
from backtalk.envs.base import World
from backtalk.envs.terminal import TerminalWorld
from backtalk.errors import ConfigError
from backtalk.language.renderer import Renderer
from backtalk.rollout.groups import fit_concurrency
from backtalk.rollout.sampler import SamplingParams
from backtalk.run.config import TrainConfig
from backtalk.run.estimates import Interval, pass_at_k, ratio_interval
from backtalk.run.evaluate import Evaluation, evaluate
from backtalk.run.events import Notice, OnEvent
from backtalk.run.worlds import check_rollouts, counted
from backtalk.sandboxes import local_sandbox
from backtalk.sandboxes.pool import PooledBackend
from backtalk.tasks.load import read_tasks
from backtalk.tasks.task import Task
from backtalk.trajectory import TrajectoryGroup

LOCAL = "local"


@dataclass(frozen=True, kw_only=True, slots=True)
class Benchmark:
    """Which tasks, and how often each is tried.

    ``environment`` "local" plays tasks on disk in our own sandbox. Anything else is an environment of Harbor's
    (docker, podman, daytona, ...), with the task's own image and Harbor's verifier: what a published number rests on.
    """

    dataset: str  # a folder of Harbor tasks, or name@version in Harbor's registry
    environment: str = LOCAL
    attempts: int = 5
    names: tuple[str, ...] = ()  # patterns such as git-*; none is every task
    count: int | None = None  # the first ones

    def __post_init__(self) -> None:
        if self.attempts < 1 or (self.count is not None and self.count < 1):
            raise ConfigError(f"attempts={self.attempts}, count={self.count} leave nothing to run; use 1 or more")


@dataclass(frozen=True, slots=True)
class BenchmarkResult:
    """``pass_at`` counts every attempt: one that the world broke, or that ran out of time, is unsolved.

    ``evaluation`` is the measurement as elsewhere, in which attempts without a reward count for nothing.
    """

    pass_at: Mapping[int, Interval]
    evaluation: Evaluation

    def to_dict(self) -> dict[str, Any]:
        passed = {str(k): [one.value, one.low, one.high] for k, one in self.pass_at.items()}
        return {"pass_at": passed, "evaluation": self.evaluation.to_dict()}


async def run_benchmark(
    config: TrainConfig, benchmark: Benchmark, *, checkpoint: Path | None = None, on_event: OnEvent | None = None
) -> tuple[BenchmarkResult, list[TrajectoryGroup]]:
    """Every task ``attempts`` times with the policy of ``config.engine``, or of a checkpoint of it.

    Raises:
        ConfigError: no such dataset, or none of its tasks has such a name.
        TaskError: a task that cannot be played here; the message says where it can.
        InfrastructureError: no rollout came through.
    """
    tell = on_event or (lambda event: None)
    tasks = await benchmark_tasks(benchmark, tell)
    world = _world(config, benchmark)
    engine = open_engine(config.engine, seed=config.seed)
    if checkpoint is not None:
        engine.load(checkpoint)
    limit, limits = config.rollout.max_tokens_per_turn, config.rollout
    if benchmark.environment == LOCAL:
        limits = fit_concurrency(limits, config.terminal.sandbox, lambda text: tell(Notice(text)))
    try:
        evaluation, groups = await evaluate(
            engine,
            tasks,
            counted(world.open, "evaluation", 0, len(tasks) * benchmark.attempts, tell),
            Renderer(engine.tokenizer, (), config.renderer),
            limits=limits,
            params=SamplingParams(temperature=config.temperature, max_tokens=limit, seed=config.seed),
            samples_per_task=benchmark.attempts,
            step=engine.policy_version,
            key=f"benchmark/{benchmark.dataset}",
        )
    finally:
        await world.close()
    check_rollouts(groups, f"the benchmark {benchmark.dataset}")
    return BenchmarkResult(pass_at_every_k(evaluation), evaluation), groups


def pass_at_every_k(evaluation: Evaluation) -> dict[int, Interval]:
    """pass@k for k = 1 to the attempts of a task, each unbiased (Chen et al. 2021) with a bootstrap over tasks."""
    found = {}
    for k in range(1, evaluation.samples_per_task + 1):
        rows = [(pass_at_k(task.rollouts, task.solved, k), 1.0) for task in evaluation.tasks if task.rollouts >= k]
        interval = ratio_interval(rows)
        if interval is not None:
            found[k] = interval
    return found


async def benchmark_tasks(benchmark: Benchmark, tell: OnEvent) -> list[Task]:
    """The tasks of a dataset, by id; from Harbor's registry where it is no folder here."""
    if benchmark.environment != LOCAL:
        from backtalk.envs.harbor import load_harbor_dataset

        return await load_harbor_dataset(benchmark.dataset, names=benchmark.names, count=benchmark.count)
    if "@" in benchmark.dataset and not Path(benchmark.dataset).exists():
        raise ConfigError(
            f"{benchmark.dataset} is a dataset of Harbor's registry, whose tasks bring images of their own; add "
            "--environment docker (or podman, daytona, e2b, modal, ...), or give a folder of tasks"
        )
    every = read_tasks(benchmark.dataset, on_skip=lambda text: tell(Notice(text)))
    tasks = [task for task in sorted(every, key=lambda task: task.id) if _named(task, benchmark.names)]
    if not tasks:
        raise ConfigError(f"none of the {len(every)} tasks in {benchmark.dataset} is called {benchmark.names}")
    return tasks[: benchmark.count]


def _named(task: Task, patterns: Sequence[str]) -> bool:
    return not patterns or any(fnmatch(task.id, one) or fnmatch(task.id.split("/")[-1], one) for one in patterns)


def _world(config: TrainConfig, benchmark: Benchmark) -> World:
    if benchmark.environment == LOCAL:
        return TerminalWorld(PooledBackend(local_sandbox(config.sandbox, root=config.terminal.root)), config.terminal)
    from backtalk.envs.harbor import HarborWorld

    return HarborWorld(benchmark.environment, config.terminal)
