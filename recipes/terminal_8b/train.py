"""Train a model in terminals with SkyRL, on rewards and on what the shell answers; README.md says on what machine.

python recipes/terminal_8b/train.py --tasks FOLDER [--smoke] [--set key=value ...] [SkyRL's own key=value ...]
"""

from __future__ import annotations

import argparse
import asyncio
import os
from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from pathlib import Path
from typing import Any

import ray
import yaml
from skyrl.train.utils.utils import initialize_ray

from backtalk.envs.base import Env
from backtalk.hosts.skyrl import EchoExperiment, EchoTrainer, echo_config
from backtalk.hosts.skyrl.smoke import SmokeTrainer
from backtalk.language.tokenizer import model_location
from backtalk.run.config import TrainConfig, load_config
from backtalk.run.tasks import HELD_OUT_SEED, TRAIN_TASKS
from backtalk.run.worlds import open_worlds
from backtalk.tasks.task import Split, Task

HERE = Path(__file__).parent
SMOKE = {"steps": 2, "tasks_per_step": 2, "evaluation.tasks": 0}


def main() -> None:
    """Read the settings, start Ray, and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", type=Path, default=HERE / "terminal_8b.yaml", help="Backtalk's settings")
    parser.add_argument("--skyrl", type=Path, default=HERE / "skyrl.yaml", help="SkyRL's settings")
    parser.add_argument("--tasks", help="a folder of task folders, or another tasks.source; default: of the settings")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a setting of Backtalk")
    parser.add_argument("--smoke", action="store_true", help="two small steps, the first with its gradient checked")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="change a setting of SkyRL")
    args = parser.parse_args()
    chosen = {"tasks.source": args.tasks} if args.tasks else {}
    smoke = {key: str(value) for key, value in SMOKE.items()} if args.smoke else {}
    config = load_config(args.settings, [f"{k}={v}" for k, v in (chosen | smoke).items()] + args.set)
    cfg = echo_config(
        config.objective,
        {**skyrl_settings(config), **flat(yaml.safe_load(args.skyrl.read_text()))},
        [*(["trainer.ckpt_interval=-1", "trainer.resume_mode=none"] if args.smoke else []), *args.overrides],
    )
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    initialize_ray(cfg)
    ray.get(ray.remote(num_cpus=1)(train).remote(cfg, config, SmokeTrainer if args.smoke else EchoTrainer))


def train(cfg: Any, config: TrainConfig, trainer_class: type) -> None:
    """Train, in a Ray task, on the tasks of the settings."""
    world = RunWorld(config)
    held_out = world.tasks(Split.HELD_OUT, config.evaluation.tasks, HELD_OUT_SEED) if config.evaluation.tasks else []
    EchoExperiment(
        cfg,
        world,
        world.tasks(Split.TRAIN, TRAIN_TASKS, config.seed),
        eval_tasks=held_out,
        objective=config.objective,
        limits=world.worlds.fit_concurrency(print),
        renderer=config.renderer,
        trainer_class=trainer_class,
    ).run()


class RunWorld:
    """The worlds of a run's task sources as one."""

    def __init__(self, config: TrainConfig) -> None:
        self._stack = AsyncExitStack()
        # SkyRL has a loop of its own later; asyncio.run would close the worlds at its end.
        self._loop = asyncio.new_event_loop()
        self.worlds = self._loop.run_until_complete(self._stack.enter_async_context(open_worlds(config, print)))

    def tasks(self, split: Split, count: int, seed: int) -> list[Task]:
        """Return at most ``count`` tasks of a split from each source."""
        return [task for source in self.worlds.tasks(split, count, seed) for task in source]

    def open(self, task: Task) -> AbstractAsyncContextManager[Env]:
        """Open an environment for a task."""
        return self.worlds.open(task)

    async def close(self) -> None:
        """Close every world."""
        await self._stack.aclose()
        self._loop.close()


def skyrl_settings(config: TrainConfig) -> dict[str, Any]:
    """Return SkyRL's settings, by dotted key, that follow from Backtalk's."""
    engine, rollout, evaluation = config.engine, config.rollout, config.evaluation
    return {
        "trainer.policy.model.path": model_location(engine.model),
        "trainer.policy.optimizer_config.lr": engine.learning_rate,
        "trainer.policy.optimizer_config.adam_betas": list(engine.betas),
        "trainer.policy.optimizer_config.weight_decay": engine.weight_decay,
        "trainer.policy.optimizer_config.max_grad_norm": engine.grad_clip_norm,
        "trainer.policy.optimizer_config.num_warmup_steps": engine.warmup_steps,
        "trainer.seed": config.seed,
        "trainer.max_training_steps": config.steps,
        "trainer.epochs": config.steps,  # an upper bound: an epoch has a step at least
        "trainer.train_batch_size": config.tasks_per_step,
        "trainer.policy_mini_batch_size": config.tasks_per_step,
        "trainer.max_prompt_length": rollout.max_tokens,
        "trainer.eval_interval": evaluation.every if evaluation.tasks else -1,
        "trainer.eval_batch_size": max(evaluation.tasks, 1),
        "generator.n_samples_per_prompt": config.group_size,
        "generator.eval_n_samples_per_prompt": evaluation.samples_per_task,
        "generator.max_turns": rollout.max_turns,
        "generator.max_input_length": rollout.max_tokens,
        "generator.sampling_params.temperature": config.temperature,
        "generator.sampling_params.max_generate_length": rollout.max_tokens_per_turn,
        "generator.eval_sampling_params.max_generate_length": rollout.max_tokens_per_turn,
        "generator.inference_engine.engine_init_kwargs.max_model_len": rollout.max_tokens,
    }


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings by dotted key."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return found


if __name__ == "__main__":
    main()
