"""One training run: rollouts in real sandboxes, one optimizer step on each batch of them, measured before and after.

What happens at a step depends only on the settings, the seed and the step's number. So a run that was killed
and resumed from its checkpoint goes on to the same numbers as one that was not.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Protocol, TypeVar

from backtalk.config import TrainConfig, config_from_dict, config_to_dict, flatten, parse_overrides, set_dotted
from backtalk.engines.torch import TorchEngine
from backtalk.engines.torch_checkpoint import has_checkpoint
from backtalk.envs import load_tasks
from backtalk.envs.base import Env, Split, Task
from backtalk.envs.terminal import BASH, SUBMIT, open_terminal_env
from backtalk.errors import ConfigError, DataError, InfrastructureError
from backtalk.evaluate import Evaluation, evaluate, rollout_metrics, time_metrics
from backtalk.renderer import Renderer
from backtalk.rollout import OpenEnv, run_groups
from backtalk.runlog import RunLog, read_trajectories
from backtalk.sampler import SamplingParams
from backtalk.samples import build_samples
from backtalk.sandboxes import local_sandbox
from backtalk.sandboxes.base import BackendReport
from backtalk.trajectory import Trajectory, TrajectoryGroup

TOOLS = (BASH, SUBMIT)
TRAIN_TASKS = 2000  # distinct ones, of a source that makes or has as many; each comes up once an epoch
T = TypeVar("T")
HELD_OUT_SEED = 0  # all runs are measured on the same held-out tasks, whatever their own seed
EXTENDABLE = ("steps", "checkpoint_every", "evaluation.every")  # a resumed run may change these and nothing else


# ---------------------------------------------------------------- what a run tells while it goes on


@dataclass(frozen=True, slots=True)
class RunStarted:
    folder: Path
    first_step: int
    steps: int
    sandbox: BackendReport


@dataclass(frozen=True, slots=True)
class RolloutDone:
    """``phase`` is "training" or "evaluation"; counts are of that step's rollouts."""

    phase: str
    step: int
    done: int
    total: int


@dataclass(frozen=True, slots=True)
class StepDone:
    """``metrics`` are what metrics.jsonl holds for this step."""

    step: int
    steps: int
    metrics: dict[str, float]


@dataclass(frozen=True, slots=True)
class EvaluationDone:
    evaluation: Evaluation


@dataclass(frozen=True, slots=True)
class Notice:
    """Something a person should know and nobody asked for."""

    text: str


@dataclass(frozen=True, slots=True)
class RunDone:
    folder: Path
    step: int  # steps done so far
    finished: bool  # False where it was asked to stop before the last step


Event = RunStarted | RolloutDone | StepDone | EvaluationDone | Notice | RunDone
OnEvent = Callable[[Event], None]


class StopFlag(Protocol):
    """threading.Event and asyncio.Event are such flags."""

    def is_set(self) -> bool: ...


