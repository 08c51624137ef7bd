"""What a train step reports about its tokens, beside the losses. Sums, so that micro-batches add.

B sequences, T tokens. *_BT is [B, T], *_B is [B].
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from backtalk.objective import ObjectiveConfig, policy_weights, world_weights
from backtalk.samples import Batch, TokenCounts, is_action
from backtalk.trajectory import TokenRole


def token_sums(logprobs_BT: Tensor, batch: Batch, counts: TokenCounts, config: ObjectiveConfig) -> dict[str, Tensor]:
    """Sums over the tokens of one micro-batch; ``logprobs_BT`` without a graph, in nats.

    ``*_pull`` is the L1 norm of d(term)/d(logprobs): how hard a term pulls, before its coefficient.
    """
    p_BT = policy_weights(batch, counts, config, logprobs_BT.dtype)
    w_BT = world_weights(batch, counts, config, logprobs_BT.dtype)
    trained_BT = p_BT > 0
    old_BT = batch.sampling_logprobs_BT.to(logprobs_BT.dtype)
    ratio_BT = (logprobs_BT - old_BT).masked_fill(~trained_BT, 0.0).exp()
    adv_BT = batch.advantages_B[:, None].to(p_BT.dtype).expand_as(p_BT)
    clipped_BT = ((ratio_BT > 1 + config.eps_high) & (adv_BT > 0)) | ((ratio_BT < 1 - config.eps_low) & (adv_BT < 0))

    def nll(selected_BT: Tensor) -> Tensor:
        return -logprobs_BT.masked_fill(~selected_BT, 0.0).sum()

    return {
        "ratio": (ratio_BT * trained_BT).sum(),
        "clipped": (clipped_BT & trained_BT).sum(),
        "action_nll": nll(is_action(batch.roles_BT)),
        "env_output_nll": nll(batch.roles_BT == TokenRole.ENV_OUTPUT),
        "warning_nll": nll(batch.roles_BT == TokenRole.WARNING),
        "target_nll": nll(w_BT > 0),
        "policy_weight": p_BT.sum(),
        "world_weight": w_BT.sum(),
        "policy_pull": (p_BT * adv_BT.abs() * ratio_BT * ~clipped_BT).sum(),
        "world_pull": w_BT.sum(),
    }


def sampler_gap(logprobs_BT: Tensor, batch: Batch) -> Tensor:
    """Largest disagreement between trainer and sampler on an action token, in nats; scalar."""
    gap_BT = (logprobs_BT - batch.sampling_logprobs_BT.to(logprobs_BT.dtype)).abs()
    return gap_BT.masked_fill(~is_action(batch.roles_BT), 0.0).amax()


def token_metrics(sums: Mapping[str, float], counts: TokenCounts, config: ObjectiveConfig) -> dict[str, float]:
    """The step's token metrics from its sums. A mean over no token is NaN: there was nothing to measure."""
    policy_weight = config.policy_coeff * _mean(sums["policy_weight"], counts.policy_tokens)
    world_weight = config.world_model_coeff * _mean(sums["world_weight"], counts.target_tokens)
    policy_pull = config.policy_coeff * sums["policy_pull"]
    world_pull = config.world_model_coeff * sums["world_pull"]
    return {
        "world_ce": _mean(sums["target_nll"], counts.target_tokens),
        "env_output_ce": _mean(sums["env_output_nll"], counts.env_output_tokens),
        "warning_ce": _mean(sums["warning_nll"], counts.warning_tokens),
        "entropy": _mean(sums["action_nll"], counts.action_tokens),
        "ratio_mean": _mean(sums["ratio"], counts.policy_tokens),
        "clip_fraction": _mean(sums["clipped"], counts.policy_tokens),
        "effective_obs_weight": world_weight / policy_weight if policy_weight else math.nan,
        "world_pull_share": world_pull / (world_pull + policy_pull) if world_pull + policy_pull else math.nan,
        "sequences": float(counts.sequences),
        "rewarded_sequences": float(counts.rewarded_sequences),
        "action_tokens": float(counts.action_tokens),
        "env_output_tokens": float(counts.env_output_tokens),
        "warning_tokens": float(counts.warning_tokens),
        "target_tokens": float(counts.target_tokens),
    }


def _mean(total: float, count: int) -> float:
    return total / count if count else math.nan
