"""Settings of SkyRL that the objective stands for, and what is refused because it could not be kept exactly."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from backtalk.errors import ConfigError
from backtalk.hosts.skyrl.loss import LOSSES, PREFIX
from backtalk.hosts.skyrl.version import moved
from backtalk.objective.coefficient import Share
from backtalk.objective.config import ObjectiveConfig, PolicyOptions

REDUCTIONS = {
    "sequence_mean": "sequence_mean",
    "token_mean": "token_mean",
    "fixed_length": "seq_mean_token_sum_norm",
}  # of SkyRL, by policy_normalizer
_POLICY_LOSSES = {"clip": "regular", "gspo": "gspo", "cispo": "cispo"}  # by policy.loss
_ESTIMATORS = {"grpo": ("grpo", True), "dr_grpo": ("grpo", False), "rloo": ("rloo", True)}
GROUP_ESTIMATORS = ("grpo", "rloo", "maxrl")  # of SkyRL, each a baseline of one prompt's rollouts
_OF_THE_ENGINE = (
    *("zero_advantage_steps", "every", "conflict", "head"),
    *("drop_surprising", "observations", "on_trouble", "loss"),
)
_OF_A_GROUP = (
    *("min_valid_calls", "min_clean_turns", "min_correct"),
    *("entropy_share", "entropy_weights", "return_adaptive"),
)
_METHODS = ("postprocess_generator_output", "convert_to_training_input", "_normalize_advantages")  # overridden
_OF_ITS_GENERATOR = ("zero_reward_on_non_stop", "apply_overlong_filtering", "merge_stepwise_output", "batched")


def algorithm_settings(objective: ObjectiveConfig) -> dict[str, Any]:
    """Return SkyRL's settings of the policy term that the objective describes, by dotted key.

    Raises:
        ConfigError: an option that SkyRL has no equal of.
    """
    policy = objective.policy
    plain = PolicyOptions(loss=policy.loss, advantage=policy.advantage)
    if policy != plain:
        odd = [field.name for field in fields(policy) if getattr(policy, field.name) != getattr(plain, field.name)]
        raise ConfigError(
            f"objective.policy sets {', '.join(odd)}, which SkyRL computes in another way (its KL is a mean over "
            "micro-batches, its caps and staleness are settings of its own); leave them out, and set SkyRL's "
            "trainer.algorithm.use_kl_loss or off_policy_correction"
        )
    estimator, by_std = _ESTIMATORS[policy.advantage]
    low, high = objective.clip
    settings: dict[str, Any] = {
        "trainer.algorithm.policy_loss_type": PREFIX + _POLICY_LOSSES[policy.loss],
        "trainer.algorithm.loss_reduction": REDUCTIONS[objective.policy_normalizer],
        "trainer.algorithm.advantage_estimator": estimator,
        "trainer.algorithm.grpo_norm_by_std": by_std,
        "trainer.algorithm.eps_clip_low": low,
        "trainer.algorithm.eps_clip_high": high,
        "trainer.algorithm.use_kl_loss": False,
    }
    if policy.loss == "cispo":
        settings |= {"trainer.algorithm.cispo.cispo_eps_clip_low": low}
        settings |= {"trainer.algorithm.cispo.cispo_eps_clip_high": high}
    if objective.max_seq_len is not None:
        settings["trainer.algorithm.max_seq_len"] = objective.max_seq_len
    return settings


def check_trainer(trainer_class: type) -> None:
    """Raise ConfigError where SkyRL's trainer lacks a method that the world-model term is built on."""
    missing = [name for name in _METHODS if not callable(getattr(trainer_class, name, None))]
    if missing:
        raise ConfigError(moved(f"its RayPPOTrainer has no {', '.join(missing)}"))


