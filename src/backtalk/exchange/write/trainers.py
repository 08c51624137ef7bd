"""Write what other trainers of observation tokens need: prime-rl's TOML, verl's rows and settings.

Their coefficient is translated so that the world-model term presses as hard on the policy term as ours does
(docs/coefficients.md). Written against prime-rl 0.9 and the ``echo`` recipe of verl-recipe (August 2026).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from backtalk.errors import ConfigError, DataError
from backtalk.exchange.write.pressure import Reduction, pressure, rows_of
from backtalk.exchange.write.turns import rollout_name
from backtalk.objective.config import ObjectiveConfig, WorldOptions
from backtalk.objective.roles import WorldLossTarget, is_target
from backtalk.trajectory import Segment, Trajectory

_SAFE_OPTIONS = ("temperature", "zero_advantage_steps", "on_trouble")  # these select no tokens


def translate_coefficient(trajectories: Sequence[Trajectory], config: ObjectiveConfig, theirs: Reduction) -> float:
    """Return the coefficient with which another library's world-model term presses as hard as ours on these rollouts.

    Raises:
        ConfigError: a coefficient that changes over the run, a selection of tokens that others do not know, or a policy
            term that is off.
    """
    coeff = config.world_model_coeff
    if not isinstance(coeff, int | float):
        raise ConfigError(
            "other trainers take one coefficient, and world_model_coeff is a schedule or a share; give the number to "
            "translate, for example --set objective.world_model_coeff=0.05 (metrics.jsonl has the one of each step)"
        )
    default = WorldOptions()
    changed = [
        f"world.{f.name}"
        for f in fields(WorldOptions)
        if f.name not in _SAFE_OPTIONS and getattr(config.world, f.name) != getattr(default, f.name)
    ]
    if changed:
        raise ConfigError(
            f"other trainers do not know {['world.' + name for name in changed]}; set them to the default"
        )
    if config.policy_coeff == 0:
        raise ConfigError("other trainers cannot switch the policy term off; use objective.policy_coeff above 0")
    ours = Reduction(policy=config.policy_normalizer, world=config.world_normalizer)
    target, advantage = config.world_loss_target, config.policy.advantage
    own = pressure(rows_of(trajectories, target, advantage), ours, config.max_seq_len)
    other = pressure(rows_of(trajectories, target, theirs.advantage), theirs, config.max_seq_len)
    if coeff and not other:
        raise ConfigError(f"these rollouts have no token of world_loss_target={target!r}, so nothing can be compared")
    return coeff / config.policy_coeff * own / other if coeff else 0.0


def to_prime_rl(trajectories: Sequence[Trajectory], config: ObjectiveConfig) -> str:
    """Return prime-rl's ``[orchestrator.train.algo]`` as TOML, one role table for each chat role of observations.

    Raises:
        ConfigError: see ``translate_coefficient``; or a target that prime-rl, which takes whole bodies, cannot learn.
    """
    if config.world_loss_target not in ("env_only", "warning_plus_env"):
        raise ConfigError(
            f"prime-rl learns whole bodies of messages, and not world_loss_target={config.world_loss_target!r}; "
            "use env_only or warning_plus_env"
        )
    theirs = Reduction(policy="token_mean", world="token_mean", advantage="dr_grpo")
    alpha = translate_coefficient(trajectories, config, theirs)
    lines = [
        f"# As hard as Backtalk's world_model_coeff {config.world_model_coeff:g} on {len(trajectories)} rollouts, "
        f"with {config.world_normalizer} and, of the policy term, {config.policy_normalizer}.",
        "# Not in here: the policy term (prime-rl's own), warnings (learned with the body they are in), and the",
        "# temperature of the cross-entropy (prime-rl's is that of sampling).",
        "[orchestrator.train.algo]",
        f'type = "{"echo" if alpha else "grpo"}"',
    ]
    roles = sorted({role for trajectory in trajectories for role in _observation_roles(trajectory)}) or ["tool"]
    for role in roles if alpha else ():
        lines += ["", f"[orchestrator.train.algo.roles.{role}]", f"alpha = {alpha:.6g}"]
    return "".join(f"{line}\n" for line in lines)


def verl_settings(trajectories: Sequence[Trajectory], config: ObjectiveConfig) -> list[str]:
    """Return the settings of verl's ``echo`` recipe, as arguments of its command.

    Raises:
        ConfigError: see ``translate_coefficient``; or a policy term that verl reduces in another way.
    """
    if config.policy_normalizer == "fixed_length":
        raise ConfigError("verl divides by another length than policy_normalizer=fixed_length; use token_mean")
    by_row = config.policy_normalizer == "sequence_mean"
    world = "sequence_mean_selected" if by_row else "action_tokens"
    theirs = Reduction(policy=config.policy_normalizer, world=world, advantage=config.policy.advantage)
    coeff = translate_coefficient(trajectories, config, theirs)
    advantage = config.policy.advantage
    low, high = config.clip
    return [
        f"algorithm.adv_estimator={'rloo' if advantage == 'rloo' else 'grpo'}",
        f"algorithm.norm_adv_by_std_in_grpo={advantage == 'grpo'}",
        f"actor_rollout_ref.actor.clip_ratio_low={low:g}",
        f"actor_rollout_ref.actor.clip_ratio_high={high:g}",
        f"actor_rollout_ref.actor.loss_agg_mode={'seq-mean-token-mean' if by_row else 'token-mean'}",
        f"+actor_rollout_ref.echo_aux_token_loss_coeff={coeff:.6g}",
    ]


def to_verl(trajectory: Trajectory, target: WorldLossTarget) -> list[dict[str, Any]]:
    """Return a rollout as rows of an agent loop's output, with ``aux_token_loss_mask``; one for each branch.

    A response begins with the first token after the prompt. Where a token was not sampled its logprob is 0.0, as verl
    fills it; ``response_mask`` is 0 there.

    Raises:
        DataError: it has no reward, which verl would take for 0; or a branch has nothing but a prompt.
    """
    if trajectory.reward is None:
        raise DataError(f"{rollout_name(trajectory)} has no reward, and verl would learn from it as from a reward of 0")
    return [_verl_row(trajectory, branch, target) for branch in trajectory.branches]


def _verl_row(trajectory: Trajectory, branch: Sequence[Segment], target: WorldLossTarget) -> dict[str, Any]:
    first = next((n for n, s in enumerate(branch) if s.turn is not None), len(branch))
    prompt, response = branch[:first], branch[first:]
    if not prompt or not response:
        raise DataError(f"{rollout_name(trajectory)} has a history without a prompt, or with nothing else")

    def column(value: Any) -> list[Any]:
        return [value(segment) for segment in response for _ in segment.token_ids]

    return {
        "prompt_ids": [token for segment in prompt for token in segment.token_ids],
        "response_ids": [token for segment in response for token in segment.token_ids],
        "response_mask": column(lambda s: int(s.is_sampled)),
        "aux_token_loss_mask": column(lambda s: int(is_target(s.role, s.turn, target))),
        "response_logprobs": [x for s in response for x in (s.logprobs or (0.0,) * len(s))],
        "reward_score": trajectory.reward,
        "num_turns": trajectory.num_turns,
        "extra_fields": {"rollout": rollout_name(trajectory), "branch": branch[0].branch},
    }


def _observation_roles(trajectory: Trajectory) -> set[str]:
    """Return the chat roles of messages that answer an action."""
    roles = [str(message.get("role")) for message in trajectory.messages]
    begin = roles.index("assistant") if "assistant" in roles else len(roles)
    return {role for role in roles[begin:] if role != "assistant"}
