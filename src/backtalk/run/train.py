"""The training loop, and the parts it is made of."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol, TypeVar

from backtalk.engines.checkpoint import find_checkpoint, write_atomically
from backtalk.engines.choose import open_engine
from backtalk.engines.guard import step_warnings
from backtalk.errors import ConfigError, DataError
from backtalk.language.renderer import Renderer
from backtalk.objective.samples import build_samples
from backtalk.objective.weights import step_weights
from backtalk.rollout.groups import run_groups
from backtalk.rollout.sampler import SamplingParams
from backtalk.run.config import TrainConfig, config_from_dict, config_to_dict
from backtalk.run.evaluate import Evaluation, evaluate, rollout_metrics, row_metrics, time_metrics
from backtalk.run.events import EvaluationDone, Notice, OnEvent, RunDone, RunStarted, StepDone
from backtalk.run.log import RunLog, lock_folder
from backtalk.run.tasks import held_out_tasks, mixed_tasks_of_step, recorded_trajectories, train_tasks
from backtalk.run.worlds import Worlds, check_rollouts, counted
from backtalk.settings import flatten
from backtalk.trajectory import TrajectoryGroup

T = TypeVar("T")

EXTENDABLE = ("steps", "checkpoint_every", "evaluation.every")  # a resumed run may change these and nothing else


class StopFlag(Protocol):
    """threading.Event and asyncio.Event are such flags."""

    def is_set(self) -> bool: ...


async def train(
    config: TrainConfig,
    folder: str | Path,
    *,
    resume: bool = False,
    on_event: OnEvent | None = None,
    stop: StopFlag | None = None,
) -> Path:
    """Train from ``config`` into ``folder`` and return it.

    ``stop`` is looked at between steps; a cancellation is obeyed at once. Both leave a checkpoint, and
    ``resume=True`` goes on from the last one.

    Raises:
        ConfigError: settings that cannot work, or a folder that holds another run or that another process writes.
        InfrastructureError: no rollout of a step came through.
        DataError: the run folder cannot be written.
    """
    log = RunLog(folder)
    with lock_folder(log.folder):
        await _train(config, log, resume, on_event or (lambda event: None), stop)
    return log.folder


async def _train(config: TrainConfig, log: RunLog, resume: bool, tell: OnEvent, stop: StopFlag | None) -> None:
    _claim(log, config, resume)
    run = Run(config, tell)
    first = run.restore(log) if resume else 0
    log.write_config(config_to_dict(config))
    run.engine.tokenizer.save_pretrained(str(log.tokenizer_path))
    tell(RunStarted(log.folder, first, config.steps, run.worlds.reports))
    try:
        for step in range(first, config.steps):
            await run.evaluate_if_due(step, log)
            if stop is not None and stop.is_set():
                break
            groups, seconds = await run.rollouts(step)
            log.write_groups(step, groups)
            metrics = await _unbroken(run.learn(step, groups, seconds, log))
            tell(StepDone(step, config.steps, metrics))
        run.checkpoint_if_consistent(log)
        done = run.engine.policy_version
        if done >= config.steps:
            await run.evaluate_if_due(config.steps, log)
    except BaseException:  # a cancellation too: leave a checkpoint, and never hide the cause behind a second error
        with suppress(Exception):
            run.checkpoint_if_consistent(log)
        raise
    finally:
        await run.worlds.close()
    tell(RunDone(log.folder, done, done >= config.steps))


async def _unbroken(work: Coroutine[Any, Any, T]) -> T:
    """Finish ``work`` before obeying a cancellation: an update and its record belong together."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        raise


async def evaluate_run(
    folder: str | Path,
    *,
    overrides: Mapping[str, Any] | Sequence[str] = (),
    base: bool = False,
    on_event: OnEvent | None = None,
) -> Evaluation:
    """Measure the policy that a run's checkpoint holds; ``base=True`` measures the model it began with.

    ``overrides`` replace settings by dotted key, for example ``{"evaluation.tasks": 200}``. Writes nothing.

    Raises:
        DataError: the folder is no run, or has no checkpoint yet.
    """
    log = RunLog(folder)
    config = config_from_dict(log.read_config(), overrides)
    if config.evaluation.tasks == 0:
        raise ConfigError("evaluation.tasks=0 leaves nothing to measure; pass evaluation.tasks=64")
    checkpoint = find_checkpoint(log.checkpoint_path)
    if not base and checkpoint is None:
        raise DataError(
            f"{log.folder} has no checkpoint yet; wait for one, or measure the model it began with (--base)"
        )
    run = Run(config, on_event or (lambda event: None))
    if not base and checkpoint is not None:
        run.engine.load(checkpoint)
    try:
        evaluation, _ = await run.evaluate(run.engine.policy_version)
    finally:
        await run.worlds.close()
    return evaluation


def _claim(log: RunLog, config: TrainConfig, resume: bool) -> None:
    """Make sure that the folder is this run's to write."""
    there = log.config_path.exists()
    if there and not resume:
        raise ConfigError(
            f"{log.folder} holds a run already; continue it with --resume, or choose another folder with --out"
        )
    if not resume:
        return
    before, now = flatten(log.read_config()), flatten(config_to_dict(config))
    changed = sorted(key for key in before | now if key not in EXTENDABLE and before.get(key) != now.get(key))
    if changed:
        what = ", ".join(f"{key}: {before.get(key)!r} -> {now.get(key)!r}" for key in changed)
        raise ConfigError(
            f"the run in {log.folder} has other settings ({what}), so resuming would mix two runs; "
            f"leave them as they were, or start a new folder. A resume may change {', '.join(EXTENDABLE)}"
        )


