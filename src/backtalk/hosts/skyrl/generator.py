"""Backtalk's own environments, sandboxes and rollouts as SkyRL's generator, and its tasks as SkyRL's dataset."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

from skyrl.train.generators.base import GeneratorInterface, TrajectoryID  # pyright: ignore[reportMissingImports]
from skyrl.train.generators.utils import get_rollout_metrics  # pyright: ignore[reportMissingImports]

from backtalk.envs.base import World
from backtalk.errors import ConfigError, InfrastructureError
from backtalk.hosts.skyrl.rows import SAMPLES, row
from backtalk.hosts.skyrl.sampler import ClientSampler
from backtalk.language.renderer import Renderer, RendererConfig
from backtalk.objective.config import ObjectiveConfig
from backtalk.objective.samples import Sample, build_samples
from backtalk.rollout.groups import run_groups
from backtalk.rollout.limits import RolloutLimits
from backtalk.tasks.task import Task
from backtalk.trajectory import StopReason, Trajectory, TrajectoryGroup

_Generator: Any = GeneratorInterface
TASK_ID = "task_id"  # of the extras of a dataset's row


class TaskPrompts:
    """Tasks as a dataset of SkyRL: a row has the task's instruction, for its logs, and the task's id."""

    def __init__(self, tasks: Sequence[Task], source: str = "backtalk") -> None:
        self._rows = [
            ([{"role": "user", "content": task.instruction}], {TASK_ID: task.id, "data_source": source})
            for task in tasks
        ]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> tuple[list[dict[str, str]], None, dict[str, str], str]:
        """Return a row as SkyRL's ``PromptDataset`` does: prompt, environment class, extras, id."""
        prompt, extras = self._rows[index]
        return prompt, None, dict(extras), str(index)

    @staticmethod
    def collate_fn(rows: Sequence[tuple[Any, ...]]) -> list[dict[str, Any]]:
        """Return rows as SkyRL's trainer takes them."""
        return [dict(zip(("prompt", "env_class", "env_extras", "uid"), row, strict=True)) for row in rows]