def check_settings(cfg: Any, objective: ObjectiveConfig) -> None:
    """Raise ConfigError for settings of SkyRL, or of the objective, with which the term would not be exact."""
    algorithm: Any = cfg.trainer.algorithm
    if algorithm.policy_loss_type not in {PREFIX + name for name in LOSSES}:
        raise ConfigError(
            f"trainer.algorithm.policy_loss_type={algorithm.policy_loss_type!r} has no world-model term; use one of "
            f"{', '.join(PREFIX + name for name in LOSSES)}"
        )
    if algorithm.advantage_estimator not in GROUP_ESTIMATORS:
        raise ConfigError(
            f"trainer.algorithm.advantage_estimator={algorithm.advantage_estimator!r} would count a rollout that broke "
            f"as one of reward 0; use one of {', '.join(GROUP_ESTIMATORS)}"
        )
    if algorithm.dynamic_sampling.type is not None:
        raise ConfigError(
            f"trainer.algorithm.dynamic_sampling.type={algorithm.dynamic_sampling.type!r} throws away groups of equal "
            "rewards with all their observations, which the world-model term learns from; use null"
        )
    if algorithm.advantage_batch_normalize and cfg.generator.step_wise_trajectories:
        raise ConfigError(
            "trainer.algorithm.advantage_batch_normalize with generator.step_wise_trajectories takes its mean over "
            "rows, of which one rollout has several; use one of the two"
        )
    if set_ones := [name for name in _OF_ITS_GENERATOR if getattr(cfg.generator, name)]:
        raise ConfigError(
            f"generator.{', generator.'.join(set_ones)}: only SkyRL's own generator reads these settings, and "
            "Backtalk's rollouts would not follow them; leave them out"
        )
    _check_objective(objective, float(algorithm.temperature))


def check_token_roles(cfg: Any, objective: ObjectiveConfig) -> None:
    """Raise ConfigError for settings that need more of a generator than the roles of its tokens."""
    if cfg.generator.step_wise_trajectories:
        raise ConfigError(
            "generator.step_wise_trajectories with token_roles: a row of SkyRL's has an action alone, and its "
            "observation is in the next row's prompt, which is not scored; use false, or Backtalk's RolloutGenerator"
        )
    if set_ones := objective.world.changed(_OF_A_GROUP):
        raise ConfigError(
            f"world options {', '.join(set_ones)} need the turns and rewards of a group, which token_roles have not; "
            "leave them at their defaults, or use Backtalk's RolloutGenerator"
        )


def check_sampling(cfg: Any, max_tokens: int) -> None:
    """Raise ConfigError for settings of SkyRL's inference with which Backtalk's rollouts would not be exact."""
    sampling, engine = cfg.generator.sampling_params, cfg.generator.inference_engine
    if sampling.logprobs is None:
        raise ConfigError(
            "generator.sampling_params.logprobs=null: rollouts keep the log-probability of each token; use 1"
        )
    if sampling.stop or cfg.generator.eval_sampling_params.stop:
        raise ConfigError(
            f"generator.sampling_params.stop={sampling.stop} cuts an action within its tokens; leave it out: an action "
            "ends at the stop tokens of the chat template"
        )
    cut = {"top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
    changed = {name: getattr(sampling, name) for name, whole in cut.items() if getattr(sampling, name) != whole}
    if changed:
        raise ConfigError(
            f"generator.sampling_params has {changed}, so the sampler's distribution is not the one that is trained; "
            f"use {', '.join(f'{name}={cut[name]}' for name in changed)}"
        )
    if engine.enable_return_routed_experts or engine.enable_return_sample_support_set:
        raise ConfigError(
            "generator.inference_engine.enable_return_routed_experts and enable_return_sample_support_set record more "
            "than tokens, and Backtalk's rollouts keep tokens alone; use false"
        )
    longest = (engine.engine_init_kwargs or {}).get("max_model_len")
    if longest is not None and longest < max_tokens:
        raise ConfigError(
            f"rollout.max_tokens={max_tokens} is more than generator.inference_engine.engine_init_kwargs.max_model_len="
            f"{longest}, so the longest rollouts would fail; raise the one or lower the other"
        )


def _check_objective(objective: ObjectiveConfig, temperature: float) -> None:
    if isinstance(objective.world_model_coeff, Share):
        raise ConfigError(
            "world_model_coeff as a share of the gradient needs both terms' gradients, and SkyRL has their sum alone; "
            "use a number or a schedule"
        )
    if temperature != 1.0 and objective.world.temperature == "one":
        raise ConfigError(
            f"SkyRL scores every token at temperature={temperature:g}, and the world-model term is at 1; use "
            "generator.sampling_params.temperature=1.0, or world=WorldOptions(temperature='sampling')"
        )
    if set_ones := objective.world.changed(_OF_THE_ENGINE):
        raise ConfigError(
            f"world options {', '.join(set_ones)} cannot be kept in SkyRL's step; leave them at their defaults, or use "
            "Backtalk's own engine"
        )