class Run:
    """The parts of one run, put together from its settings."""

    def __init__(self, config: TrainConfig, tell: OnEvent) -> None:
        self.config, self.tell = config, tell
        self.worlds = Worlds(config, on_notice=lambda text: tell(Notice(text)))
        self.pools = train_tasks(config, self.worlds)
        self.held_out = held_out_tasks(config, self.worlds)
        self.engine = open_engine(config.engine, seed=config.seed)
        self.renderer = Renderer(
            self.engine.tokenizer, (), config.renderer
        )  # each rollout takes it for its world's tools
        self.params = SamplingParams(
            temperature=config.temperature, max_tokens=config.rollout.max_tokens_per_turn, seed=config.seed
        )
        self.limits = self.worlds.fit_concurrency(tell)
        self.recorded = recorded_trajectories(config, len(self.engine.tokenizer), tell)
        self.saved_step = 0  # policy version of the checkpoint; 0 has none, it is the model itself

    async def rollouts(self, step: int) -> tuple[list[TrajectoryGroup], float]:
        """The groups of one step, and the seconds they took.

        Raises:
            InfrastructureError: not one rollout came through, so the world is broken, not this task.
        """
        config, started = self.config, time.monotonic()
        tasks = mixed_tasks_of_step(self.pools, config.tasks_per_step, config.seed, step)
        groups = await run_groups(
            tasks,
            counted(self.worlds.open, "training", step, len(tasks) * config.group_size, self.tell),
            self.engine.sampler(self.params),
            self.renderer,
            self.limits,
            group_size=config.group_size,
            key=f"train/{step}",
        )
        check_rollouts(groups, f"step {step}", observations_teach=config.objective.at(step).world_coeff > 0)
        return groups, time.monotonic() - started

    async def learn(
        self, step: int, groups: Sequence[TrajectoryGroup], rollout_seconds: float, log: RunLog
    ) -> dict[str, float]:
        """One optimizer step, its metrics on disk, and a checkpoint where one is due."""
        config, started = self.config, time.monotonic()
        objective = config.objective.at(step)
        now = self.engine.policy_version
        samples = [
            sample
            for group in groups
            for sample in build_samples(group, objective, temperature=config.temperature, policy_version=now)
        ]
        learned = await self.engine.train_step(samples, objective)
        if not learned.get("skipped"):
            log.write_weights(step, groups, step_weights(samples, objective))
        seconds = time_metrics(groups, rollout_seconds, time.monotonic() - started)
        rolled = rollout_metrics(groups)
        for line in step_warnings(rolled, objective):  # the engine logs its own
            self.tell(Notice(f"step {step}: {line}"))
        metrics = rolled | row_metrics(samples, objective) | learned | seconds
        log.write_metrics(step, metrics)
        if (step + 1) % config.checkpoint_every == 0 or step + 1 == config.steps:
            self._checkpoint(log)
        return metrics

    async def evaluate(self, step: int) -> tuple[Evaluation, list[TrajectoryGroup]]:
        """Measure the policy as it stands. The random numbers are the same at every step.

        Raises:
            InfrastructureError: not one rollout came through.
        """
        config = self.config.evaluation
        evaluation, groups = await evaluate(
            self.engine,
            self.held_out,
            counted(self.worlds.open, "evaluation", step, len(self.held_out) * config.samples_per_task, self.tell),
            self.renderer,
            limits=self.limits,
            params=self.params,
            samples_per_task=config.samples_per_task,
            recorded=self.recorded,
            step=step,
        )
        check_rollouts(groups, "the held-out measurement")
        return evaluation, groups

    async def evaluate_if_due(self, step: int, log: RunLog) -> None:
        """Before the first step, after the last, and at every ``evaluation.every`` between."""
        every = self.config.evaluation.every
        due = step in (0, self.config.steps) or (every > 0 and step % every == 0)
        if not due or not self.held_out or log.evaluation_path(step).exists():
            return
        evaluation, groups = await self.evaluate(step)
        log.write_evaluation(step, evaluation.to_dict(), groups)
        self.tell(EvaluationDone(evaluation))

    def restore(self, log: RunLog) -> int:
        """Go back to the last checkpoint and forget what came after it; returns the step to begin with.

        Raises:
            DataError: the checkpoint is damaged, or gone.
            ConfigError: the run has done more steps than it is asked for.
        """
        if (checkpoint := find_checkpoint(log.checkpoint_path)) is not None:
            self.engine.load(checkpoint)
        elif log.last_step() >= log.read_config()["checkpoint_every"]:  # by then there was one
            raise DataError(
                f"{log.folder} has {log.last_step() + 1} steps on record and its checkpoint is gone, so resuming would "
                f"forget them; put {log.checkpoint_path} back, or start a new folder"
            )
        first = self.saved_step = self.engine.policy_version
        if first > self.config.steps:
            raise ConfigError(
                f"the run in {log.folder} has done {first} steps already, more than steps={self.config.steps}; "
                f"use steps >= {first}, or start a new folder"
            )
        log.truncate_after(first - 1)
        return first

    def checkpoint_if_consistent(self, log: RunLog) -> None:
        """Keep where the run stands, unless a step's update could not be recorded."""
        done = self.engine.policy_version
        if done > self.saved_step and log.last_step() == done - 1:
            self._checkpoint(log)

    def _checkpoint(self, log: RunLog) -> None:
        write_atomically(log.checkpoint_path, self.engine.save)
        self.saved_step = self.engine.policy_version
