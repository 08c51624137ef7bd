"""``EchoExperiment``: SkyRL's experiment with Backtalk's tasks, rollouts and trainer in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any

from skyrl.backends.skyrl_train.inference_servers.utils import (  # pyright: ignore[reportMissingImports]
    resolve_policy_model_name,
)
from skyrl.train.config import SkyRLTrainConfig  # pyright: ignore[reportMissingImports]
from skyrl.train.config.config import overrides_dict_to_dotlist  # pyright: ignore[reportMissingImports]
from skyrl.train.entrypoints.main_base import BasePPOExp  # pyright: ignore[reportMissingImports]
from skyrl.train.utils import validate_cfg  # pyright: ignore[reportMissingImports]

from backtalk.envs.base import World
from backtalk.errors import ConfigError
from backtalk.hosts.skyrl.generator import RolloutGenerator, TaskPrompts
from backtalk.hosts.skyrl.loss import register_losses
from backtalk.hosts.skyrl.support import algorithm_settings, check_sampling, check_settings
from backtalk.hosts.skyrl.trainer import EchoTrainer
from backtalk.language.renderer import RendererConfig
from backtalk.objective.config import ObjectiveConfig
from backtalk.rollout.limits import RolloutLimits
from backtalk.tasks.task import Task

_Experiment: Any = BasePPOExp


class EchoExperiment(_Experiment):
    """SkyRL's experiment on a world's tasks: its dataset, generator and trainer are Backtalk's, all else is SkyRL's.

    Make it where SkyRL makes its own, in a Ray task, with settings of ``echo_config``. ``eval_tasks`` are evaluated
    every ``trainer.eval_interval`` steps.
    """

    def __init__(
        self,
        cfg: Any,
        world: World,
        tasks: Sequence[Task],
        *,
        objective: ObjectiveConfig,
        eval_tasks: Sequence[Task] = (),
        limits: RolloutLimits | None = None,
        renderer: RendererConfig | None = None,
        trainer_class: type = EchoTrainer,
    ) -> None:
        self.world, self.tasks, self.eval_tasks = world, list(tasks), list(eval_tasks)
        self.objective, self.limits, self.renderer = objective, limits or RolloutLimits(), renderer
        self._trainer_class = trainer_class
        check_settings(cfg, objective)
        check_sampling(cfg, self.limits.max_tokens)
        super().__init__(cfg)

    def get_train_dataset(self) -> TaskPrompts:
        """Return the tasks as a dataset."""
        if len(self.tasks) < self.cfg.trainer.train_batch_size:
            raise ConfigError(
                f"trainer.train_batch_size={self.cfg.trainer.train_batch_size} is more than the tasks there are, "
                f"{len(self.tasks)}; use fewer, or add tasks"
            )
        return TaskPrompts(self.tasks)

    def get_eval_dataset(self) -> TaskPrompts | None:
        """Return the held-out tasks as a dataset; None without evaluation."""
        return TaskPrompts(self.eval_tasks) if self.eval_tasks and self.cfg.trainer.eval_interval > 0 else None

    def get_generator(self, cfg: Any, tokenizer: Any, inference_engine_client: Any) -> RolloutGenerator:
        """Return the rollouts of all tasks over SkyRL's inference client."""
        return RolloutGenerator(
            self.world,
            [*self.tasks, *self.eval_tasks],
            inference_engine_client,
            tokenizer,
            objective=self.objective,
            limits=self.limits,
            renderer=self.renderer,
            step_wise=cfg.generator.step_wise_trajectories,
            model=resolve_policy_model_name(cfg),
            seed=cfg.trainer.seed,
        )

    def get_trainer(self, *args: Any, **kwargs: Any) -> Any:
        """Return the trainer with the world-model term."""
        objective = self.objective
        return self._trainer_class(
            *args,
            world_model_coeff=objective.world_model_coeff,
            world_normalizer=objective.world_normalizer,
            world_loss_target=objective.world_loss_target,
            max_seq_len=objective.max_seq_len,
            world=objective.world,
            policy_coeff=objective.policy_coeff,
            **kwargs,
        )


def echo_config(objective: ObjectiveConfig, settings: Mapping[str, Any], overrides: Sequence[str] = ()) -> Any:
    """Return SkyRL's settings for an objective: those of its policy term, then ``settings``, then ``overrides``.

    ``settings`` are SkyRL's own by dotted key, ``overrides`` the same as ``key=value``. What SkyRL itself checks is
    checked, and the losses with the world-model term are registered.

    Raises:
        ConfigError: a setting that cannot be kept, or one that contradicts the objective.
        ValueError, AssertionError: SkyRL's own refusals.
    """
    register_losses()
    wanted = algorithm_settings(objective)
    defaults = {"data.dataloader.num_workers": 0, **wanted, **settings}
    cfg = SkyRLTrainConfig.from_cli_overrides([*overrides_dict_to_dotlist(defaults), *overrides])
    found = {key: reduce(getattr, key.split("."), cfg) for key in wanted}
    if clash := [f"{key}={found[key]!r}, not {wanted[key]!r}" for key in wanted if found[key] != wanted[key]]:
        raise ConfigError(
            f"{'; '.join(clash)}: the objective says otherwise; set it there (objective.clip, .policy_normalizer, "
            ".policy), which these settings of SkyRL follow from"
        )
    validate_cfg(cfg)
    check_settings(cfg, objective)
    return cfg
