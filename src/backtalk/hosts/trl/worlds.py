"""Backtalk's own environments, sandboxes and rollouts as the generation of a TRL trainer."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from torch import nn
from torch.distributed.fsdp import FSDPModule
from trl.models.utils import unwrap_model_for_generation

from backtalk.engines.torch.sampler import TorchSampler
from backtalk.envs.base import World
from backtalk.errors import ConfigError
from backtalk.language.renderer import Renderer, RendererConfig
from backtalk.objective.samples import Sample, build_samples
from backtalk.rollout.groups import fit_concurrency, run_groups
from backtalk.rollout.limits import RolloutLimits
from backtalk.rollout.sampler import SamplingParams
from backtalk.tasks.task import Task
from backtalk.trajectory import TrajectoryGroup

if TYPE_CHECKING:
    from backtalk.hosts.trl.trainer import EchoGRPOTrainer


class WorldRollouts:
    """Rollouts of a world's tasks, sampled from the trainer's own model; for ``EchoGRPOTrainer(rollouts=...)``.

    ``dataset`` is the trainer's ``train_dataset``. A rollout that broke has no reward, and is no reward of 0.
    """

    def __init__(
        self,
        world: World,
        tasks: Sequence[Task],
        *,
        limits: RolloutLimits | None = None,
        renderer: RendererConfig | None = None,
    ) -> None:
        self.world, self.renderer = world, renderer or RendererConfig(on_drift="fork")
        self.limits = fit_concurrency(limits or RolloutLimits())
        self._tasks = {task.id: task for task in tasks}
        if len(self._tasks) != len(tasks) or not tasks:
            raise ConfigError(
                f"{len(tasks)} tasks with {len(self._tasks)} ids; give at least one, each with its own id"
            )
        self._loop = asyncio.new_event_loop()  # sandboxes belong to one loop
        threading.Thread(target=self._loop.run_forever, name="backtalk-rollouts", daemon=True).start()
        self._calls = 0

    @property
    def dataset(self) -> Dataset:
        """Return the tasks as rows for TRL, which shuffles and repeats them."""
        return Dataset.from_list([{"prompt": task.instruction, "task_id": task.id} for task in self._tasks.values()])

    def __call__(self, inputs: Sequence[Mapping[str, Any]], trainer: EchoGRPOTrainer) -> list[Sample]:
        """Run the rollouts of this process's rows, whole groups of one task each.

        Raises:
            ConfigError: rows that are not whole groups, or not of these tasks.
        """
        training = trainer.model.training
        size = trainer.num_generations if training else getattr(trainer, "num_generations_eval", 1)
        names = [
            name
            for name, rows in groupby(str(row.get("task_id")) for row in inputs)
            for _ in range(-(-len(list(rows)) // size))
        ]
        if len(names) * size != len(inputs) or not self._tasks.keys() >= set(names):
            raise ConfigError(
                f"this process got {len(inputs)} rows, which are not whole groups of num_generations={size} of the "
                "tasks given; use train_dataset=rollouts.dataset, and a multiple of num_generations for "
                "per_device_train_batch_size * steps_per_generation"
            )
        groups = self._run([self._tasks[name] for name in names], trainer, size)
        self._log(groups, trainer)
        temperature = float(trainer.temperature)
        return [s for group in groups for s in build_samples(group, trainer.objective, temperature=temperature)]

    def _run(self, tasks: Sequence[Task], trainer: EchoGRPOTrainer, size: int) -> list[TrajectoryGroup]:
        """Run the rollouts with a sampler over the trainer's weights as they are."""
        tokenizer = getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
        renderer = Renderer(tokenizer, (), self.renderer)
        params = SamplingParams(
            temperature=float(trainer.temperature), max_tokens=self.limits.max_tokens_per_turn, seed=trainer.args.seed
        )
        self._calls += 1
        key = f"{trainer.accelerator.process_index}/{self._calls}"
        training = trainer.model.training
        with (
            unwrap_model_for_generation(trainer.model_wrapped, trainer.accelerator) as model,
            whole_weights(model, trainer.accelerator),
        ):
            model.eval()
            try:
                sampler = TorchSampler(
                    model,
                    params=params,
                    stop_token_ids=renderer.stop_token_ids,
                    pad_token_id=tokenizer.pad_token_id,
                    policy_version=trainer.state.global_step,
                )
                run = run_groups(tasks, self.world.open, sampler, renderer, self.limits, group_size=size, key=key)
                return asyncio.run_coroutine_threadsafe(run, self._loop).result()
            finally:
                model.train(training)

    def _log(self, groups: Sequence[TrajectoryGroup], trainer: EchoGRPOTrainer) -> None:
        """Log the mean reward and the share of rollouts without one, over all processes."""
        rewards = [trajectory.reward for group in groups for trajectory in group]
        known = [reward for reward in rewards if reward is not None]
        local = torch.tensor([sum(known), len(known), len(rewards)], device=trainer.accelerator.device)
        total, scored, count = trainer.accelerator.reduce(local, "sum").tolist()
        metrics = trainer._metrics["train" if trainer.model.training else "eval"]
        metrics["reward"].append(total / scored if scored else math.nan)
        metrics["no_reward"].append((count - scored) / max(count, 1))


@contextmanager
def whole_weights(model: nn.Module, accelerator: Any) -> Iterator[None]:
    """Gather the weights of a model that FSDP2 shards, and shard it again at the end; all processes enter together.

    A process samples as many tokens as its own rollouts need. A sharded model gathers its weights from all processes at
    each of them, so one that is done would leave the others waiting.
    """
    shards = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in shards:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in shards:
            module.set_reshard_after_forward(accelerator.state.fsdp_plugin.reshard_after_forward, recurse=False)
            module.reshard()