class RolloutGenerator(_Generator):
    """Rollouts of a world's tasks, sampled from SkyRL's inference engines; ``TaskPrompts`` of the tasks is the dataset.

    The samples of every row, with the role of each token, travel beside what SkyRL itself reads. A rollout that broke
    has no reward: SkyRL reads 0, and ``EchoTrainer`` leaves the row out of its group's baseline and of the policy term.

    Args:
        world, tasks: whose tasks are run; ``close`` closes the world.
        client, tokenizer: SkyRL's inference client, and the tokenizer of the policy.
        objective: that of the trainer, for the options that compare the rollouts of a group.
        step_wise: ``generator.step_wise_trajectories``, a row for each branch of a rollout. Without it a rollout has to
            be one history that only grows.
        model: name of the policy at the inference engines; None is their own.
        seed: of the rollouts.

    Raises:
        ConfigError: two tasks of one id; or the chat template rewrites earlier turns, and ``step_wise`` is false.
    """

    def __init__(
        self,
        world: World,
        tasks: Sequence[Task],
        client: Any,
        tokenizer: Any,
        *,
        objective: ObjectiveConfig,
        limits: RolloutLimits | None = None,
        renderer: RendererConfig | None = None,
        step_wise: bool = False,
        model: str | None = None,
        seed: int = 0,
    ) -> None:
        self.world, self.limits, self.objective = world, limits or RolloutLimits(), objective
        self._client, self._model, self._seed, self._step_wise = client, model, seed, step_wise
        self._renderer = Renderer(tokenizer, (), renderer or RendererConfig(on_drift="fork"))
        self._tasks = {task.id: task for task in tasks}
        if len(self._tasks) != len(tasks):
            raise ConfigError(f"{len(tasks)} tasks have {len(self._tasks)} ids; give each task its own id")
        if not step_wise and not self._renderer.append_only:
            raise ConfigError(
                "the chat template rewrites earlier turns, so a rollout has several histories, a row each; use "
                "generator.step_wise_trajectories=true, or a renderer that keeps the history (renderer.thinking=keep)"
            )

    async def generate(self, input_batch: dict[str, Any]) -> dict[str, Any]:
        """Run the rollouts of a batch, whole groups of one task each, and return them in SkyRL's order.

        Raises:
            InfrastructureError: every rollout failed.
        """
        ids: list[TrajectoryID] = input_batch["trajectory_ids"]
        extras: list[dict[str, Any]] = input_batch["env_extras"]
        about, params = input_batch["batch_metadata"], input_batch["sampling_params"]
        sizes = [len(list(run)) for _, run in groupby(ids, key=lambda i: i.instance_id)]
        names = [str(extras[sum(sizes[:g])].get(TASK_ID)) for g in range(len(sizes))]
        if len(set(sizes)) != 1 or not self._tasks.keys() >= set(names):
            raise ConfigError(
                f"SkyRL asked for groups of {sizes} rollouts of the tasks {names[:3]}; they are of one size, of tasks "
                "that this generator was made with; use TaskPrompts(tasks) as the dataset"
            )
        step = about.global_step or 0
        sampler = ClientSampler(
            self._client,
            params,
            stop_token_ids=self._renderer.stop_token_ids,
            policy_version=step,
            model=self._model,
        )
        groups = await run_groups(
            [self._tasks[name] for name in names],
            self.world.open,
            sampler,
            self._renderer,
            self.limits,
            group_size=sizes[0],
            key=f"{self._seed}/{about.training_phase}/{step}",
        )
        _refuse_failed(groups)
        return self._output(groups, ids, params["temperature"], training=about.training_phase == "train")

    async def close(self) -> None:
        """Close the world."""
        await self.world.close()

    def _output(
        self, groups: Sequence[TrajectoryGroup], ids: Sequence[TrajectoryID], temperature: float, *, training: bool
    ) -> dict[str, Any]:
        """Return rollouts as SkyRL's generator output."""
        trajectories = [trajectory for group in groups for trajectory in group]
        samples = [list(rows) for rows in self._rows(groups, temperature if training else 1.0)]
        if not self._step_wise and any(len(rows) > 1 for rows in samples):
            raise ConfigError(
                "the history of a rollout was rewritten, so it takes several rows; use "
                "generator.step_wise_trajectories=true"
            )
        pad = self._renderer.pad_token_id
        rows = [
            {
                **row(sample, pad),
                "rewards": float(trajectory.reward or 0.0),
                "stop_reasons": trajectory.stop_reason.value,
                "trajectory_ids": trajectory_id,
                "is_last_step": k == len(branches) - 1,
                SAMPLES: sample,
            }
            for trajectory, trajectory_id, branches in zip(trajectories, ids, samples, strict=True)
            for k, sample in enumerate(branches)
        ]
        output: dict[str, Any] = {key: [values[key] for values in rows] for key in rows[0]}
        if not self._step_wise:
            del output["is_last_step"]
        if not training:
            del output[SAMPLES]
        metrics = get_rollout_metrics(output["response_ids"], output["rewards"], loss_masks=output["loss_masks"])
        return output | {"rollout_metrics": metrics | _metrics(trajectories)}

    def _rows(self, groups: Sequence[TrajectoryGroup], temperature: float) -> Iterator[Iterator[Sample]]:
        """Yield the samples of each rollout."""
        for group in groups:
            samples = build_samples(group, self.objective, temperature=temperature)
            yield from (run for _, run in groupby(samples, key=lambda sample: sample.sample_index))


def _refuse_failed(groups: Sequence[TrajectoryGroup]) -> None:
    failures = [trajectory.failure for group in groups for trajectory in group]
    if failures and (first := failures[0]) is not None and None not in failures:
        raise InfrastructureError(
            f"all {len(failures)} rollouts failed, the first at {first.phase} with {first.error}: {first.message}; "
            "nothing was learned from them. `backtalk doctor` says what this machine lacks"
        )


def _metrics(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """Return counts of a batch's rollouts, which SkyRL adds up over batches, and means named as it names them."""
    turns = sum(trajectory.num_turns for trajectory in trajectories)
    ends = {f"generate/stop_reason/{e.value}": sum(t.stop_reason is e for t in trajectories) for e in StopReason}
    return {
        "generate/rollouts": len(trajectories),
        "generate/no_reward": sum(trajectory.reward is None for trajectory in trajectories),
        "generate/failed": sum(trajectory.failure is not None for trajectory in trajectories),
        "generate/avg_num_turns": turns / len(trajectories),
        **ends,
    }
