"""What the trainer relies on in TRL, and what it refuses because it could not be kept exactly."""

from __future__ import annotations

from typing import Any

from backtalk.errors import ConfigError
from backtalk.objective.coefficient import Share

OLDEST, NEWEST = "1.7.1", "1.16"  # tested
_METHODS = (
    "_prepare_inputs",
    "_generate_and_score_completions",
    "_compute_loss",
    "_calculate_rewards",
    "_get_per_token_logps_and_entropies",
)
_ATTRIBUTES = ("_step", "_buffered_inputs", "_metrics", "rollout_func", "loss_type", "chat_template_kwargs")
_OF_A_GROUP = (
    *("min_valid_calls", "min_clean_turns", "min_correct"),
    *("entropy_share", "entropy_weights", "return_adaptive"),
)
_OF_THE_ENGINE = (
    *("zero_advantage_steps", "every", "conflict", "head"),
    *("drop_surprising", "observations", "on_trouble"),
)


def refuse_compiled(trainer_class: type) -> None:
    """Raise ConfigError where Unsloth has replaced TRL's trainer by one that it compiled."""
    names = {cls.__name__ for cls in trainer_class.__mro__} | {cls.__module__ for cls in trainer_class.__mro__}
    if any("unsloth" in name.lower() for name in names):
        raise ConfigError(
            "Unsloth has replaced TRL's GRPOTrainer by one whose loss it compiled, to which nothing can be added; "
            "import backtalk.hosts.trl in a process that does not import unsloth"
        )
    missing = [name for name in _METHODS if not callable(getattr(trainer_class, name, None))]
    if missing:
        raise ConfigError(_moved(missing))


def check_trainer(trainer: Any) -> None:
    """Raise ConfigError for arguments of TRL with which the world-model term would not be exact."""
    missing = [name for name in _ATTRIBUTES if not hasattr(trainer, name)]
    if missing:
        raise ConfigError(_moved(missing))
    args: Any = trainer.args
    if getattr(trainer, "use_liger_kernel", False):
        raise ConfigError("use_liger_kernel computes TRL's loss without log-probabilities; use use_liger_kernel=False")
    if args.steps_per_generation % args.gradient_accumulation_steps:
        raise ConfigError(
            f"an optimizer step of gradient_accumulation_steps={args.gradient_accumulation_steps} spans generations of "
            f"steps_per_generation={args.steps_per_generation}, so its observations cannot be counted before it is "
            "taken; use a multiple of gradient_accumulation_steps for steps_per_generation"
        )
    if trainer.rollouts is not None:
        if getattr(trainer, "use_vllm", False):
            raise ConfigError("rollouts= samples for itself, and use_vllm would not be asked; use use_vllm=False")
        if getattr(trainer, "beta", 0.0):
            raise ConfigError(
                f"beta={trainer.beta} needs log-probabilities of a reference, which rollouts= has none of; use beta=0"
            )


def check_objective(trainer: Any) -> None:
    """Raise ConfigError for options of the objective that TRL cannot keep."""
    objective = trainer.objective
    if isinstance(objective.world_model_coeff, Share):
        raise ConfigError(
            "world_model_coeff as a share of the gradient needs both terms' gradients, and TRL has their sum alone; "
            "use a number or a schedule"
        )
    temperature = float(getattr(trainer, "temperature", 1.0))
    if temperature != 1.0 and objective.world.temperature == "one":
        raise ConfigError(
            f"TRL scores every token at temperature={temperature:g}, and the world-model term is at 1; use "
            "temperature=1.0, or world=WorldOptions(temperature='sampling')"
        )
    unkept = list(_OF_THE_ENGINE) if trainer.rollouts is not None else [*_OF_THE_ENGINE, *_OF_A_GROUP]
    if set_ones := objective.world.changed(unkept):
        raise ConfigError(
            f"world options {', '.join(set_ones)} cannot be kept here: they need the rewards and turns of a group, "
            "which rollouts= has, or Backtalk's own engine; leave them at their defaults"
        )


def _moved(names: list[str]) -> str:
    import trl

    return (
        f"TRL {trl.__version__} has no {', '.join(names)} in its GRPOTrainer, on which the world-model term is built; "
        f"install a version that is tested: pip install 'trl>={OLDEST},<1.17'"
    )
