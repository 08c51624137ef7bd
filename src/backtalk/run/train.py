"""Train a policy: the loop, the parts of a run, and its checkpoints."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from backtalk.engines.abilities import check_objective
from backtalk.engines.checkpoint import find_checkpoint, write_atomically
from backtalk.engines.choose import open_engine
from backtalk.errors import ConfigError, DataError
from backtalk.language.renderer import Renderer
from backtalk.objective.config import ObjectiveConfig
from backtalk.objective.controls import mask_actions, shuffle_observations
from backtalk.objective.samples import build_samples
from backtalk.objective.surprise import drop_surprising
from backtalk.objective.weights import step_weights
from backtalk.rollout.groups import run_groups
from backtalk.run.config import TrainConfig, config_from_dict, config_to_dict
from backtalk.run.evaluate import Evaluation, evaluate
from backtalk.run.events import (
    EvaluationDone,
    Notice,
    OnEvent,
    RunDone,
    RunStarted,
    StepDone,
    WorldModelMeasured,
    report_rollouts,
)
from backtalk.run.guard import Guard
from backtalk.run.history import fit_history
from backtalk.run.log import RunLog, lock_folder
from backtalk.run.recorded import recorded_trajectories
from backtalk.run.rollouts import check_rollouts, rollout_metrics, row_metrics, time_metrics
from backtalk.run.tasks import held_out_tasks, mixed_tasks_of_step, train_tasks
from backtalk.run.world_model import measure_world_model
from backtalk.run.worlds import Worlds, open_worlds
from backtalk.settings import flatten
from backtalk.spans import timed
from backtalk.trajectory import TrajectoryGroup

T = TypeVar("T")

RESUME_MAY_CHANGE = ("steps", "checkpoint_every", "evaluation.every", "engine.sampler", "engine.batching")


async def train(
    config: TrainConfig,
    folder: str | Path,
    *,
    resume: bool = False,
    on_event: OnEvent = lambda event: None,
    stop: threading.Event | None = None,
) -> Path:
    """Train from ``config`` into ``folder`` and return it.

    ``stop`` is looked at between steps; a cancellation is obeyed immediately. Both leave a checkpoint, and
    ``resume=True`` continues from the last one.

    Raises:
        ConfigError: settings that cannot work, or a folder that holds another run or that another process writes.
        InfrastructureError: no rollout of a step came through.
        DataError: the run folder cannot be written.
    """
    log = RunLog(folder)
    with lock_folder(log.folder):
        _check_folder(log, config, resume)
        async with open_run(config, on_event) as run:
            first = run.restore(log) if resume else 0
            log.write_config(config_to_dict(config))
            run.engine.tokenizer.save_pretrained(str(log.tokenizer_path))
            on_event(RunStarted(log.folder, first, config.steps, run.worlds.reports))
            try:
                await _train_steps(run, log, first, stop)
            except BaseException:  # a cancellation too; a second error must not hide the first
                with suppress(Exception):
                    run.checkpoint_if_consistent(log)
                raise
            run.checkpoint_if_consistent(log)
            done = run.engine.policy_version
    on_event(RunDone(log.folder, done, done >= config.steps))
    return log.folder


async def _train_steps(run: Run, log: RunLog, first: int, stop: threading.Event | None) -> None:
    for step in range(first, run.config.steps):
        await run.evaluate_if_due(step, log)
        if stop is not None and stop.is_set():
            return
        groups, seconds = await run.rollouts(step)
        with timed("logging"):
            log.write_groups(step, groups)
        await _uninterrupted(run.train_step(step, groups, seconds, log))
    await run.evaluate_if_due(run.config.steps, log)


async def _uninterrupted(work: Coroutine[Any, Any, T]) -> T:
    """Finish ``work`` before a cancellation is obeyed: an update and its record belong together."""
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
    on_event: OnEvent = lambda event: None,
) -> Evaluation:
    """Evaluate the policy of a run's checkpoint, or with ``base`` the model that the run began with.

    ``overrides`` replace settings by dotted key, for example ``{"evaluation.tasks": 200}``. Writes nothing, but for the
    world_model_step_*.json of ``evaluation.world_model``.

    Raises:
        DataError: the folder is no run, or has no checkpoint yet.
    """
    log = RunLog(folder)
    config = config_from_dict(log.read_config(), overrides)
    if config.evaluation.tasks == 0:
        raise ConfigError("evaluation.tasks=0 leaves nothing to measure; pass evaluation.tasks=64")
    async with open_trained(log, config, base=base, on_event=on_event) as run:
        evaluation, groups = await run.evaluate(run.engine.policy_version)
        if config.evaluation.world_model:
            await run.measure_world_model(evaluation.step, groups, log)
    return evaluation


@asynccontextmanager
async def open_trained(log: RunLog, config: TrainConfig, *, base: bool, on_event: OnEvent) -> AsyncIterator[Run]:
    """Open a run with the policy of its checkpoint, or with ``base`` the model that it began with.

    Raises:
        DataError: there is no checkpoint yet.
    """
    checkpoint = None if base else find_checkpoint(log.checkpoint_path)
    if not base and checkpoint is None:
        raise DataError(f"{log.folder} has no checkpoint yet; wait for one, or take the model it began with (--base)")
    async with open_run(config, on_event) as run:
        if checkpoint is not None:
            run.engine.load(checkpoint)
        yield run


def _check_folder(log: RunLog, config: TrainConfig, resume: bool) -> None:
    """Check that the folder holds no run, or with ``resume`` a run of the same settings."""
    if not resume:
        if log.config_path.exists():
            raise ConfigError(
                f"{log.folder} holds a run already; continue it with --resume, or choose another folder with --out"
            )
        return
    old, new = (flatten(config_to_dict(c)) for c in (config_from_dict(log.read_config()), config))
    changed = sorted(key for key in old | new if not key.startswith(RESUME_MAY_CHANGE) and old.get(key) != new.get(key))
    if changed:
        changes = ", ".join(f"{key}: {old.get(key)!r} -> {new.get(key)!r}" for key in changed)
        raise ConfigError(
            f"the run in {log.folder} has other settings ({changes}), so resuming would mix two runs; "
            f"leave them as they were, or start a new folder. A resume may change {', '.join(RESUME_MAY_CHANGE)}"
        )


@asynccontextmanager
async def open_run(config: TrainConfig, on_event: OnEvent) -> AsyncIterator[Run]:
    """Open the parts of a run; its worlds are closed when the context is left, and if another part cannot be had."""
    config = fit_history(config, lambda text: on_event(Notice(text)))
    async with open_worlds(config, lambda text: on_event(Notice(text))) as worlds:
        yield Run(config, worlds, on_event)


class Run:
    """The parts of one run, put together from its settings, and what is done with them at each step."""

    def __init__(self, config: TrainConfig, worlds: Worlds, on_event: OnEvent) -> None:
        self.config, self.worlds, self.on_event = config, worlds, on_event
        self.pools = train_tasks(config, worlds)
        self.held_out = held_out_tasks(config, worlds)
        self.engine = open_engine(config.engine, seed=config.seed)
        check_objective(self.engine, config.objective)
        self.renderer = Renderer(self.engine.tokenizer, (), config.renderer)  # each rollout adds its tools
        self.params = config.sampling_params
        self.limits = worlds.fit_concurrency(self.notice)
        self.recorded = recorded_trajectories(config, self.renderer, self.notice)
        self.guard = Guard(config.objective)
        self.saved_version = 0  # policy version of the checkpoint; 0 is the model itself and has none

    def notice(self, text: str) -> None:
        """Tell the user."""
        self.on_event(Notice(text))

    def objective(self) -> ObjectiveConfig:
        """Return the objective, with its coefficient as the guard has it now."""
        return self.config.objective.times(self.guard.factor)

    async def rollouts(self, step: int) -> tuple[list[TrajectoryGroup], float]:
        """Run the rollouts of one step; return their groups and the seconds they took.

        Raises:
            InfrastructureError: no rollout came through.
        """
        config, started = self.config, time.monotonic()
        tasks = mixed_tasks_of_step(self.pools, config.tasks_per_step, config.seed, step)
        num_rollouts = len(tasks) * config.group_size
        groups = await run_groups(
            tasks,
            report_rollouts(self.worlds.open, "training", step, num_rollouts, self.on_event),
            self.engine.sampler(self.params),
            self.renderer,
            self.limits,
            group_size=config.group_size,
            key=f"train/{step}",
        )
        check_rollouts(groups, f"step {step}", observations_teach=self.objective().has_world_term(step))
        return groups, time.monotonic() - started

    async def train_step(
        self, step: int, groups: Sequence[TrajectoryGroup], rollout_seconds: float, log: RunLog
    ) -> None:
        """Make one optimizer step, write its weights and metrics, and a checkpoint if one is due."""
        config, engine, started = self.config, self.engine, time.monotonic()
        objective, version = self.objective().at(step), engine.policy_version
        samples = [
            sample
            for group in groups
            for sample in build_samples(group, objective, temperature=config.temperature, policy_version=version)
        ]
        if objective.world.drop_surprising > 0 and objective.has_world_term(step):
            logprobs = await engine.score([trajectory for group in groups for trajectory in group])
            flat = [x for row in logprobs for x in row]
            samples = drop_surprising(samples, flat, objective.world_loss_target, objective.world.drop_surprising)
        match objective.world.observations:
            case "shuffled":
                samples = shuffle_observations(samples, objective.world_loss_target, key=f"{config.seed}/{step}")
            case "action_masked":
                kept = self.renderer.stop_token_ids
                samples = mask_actions(samples, objective.world_loss_target, kept=kept)
        metrics = await engine.train_step(samples, objective)
        used = metrics.get("world_model_coeff")  # a number, where it was a share
        metrics["world_model_coeff"] = used = objective.world_coeff if used is None else used
        objective = replace(objective, world_model_coeff=used)
        if not metrics.get("skipped"):
            with timed("logging"):
                log.write_weights(step, groups, step_weights(samples, objective))
        seconds = time_metrics(groups, rollout_seconds, time.monotonic() - started)
        metrics = rollout_metrics(groups) | row_metrics(samples, objective) | metrics | seconds
        for line in self.guard.read(step, metrics):
            self.notice(f"step {step}: {line}")
        metrics["alarms"] = len(self.guard.alarms)
        with timed("logging"):
            log.write_metrics(step, metrics)
        if (step + 1) % config.checkpoint_every == 0 or step + 1 == config.steps:
            self._checkpoint(log)
        self.on_event(StepDone(step, config.steps, metrics))

    async def evaluate(self, step: int) -> tuple[Evaluation, list[TrajectoryGroup]]:
        """Evaluate the current policy, with the same random numbers at every step; return the rollouts too.

        Raises:
            InfrastructureError: no rollout came through.
        """
        config = self.config.evaluation
        num_rollouts = len(self.held_out) * config.samples_per_task
        evaluation, groups = await evaluate(
            self.engine,
            self.held_out,
            report_rollouts(self.worlds.open, "evaluation", step, num_rollouts, self.on_event),
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
        """Evaluate before the first step, after the last, and every ``evaluation.every`` steps; write the result."""
        every = self.config.evaluation.every
        due = step in (0, self.config.steps) or (every > 0 and step % every == 0)
        if not due or not self.held_out or log.evaluation_path(step).exists():
            return
        evaluation, groups = await self.evaluate(step)
        if self.config.evaluation.world_model:
            await self.measure_world_model(step, groups, log)
        log.write_evaluation(step, evaluation.to_dict(), groups)
        self.on_event(EvaluationDone(evaluation))

    async def measure_world_model(self, step: int, groups: Sequence[TrajectoryGroup], log: RunLog) -> None:
        """Measure the policy's knowledge of its environment, on recorded and on its own rollouts, and write it."""
        own = [rollout for group in groups for rollout in group if rollout.num_turns]
        sets = {"recorded": self.recorded, "own": own}
        measured = await measure_world_model(self.engine, self.renderer, sets, step=step)
        log.write_world_model(step, measured)
        self.on_event(WorldModelMeasured(measured, log.world_model_path(step)))

    def restore(self, log: RunLog) -> int:
        """Load the last checkpoint and forget the steps after it; return the step to begin with.

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
        first = self.saved_version = self.engine.policy_version
        if first > self.config.steps:
            raise ConfigError(
                f"the run in {log.folder} has done {first} steps already, more than steps={self.config.steps}; "
                f"use steps >= {first}, or start a new folder"
            )
        log.truncate_after(first - 1)
        for row in log.read_metrics():
            self.guard.read(row["step"], row)
        return first

    def checkpoint_if_consistent(self, log: RunLog) -> None:
        """Write a checkpoint of the current policy, unless a step's update could not be recorded."""
        done = self.engine.policy_version
        if done > self.saved_version and log.last_step() == done - 1:
            self._checkpoint(log)

    def _checkpoint(self, log: RunLog) -> None:
        with timed("checkpoint"):
            write_atomically(log.checkpoint_path, self.engine.save)
        self.saved_version = self.engine.policy_version