# ---------------------------------------------------------------- the run


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
        ConfigError: settings that cannot work, or a folder that holds another run.
        InfrastructureError: every rollout of a step failed.
        DataError: the run folder cannot be written.
    """
    log, tell = RunLog(folder), on_event or (lambda event: None)
    _claim(log, config, resume)
    run = Run(config, tell)
    first = run.restore(log) if resume else 0
    log.write_config(config_to_dict(config))
    run.engine.tokenizer.save_pretrained(str(log.tokenizer_path))
    tell(RunStarted(log.folder, first, config.steps, run.sandbox))
    try:
        for step in range(first, config.steps):
            await run.evaluate_if_due(step, log)
            if stop is not None and stop.is_set():
                break
            groups, seconds = await run.rollouts(step)
            log.write_groups(step, groups)
            metrics = await _unbroken(run.learn(step, groups, seconds, log))
            tell(StepDone(step, config.steps, metrics))
    except BaseException:  # a cancellation too: leave a checkpoint, and never hide the cause behind a second error
        with suppress(Exception):
            run.checkpoint_if_consistent(log)
        raise
    run.checkpoint_if_consistent(log)
    done = run.engine.policy_version
    if done >= config.steps:
        await run.evaluate_if_due(config.steps, log)
    tell(RunDone(log.folder, done, done >= config.steps))
    return log.folder


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
    tree = log.read_config()
    for key, value in parse_overrides(overrides).items():
        set_dotted(tree, key, value)
    config = config_from_dict(tree)
    if config.evaluation.tasks == 0:
        raise ConfigError("evaluation.tasks=0 leaves nothing to measure; pass evaluation.tasks=64")
    if not base and not has_checkpoint(log.checkpoint_path):
        raise DataError(
            f"{log.folder} has no checkpoint yet; wait for one, or measure the model it began with (--base)"
        )
    run = Run(config, on_event or (lambda event: None))
    if not base:
        run.engine.load(log.checkpoint_path)
    evaluation, _ = await run.evaluate(run.engine.policy_version)
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
        self.train_tasks = _train_tasks(config)
        self.held_out = _held_out_tasks(config)
        backend = local_sandbox(config.sandbox)
        self.sandbox = backend.report
        self._open_env: OpenEnv = lambda task: open_terminal_env(task, backend, config.terminal)
        self.engine = TorchEngine(config.engine)
        # Thinking of earlier turns is dropped by most templates, which would rewrite history; so there is none.
        self.renderer = Renderer(self.engine.tokenizer, TOOLS, template_options={"enable_thinking": False})
        self.params = SamplingParams(
            temperature=config.temperature, max_tokens=config.rollout.max_tokens_per_turn, seed=config.seed
        )
        self.recorded = _recorded(config, len(self.engine.tokenizer), tell)
        self.saved_step = 0  # policy version of the checkpoint; 0 has none, it is the model itself

    async def rollouts(self, step: int) -> tuple[list[TrajectoryGroup], float]:
        """The groups of one step, and the seconds they took.

        Raises:
            InfrastructureError: not one rollout came through, so the world is broken, not this task.
        """
        config, started = self.config, time.monotonic()
        tasks = tasks_of_step(self.train_tasks, config.tasks_per_step, config.seed, step)
        groups = await run_groups(
            tasks,
            self._counted("training", step, len(tasks) * config.group_size),
            self.engine.sampler(self.params),
            self.renderer,
            config.rollout,
            group_size=config.group_size,
            key=f"train/{step}",
        )
        failures = [t.failure for group in groups for t in group]
        if first := all(failures) and failures[0]:
            raise InfrastructureError(
                f"all {len(failures)} rollouts of step {step} failed, the first at {first.where} with "
                f"{first.error}: {first.message}; `backtalk doctor` says what this machine lacks. "
                "Continue with --resume once it works"
            )
        return groups, time.monotonic() - started

    async def learn(
        self, step: int, groups: Sequence[TrajectoryGroup], rollout_seconds: float, log: RunLog
    ) -> dict[str, float]:
        """One optimizer step, its metrics on disk, and a checkpoint where one is due."""
        config, started = self.config, time.monotonic()
        samples = [s for group in groups for s in build_samples(group, temperature=config.temperature)]
        learned = await self.engine.train_step(samples, config.objective)
        seconds = time_metrics(groups, rollout_seconds, time.monotonic() - started)
        metrics = rollout_metrics(groups) | learned | seconds
        log.write_metrics(step, metrics)
        if (step + 1) % config.checkpoint_every == 0 or step + 1 == config.steps:
            self._checkpoint(log)
        return metrics

    async def evaluate(self, step: int) -> tuple[Evaluation, list[TrajectoryGroup]]:
        """Measure the policy as it stands. The random numbers are the same at every step."""
        config = self.config.evaluation
        return await evaluate(
            self.engine,
            self.held_out,
            self._counted("evaluation", step, len(self.held_out) * config.samples_per_task),
            self.renderer,
            limits=self.config.rollout,
            params=self.params,
            samples_per_task=config.samples_per_task,
            recorded=self.recorded,
            step=step,
        )

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
        """Go back to the last checkpoint and forget what came after it; returns the step to begin with."""
        if has_checkpoint(log.checkpoint_path):
            self.engine.load(log.checkpoint_path)
        first = self.saved_step = self.engine.policy_version
        log.truncate_after(first - 1)
        return first

    def checkpoint_if_consistent(self, log: RunLog) -> None:
        """Keep where the run stands, unless a step's update could not be recorded."""
        done = self.engine.policy_version
        if done > self.saved_step and log.last_step() == done - 1:
            self._checkpoint(log)

    def _checkpoint(self, log: RunLog) -> None:
        self.engine.save(log.checkpoint_path)
        self.saved_step = self.engine.policy_version

    def _counted(self, phase: str, step: int, total: int) -> OpenEnv:
        """``open_env`` that tells of every environment it closes."""
        done = 0

        @asynccontextmanager
        async def opened(task: Task) -> AsyncIterator[Env]:
            nonlocal done
            try:
                async with self._open_env(task) as env:
                    yield env
            finally:
                done += 1
                self.tell(RolloutDone(phase, step, done, total))

        return opened


# ---------------------------------------------------------------- tasks


def tasks_of_step(tasks: Sequence[Task], per_step: int, seed: int, step: int) -> list[Task]:
    """The tasks of one step. Every epoch is a new shuffle of them all; what fills no whole step waits for the next."""
    epoch, place = divmod(step, len(tasks) // per_step)
    order = list(tasks)
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return order[place * per_step : (place + 1) * per_step]


def _train_tasks(config: TrainConfig) -> list[Task]:
    wanted = config.tasks
    tasks = load_tasks(wanted.source, split=Split.TRAIN, count=TRAIN_TASKS, levels=wanted.levels, seed=config.seed)
    if len(tasks) < config.tasks_per_step:
        raise ConfigError(
            f"{wanted.source!r} has {len(tasks)} training tasks, fewer than tasks_per_step={config.tasks_per_step}; "
            "lower tasks_per_step or add tasks"
        )
    return tasks


def _held_out_tasks(config: TrainConfig) -> list[Task]:
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


def _recorded(config: TrainConfig, vocab_size: int, tell: OnEvent) -> list[Trajectory]:
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
