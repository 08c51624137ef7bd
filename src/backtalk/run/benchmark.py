"""Benchmark a policy on a dataset that others wrote: pass@k as leaderboards count it."""

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
from backtalk.run.config import TrainConfig
from backtalk.run.estimates import Interval, pass_at_k, ratio_interval
from backtalk.run.evaluate import Evaluation, evaluate
from backtalk.run.events import Notice, OnEvent, report_rollouts
from backtalk.run.history import fit_history
from backtalk.run.rollouts import check_rollouts
from backtalk.run.worlds import OnNotice, open_sandboxes
from backtalk.sandboxes.images.open import open_root
from backtalk.tasks.load import OnRefuse, read_tasks
from backtalk.tasks.task import Task
from backtalk.trajectory import TrajectoryGroup

LOCAL = "local"


@dataclass(frozen=True, kw_only=True, slots=True)
class Benchmark:
    """Tasks of a benchmark, and the number of rollouts of each.

    ``environment`` "local" is a sandbox of this machine. Any other is an environment of Harbor's (docker, podman,
    daytona, ...) with the task's own image and Harbor's verifier, on which published numbers rest.
    """

    dataset: str  # a folder of Harbor tasks, or name@version in Harbor's registry
    environment: str = LOCAL
    samples_per_task: int = 5
    names: tuple[str, ...] = ()  # patterns such as git-*; without any, all tasks
    count: int | None = None  # at most so many tasks, the first by id
    host_packages: bool = False  # of folders: skip what installs packages, which this machine has
    on_refuse: OnRefuse = "stop"  # about folders that cannot be read

    def __post_init__(self) -> None:
        if self.samples_per_task < 1 or (self.count is not None and self.count < 1):
            raise ConfigError(
                f"samples_per_task={self.samples_per_task}, count={self.count} leave nothing to run; use 1 or more"
            )


@dataclass(frozen=True, slots=True)
class BenchmarkResult:
    """Result of a benchmark. In ``pass_at`` a rollout that broke or ran out of time is unsolved.

    ``evaluation`` is as in training: rollouts without a reward are left out.
    """

    pass_at: Mapping[int, Interval]
    evaluation: Evaluation

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        pass_at = {str(k): [interval.value, interval.low, interval.high] for k, interval in self.pass_at.items()}
        return {"pass_at": pass_at, "evaluation": self.evaluation.to_dict()}


async def run_benchmark(
    config: TrainConfig,
    benchmark: Benchmark,
    *,
    checkpoint: Path | None = None,
    on_event: OnEvent = lambda event: None,
) -> tuple[BenchmarkResult, list[TrajectoryGroup]]:
    """Run a benchmark with the policy of ``config.engine``, or of a checkpoint of it; return the rollouts too.

    Raises:
        ConfigError: there is no such dataset, or none of its tasks has such a name.
        TaskError: a task cannot be run here; the message says where it can.
        InfrastructureError: no rollout came through.
    """

    def notice(text: str) -> None:
        on_event(Notice(text))

    tasks = await benchmark_tasks(benchmark, notice, config.terminal.root)
    num_rollouts = len(tasks) * benchmark.samples_per_task
    limits = fit_history(config, notice).rollout
    world = _open_world(config, benchmark)
    try:
        engine = open_engine(config.engine, seed=config.seed)
        if checkpoint is not None:
            engine.load(checkpoint)
        if benchmark.environment == LOCAL:
            limits = fit_concurrency(limits, config.terminal.sandbox, notice)
        evaluation, groups = await evaluate(
            engine,
            tasks,
            report_rollouts(world.open, "evaluation", 0, num_rollouts, on_event),
            Renderer(engine.tokenizer, (), config.renderer),
            limits=limits,
            params=config.sampling_params,
            samples_per_task=benchmark.samples_per_task,
            step=engine.policy_version,
            key=f"benchmark/{benchmark.dataset}",
        )
    finally:
        await world.close()
    check_rollouts(groups, f"the benchmark {benchmark.dataset}")
    return BenchmarkResult(pass_at_every_k(evaluation), evaluation), groups


def pass_at_every_k(evaluation: Evaluation) -> dict[int, Interval]:
    """Return pass@k for k from 1 to the rollouts of a task (Chen et al. 2021), with a bootstrap over the tasks."""
    intervals = {}
    for k in range(1, evaluation.samples_per_task + 1):
        rows = [(pass_at_k(task.rollouts, task.solved, k), 1.0) for task in evaluation.tasks if task.rollouts >= k]
        if (interval := ratio_interval(rows)) is not None:
            intervals[k] = interval
    return intervals


async def benchmark_tasks(
    benchmark: Benchmark, on_notice: OnNotice = lambda text: None, root: str | None = None
) -> list[Task]:
    """Return the tasks of a benchmark by id; ``on_notice`` is called with a line for each that cannot run here.

    ``root`` is the root file system that sandboxes start from, in which what tasks need is looked for.

    Raises:
        ConfigError: there is no such dataset, or none of its tasks has such a name.
        TaskError: a task cannot be read.
    """
    if benchmark.environment != LOCAL:
        from backtalk.envs.harbor import load_harbor_dataset

        return await load_harbor_dataset(benchmark.dataset, names=benchmark.names, count=benchmark.count)
    if "@" in benchmark.dataset and not Path(benchmark.dataset).exists():
        raise ConfigError(
            f"{benchmark.dataset} is a dataset of Harbor's registry, whose tasks bring images of their own; add "
            "--environment docker (or podman, daytona, e2b, modal, ...), or give a folder of tasks"
        )
    tasks = read_tasks(
        benchmark.dataset,
        host_packages=benchmark.host_packages,
        on_skip=on_notice,
        on_refuse=benchmark.on_refuse,
        root=open_root(root),
    )
    tasks = sorted(tasks, key=lambda task: task.id)
    chosen = [task for task in tasks if not benchmark.names or _matches(task, benchmark.names)]
    if not chosen:
        raise ConfigError(f"none of the {len(tasks)} tasks in {benchmark.dataset} is called {benchmark.names}")
    return chosen[: benchmark.count]


def _matches(task: Task, patterns: Sequence[str]) -> bool:
    return any(fnmatch(name, pattern) for name in (task.id, task.id.split("/")[-1]) for pattern in patterns)


def _open_world(config: TrainConfig, benchmark: Benchmark) -> World:
    if benchmark.environment == LOCAL:
        return TerminalWorld(open_sandboxes(config), config.terminal)
    from backtalk.envs.harbor import HarborWorld

    return HarborWorld(benchmark.environment, config.terminal)
